"""The relation as a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.arguments import GridLike
from attnc.compiler import compile
from attnc.errors import ShapeError, UnsupportedError
from attnc.lang.pattern import Pattern


def mask(p: Pattern, *, grid: GridLike, kv_grid: GridLike = None, heads: int = 1) -> Tensor:
    """bool [heads, Nq, Nk]: the relation on a grid, for looking at and for tests (N x N on purpose)."""
    op = compile(p, grid=grid, kv_grid=kv_grid, heads=heads)
    if not op.grid or None in op.grid:
        raise ShapeError(f"{p.name}: mask needs a grid with known lengths, not {grid!r}")
    q_grid = tuple(n for n in op.grid if n is not None)
    k_grid = q_grid if op.kv_grid is None else tuple(n for n in op.kv_grid if n is not None)
    attend = op.program(len(q_grid)).attend
    assert isinstance(attend, ir.Attend)
    reads = tuple(dict.fromkeys(n.args[0] for n in ir.walk(attend.relation) if n.op == "load"))
    if reads:
        raise UnsupportedError(f"{p.name}: the relation reads the runtime tables {reads}; it has no mask without them")
    leaves: dict[ir.Expr, Any] = {ir.HEAD: torch.arange(heads)[:, None, None], ir.HEADS: heads}
    points = {"q": (q_grid, (slice(None), None)), "k": (k_grid, (None, slice(None)))}
    for role, (sizes, view) in points.items():
        coords = torch.meshgrid(*[torch.arange(n) for n in sizes], indexing="ij")
        for i, c in enumerate(coords):
            leaves[ir.coord(role, i)] = c.flatten()[view]  # type: ignore[arg-type]
            leaves[ir.size(role, i)] = sizes[i]  # type: ignore[arg-type]
    relation = ir.flatten_index(attend.relation, len(q_grid), op.same_grid)
    found = torch.as_tensor(evaluate(relation, leaves, torch))
    n_q, n_k = (int(torch.tensor(g).prod()) for g in (q_grid, k_grid))
    return found.expand(heads, n_q, n_k).clone()
