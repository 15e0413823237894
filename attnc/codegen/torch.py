"""The portable backend: the compiler's schedule as composed PyTorch calls over tiles, never N x N. For machines without a
compiler.

Query tiles see the box of keys their interval ends give, or the blocks of it that a list names; tiles of one size run together, a
bounded number at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.codegen import blocks, eager
from attnc.codegen.blocks import Tile
from attnc.runtime.call import Call, known_tables
from attnc.schedule.geometry import Axis, Geometry
from attnc.schedule.list_choice import Limits, Listed, listed

TILE = 64  # queries per tile, about
SCORES = 1 << 22  # score elements (over batch and heads) at a time

LIMITS = Limits(TILE, TILE, partial=1.0, query=4.0, key=4.0)  # every pair is masked, and every row gathered

Span = tuple[int, int, int, int, int]  # residue, first and last + 1 query index, first and last + 1 key index
RawTile = tuple[
    NDArray[np.int64], NDArray[np.int64]
]  # [1 + rank, n], [1 + rank, m]: token numbers and coordinates, no prefix tokens


def spans(axis: Axis, size: int) -> list[Span]:
    """Query intervals of an axis, `size` long or one block where the ends are constant on blocks, and the keys each sees."""
    out = []
    for r in range(axis.classes):
        n = axis.count(axis.queries, r)
        edges = {0, n}
        if axis.block:
            starts = [b for b in range(axis.shift - axis.block, n, axis.block) if b > 0]
            edges |= set(starts)
        borders = sorted(edges)
        for a, b in pairwise(borders):
            parts = -(-(b - a) // max(size, 1))
            cuts = [a + (b - a) * i // parts for i in range(parts + 1)]
            for c, d in pairwise(cuts):
                out.append((r, c, d, int(axis.lo[r, c:d].min()), int(axis.hi[r, c:d].max()) + 1))
    return out


def _coords(axis: Axis, r: int, first: int, last: int) -> NDArray[np.int64]:
    return np.arange(first, last) * axis.split + r


def _cross(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """[rank, product of lengths], row-major."""
    return np.stack([g.ravel() for g in np.meshgrid(*parts, indexing="ij")])


def _tokens(coords: NDArray[np.int64], axes: tuple[Axis, ...], prefix: int, *, queries: bool) -> NDArray[np.int64]:
    token, inside = np.zeros(coords.shape[1], np.int64), np.ones(coords.shape[1], bool)
    for c, a in zip(coords, axes, strict=True):
        before, real = (a.before_queries, a.real_queries) if queries else (a.before_keys, a.real_keys)
        token = token * real + (c - before)
        inside &= (c >= before) & (c < before + real)
    return np.where(inside, token + prefix, -1)


def _unflatten(c: NDArray[np.int64], grid: tuple[int, ...], flat: bool) -> NDArray[np.int64]:
    return np.stack(np.unravel_index(c[0], grid)) if flat else c


def sides(g: Geometry) -> tuple[int, ...]:
    """Queries of a tile per axis."""
    side = max(1, round(TILE ** (1 / len(g.axes))))
    point = [int((a.hi - a.lo).max()) <= 0 for a in g.axes]  # a tile one token wide on axes where a query sees its own line only
    free = max(1, len(g.axes) - sum(point))
    wide = max(1, round(TILE ** (1 / free)))
    return tuple(1 if p else (wide if any(point) else side) for p in point)


def _raw_tiles(g: Geometry) -> Iterator[RawTile]:
    """Tiles with the keys of their boxes."""
    for combo in product(*(spans(a, s) for a, s in zip(g.axes, sides(g), strict=True))):
        q = _cross([_coords(a, s[0], s[1], s[2]) for a, s in zip(g.axes, combo, strict=True)])
        k = _cross([_coords(a, s[0], s[3], s[4]) for a, s in zip(g.axes, combo, strict=True)])
        tq = _tokens(q, g.axes, g.q_prefix, queries=True)
        if not (tq >= 0).any():
            continue
        tk = _tokens(k, g.axes, g.k_prefix, queries=False)
        flat = g.structure.flat
        yield (
            np.concatenate([tq[None], _unflatten(q, g.q_grid, flat)]),
            np.concatenate([tk[None], _unflatten(k, g.k_grid, flat)]),
        )


def _listed_tiles(g: Geometry, found: Listed) -> Iterator[RawTile]:
    """Tiles with the keys of the blocks that they visit, those with few keys first."""

    def rows(parts: tuple[Any, ...], grid: tuple[int, ...], prefix: int, *, queries: bool) -> NDArray[np.int64]:
        c = _cross([_coords(a, *p) for a, p in zip(g.axes, parts, strict=True)])
        return np.concatenate([_tokens(c, g.axes, prefix, queries=queries)[None], _unflatten(c, grid, g.structure.flat)])

    blocks = [rows(p, g.k_grid, g.k_prefix, queries=False) for p in product(*found.keys)]
    tiles = [rows(p, g.q_grid, g.q_prefix, queries=True) for p in product(*found.queries)]
    lists = [found.lists.blocks[a:b] for a, b in pairwise(found.lists.offsets)]
    keys = [sum(blocks[b].shape[1] for b in mine) for mine in lists]
    for t in sorted(range(len(tiles)), key=lambda t: keys[t]):
        yield tiles[t], np.concatenate([blocks[0][:, :0], *(blocks[b] for b in lists[t])], 1)


def _pack(group: list[RawTile], k_prefix: int, device: torch.device) -> Tile:
    n, m = max(t[0].shape[1] for t in group), max(1, *(t[1].shape[1] for t in group))
    rank = group[0][0].shape[0]
    q, k = np.zeros((rank, len(group), n), np.int64), np.zeros((rank, len(group), k_prefix + m), np.int64)
    q[0], k[0] = -1, -2
    k[0, :, :k_prefix], k[1:, :, :k_prefix] = np.arange(k_prefix), -1
    for i, (tq, tk) in enumerate(group):
        q[:, i, : tq.shape[1]] = tq
        k[:, i, k_prefix : k_prefix + tk.shape[1]] = tk
    qt, kt = (torch.from_numpy(x).to(device) for x in (q, k))
    return Tile(qt[0], kt[0], tuple(qt[1:]), tuple(kt[1:]))


def _tiles(call: Call, device: torch.device, batch_heads: int, *, heads: int) -> Iterable[Tile]:
    g = call.geometry
    budget = max(1, SCORES // max(1, batch_heads))
    found = listed(g, LIMITS, sides(g), heads, batch_heads // max(heads, 1), known_tables(call))
    group: list[RawTile] = []
    shape = (0, 0)
    for tile in _raw_tiles(g) if found is None else _listed_tiles(g, found):
        mine = (tile[0].shape[1], tile[1].shape[1])
        alike = mine == shape or (found is not None and 0.8 * mine[0] <= shape[0] <= mine[0] and 0.8 * mine[1] <= shape[1])
        if group and (not alike or (len(group) + 1) * mine[0] * mine[1] > budget):
            yield _pack(group, g.k_prefix, device)
            group = []
        group.append(tile)
        shape = mine if len(group) == 1 else shape
    if group:
        yield _pack(group, g.k_prefix, device)
    if g.q_prefix:  # prefix queries see every key but virtual ones
        queries, keys = eager.token_sets(g, device)
        keys = keys[:, keys[0] >= 0]
        step = max(1, budget // max(1, keys.shape[1]))
        for at in range(0, g.q_prefix, step):
            q, k = queries[:, None, at : min(at + step, g.q_prefix)], keys[:, None]
            yield Tile(q[0], k[0], tuple(q[1:]), tuple(k[1:]))


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See runtime.call.Call."""
    return blocks.forward(call, q, k, v, partial(_tiles, heads=q.shape[1]))


def backward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """See runtime.call.Call."""
    n = call.attend.normalizer
    whole = (out, lse) if n.kind == "softmax" and n.sink is None else None
    return blocks.backward(call, q, k, v, grad_out, grad_lse, partial(_tiles, heads=q.shape[1]), whole)


channel_forward = eager.channel_forward
channel_backward = eager.channel_backward
