"""How a call on the CPU runs: the sides of its query tiles, and whether its rows are walked as bands. Candidates with a cost each.

The cost is a model, in cycles of one (batch, head); its constants were fitted to measured calls, with AVX-512 and with 16 registers
of 8 lanes. `attnc.tune` measures the best of the candidates instead.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from attnc.schedule.boxes import Ints, Kernel, ends, pieces
from attnc.schedule.geometry import Axis, Geometry

SIDES = (1, 2, 3, 4, 6, 8, 12, 14, 16, 18, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Choice:
    """sides: queries of a tile per axis, 0 for the whole of an axis or block. band: lanes are queries of one row, if that fits."""

    sides: tuple[int, ...]
    band: bool = False

    def show(self) -> str:
        """For people: "tiles 4 x all", "rows of a band"."""
        return "rows of a band" if self.band else "tiles " + " x ".join(str(s or "all") for s in self.sides)


def bucket(n: int, steps: int = 4) -> int:
    """The least number of at least n among those with `steps` to an octave (4: 16, 20, 24, 28, 32, 40, ...; 1: powers of two)."""
    unit = 1
    while unit * 2 * steps < n:
        unit *= 2
    return -(-n // unit) * unit


@dataclass(frozen=True)
class _Rates:
    """Cycles, of one direction. Pairs come as vectors: `lanes` keys of a query in a tile, one key of `lanes` queries in a band."""

    product: float  # of a pair and a channel, while only live vectors are computed
    box: float  # of a pair and a channel of the tile's whole box (a backward's sums over queries)
    weight: float  # of a pair: its exponential
    key: float  # of a packed key and a channel
    query: float  # of a query and a channel: loaded, stored, its sums kept between chunks
    row: float  # of a query
    tile: float
    easy: float  # of a band's pair and channel where lanes' keys follow each other,
    hard: float  # and where they are permuted (at a clamped border, in a row's last and shorter vector)
    turn: float  # of a vector of a band's queries and a channel: transposed there and back


_WIDE = _Rates(1, 0, 20, 0.35, 0.15, 10, 500, 1.5, 1.5, 0), _Rates(1.6, 1, 20, 0.75, 0.15, 10, 500, 3.3, 3.3, 0)
_NARROW = _Rates(1, 0, 17, 1.55, 2.6, 0, 100, 1.4, 2.2, 35), _Rates(1.6, 1.2, 17, 3.7, 3.9, 0, 1800, 4.15, 5.6, 110)


def _rates(kernel: Kernel) -> _Rates:
    return (_WIDE if kernel.wide else _NARROW)[kernel.backward]


@dataclass(frozen=True)
class _Cut:
    """Totals over the pieces of one axis: what the cost of a product of axes is made of."""

    side: int
    longest: int  # queries of the longest piece
    pieces: int
    pairs: float  # sum of queries x keys
    seen: float  # sum over queries of the keys that each sees
    keys: float
    queries: float
    masked: bool


def _cut(a: Axis, lo: Ints, hi: Ints, side: int) -> _Cut:
    p = pieces(a, side)
    first_lo, last_hi = lo[p[:, 0], p[:, 1]], hi[p[:, 0], p[:, 2] - 1]
    keys, queries = (last_hi - first_lo + 1).clip(0).astype(float), (p[:, 2] - p[:, 1]).astype(float)
    masked = bool((lo[p[:, 0], p[:, 2] - 1] != first_lo).any() or (hi[p[:, 0], p[:, 1]] != last_hi).any())
    pairs, longest = float((keys * queries).sum()), int(queries.max(initial=1))
    return _Cut(side, longest, len(p), pairs, float(a.pairs()), float(keys.sum()), float(queries.sum()), masked)


def _cost(cuts: tuple[_Cut, ...], kernel: Kernel) -> float:
    """Cycles of one (batch, head), roughly."""
    width = kernel.dim + kernel.value_dim
    lead = next((i for i, c in enumerate(cuts) if c.keys > c.pieces), len(cuts) - 1)
    inner = 1.0
    for c in cuts[lead + 1 :]:
        inner *= c.queries / max(c.pieces, 1)
    span = max(kernel.rows / inner, 1.0)  # rows of the lead axis that one block of queries touches
    if inner % kernel.rows:
        span += 0.5
    boxes = tiles = packed = gathered = 1.0
    live = 1.0
    for i, c in enumerate(cuts):
        boxes *= c.pairs
        live *= min(c.pairs, c.seen + (span - 1) * c.queries) if i == lead else c.pairs
        tiles *= c.pieces
        packed *= c.keys
        gathered *= c.queries
    live += gathered * kernel.lanes / 2  # the last vector of a row is half empty
    masks = sum(c.masked for c in cuts[lead + 1 :])
    r = _rates(kernel)
    cost = (live * (r.product * width + r.weight + 6 * masks) + r.box * boxes * width) / kernel.lanes
    cost += (r.key * packed + r.query * gathered) * width + r.row * gathered + r.tile * tiles
    chunks = -(-packed // (tiles * kernel.keys)) if tiles else 1.0
    return cost + (chunks - 1) * gathered * (width * 0.5 + 40)


def band_elements(geo: Geometry, lanes: int) -> int:
    """Score elements that one (batch, head) computes whose rows are walked as bands: one key each of `lanes` queries of a row."""
    *others, x = geo.axes
    lo, hi = ends(x)
    rows = [-(-x.queries // x.split) - (r >= x.queries % x.split > 0) for r in range(x.split)]
    columns = sum(-(-n // lanes) for n in rows) * lanes * int((hi - lo + 1).max(initial=0))
    return columns * math.prod(a.pairs() for a in others)


def _band_cost(geo: Geometry, kernel: Kernel) -> float:
    """Cycles of one (batch, head), roughly."""
    *others, x = geo.axes
    lo, hi = ends(x)
    easy = blocks = 0
    for r in range(x.split):
        n = -(-(x.queries - r) // x.split)
        for j in range(0, n, kernel.lanes):
            blocks += 1
            easy += bool(j + kernel.lanes <= n and (np.diff(lo[r, j : j + kernel.lanes]) == 1).all())
    rates, keys = _rates(kernel), int((hi - lo + 1).max(initial=0))
    pairs = keys * math.prod(a.pairs() for a in others)
    per_channel = pairs * (easy * rates.easy + (blocks - easy) * rates.hard)
    return (per_channel + math.prod(a.queries for a in others) * blocks * rates.turn) * (kernel.dim + kernel.value_dim)


@lru_cache(maxsize=256)
def candidates(geo: Geometry, kernel: Kernel, items: int, threads: int) -> tuple[tuple[float, Choice], ...]:
    """Every choice with its cost, the cheapest first, for `items` (batch, head) pairs on so many threads."""
    options = []
    for a in geo.axes:
        lo, hi = ends(a)
        longest = a.block or -(-a.queries // a.split)
        sides = {s for s in SIDES if s < longest} | {0}
        if not a.block and len(geo.axes) == 1:
            sides = {s for s in sides if s >= 16 or not s}
        cuts = [_cut(a, lo, hi, s) for s in sorted(sides)]
        options.append([c for c in cuts if c.longest <= kernel.queries])
    found = []
    for product in itertools.product(*options):
        if math.prod(c.longest for c in product) > kernel.queries:
            continue
        n = items * math.prod(c.pieces for c in product)
        uneven = -(-n // threads) * threads / n if n else 1.0
        cost = _cost(product, kernel) * (1 + (uneven - 1) * 0.9)
        found.append((cost, Choice(tuple(c.side for c in product))))
    found.sort(key=lambda x: x[0])
    if kernel.band:
        found.append((_band_cost(geo, kernel), Choice(found[0][1].sides, band=True)))
        found.sort(key=lambda x: x[0])
    return tuple(found)


def choose(geo: Geometry, kernel: Kernel, items: int, threads: int) -> Choice:
    """The cheapest by the model."""
    return candidates(geo, kernel, items, threads)[0][1]
