"""How tiles of GPU kernels walk: what one program owns, how the keys it sees are cut into chunks, and what that issues.

A program owns `rows` query indices per axis (of one residue class) and walks the box of keys they see in chunks of `chunk` per
axis, beginning at the first key of the first row. Work is counted from the interval ends: per axis a sum over its tiles, and the
whole is the product over axes. For dk and dv the roles are swapped and the ends are the inverses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np

from attnc import ir
from attnc.analysis.axis import AxisForm, I, J
from attnc.analysis.structure import Blocks
from attnc.schedule.geometry import Axis, Geometry

Side = Literal["q", "k"]


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: rows and chunk per axis, the axis whose chunks form the inner loop, and launch parameters."""

    rows: tuple[int, ...]
    chunk: tuple[int, ...]
    inner: int = 0
    warps: int = 4
    stages: int = 2
    batch: int = 1  # batch items one program walks (geometry, mask and bias stay in registers)
    wraps: tuple[bool, ...] = ()  # axes on which the tile before the first row takes the last rows as well (see `joins`)

    def wrapped(self, axis: int) -> bool:
        """Whether tiles wrap around the end of an axis."""
        return bool(self.wraps) and self.wraps[axis]

    @property
    def bm(self) -> int:
        """Rows in registers."""
        return padded(math.prod(self.rows))

    @property
    def bn(self) -> int:
        """Columns in registers."""
        return padded(math.prod(self.chunk))


@dataclass(frozen=True)
class Walk:
    """What one axis of a tiling does, counted over all its programs."""

    programs: int
    steps: Fraction | int  # chunks visited; with `odd` columns a part of one counts as such
    most: int  # chunks of one program at most
    full: int  # chunks in which every row sees every column
    partial: int
    left: int  # of these, the ones before the first full chunk
    overruns: bool  # some chunk reaches beyond the axis even after it is moved back inside
    exact: bool  # chunks never hold a column outside the rows' common interval
    one_box: bool  # the rows of a tile always share one interval
    passes: bool  # some chunk that is not moved reaches beyond the axis
    rest: int = 0  # columns of each program that fill no whole chunk, where all have as many
    odd: int = 0  # and these are a chunk of their own, before the others, so that no chunk has a mask


def padded(n: int) -> int:
    """The power of two, at least 16, that holds n."""
    return max(16, 1 << (n - 1).bit_length())


def start(axis: Axis, side: Side, rows: int) -> int:
    """Where tiles begin on an axis: aligned to block borders (perhaps before 0), and not far before the first real row."""
    off = -axis.shift % axis.block if axis.block else 0
    before = axis.before_queries // axis.split if side == "q" else 0
    return (before + off) // rows * rows - off


def ends(axis: Axis, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """The two interval ends of rows on one side, cut to columns that exist there."""
    if side == "q":
        return axis.lo, axis.hi
    r = np.arange(axis.split)[:, None]
    first = -(-(axis.before_queries - r) // axis.split)
    last = (axis.before_queries + axis.real_queries - 1 - r) // axis.split
    return np.maximum(axis.inverse_lo, first), np.minimum(axis.inverse_hi, last)


def joins(axis: Axis) -> bool:
    """Whether the two blocks that an axis cuts, its first and its last, are one block together, and so share a tile.

    That is the layout of a cyclic shift, without the shift: the tile that begins before the first row goes on at the end.
    """
    n = axis.real_queries
    alone = axis.split == 1 and axis.queries == axis.keys == axis.real_keys == n
    return alone and bool(axis.block and axis.shift) and n % axis.block == 0


def whole(axis: Axis, form: AxisForm, side: Side, rows: int) -> bool:
    """Whether all tiles of an axis have all of their rows: they fill it, or the last one begins earlier and stores what no other
    does, for which all rows must see the same columns."""
    n, real = (axis.queries, axis.real_queries) if side == "q" else (axis.keys, axis.real_keys)
    if n % rows == 0:
        return True
    ends = (form.lo, form.hi) if side == "q" else (form.inverse_lo, form.inverse_hi)
    alike = all(e is not None and not any(leaf in (I, J) for leaf in ir.walk(e)) for e in ends)
    return alike and rows <= n == real and axis.split == 1 and not axis.block and axis.others is None


def passes_over(others: Sequence[Blocks | None], rows: tuple[int, ...]) -> bool:
    """Whether tiles of these rows leave out the same keys each, their own block on axes where queries see the other ones. Such a
    tile's columns are counted without them, and nothing is asked of a pair."""
    cut = [(*blocks, n) for blocks, n in zip(others, rows, strict=True) if blocks is not None]
    return bool(cut) and all(size % n == 0 and shift % n == 0 for size, shift, n in cut)


def asks(g: Geometry, tile: Tile) -> bool:
    """Whether a condition is evaluated for each pair of a tile."""
    return g.structure.residual != ir.TRUE and not passes_over([a.others for a in g.axes], tile.rows)


def _walk_others(axis: Axis, others: Blocks, rows: int, chunk: int) -> Walk:
    """Count an axis whose tiles pass over their own block."""
    n, (size, shift) = axis.queries, others
    own = (np.arange(0, n, rows) - shift) // size * size + shift
    seen = n - (np.minimum(own + size, n) - np.maximum(own, 0))
    steps = -(-seen // chunk)
    if steps.max(initial=0) <= 1:  # no loop is printed
        steps = np.maximum(steps, 1)
    exact = bool(((seen % chunk == 0) & (seen > 0)).all())
    full = int((seen // chunk).sum())
    total = int(steps.sum())
    return Walk(
        len(own), total, int(steps.max(initial=0)), full, total - full, left=0, overruns=not exact, exact=exact, one_box=True,
        passes=not exact, rest=_rest(seen, chunk),
    )  # fmt: skip


def _rest(seen: np.ndarray, chunk: int) -> int:
    """Columns beyond whole chunks, where all programs see as many and more than one chunk."""
    same = bool(seen.size) and bool((seen == seen.flat[0]).all()) and int(seen.flat[0]) > chunk
    return int(seen.flat[0]) % chunk if same else 0


@lru_cache(maxsize=65536)
def walk(
    axis: Axis, side: Side, rows: int, chunk: int, *, columns: bool = False, wrap: bool = False, others: Blocks | None = None
) -> Walk:
    """Count one axis. `columns`: there is no inverse in closed form, so dk and dv programs visit the whole axis. others: the blocks
    of which tiles pass over their own."""
    if others is not None:
        return _walk_others(axis, others, rows, chunk)
    if wrap:
        n = axis.queries // rows
        return Walk(n, n, most=1, full=0, partial=n, left=0, overruns=False, exact=True, one_box=True, passes=False)
    lo, hi = ends(axis, side)
    size = axis.before_queries + axis.real_queries if side == "q" else axis.keys
    other = axis.keys if side == "q" else axis.before_queries + axis.real_queries
    begin = start(axis, side, rows)
    tiles = -(-(-(-size // axis.split) - begin) // rows)
    classes = min(axis.split, size)
    r = np.arange(classes)[:, None]
    first_real = -(-(axis.before_queries - r) // axis.split) if side == "q" else 0 * r
    last_real = (size - 1 - r) // axis.split
    t = begin + np.arange(tiles)[None, :] * rows
    last = np.maximum(np.minimum(t + rows - 1, last_real), 0)
    first = np.minimum(np.maximum(t, first_real), last)
    left, right = lo[r, first], hi[r, last] + 1
    count = -(-(other - r) // axis.split)
    if columns:
        left, right = 0 * left, count + 0 * right
    steps = np.maximum(-(-(right - left) // chunk), 0)
    alone = bool(steps.max(initial=0) <= 1)  # no loop is printed, so a tile that sees nothing computes a chunk as well
    if alone:
        steps = np.maximum(steps, 1)
    inner_left, inner_right = lo[r, last], hi[r, first] + 1
    skip = np.minimum(-(-np.maximum(inner_left - left, 0) // chunk), steps)
    full = np.maximum(np.minimum((inner_right - left) // chunk, steps) - skip, 0)
    if columns:
        full = 0 * full
    same = bool(((lo[r, first] == lo[r, last]) & (hi[r, first] == hi[r, last])).all()) and not columns
    floor = 0 * r if side == "q" else -(-(axis.before_queries - r) // axis.split)
    # (a chunk of one column is moved nowhere, and reaches beyond the axis where a tile sees nothing)
    moved = left if same or columns or chunk == 1 else np.maximum(np.minimum(left, count - np.maximum(steps, 1) * chunk), floor)
    exact = same and bool((np.maximum(right - left, 0) % chunk == 0).all()) and not (alone and bool((right <= left).any()))
    return Walk(
        programs=tiles * classes,
        steps=int(steps.sum()),
        most=int(steps.max(initial=0)),
        full=int(full.sum()),
        partial=int((steps - full).sum()),
        left=int(skip.sum()),
        overruns=bool((moved + np.maximum(steps, 1) * chunk > count).any()),
        exact=exact,
        one_box=same,
        passes=bool((left + np.maximum(steps, 1) * chunk > count).any()),
        rest=_rest(right - left, chunk) if same else 0,
    )


def walks(g: Geometry, side: Side, tile: Tile) -> tuple[Walk, ...]:
    """Every axis of a geometry."""
    out, over = [], passes_over([a.others for a in g.axes], tile.rows)
    for i, (axis, form, rows, chunk) in enumerate(zip(g.axes, g.structure.axes, tile.rows, tile.chunk, strict=True)):
        how = {"columns": side == "k" and form.inverse_lo is None, "wrap": tile.wrapped(i), "others": axis.others if over else None}
        out.append(walk(axis.proved or axis, side, rows, chunk, **how))
    return _evened(tuple(out), tile.chunk)


def _evened(ws: tuple[Walk, ...], chunk: tuple[int, ...]) -> tuple[Walk, ...]:
    """With columns that fill no whole chunk as a chunk of their own, where the inner loop's axis alone has such, and enough."""
    i = innermost(ws)
    w, rest = ws[i], ws[i].rest * math.prod(chunk) // chunk[i]
    fills = math.prod(chunk) == padded(math.prod(chunk)) and rest == padded(rest)
    if w.exact or not w.rest or not fills or not all(other.exact for other in ws if other is not w):
        return ws
    steps = w.steps - w.programs * (1 - Fraction(w.rest, chunk[i]))
    even = replace(w, steps=steps, partial=0, overruns=False, exact=True, passes=False, odd=w.rest)
    return (*ws[:i], even, *ws[i + 1 :])


def innermost(ws: tuple[Walk, ...]) -> int:
    """The axis whose chunks form the inner loop: the one with the most, and the first of these."""
    return max(range(len(ws)), key=lambda a: (ws[a].most, -a))


def issued(g: Geometry, side: Side, tile: Tile) -> int:
    """Score elements one head's programs compute for grid pairs."""
    return int(math.prod(w.steps for w in walks(g, side, tile)) * tile.bm * tile.bn)
