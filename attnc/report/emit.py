"""`attnc.emit`: the source of a stand-alone module, printed for a target; and what the printers say they do not lower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attnc import ir
from attnc.analysis.dropout import with_dropout
from attnc.arguments import GridLike, PadLike
from attnc.compiler import compile
from attnc.errors import CacheError, DeclarationError, ShapeError, UnsupportedError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern

if TYPE_CHECKING:
    from attnc.schedule.tiles import Tiles

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
    dropout: bool = False,
) -> str:
    """The source of a Python module with `attention(q, k, v, *, scale=None, **tables)`, differentiable, that imports no attnc.

    Where the cache holds winners of `attnc.tune` for this statement and target, the module carries them (`TUNED`) and runs the
    tiles of those that fit its grid, dtype and head dimensions; else the cost model's.

    Args:
        p: a pattern, or a mechanism of one channel attention.
        grid, kv_grid, prefix, pad: as for `attnc.compile`; a pattern's lengths are all known.
        heads, head_dim, value_dim: of the tensors the module is made for; value_dim defaults to head_dim.
        dtype: float32, float16 or bfloat16 (float64 for cpu), as a string or a torch dtype.
        target: one of `TARGETS`: Triton for cuda and hip, C++ for cpu.
        dropout: its `attention` takes `dropout_p=0.0` and `seed=None`, as an operator does, with the same mask. At p = 0 it gives
            what a module without dropout gives, in the time of one with it.

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
        if dropout:
            raise UnsupportedError(f"mechanism {name}: dropout=True belongs to patterns; drop out the output yourself")
        program = _channel(p)
    else:
        op = compile(p, grid=grid, kv_grid=kv_grid, prefix=prefix, pad=pad, heads=heads)
        if op.axes is None or op.grid is None or None in (*op.grid, *(op.kv_grid or ())):
            raise ShapeError(f"{name}: emit needs a grid with known lengths, not grid={grid!r}, kv_grid={kv_grid!r}")
        program = op.program(len(op.axes))
        program = with_dropout(program) if dropout else program
        q_grid = tuple(int(n) for n in op.grid if n is not None)
        k_grid = q_grid if op.kv_grid is None else tuple(int(n) for n in op.kv_grid if n is not None)
    if target == "cpu":
        from attnc.codegen.cpp_module import emit_cpu

        return emit_cpu(program, grid=q_grid, kv_grid=k_grid, heads=heads, head_dim=head_dim, value_dim=values, dtype=text)
    from attnc.codegen.triton import emit_triton

    sizes = {"heads": heads, "head_dim": head_dim, "value_dim": values}
    chosen, tuned = (
        (None, None) if isinstance(p, Mechanism) else _tuned(program, q_grid, k_grid, **sizes, dtype=text, target=target)
    )
    return emit_triton(program, q_grid, k_grid, **sizes, dtype=text, target=target, chosen=chosen, tuned=tuned)


def _tuned(
    program: ir.Program,
    q_grid: tuple[int, ...],
    k_grid: tuple[int, ...],
    *,
    heads: int,
    head_dim: int,
    value_dim: int,
    dtype: str,
    target: str,
) -> tuple[Tiles | None, dict[str, Any] | None]:
    """What was measured of a statement on a target's devices, and the tiles of those winners that fit: of this dtype, these head
    dimensions and this grid's bucket, with the most (batch, head) pairs. (None, None) where nothing was."""
    from attnc.codegen.around import core_program
    from attnc.runtime import triton_choice, winners
    from attnc.schedule import tiles
    from attnc.schedule.choose import bucket
    from attnc.schedule.cost import Sizes
    from attnc.schedule.geometry import geometry

    core = core_program(program)
    try:
        table = winners.table(core, target)
    except CacheError:  # a module needs no cache to be printed
        return None, None
    if not table["winners"]:
        return None, None
    grids = [[bucket(n) for n in grid] for grid in (q_grid, k_grid)]
    wanted = {"dtype": dtype, "head_dim": head_dim, "value_dim": value_dim}
    mine = [r for r in table["winners"] if all(r[n] == x for n, x in wanted.items())]
    mine = [r for r in mine if [r["bucket"]["grid"], r["bucket"]["kv_grid"]] == grids]
    g, chosen = geometry(core, q_grid, k_grid), dict[str, Any]()
    for r in sorted(mine, key=lambda r: int(r["bucket"]["items"])):
        items, backward = int(r["bucket"]["items"]), r["direction"] == "backward"
        sizes = Sizes(heads, heads, max(1, items // heads), head_dim, value_dim, dtype)
        for _, c in triton_choice.candidates(g, sizes, backward, target, str(r["device"]["name"])):
            if c.data() == r["choice"]:
                chosen |= c.given()
    own = tiles.tiles(g, head_dim, value_dim, sizes.itemsize, target) if mine else None
    return None if own is None else replace(own, **chosen), table


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
