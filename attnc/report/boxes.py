"""Tiles of about 64 queries and the boxes of keys they visit, counted per axis: a yardstick that no backend's choice changes.

A tile owns a run of queries per axis and walks the box of keys they see in chunks that begin at the first such key. A chunk is
full where every query of the tile sees every key of it, partial elsewhere. Counts are products of per-axis counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attnc import ir
from attnc.schedule.geometry import Axis, Geometry

TOKENS = 64


@dataclass(frozen=True)
class Counts:
    """Chunks of all tiles of one head: visited ones are full or partial, the others empty."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    tiles: int
    full: int
    partial: int
    empty: int
    elements: int  # (query, key) pairs of the boxes visited, cut to the axes


def tile_sides(g: Geometry) -> tuple[int, ...]:
    """Queries per axis. A group that sees itself alone stays whole, other blocks are joined; the rest shares what is left of 64."""
    thin = [int((a.hi - a.lo).max(initial=0)) <= 0 for a in g.axes]
    wide = sum(not t for t in thin) or 1
    side = round(TOKENS ** (1 / wide))
    closed = [1 < a.block <= 2 * side and int((a.hi - a.lo).max(initial=0)) < a.block for a in g.axes]
    left = TOKENS / math.prod(a.block for a, c in zip(g.axes, closed, strict=True) if c)
    free = sum(not t and not c for t, c in zip(thin, closed, strict=True)) or 1
    each = max(1, round(left ** (1 / free)))
    out = []
    for a, t, c in zip(g.axes, thin, closed, strict=True):
        joined = each // a.block * a.block if 1 < a.block <= each else each
        out.append(min(1 if t else a.block if c else joined, a.count(max(a.queries, a.keys), 0)))
    return tuple(out)


def tiles_of(a: Axis, rows: int) -> list[tuple[int, int, int]]:
    """(residue, first query index, last + 1) of each tile that holds a real query, cut to the real ones."""
    out = []
    for r in range(a.classes):
        first = max(0, -(-(a.before_queries - r) // a.split))
        stop = (a.before_queries + a.real_queries - 1 - r) // a.split + 1
        start = a.shift % rows if a.block and rows % a.block == 0 else 0
        at = first - (first - start) % rows
        while at < stop:
            out.append((r, max(at, first), min(at + rows, stop)))
            at += rows
    return out


def chunks_of(a: Axis, r: int, first: int, stop: int, columns: int) -> list[tuple[int, int, bool]]:
    """(first key index, last + 1, full) of each chunk a tile visits on an axis."""
    left, right = int(a.lo[r, first]), int(a.hi[r, stop - 1]) + 1
    full_left, full_right = int(a.lo[r, stop - 1]), int(a.hi[r, first]) + 1
    out = []
    for at in range(left, right, columns):
        end = min(at + columns, right)
        out.append((at, end, full_left <= at and end <= full_right))
    return out


def count(g: Geometry) -> Counts:
    """Chunk classes of a geometry. A residual predicate makes every visited chunk partial."""
    rows = tile_sides(g)
    tiles, visited, full, total, elements = 1, 1, 1, 1, 1
    for a, side in zip(g.axes, rows, strict=True):
        t = tiles_of(a, side)
        chunks = [chunks_of(a, r, b, e, side) for r, b, e in t]
        tiles *= len(t)
        visited *= sum(map(len, chunks))
        full *= sum(f for c in chunks for _, _, f in c)
        total *= len(t) * sum(math.ceil(a.count(a.keys, r) / side) for r in range(a.split))
        elements *= sum((e - b) * max(0, int(a.hi[r, e - 1]) + 1 - int(a.lo[r, b])) for r, b, e in t)
    if g.structure.residual != ir.TRUE:
        full = 0
    return Counts(rows, rows, tiles, full, visited - full, total - visited, elements)


def tile_of(g: Geometry, query: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Per axis (residue, first, last + 1) of the tile that holds a query, given by its real coordinates."""
    out = []
    for a, side, c in zip(g.axes, tile_sides(g), query, strict=True):
        at = c + a.before_queries
        r, j = at % a.split, at // a.split
        out.append(next(t for t in tiles_of(a, side) if t[0] == r and t[1] <= j < t[2]))
    return out


def coordinates(a: Axis, r: int, first: int, stop: int) -> np.ndarray:
    """Extended coordinates of indices first .. stop - 1 of residue class r."""
    return np.arange(first, stop) * a.split + r
