"""Whether a call walks lists of blocks, and with which tiles: the shapes that cost least, against the boxes it would walk without.

Shapes are judged by a sample of their blocks; the lists of the best are then made, and used where they save enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from attnc import ir
from attnc.analysis.intervals import RangeTable
from attnc.schedule.boxes import ends, pieces
from attnc.schedule.geometry import Axis, Geometry
from attnc.schedule.lists import BlockLists, Ints, Walk, cut

WORTH = 0.85  # lists are used where their work is less than this share of that of the boxes
FEW, MANY = 512, 4096  # blocks that say what a shape would cost
MOST = 1 << 25  # entries: 128 MiB; longer lists are not made
LARGEST_TABLE = 1 << 22  # elements of a table whose values are looked at
Known = tuple[tuple[str, str, tuple[int, ...], bytes], ...]  # tables whose values are known: name, dtype, shape, contents


@dataclass(frozen=True)
class Limits:
    """What a kernel takes at once, and what things cost it, in units of a score element that needs no mask."""

    queries: int  # of a tile at most
    keys: int  # of a block at most
    partial: float = 1.4  # a score element that is masked
    query: float = 8.0  # per block, for each of its queries: a running sum taken along
    key: float = 12.0  # per block, for each of its keys: loaded

    def work(self, queries: float, keys: float, full: float, partial: float) -> float:
        """Of so many full and partial blocks."""
        return (queries + self.key) * (keys + self.query) * (full + self.partial * partial)


@dataclass(frozen=True, eq=False)
class Listed:
    """Tiles and blocks as pieces per axis (see `lists.Walk`), the sides they were cut to, and the lists. work: of boxes, 1."""

    query_sides: tuple[int, ...]
    key_sides: tuple[int, ...]
    queries: tuple[Ints, ...]
    keys: tuple[Ints, ...]
    lists: BlockLists
    work: float

    def elements(self) -> int:
        """Score elements of the visited blocks, full and partial."""
        size = [np.array([1], np.int64), np.array([1], np.int64)]
        for side, per_axis in enumerate((self.queries, self.keys)):
            for p in per_axis:
                size[side] = np.multiply.outer(size[side], p[:, 2] - p[:, 1]).ravel().astype(np.int64)
        tiles = np.repeat(size[0], np.diff(self.lists.offsets))
        return int((tiles * size[1][self.lists.blocks]).sum())


def shapes(lengths: tuple[int, ...], most: int) -> Iterator[tuple[int, ...]]:
    """Sides of boxes of about `most` tokens, powers of two or a whole axis."""
    if len(lengths) == 1:
        yield (min(most, lengths[0]),)
        return
    side = 1
    while True:
        mine = min(side, lengths[0])
        yield from ((mine, *rest) for rest in shapes(lengths[1:], max(1, most // mine)))
        if side >= min(lengths[0], most):
            return
        side *= 2


def mentions(g: Geometry, op: str) -> bool:
    """Whether the predicate of a geometry that no axis expresses mentions a leaf."""
    return any(n.op == op for n in ir.walk(g.structure.residual))


def _key_lengths(g: Geometry) -> tuple[int, ...]:
    return tuple(-(-a.keys // a.split) for a in g.axes)


def _walk(g: Geometry, sides: tuple[tuple[int, ...], tuple[int, ...]], heads: int, batch: int, tables: Known) -> Walk:
    queries = [pieces(a, side) for a, side in zip(g.axes, sides[0], strict=True)]
    keys = [cut(a.keys, a.split, side) for a, side in zip(g.axes, sides[1], strict=True)]
    return Walk(g, queries, keys, heads, batch, {name: _table(*rest) for name, *rest in tables})


@lru_cache(maxsize=32)
def _table(dtype: str, shape: tuple[int, ...], data: bytes) -> RangeTable:
    return RangeTable(np.frombuffer(data, dtype).reshape(shape))


def _work_of(w: Walk, limits: Limits, samples: int) -> float:
    """Of the lists that a walk would make, from a sample."""
    if not w.rows or not w.columns:
        return 0.0
    full, part = w.sampled(samples)
    rows = math.prod(a.real_queries for a in w.g.axes) / w.rows
    columns = math.prod(a.keys for a in w.g.axes) / w.columns
    return w.boxed() * limits.work(rows, columns, full, part)


def box_work(g: Geometry, sides: tuple[int, ...], limits: Limits) -> float:
    """Of the boxes that tiles of these sides walk, every pair masked."""
    pairs = keys = queries = tiles = 1.0
    for a, side in zip(g.axes, sides, strict=True):
        (lo, hi), p = ends(a), pieces(a, side)
        seen = (hi[p[:, 0], p[:, 2] - 1].astype(float) - lo[p[:, 0], p[:, 1]] + 1).clip(0)
        own = (p[:, 2] - p[:, 1]).astype(float)
        pairs, keys, queries, tiles = pairs * float((seen * own).sum()), keys * seen.sum(), queries * own.sum(), tiles * len(p)
    chunks = max(1.0, keys / max(tiles, 1) / limits.keys)
    return limits.partial * (pairs + limits.key * keys + limits.query * queries * chunks)


@lru_cache(maxsize=64)
def listed(g: Geometry, limits: Limits, boxes: tuple[int, ...], heads: int, batch: int, tables: Known = ()) -> Listed | None:
    """The lists of a call, or None where they save too little (or nothing is left for them to find).

    boxes: sides of the query tiles that it has without lists. tables: what is known of integer tables.
    """
    if g.structure.residual == ir.TRUE or not g.n_queries or not g.n_keys:
        return None
    plain = box_work(g, boxes, limits)
    q_lengths, k_lengths = tuple(_longest(a) for a in g.axes), _key_lengths(g)
    heads, batch = (heads if mentions(g, "head") or mentions(g, "heads") else 1), (batch if mentions(g, "batch") else 1)

    def work_of(pair: tuple[tuple[int, ...], tuple[int, ...]], samples: int) -> float:
        return _work_of(_walk(g, pair, heads, batch, tables), limits, samples)

    # any shape of one side may only help beside a certain one of the other: a line of queries beside a line of keys across it
    every = [(q, k) for q in shapes(q_lengths, limits.queries) for k in shapes(k_lengths, limits.keys)]
    q_best, k_best = best = min(every, key=lambda pair: work_of(pair, FEW))
    smaller = [
        (q, k) for q in (q_best, *shapes(q_lengths, limits.queries // 4)) for k in (k_best, *shapes(k_lengths, limits.keys // 4))
    ]
    near = [(q, k) for q, k in smaller if (q == q_best or k == k_best) and (q, k) != best]
    q_best, k_best = best = min((best, *near), key=lambda pair: work_of(pair, FEW))
    if work_of(best, MANY) >= WORTH * plain * 1.05:  # a sample may err by as much
        return None
    w = _walk(g, best, heads, batch, tables)
    if sum(w.sampled(FEW)) * w.boxed() > MOST:
        return None
    lists = w.lists()
    rows = math.prod(a.real_queries for a in g.axes) / max(w.rows, 1)
    columns = math.prod(a.keys for a in g.axes) / max(w.columns, 1)
    full = int(lists.full.sum())
    work = limits.work(rows, columns, full, lists.visited - full)
    if work >= WORTH * plain:
        return None
    queries = tuple(pieces(a, side) for a, side in zip(g.axes, q_best, strict=True))
    keys = tuple(cut(a.keys, a.split, side) for a, side in zip(g.axes, k_best, strict=True))
    return Listed(q_best, k_best, queries, keys, lists, work / max(plain, 1.0))


def _longest(a: Axis) -> int:
    """Queries of the longest piece that an axis can have."""
    return min(a.block or a.queries, -(-a.queries // a.split))
