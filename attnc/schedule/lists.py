"""Lists of the blocks that tiles visit, for predicates that no interval expresses: which key blocks a query tile skips, sees in
full, or sees in part.

Classes come from the axes' intervals and, for the rest, from interval arithmetic over boxes of coordinates: large boxes first, and
only those that nothing is proved of are split. What is held is the list itself and one slab of boxes; nothing is as large as all
pairs of blocks, let alone of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc import ir
from attnc.analysis.intervals import Boxes, RangeTable, Span
from attnc.schedule.geometry import Geometry

Ints = NDArray[Any]
Tables = dict[str, RangeTable]
SLAB = 1 << 16  # boxes looked at together
COARSEST = 4096  # boxes that a walk begins with, at most
SKIP, PART, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Per tile the blocks it visits, in CSR form: `blocks[offsets[t] : offsets[t + 1]]`, the first `full[t]` of them full.

    Tiles and blocks are numbered row-major over the pieces of the axes. boxed: pairs of a tile and a block that the axes'
    intervals leave, which are visited without lists.
    """

    offsets: Ints  # [tiles + 1]
    full: Ints  # [tiles]
    blocks: Ints  # [visited]
    columns: int
    boxed: int

    @property
    def visited(self) -> int:
        """Blocks visited, full ones included."""
        return len(self.blocks)

    @property
    def bytes(self) -> int:
        """Memory of the lists."""
        return int(self.offsets.nbytes + self.full.nbytes + self.blocks.nbytes)

    def transposed(self) -> BlockLists:
        """Per block the tiles that visit it."""
        tiles, partial = self._entries()
        keys = (self.blocks.astype(np.int64) * 2 + partial) * len(self.full) + tiles
        return _listed(keys, self.columns, len(self.full), self.boxed)

    def masked(self, columns: Ints) -> BlockLists:
        """The same with these blocks (bool [columns]) in part only."""
        tiles, partial = self._entries()
        return _listed(
            (tiles * 2 + (partial | columns[self.blocks])) * self.columns + self.blocks, len(self.full), self.columns, self.boxed
        )

    def _entries(self) -> tuple[Ints, Ints]:
        """Of each entry its tile, and whether it is partial."""
        tiles = np.repeat(np.arange(len(self.full)), np.diff(self.offsets))
        place = np.arange(self.visited) - self.offsets[tiles]
        return tiles, (place >= self.full[tiles]).astype(np.int64)


def _listed(keys: Ints, rows: int, columns: int, boxed: int) -> BlockLists:
    """Lists of entries (row * 2 + partial) * columns + column."""
    keys = np.sort(keys)
    row, partial = keys // columns // 2, keys // columns % 2
    counts = np.bincount(row, minlength=rows)
    full = np.bincount(row[partial == 0], minlength=rows)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    small = [x.astype(np.int32) for x in (offsets, full, keys % columns)]
    return BlockLists(small[0], small[1], small[2], columns, boxed)


@dataclass(frozen=True)
class _Runs:
    """Runs of neighbouring pieces of one axis, as coordinates: their own, and for queries those of the keys they see.

    residue: -1 where a run holds several.
    """

    low: Ints
    high: Ints
    residue: Ints
    first: tuple[Ints, Ints]  # least and greatest first key of a query
    last: tuple[Ints, Ints]

    def joined(self, by: int) -> _Runs:
        """Runs of `by` of these."""
        at = np.arange(0, len(self.low), by)

        def small(x: Ints) -> Ints:
            return np.minimum.reduceat(x, at)

        def large(x: Ints) -> Ints:
            return np.maximum.reduceat(x, at)

        least, most = small(self.residue), large(self.residue)
        first, last = ((small(a), large(b)) for a, b in (self.first, self.last))
        return _Runs(small(self.low), large(self.high), np.where(least == most, least, -1), first, last)


class Walk:
    """The pairs of a tile and a block of a geometry, at every size from single ones up.

    pieces: per axis [n, 3] (residue, first, last + 1; indices in the residue class) of queries, and of keys. tables: the integer
    tables whose values are known.
    """

    def __init__(
        self, g: Geometry, queries: list[Ints], keys: list[Ints], heads: int, batch: int, tables: Tables | None = None
    ) -> None:
        self.g, self.tables = g, tables or {}
        self.fixed: dict[ir.Expr, Span] = {e: Span(n, n) for e, n in g.sizes.items()}
        self.fixed |= {ir.HEAD: Span(0, heads - 1), ir.HEADS: Span(heads, heads), ir.BATCH: Span(0, batch - 1)}
        self.shape = tuple(len(p) for p in (*queries, *keys))
        self.rows, self.columns = math.prod(map(len, queries)), math.prod(map(len, keys))
        self.by = 4 if len(g.axes) == 1 else 2
        level = []
        for a, q, k in zip(g.axes, queries, keys, strict=True):
            r, b, e = (x.astype(np.int64) for x in q.T)
            lo, hi = a.lo.astype(np.int64) * a.split, a.hi.astype(np.int64) * a.split
            ends = [(end[r, b] + r, end[r, e - 1] + r) for end in (lo, hi)]
            mine = _Runs(a.split * b + r, a.split * (e - 1) + r, r, *ends)
            r, b, e = (x.astype(np.int64) for x in k.T)
            none = (0 * r, 0 * r)
            level.append((mine, _Runs(a.split * b + r, a.split * (e - 1) + r, r, none, none)))
        self.levels = [level]
        while len(self.levels) < 20 and self._count(level) > COARSEST:
            level = [(q.joined(self.by), k.joined(self.by)) for q, k in level]
            self.levels.append(level)

    @staticmethod
    def _count(level: list[tuple[_Runs, _Runs]]) -> int:
        return math.prod(len(q.low) * len(k.low) for q, k in level)

    def boxed(self) -> int:
        """Pairs that the axes' intervals leave: a product of counts per axis."""
        total = 1
        for q, k in self.levels[0]:
            count = 0
            step = max(1, SLAB // max(len(k.low), 1))
            for at in range(0, len(q.low), step):
                rows = np.arange(at, min(at + step, len(q.low)))[:, None]
                count += int(_on_axis(q, k, rows, np.arange(len(k.low))[None])[1].sum())
            total *= count
        return total

    def classes(self, level: int, at: Ints) -> Ints:
        """SKIP, PART or FULL of each pair: at [2 * rank, n], runs of queries per axis, then of keys."""
        rank, n = len(self.g.axes), at.shape[1]
        must, may = np.ones(n, bool), np.ones(n, bool)
        spans = dict(self.fixed)
        for i, (q, k) in enumerate(self.levels[level]):
            whole, some = _on_axis(q, k, at[i], at[rank + i])
            must, may = must & whole, may & some
            spans[ir.coord("q", i)] = Span(q.low[at[i]], q.high[at[i]])
            spans[ir.coord("k", i)] = Span(k.low[at[rank + i]], k.high[at[rank + i]])
        rest = Boxes(spans, self.tables).truth(self.g.structure.residual)
        must, may = must & rest.must, may & rest.may
        return np.where(may, np.where(must, FULL, PART), SKIP)

    def sampled(self, most: int) -> tuple[float, float]:
        """Shares of the boxed pairs that would be full and partial, from about `most` of all, spread evenly."""
        all_pairs = self.rows * self.columns
        step = max(1, all_pairs // most) | 1  # odd, so that it is not in step with a grid
        boxed, full, part = 0, 0, 0
        for start in range(16):
            at = np.array(np.unravel_index(np.arange(start * step // 16, all_pairs, step), self.shape))
            rank, inside = len(self.g.axes), np.ones(at.shape[1], bool)
            for i, (q, k) in enumerate(self.levels[0]):
                inside &= _on_axis(q, k, at[i], at[rank + i])[1]
            found = self.classes(0, at[:, inside])
            boxed, full, part = boxed + int(inside.sum()), full + int((found == FULL).sum()), part + int((found == PART).sum())
            if boxed >= most // 4 or step == 1:
                break
        return full / max(boxed, 1), part / max(boxed, 1)

    def lists(self) -> BlockLists:
        """Every pair that is not skipped."""
        top, entries = len(self.levels) - 1, [np.zeros(0, np.int64)]
        stack = [(top, False, x) for x in self._all(top)]
        while stack:
            level, known, at = stack.pop()
            found = np.full(at.shape[1], FULL) if known else self.classes(level, at)
            for kind in (PART, FULL):
                kept = at[:, found == kind]
                if not kept.shape[1]:
                    continue
                if level:
                    stack += [(level - 1, kind == FULL, x) for x in self._split(level, kept)]
                else:
                    number = np.ravel_multi_index(tuple(kept), self.shape)
                    tile, block = number // self.columns, number % self.columns
                    entries.append((tile * 2 + (kind == PART)) * self.columns + block)
        return _listed(np.concatenate(entries), self.rows, self.columns, self.boxed())

    def _all(self, level: int) -> list[Ints]:
        sizes = [len(q.low) for q, _ in self.levels[level]] + [len(k.low) for _, k in self.levels[level]]
        n = math.prod(sizes)
        return [np.array(np.unravel_index(np.arange(i, min(i + SLAB, n)), sizes)) for i in range(0, n, SLAB)]

    def _split(self, level: int, at: Ints) -> list[Ints]:
        """The pairs one level below, in slabs."""
        below = self.levels[level - 1]
        sizes = [len(q.low) for q, _ in below] + [len(k.low) for _, k in below]
        children = np.array(np.unravel_index(np.arange(self.by ** len(sizes)), (self.by,) * len(sizes)))
        out, step = [], max(1, SLAB // children.shape[1])
        for i in range(0, at.shape[1], step):
            new = (at[:, i : i + step, None] * self.by + children[:, None]).reshape(len(sizes), -1)
            out.append(new[:, (new < np.array(sizes)[:, None]).all(0)])
        return out


def _on_axis(q: _Runs, k: _Runs, i: Ints, j: Ints) -> tuple[Ints, Ints]:
    """Whether every pair, and whether any pair, of runs i of queries and j of keys is in the intervals of one axis."""
    low, high, one, other = k.low[j], k.high[j], q.residue[i], k.residue[j]
    some = (low <= q.last[1][i]) & (high >= q.first[0][i]) & ((one == other) | (one < 0) | (other < 0))
    return (one == other) & (one >= 0) & (low >= q.first[1][i]) & (high <= q.last[0][i]), some


def cut(length: int, split: int, side: int) -> Ints:
    """Pieces of an axis in runs of `side` from the start of each residue class on."""
    out = []
    for r in range(min(split, length)):
        n = (length - r + split - 1) // split
        out += [(r, b, min(b + side, n)) for b in range(0, n, side)]
    return np.array(out, np.int32).reshape(-1, 3)
