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
LEAST, LEAST_WITH_TABLES = (
    1 << 12,
    1 << 18,
)  # pairs below which lists take longer to make than they save; tables may change each call
Sides = tuple[tuple[int, ...], tuple[int, ...]]  # of tiles and of blocks, per axis
Known = tuple[tuple[str, str, tuple[int, ...], bytes], ...]  # tables whose values are known: name, dtype, shape, contents


@dataclass(frozen=True)
class Limits:
    """What a kernel takes at once, and what things cost it, in units of a score element that needs no mask."""

    queries: int  # of a tile at most
    keys: int  # of a block at most
    partial: float = 1.4  # a score element that is masked
    query: float = 8.0  # per block, for each of its queries: a running sum taken along
    key: float = 12.0  # per block, for each of its keys: loaded
    lattice: bool = False  # sides are powers of two, and tiles begin at their multiples

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

    def show(self) -> str:
        """Tiles and blocks for people: "8x8/32x2"."""
        return "/".join("x".join(map(str, sides)) for sides in (self.query_sides, self.key_sides))

    def for_chunks(self) -> tuple[BlockLists, BlockLists]:
        """Lists of each tile's blocks and of each block's tiles, for kernels that mask what a chunk cut by the axis lacks."""
        cut_queries, cut_keys = (
            _any([p[:, 2] - p[:, 1] < side for p, side in zip(per_axis, sides, strict=True)])
            for per_axis, sides in ((self.queries, self.query_sides), (self.keys, self.key_sides))
        )
        return self.lists.masked(cut_keys), self.lists.transposed().masked(cut_queries)

    def elements(self) -> int:
        """Score elements of the visited blocks, full and partial."""
        size = [np.array([1], np.int64), np.array([1], np.int64)]
        for side, per_axis in enumerate((self.queries, self.keys)):
            for p in per_axis:
                size[side] = np.multiply.outer(size[side], p[:, 2] - p[:, 1]).ravel().astype(np.int64)
        tiles = np.repeat(size[0], np.diff(self.lists.offsets))
        return int((tiles * size[1][self.lists.blocks]).sum())


def _any(per_axis: list[Ints]) -> Ints:
    """Whether it holds on any axis, of every product of pieces in row-major order."""
    out = np.zeros(1, bool)
    for on_axis in per_axis:
        out = np.logical_or.outer(out, on_axis).ravel()
    return out


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


def _pieces(g: Geometry, sides: Sides, lattice: bool) -> tuple[list[Ints], list[Ints]]:
    each = list(zip(g.axes, *sides, strict=True))
    queries = [cut(a.queries, a.split, side) if lattice else pieces(a, side) for a, side, _ in each]
    return queries, [cut(a.keys, a.split, side) for a, _, side in each]


def _walk(g: Geometry, sides: Sides, heads: int, batch: int, tables: Known, lattice: bool) -> Walk:
    queries, keys = _pieces(g, sides, lattice)
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
    if g.structure.residual == ir.TRUE or g.n_queries * g.n_keys < LEAST:
        return None
    plain = box_work(g, boxes, limits)
    q_lengths, k_lengths = tuple(_longest(a) for a in g.axes), _key_lengths(g)
    if limits.lattice:
        q_lengths, k_lengths = (tuple(1 << (n - 1).bit_length() for n in lengths) for lengths in (q_lengths, k_lengths))
    heads, batch = (heads if mentions(g, "head") or mentions(g, "heads") else 1), (batch if mentions(g, "batch") else 1)

    def work_of(pair: Sides, samples: int) -> float:
        return _work_of(_walk(g, pair, heads, batch, tables, limits.lattice), limits, samples)

    # any shape of one side may only help beside a certain one of the other: a line of queries beside a line of keys across it
    every = [(q, k) for q in shapes(q_lengths, limits.queries) for k in shapes(k_lengths, limits.keys)]
    q_best, k_best = best = min(every, key=lambda pair: work_of(pair, FEW))
    least = 16 if limits.lattice else 1  # rows and columns of a product in registers
    few_queries, few_keys = max(limits.queries // 4, least), max(limits.keys // 4, least)
    smaller = [(q, k) for q in (q_best, *shapes(q_lengths, few_queries)) for k in (k_best, *shapes(k_lengths, few_keys))]
    near = [(q, k) for q, k in smaller if (q == q_best or k == k_best) and (q, k) != best]
    q_best, k_best = best = min((best, *near), key=lambda pair: work_of(pair, FEW))
    if work_of(best, MANY) >= WORTH * plain * 1.05:  # a sample may err by as much
        return None
    w = _walk(g, best, heads, batch, tables, limits.lattice)
    if sum(w.sampled(FEW)) * w.boxed() > MOST:
        return None
    lists = w.lists()
    rows = math.prod(a.real_queries for a in g.axes) / max(w.rows, 1)
    columns = math.prod(a.keys for a in g.axes) / max(w.columns, 1)
    full = int(lists.full.sum())
    work = limits.work(rows, columns, full, lists.visited - full)
    if work >= WORTH * plain:
        return None
    queries, keys = _pieces(g, best, limits.lattice)
    return Listed(q_best, k_best, tuple(queries), tuple(keys), lists, work / max(plain, 1.0))


def _longest(a: Axis) -> int:
    """Queries of the longest piece that an axis can have."""
    return min(a.block or a.queries, -(-a.queries // a.split))
