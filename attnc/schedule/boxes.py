"""Query tiles that are boxes, each with the box of keys it sees: their pieces per axis, and the segments whose keys are disjoint.

Everything is per axis, so it costs O(axis length); the tiles of a call are the product of the axes' pieces.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from attnc.schedule.geometry import Axis, Geometry

Ints = NDArray[np.int32]
SHORTEST_RUN = 4  # queries that leave out the same keys have pieces of their own where they are so many


@dataclass(frozen=True)
class Kernel:
    """What a kernel can take at once, and its vector length: the numbers that the choice of tiles depends on."""

    queries: int  # of one tile
    keys: int  # of one chunk
    lanes: int
    rows: int  # queries whose scores are computed together
    dim: int
    value_dim: int
    backward: bool = False
    band: int = 0  # keys of the last axis that every query sees, where a kernel for such bands exists
    wide: bool = True  # 32 vector registers, and any lanes of two vectors in one instruction (AVX-512); else 16, and no such thing


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """One axis: its interval ends and how its queries are cut."""

    split: int
    queries_before: int
    keys_before: int
    real_keys: int
    lo: Ints  # [split, columns], cut to the axis
    hi: Ints
    pieces: Ints  # [n, 3]: residue, first query, last query + 1 (indices in the residue class)
    segments: Ints  # [n, 5]: first piece, last + 1; their keys: first coordinate, step, count
    owners: Ints  # [n, 2]: first segment, last + 1, of segments that share keys


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tiles of a call. `whole`: one segment holds all keys (prefix tokens are seen by all). `split`: segments share keys."""

    axes: tuple[AxisTiles, ...]
    whole: bool
    split: bool
    sum_rows: int  # keys of the largest segment
    covers: bool  # every real key is in some segment


def ends(a: Axis) -> tuple[Ints, Ints]:
    """lo and hi cut to the keys that exist (an empty interval stays empty)."""
    lo, hi = a.lo.astype(np.int32).copy(), a.hi.astype(np.int32).copy()
    for r in range(a.split):
        lo[r] = np.clip(lo[r], 0, max(a.count(a.keys, r), 0))
        hi[r] = np.clip(hi[r], -1, a.count(a.keys, r) - 1)
    return lo, hi


def pieces(a: Axis, side: int) -> Ints:
    """The axis's queries in runs of `side` at most, evenly long within a block and a residue class. 0: as long as they come."""
    side = side or a.queries
    out: list[tuple[int, int, int]] = []
    for r in range(a.split):
        first = -((r - a.before_queries) // a.split)
        end = -((r - a.before_queries - a.real_queries) // a.split)
        first, end = max(first, 0), min(end, a.count(a.queries, r))
        borders = [first]
        if a.block:
            borders += [b for b in range(a.shift % a.block, end, a.block) if b > first]
        elif a.gap_lo is not None and a.gap_hi is not None:
            changes = (np.diff(a.gap_lo[r, first:end]) != 0) | (np.diff(a.gap_hi[r, first:end]) != 0)
            if SHORTEST_RUN * changes.sum() <= end - first:
                borders += (np.flatnonzero(changes) + first + 1).tolist()
        for begin, stop in itertools.pairwise([*borders, end]):
            parts = -(-(stop - begin) // side) if stop > begin else 0
            for i in range(parts):
                out.append((r, begin + (stop - begin) * i // parts, begin + (stop - begin) * (i + 1) // parts))
    return np.array(out, np.int32).reshape(-1, 3)


def _segments(a: Axis, lo: Ints, hi: Ints, pieces: Ints, parts: int) -> tuple[Ints, Ints]:
    """Runs of pieces whose keys overlap, each cut into `parts`; and which segments come from one run."""
    runs: list[list[int]] = []
    reach = -1
    for n, (r, b, e) in enumerate(pieces):
        first, last = int(lo[r, b]), int(hi[r, e - 1])
        if runs and first <= last and r == pieces[n - 1][0] and first <= reach:
            runs[-1].append(n)
        else:
            runs.append([n])
        reach = last if first <= last else -1
    segments: list[tuple[int, ...]] = []
    owners: list[tuple[int, int]] = []
    for run in runs:
        count = min(parts, len(run))
        owners.append((len(segments), len(segments) + count))
        for i in range(count):
            p = run[len(run) * i // count : len(run) * (i + 1) // count]
            r, b = int(pieces[p[0]][0]), int(pieces[p[0]][1])
            first, last = int(lo[r, b]), int(hi[r, pieces[p[-1]][2] - 1])
            segments.append((p[0], p[-1] + 1, a.split * first + r, a.split, max(last - first + 1, 0)))
    return np.array(segments, np.int32).reshape(-1, 5), np.array(owners, np.int32).reshape(-1, 2)


@lru_cache(maxsize=256)
def tiling(geo: Geometry, kernel: Kernel, sides: tuple[int, ...], items: int, threads: int) -> Tiling:
    """The tiles of these sides for `items` (batch, head) pairs on so many threads."""
    cut = [pieces(a, side) for a, side in zip(geo.axes, sides, strict=True)]
    limits = [ends(a) for a in geo.axes]
    whole = bool(geo.q_prefix or geo.k_prefix)

    def cut_segments(parts: int) -> list[tuple[Ints, Ints]]:
        out = []
        for i, (a, (lo, hi), p) in enumerate(zip(geo.axes, limits, cut, strict=True)):
            mine = parts if i == 0 else 1
            if whole:
                n = max(min(mine, len(p)), 1)
                rows = [(len(p) * i // n, len(p) * (i + 1) // n, 0, 1, a.keys) for i in range(n)]
                out.append((np.array(rows, np.int32), np.array([(0, n)], np.int32)))
            else:
                out.append(_segments(a, lo, hi, p, mine))
        return out

    segments = cut_segments(1)
    split = False
    if kernel.backward:
        n = items * int(np.prod([len(s) for s, _ in segments]))
        if n and -(-n // threads) * threads / n > 1.15:
            more = cut_segments(-(-4 * threads // n))
            split = len(more[0][0]) > len(segments[0][0])
            segments = more if split else segments
    axes, covers, rows = [], True, 1
    for a, (lo, hi), p, (s, o) in zip(geo.axes, limits, cut, segments, strict=True):
        axes.append(AxisTiles(a.split, a.before_queries, a.before_keys, a.real_keys, lo, hi, p, s, o))
        hit = np.zeros(a.keys, bool)
        for _, _, first, step, count in s:
            hit[first : first + step * count : step] = True
        covers = covers and bool(hit[a.before_keys : a.before_keys + a.real_keys].all())
        rows *= int(s[:, 4].max(initial=0))
    return Tiling(tuple(axes), whole, split, rows + geo.k_prefix, covers)
