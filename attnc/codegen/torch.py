"""The portable backend: the compiler's schedule as composed PyTorch calls over tiles, never N x N. For machines without a
compiler.

Query tiles see the box of keys their interval ends give; tiles of one size run together, a bounded number at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.codegen import blocks, eager
from attnc.codegen.blocks import Tile
from attnc.runtime.call import Call
from attnc.schedule.geometry import Axis, Geometry

TILE = 64  # queries per tile, about
SCORES = 1 << 22  # score elements (over batch and heads) at a time

Span = tuple[int, int, int, int, int]  # residue, first and last + 1 query index, first and last + 1 key index


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


def _raw_tiles(g: Geometry) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """([1 + rank, n], [1 + rank, m]) per tile: token numbers and coordinates, without prefix tokens."""
    side = max(1, round(TILE ** (1 / len(g.axes))))
    point = [int((a.hi - a.lo).max()) <= 0 for a in g.axes]  # a tile one token wide on axes where a query sees its own line only
    free = max(1, len(g.axes) - sum(point))
    wide = max(1, round(TILE ** (1 / free)))
    sizes = [1 if p else (wide if any(point) else side) for p in point]
    for combo in product(*(spans(a, s) for a, s in zip(g.axes, sizes, strict=True))):
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


def _pack(group: list[tuple[NDArray[np.int64], NDArray[np.int64]]], k_prefix: int, device: torch.device) -> Tile:
    n, m = (max(t[i].shape[1] for t in group) for i in (0, 1))
    rank = group[0][0].shape[0]
    q, k = np.zeros((rank, len(group), n), np.int64), np.zeros((rank, len(group), k_prefix + m), np.int64)
    q[0], k[0] = -1, -2
    k[0, :, :k_prefix], k[1:, :, :k_prefix] = np.arange(k_prefix), -1
    for i, (tq, tk) in enumerate(group):
        q[:, i, : tq.shape[1]] = tq
        k[:, i, k_prefix : k_prefix + tk.shape[1]] = tk
    qt, kt = (torch.from_numpy(x).to(device) for x in (q, k))
    return Tile(qt[0], kt[0], tuple(qt[1:]), tuple(kt[1:]))


def _tiles(call: Call, device: torch.device, batch_heads: int) -> Iterable[Tile]:
    g = call.geometry
    budget = max(1, SCORES // max(1, batch_heads))
    group: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    shape = (0, 0)
    for tile in _raw_tiles(g):
        mine = (tile[0].shape[1], tile[1].shape[1])
        if group and (mine != shape or (len(group) + 1) * mine[0] * mine[1] > budget):
            yield _pack(group, g.k_prefix, device)
            group = []
        group.append(tile)
        shape = mine
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
    return blocks.forward(call, q, k, v, _tiles)


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
    return blocks.backward(call, q, k, v, grad_out, grad_lse, _tiles, whole)


channel_forward = eager.channel_forward
channel_backward = eager.channel_backward
