"""`attnc.emit`: the source of a stand-alone module, printed for a target; and what the printers say they do not lower."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnc import ir
from attnc.arguments import GridLike, PadLike
from attnc.compiler import compile
from attnc.errors import DeclarationError, ShapeError, UnsupportedError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx1100", "cpu")
DTYPES = ("float32", "float16", "bfloat16")


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
        p: a pattern, or a mechanism of one channel attention.
        grid, kv_grid, prefix, pad: as for `attnc.compile`; a pattern's lengths are all known.
        heads, head_dim, value_dim: of the tensors the module is made for; value_dim defaults to head_dim.
        dtype: float32, float16 or bfloat16 (float64 for cpu), as a string or a torch dtype.
        target: one of `TARGETS`: Triton for cuda and hip, C++ for cpu.

    Raises:
        UnsupportedError: the target is unknown, or its printer does not lower the statement.
        ShapeError: a length of the grid is open.
    """
    name = getattr(p, "name", type(p).__name__)
    if target not in TARGETS:
        raise UnsupportedError(f"{name}: target={target!r} is unknown; there are {', '.join(TARGETS)}")
    text = str(dtype).removeprefix("torch.")
    known = (*DTYPES, "float64") if target == "cpu" else DTYPES
    if text not in known:
        raise UnsupportedError(f"{name}: dtype={text!r} for the target {target}; it takes {', '.join(known)}")
    for what, n in (("heads", heads), ("head_dim", head_dim), ("value_dim", value_dim or head_dim)):
        if not isinstance(n, int) or n < 1:
            raise DeclarationError(f"{name}: {what}={n!r}: a positive int")
    values = value_dim or head_dim
    q_grid: tuple[int, ...] = (1,)
    k_grid: tuple[int, ...] = (1,)
    if isinstance(p, Mechanism):
        program = _channel(p)
    else:
        op = compile(p, grid=grid, kv_grid=kv_grid, prefix=prefix, pad=pad, heads=heads)
        if op.axes is None or op.grid is None or None in (*op.grid, *(op.kv_grid or ())):
            raise ShapeError(f"{name}: emit needs a grid with known lengths, not grid={grid!r}, kv_grid={kv_grid!r}")
        program = op.program(len(op.axes))
        q_grid = tuple(int(n) for n in op.grid if n is not None)
        k_grid = q_grid if op.kv_grid is None else tuple(int(n) for n in op.kv_grid if n is not None)
    if target == "cpu":
        from attnc.codegen.cpp_module import emit_cpu

        return emit_cpu(program, grid=q_grid, kv_grid=k_grid, heads=heads, head_dim=head_dim, value_dim=values, dtype=text)
    from attnc.codegen.triton import emit_triton

    sizes = {"heads": heads, "head_dim": head_dim, "value_dim": values}
    return emit_triton(program, q_grid, k_grid, **sizes, dtype=text, target=target)


def _channel(m: Mechanism) -> ir.Program:
    """The program of a mechanism that is one channel attention of q, k and v."""
    graph = m.trace()
    if [inputs for _, inputs in graph.steps] != [(0, 1, 2)] or graph.result != 3:
        raise UnsupportedError(f"mechanism {m.name}: emit prints patterns and a single channel attention; use attnc.compile")
    return ir.Program(graph.steps[0][0], ir.Tokens((None,)), ir.Tokens((None,)))


def refusals(program: ir.Program) -> list[str]:
    """What the printers do not lower of a program, a line for each that refuses; nothing is printed or built."""
    from attnc.codegen import around, cpp, triton_plan

    program = around.core_program(program)
    asked: tuple[Callable[[], None], ...] = (
        lambda: triton_plan.check(program),
        lambda: cpp.refuse(cpp.Spec(program, 32, 32, "float32")),
    )
    said = []
    for ask in asked:
        try:
            ask()
        except UnsupportedError as e:
            said.append(str(e))
    return said
