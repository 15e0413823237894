"""attnc: declare which token may attend to which; get a fused, differentiable operator.

    import attnc

    @attnc.pattern
    def window(q, k, *, size):
        return (q.y // size == k.y // size) & (q.x // size == k.x // size)

    op = attnc.compile(window(size=7), grid=(56, 56))
    out = op(q, k, v)                                    # [B, H, 3136, D] each

The compiler (sympy, networkx), Triton and the C++ toolchain load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnc import models, patterns
from attnc.errors import AttncError, BuildError, CacheError, DeclarationError, ShapeError, UnsupportedError
from attnc.lang.functions import (
    BATCH,
    HEAD,
    SCORE,
    clamp,
    exp,
    l2norm,
    log,
    relu,
    rotary,
    sigmoid,
    softmax,
    sqrt,
    tanh,
    where,
)
from attnc.lang.functions import maximum as max
from attnc.lang.functions import minimum as min
from attnc.lang.mechanism import Mechanism, channel_attend, mechanism
from attnc.lang.pattern import Pattern, pattern
from attnc.lang.symbols import Table

if TYPE_CHECKING:
    from attnc import compat
    from attnc.compiler import Operator, compile, reference
    from attnc.models.accelerate import accelerate
    from attnc.report.draw import draw
    from attnc.report.emit import emit
    from attnc.report.explain import explain
    from attnc.report.inspect import inspect
    from attnc.report.mask import mask
    from attnc.tuning import Shape, Tuning, export_winners, import_winners, tune

__version__ = "0.1.0"
_LAZY = {
    **dict.fromkeys(("compile", "reference", "Operator"), "attnc.compiler"),
    **dict.fromkeys(("Shape", "Tuning", "export_winners", "import_winners", "tune"), "attnc.tuning"),
    "accelerate": "attnc.models.accelerate",
    **{name: f"attnc.report.{name}" for name in ("explain", "draw", "emit", "inspect", "mask")},
}
__all__ = [
    "BATCH",
    "HEAD",
    "SCORE",
    "AttncError",
    "BuildError",
    "CacheError",
    "DeclarationError",
    "Mechanism",
    "Operator",
    "Pattern",
    "Shape",
    "ShapeError",
    "Table",
    "Tuning",
    "UnsupportedError",
    "accelerate",
    "channel_attend",
    "clamp",
    "compat",
    "compile",
    "draw",
    "emit",
    "exp",
    "explain",
    "export_winners",
    "import_winners",
    "inspect",
    "l2norm",
    "log",
    "mask",
    "max",
    "mechanism",
    "min",
    "models",
    "pattern",
    "patterns",
    "reference",
    "relu",
    "rotary",
    "sigmoid",
    "softmax",
    "sqrt",
    "tanh",
    "tune",
    "where",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value  # a submodule of the same name must not shadow the function
        return value
    if name == "compat":
        return importlib.import_module("attnc.compat")
    raise AttributeError(f"module 'attnc' has no attribute {name!r}")


models.timm_bridge.install()  # at the end: where timm is loaded already, it imports the papers, which read this module
