"""`attnc.emit`: the source of a stand-alone module, printed for a target."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from attnc import ir
from attnc.compiler import GridLike, PadLike, compile
from attnc.errors import DeclarationError, ShapeError, UnsupportedError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx1100", "cpu")
DTYPES = ("float32", "float16", "bfloat16", "float64")


def emit(
    p: Pattern | Mechanism,
    *,
    grid: GridLike = None,
    kv_grid: GridLike = None,
    prefix: int = 0,
    pad: PadLike = None,
    heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: str | torch.dtype = "float16",
    target: str = "cuda:90",
) -> str:
    """The source of a Python module with `attention(q, k, v, *, scale=None, **tables)`, differentiable, that imports no attnc.

    Args:
        p: a pattern.
        grid, kv_grid, prefix, pad: as for `attnc.compile`.
        heads, head_dim, value_dim: of the tensors the module is tuned for; value_dim defaults to head_dim.
        dtype: float32, float16 or bfloat16 (float64 on a CPU), as a string or a torch dtype.
        target: one of `TARGETS`: Triton for cuda and hip, C++ for cpu.

    Raises:
        UnsupportedError: the target is unknown, or its printer does not lower the statement.
    """
    name = getattr(p, "name", type(p).__name__)
    if target not in TARGETS:
        raise UnsupportedError(f"{name}: target={target!r} is unknown; there are {', '.join(TARGETS)}")
    text = str(dtype).removeprefix("torch.")
    if text not in DTYPES or (text == "float64" and target != "cpu"):
        known = ", ".join(DTYPES if target == "cpu" else DTYPES[:3])
        raise UnsupportedError(f"{name}: dtype={text!r} for the target {target}; it takes {known}")
    if isinstance(p, Mechanism):
        raise UnsupportedError(f"mechanism {name}: emit prints patterns; a mechanism runs through attnc.compile")
    op = compile(p, grid=grid, kv_grid=kv_grid, prefix=prefix, pad=pad, heads=heads)
    if op.axes is None or op.grid is None:
        raise ShapeError(f"{name}: emit needs grid=, with None where a length may vary: grid=(None, None)")
    for what, n in (("heads", heads), ("head_dim", head_dim), ("value_dim", value_dim or head_dim)):
        if not isinstance(n, int) or n < 1:
            raise DeclarationError(f"{name}: {what}={n!r}: a positive int")
    program = op.program(len(op.axes))
    q_grid = op.grid
    k_grid = q_grid if op.kv_grid is None else op.kv_grid
    shape = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim or head_dim, "dtype": text}
    printer = _printer("cpu" if target == "cpu" else "triton", name, target)
    source: str = printer(program, q_grid, k_grid, **shape, **({} if target == "cpu" else {"target": target}))
    return source


PRINTERS = {"triton": ("attnc.codegen.triton", "emit_triton"), "cpu": ("attnc.codegen.cpp", "emit_cpu")}


def _printer(kind: str, name: str, target: str) -> Any:
    module, function = PRINTERS[kind]
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as e:
        raise UnsupportedError(f"{name}: the printer for {target} cannot be loaded: {e}") from e


CHECKS = {"triton": "attnc.codegen.triton_plan", "cpp": "attnc.codegen.cpp"}


def refusals(program: ir.Program) -> list[str]:
    """What the printers say they do not lower of a program, one line each; nothing is printed or built."""
    said = []
    for module in CHECKS.values():
        try:
            check = getattr(importlib.import_module(module), "check", None)
        except ImportError:
            continue
        if check is None:
            continue
        try:
            check(program)
        except UnsupportedError as e:
            said.append(str(e))
    return said
