"""Query tiles that are boxes, each with the box of keys it sees: tile sides per axis, and the segments whose keys are disjoint.

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
SIDES = (1, 2, 3, 4, 6, 8, 12, 14, 16, 18, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Kernel:
    """What a kernel can take at once, and its vector length: the numbers that the choice of tiles depends on."""

    queries: int  # of one tile
    keys: int  # of one chunk
    lanes: int
    rows: int  # queries whose scores are computed together
    width: int  # D + Dv
    backward: bool = False


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


@dataclass(frozen=True)
class _Cut:
    """Totals over the pieces of one axis: what the cost of a product of axes is made of."""

    side: int
    pieces: Ints
    pairs: float  # sum of queries x keys
    seen: float  # sum over queries of the keys that each sees
    keys: float
    queries: float
    masked: bool


def _ends(a: Axis) -> tuple[Ints, Ints]:
    """lo and hi cut to the keys that exist (an empty interval stays empty)."""
    lo, hi = a.lo.astype(np.int32).copy(), a.hi.astype(np.int32).copy()
    for r in range(a.split):
        lo[r] = np.clip(lo[r], 0, max(a.count(a.keys, r), 0))
        hi[r] = np.clip(hi[r], -1, a.count(a.keys, r) - 1)
    return lo, hi


def _pieces(a: Axis, side: int) -> Ints:
    out: list[tuple[int, int, int]] = []
    for r in range(a.split):
        first = -((r - a.before_queries) // a.split)
        end = -((r - a.before_queries - a.real_queries) // a.split)
        first, end = max(first, 0), min(end, a.count(a.queries, r))
        borders = [first]
        if a.block:
            borders += [b for b in range(a.shift % a.block, end, a.block) if b > first]
        for begin, stop in itertools.pairwise([*borders, end]):
            parts = -(-(stop - begin) // side) if stop > begin else 0
            for i in range(parts):
                out.append((r, begin + (stop - begin) * i // parts, begin + (stop - begin) * (i + 1) // parts))
    return np.array(out, np.int32).reshape(-1, 3)


def _cut(a: Axis, lo: Ints, hi: Ints, side: int) -> _Cut:
    p = _pieces(a, side)
    first_lo, last_hi = lo[p[:, 0], p[:, 1]], hi[p[:, 0], p[:, 2] - 1]
    keys, queries = np.maximum(last_hi - first_lo + 1, 0).astype(float), (p[:, 2] - p[:, 1]).astype(float)
    masked = bool((lo[p[:, 0], p[:, 2] - 1] != first_lo).any() or (hi[p[:, 0], p[:, 1]] != last_hi).any())
    return _Cut(side, p, float((keys * queries).sum()), float(a.pairs()), float(keys.sum()), float(queries.sum()), masked)


def _cost(cuts: tuple[_Cut, ...], kernel: Kernel) -> float:
    """Cycles of one (batch, head), roughly."""
    lead = next((i for i, c in enumerate(cuts) if c.keys > len(c.pieces)), len(cuts) - 1)
    inner = 1.0
    for c in cuts[lead + 1 :]:
        inner *= c.queries / max(len(c.pieces), 1)
    span = max(kernel.rows / inner, 1.0)  # rows of the lead axis that one block of queries touches
    if inner % kernel.rows:
        span += 0.5
    boxes = tiles = packed = gathered = 1.0
    live = 1.0
    for i, c in enumerate(cuts):
        boxes *= c.pairs
        live *= min(c.pairs, c.seen + (span - 1) * c.queries) if i == lead else c.pairs
        tiles *= len(c.pieces)
        packed *= c.keys
        gathered *= c.queries
    live += gathered * kernel.lanes / 2  # the last vector of a row is half empty
    masks = sum(c.masked for c in cuts[lead + 1 :])
    per_pair = (kernel.width + 20 + 6 * masks) / kernel.lanes
    cost = (
        live * per_pair + packed * kernel.width * 0.35 + gathered * kernel.width * 0.15 + tiles * 500 + gathered / kernel.rows * 60
    )
    chunks = -(-packed // (tiles * kernel.keys)) if tiles else 1.0
    cost += (chunks - 1) * gathered * (kernel.width * 0.5 + 40)
    if kernel.backward:
        cost += (boxes + live * 0.6) * kernel.width / kernel.lanes + packed * kernel.width * 0.4
    return cost


def _choose(geo: Geometry, ends: list[tuple[Ints, Ints]], kernel: Kernel, items: int, threads: int) -> tuple[_Cut, ...]:
    options = []
    for a, (lo, hi) in zip(geo.axes, ends, strict=True):
        longest = a.block or -(-a.queries // a.split)
        sides = {s for s in SIDES if s < longest} | {longest}
        if not a.block and len(geo.axes) == 1:
            sides = {s for s in sides if s >= min(longest, 16)}
        options.append([_cut(a, lo, hi, s) for s in sorted(sides) if s <= kernel.queries])
    best, chosen = float("inf"), None
    for cuts in itertools.product(*options):
        most = int(np.prod([int((c.pieces[:, 2] - c.pieces[:, 1]).max(initial=1)) for c in cuts]))
        if most > kernel.queries:
            continue
        n = items * int(np.prod([len(c.pieces) for c in cuts]))
        uneven = -(-n // threads) * threads / n if n else 1.0
        cost = _cost(cuts, kernel) * (1 + (uneven - 1) * 0.9)
        if cost < best:
            best, chosen = cost, cuts
    assert chosen is not None
    return chosen


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
def tiling(geo: Geometry, kernel: Kernel, items: int, threads: int) -> Tiling:
    """The tiles for `items` (batch, head) pairs on so many threads."""
    ends = [_ends(a) for a in geo.axes]
    cuts = _choose(geo, ends, kernel, items, threads)
    whole = bool(geo.q_prefix or geo.k_prefix)

    def cut_segments(parts: int) -> list[tuple[Ints, Ints]]:
        out = []
        for i, (a, (lo, hi), c) in enumerate(zip(geo.axes, ends, cuts, strict=True)):
            mine = parts if i == 0 else 1
            if whole:
                n = max(min(mine, len(c.pieces)), 1)
                rows = [(len(c.pieces) * p // n, len(c.pieces) * (p + 1) // n, 0, 1, a.real_keys) for p in range(n)]
                out.append((np.array(rows, np.int32), np.array([(0, n)], np.int32)))
            else:
                out.append(_segments(a, lo, hi, c.pieces, mine))
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
    for a, (lo, hi), c, (s, o) in zip(geo.axes, ends, cuts, segments, strict=True):
        axes.append(AxisTiles(a.split, a.before_queries, a.before_keys, a.real_keys, lo, hi, c.pieces, s, o))
        hit = np.zeros(a.keys, bool)
        for _, _, first, step, count in s:
            hit[first : first + step * count : step] = True
        covers = covers and bool(hit[a.before_keys : a.before_keys + a.real_keys].all())
        rows *= int(s[:, 4].max(initial=0))
    return Tiling(tuple(axes), whole, split, rows + geo.k_prefix, covers)
