"""Walking through a model, and turning its modules into what computes the same by attnc."""

from __future__ import annotations

import importlib
import re
from typing import Any, ClassVar, TypeVar, cast

from torch import nn

from attnc.compiler import Operator
from attnc.errors import AttncError, DeclarationError
from attnc.models.accelerate.report import Report, Row
from attnc.models.blocks.linear import Linear

PACKAGE = __name__.rpartition(".")[0]
FAMILIES = {  # where classes are defined: the file of this folder that knows them
    "timm.layers.attention": "timm_vit",
    "timm.layers.mlp": "timm_mlp",
    "timm.models.convit": "timm_convit",
    "timm.models.crossvit": "timm_crossvit",
    "timm.models.davit": "timm_davit",
    "timm.models.efficientvit_msra": "timm_efficientvit_msra",
    "timm.models.gcvit": "timm_gcvit",
    "timm.models.maxxvit": "timm_maxvit",
    "timm.models.shvit": "timm_shvit",
    "timm.models.swin_transformer": "timm_swin",
    "timm.models.swin_transformer_v2": "timm_swin",
    "timm.models.tnt": "timm_tnt",
    "timm.models.vision_transformer": "timm_vit",
    "timm.models.volo": "timm_volo",
    "torchvision.models.swin_transformer": "torchvision_swin",
    "torchvision.ops.misc": "torchvision_mlp",
}
ATTENTION = re.compile("Attention|Attn|MHSA|SHSA|GPSA")  # in the names of classes that compute attention
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Accelerated:
    """What a module becomes: a mixin before the module's own class, whose methods it overrides.

    covers: submodules that are not called any more, because an operator does their work. counted: the report's field that counts
    it, where it computes no attention and has no row.
    """

    covers: ClassVar[tuple[str, ...]] = ()
    counted: ClassVar[str] = ""
    attnc_backend: str

    def refuse(self) -> str:
        """Why this module stays as it is (asked of the original); nothing where nothing speaks against it."""
        return ""

    def build(self) -> tuple[Operator, ...]:
        """Make the operators from the module's settings, keep them as attributes, and return them."""
        raise NotImplementedError

    def remark(self) -> str:
        """In which calls the original's code runs."""
        return ""


_replacements: dict[type, type[Accelerated]] = {}
Class = TypeVar("Class", bound=type[Accelerated])
Model = TypeVar("Model", bound=nn.Module)


def replaces(original: type) -> Any:
    """Register the decorated subclass of `original` (and of `Accelerated`) as what its instances become."""

    def register(cls: Class) -> Class:
        _replacements[original] = cls
        return cls

    return register


def drops(drop: Any) -> bool:
    """Whether this dropout of attention weights does something now, which no operator does."""
    return bool(drop.training and drop.p > 0)


def dropout_remark(p: float) -> str:
    """For `Accelerated.remark`."""
    return f"the original where attention weights are dropped (p = {p:g}, in training)" if p else ""


def accelerate(model: Model, *, backend: str = "auto") -> tuple[Model, Report]:
    """Let attnc compute the attention modules that it knows, in place: same weights, same outputs, gradients as before.

    Linear layers become `attnc.models.blocks.linear.Linear`, which take the faster library where there are two, and feed-forward
    layers of timm and torchvision ones whose GELU is part of the product before it.

    Args:
        model: of timm (davit, maxvit, gcvit, crossvit, convit, volo, efficientvit_msra, shvit, tnt, swin, swinv2, vit and
            deit) or torchvision (swin, swin v2), or anything that contains such modules.
        backend: of the operators, see `attnc.compile`.

    Returns:
        The model itself, and a report of every attention module in it: what computes it now, or why it was left alone.
        Parameters and buffers stay the same objects under the same names, so checkpoints and optimizers go on working.

    Raises:
        DeclarationError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise DeclarationError(f"accelerate: the model is a {type(model).__name__}, not a torch.nn.Module")
    report = Report(_name(type(model)).rpartition(".")[2])
    covered: set[nn.Module] = set()
    for path, module in list(model.named_modules()):
        cls = type(module)
        if cls in (nn.Linear, Linear):
            module.__class__ = Linear
            report.linear += 1
        if module in covered or (cls.__module__.startswith("attnc.") and not issubclass(cls, Accelerated)):
            continue
        kind = _name(cls)
        known = next((b for b in cls.__mro__ if _replacement(b) is not None), None)
        replacement = None if known is None else _replacement(known)
        if replacement is not None and replacement.counted:
            if known is cls and not _swap(path, kind, module, replacement, backend).reason:
                setattr(report, replacement.counted, getattr(report, replacement.counted) + 1)
        elif replacement is not None:
            if known is cls:
                report.rows.append(_swap(path, kind, module, replacement, backend))
            else:
                report.rows.append(Row(path, kind, reason=f"it is a subclass of {_name(replacement)}, whose code may differ"))
            covered.update(s for name in replacement.covers for s in module.get_submodule(name).modules())
        elif ATTENTION.search(cls.__name__) and _leaf(module):
            report.rows.append(Row(path, kind, reason="no replacement is known for this class"))
    return model, report


def _swap(path: str, kind: str, module: nn.Module, replacement: type[Accelerated], backend: str) -> Row:
    """Turn the module into its replacement; the row says how, or why not."""
    original, changed = type(module), cast(Any, module)
    reason = replacement.refuse(changed)
    for name in replacement.covers:
        hooked = any(getattr(m, hooks) for m in module.get_submodule(name).modules() for hooks in HOOKS)
        if hooked and not reason:
            reason = f"{name} has hooks, which would not be called any more: remove them first"
    if reason:
        return Row(path, kind, reason=reason)
    changed.__class__, changed.attnc_backend = replacement, backend
    try:
        operators = changed.build()
    except AttncError as error:
        changed.__class__ = original
        return Row(path, kind, reason=str(error))
    return Row(path, kind, tuple(dict.fromkeys(o.source.name for o in operators)), changed.remark())


def _replacement(cls: type) -> type[Accelerated] | None:
    """What instances of exactly this class become."""
    if issubclass(cls, Accelerated):
        return cls
    family = FAMILIES.get(cls.__module__)
    if family is not None:
        importlib.import_module(f"{PACKAGE}.{family}")
    return _replacements.get(cls)


def _leaf(module: nn.Module) -> bool:
    """Whether no attention is inside of this module."""
    inner = [type(m) for m in module.modules() if m is not module]
    known = (_replacement(cls) for cls in inner)
    return not any(ATTENTION.search(cls.__name__) for cls in inner) and not any(r is not None and not r.counted for r in known)


def _name(cls: type) -> str:
    """The class that a user knows: of a replacement, the one it replaces."""
    if issubclass(cls, Accelerated):
        cls = next(original for original, replacement in _replacements.items() if replacement is cls)
    return f"{cls.__module__}.{cls.__qualname__}"
