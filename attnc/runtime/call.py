"""What a backend is handed for one call, and the views and allocations that all backends share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnc import ir
from attnc.codegen.cpp_host import outermost_first, strides_in_order
from attnc.schedule.geometry import Geometry
from attnc.schedule.list_choice import LARGEST_TABLE, LEAST_WITH_TABLES, Known


@dataclass(eq=False)
class Call:
    """One call of a statement at concrete sizes.

    Tensors: q [B, Hq, N, D] or [B, Hq, *grid, D], k and v alike with Hkv heads (Hq % Hkv == 0), any strides.
    tables: the statement's runtime tables by name (any strides; a dimension of length 1 broadcasts), and `pad_k` [Hkv or 1, D],
    `pad_v` [Hkv or 1, Dv] where the geometry has virtual keys. scale multiplies q . k and is the meaning of SCORE with it.

    A backend module has
        forward(call, q, k, v) -> (out, lse)
        backward(call, q, k, v, out, lse, grad_out, grad_lse) -> (dq, dk, dv, {table: gradient})
    where lse is float32 [B, Hq, N] (float64 for float64 inputs): natural log of the sum of exp of the scores, -inf for a row
    without keys (its output row and gradients are zero). grad_lse may be None. Gradients of tables have the tables' shapes.

    part: one of several calls that share their queries (a union); its backward gets the out and lse of all of them together.
    into: tensors that a forward may write out and lse into, a backward dq, dk and dv, and return as such.
    continues: `into` holds the out and lse of the part's earlier calls, and a forward goes on from there; or gradients of earlier
    calls, to which a backward adds dq (1), dk and dv (2), in the dtypes of the backend's CONTINUES.
    kept: what a backend keeps for all calls of this statement at these sizes (and batch and heads), by keys of its own.
    choice: how it runs, one of the backend's candidates; None leaves it to the backend.
    """

    program: ir.Program
    geometry: Geometry
    scale: float
    tables: dict[str, Tensor]
    part: bool = False
    into: tuple[Tensor, ...] | None = None
    continues: int = 0
    choice: Any = None
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def attend(self) -> ir.Attend:
        """The statement."""
        assert isinstance(self.program.attend, ir.Attend)
        return self.program.attend


def known_tables(call: Call) -> Known:
    """The integer tables of the predicate that no axis expresses, with their contents, where reading them waits for no device and
    there are pairs enough that lists of blocks made of them may pay."""
    if call.geometry.n_queries * call.geometry.n_keys < LEAST_WITH_TABLES:
        return ()
    read = dict.fromkeys(n.args[0] for n in ir.walk(call.geometry.structure.residual) if n.op == "load")
    found = []
    for name in read:
        t = call.tables[name]
        if t.is_cpu and not t.is_floating_point() and t.numel() <= LARGEST_TABLE:
            a = t.detach().contiguous().numpy()
            found.append((name, a.dtype.str, tuple(a.shape), a.tobytes()))
    return tuple(found)


@dataclass(frozen=True)
class Strides:
    """Element strides of a token tensor: batch, head, one per grid axis, channel; `grid_start` is where the grid begins."""

    batch: int
    head: int
    axes: tuple[int, ...]
    channel: int
    prefix: int  # from one prefix token to the next
    grid_start: int


def strides(t: Tensor, grid: tuple[int, ...], prefix: int) -> Strides:
    """Strides of [B, H, N, D] or [B, H, *grid, D]."""
    s = t.stride()
    if t.dim() == 4 and (len(grid) != 1 or prefix or t.shape[2] == grid[0]):
        token, axes = s[2], []
        for n in reversed(grid):
            axes.append(token)
            token *= n
        return Strides(s[0], s[1], tuple(reversed(axes)), s[3], s[2], prefix * s[2])
    return Strides(s[0], s[1], tuple(s[2:-1]), s[-1], 0, 0)


def in_order(t: Tensor, gradient: Tensor) -> bool:
    """Whether a tensor of t's shape is laid out as empty_like_order promises."""
    return gradient.stride() == strides_in_order(gradient.shape, t.stride())


def empty_like_order(t: Tensor, channels: int) -> Tensor:
    """A dense tensor with t's shape but for the last dimension, its dimensions laid out in memory in the order of t's strides.

    So an output follows its query's layout ([B, N, H, D] seen as [B, H, N, D] gives the same), and nothing is copied
    afterwards.
    """
    shape, strides = (*t.shape[:-1], channels), t.stride()
    if all(type(n) is int for n in (*shape, *strides)):
        return torch.empty_strided(shape, strides_in_order(shape, strides), dtype=t.dtype, device=t.device)
    order = outermost_first(strides)  # sizes are symbols
    inverse = [order.index(d) for d in range(t.dim())]
    return torch.empty([shape[d] for d in order], dtype=t.dtype, device=t.device).permute(inverse)


def token_count(t: Tensor) -> int:
    """Tokens of [B, H, N, D] or [B, H, *grid, D]."""
    n = 1
    for d in t.shape[2:-1]:
        n *= d
    return n


def lse_like(q: Tensor, rows: Tensor | None = None) -> Tensor:
    """[B, H, N], float32 (float64 for float64), one for each token of q, or of `rows`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty((*q.shape[:2], token_count(q if rows is None else rows)), dtype=dtype, device=q.device)
