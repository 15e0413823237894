"""Tiles as their registers turned out when compiled: what a tile's cost does not know.

A kernel's registers follow from what it keeps beside a chunk's scores (sums, rows, conditions on pairs), but whether they suffice
is the compiler's doing. The steps here are as few as keep the library's kernels from spilling, and say what is in the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnc.schedule.tiles import Kind
    from attnc.schedule.walks import Tile


@dataclass(frozen=True)
class Facts:
    """What registers depend on, of a statement with a tile."""

    exact: bool  # no chunk has pairs to mask
    whole: bool  # every row of every tile exists, so that no row's place is kept
    one_box: bool  # all rows of a tile see the same columns
    most: int  # chunks that a program visits at most
    passes: bool  # some chunk reaches beyond the axis: its rows are asked whether they exist
    mixed: bool  # some chunks of a program have pairs to mask and some have none: two loops
    residual: bool  # a condition on pairs, whose parts live beside the scores
    tables: bool  # tables of pairs do


def settled(tile: Tile, kind: Kind, width: int, target: str, facts_of: Callable[[Tile], Facts]) -> Tile:
    """The tile that is launched for one that was found cheapest, for products in half precision."""
    facts, (family, _, version) = facts_of(tile), target.partition(":")
    if family == "hip":
        return (_cdna if version == "gfx942" else _rdna)(tile, kind, width, facts)
    if facts.tables and tile.warps == 1 and tile.bn > {"forward": 128, "dq": 64, "dkv": 32}[kind]:  # a table's places are many
        return _half(tile)
    if int(version) < 90:
        return _ampere(tile, kind, width, facts)
    return _hopper(tile, kind, width, target, facts, facts_of)


def listed(tile: Tile, kind: Kind, width: int, target: str) -> Tile:
    """The same of a tile whose sides are those of lists, so that its warps alone may be others."""
    family, _, version = target.partition(":")
    if family == "hip":
        warps = {"forward": 1, "dq": 2, "dkv": 4}[kind]
        return tile if version == "gfx942" else replace(tile, warps=max(tile.warps, warps), stages=1)
    if version == "100":  # pipelined, products leave tensor memory
        return replace(tile, stages=1)
    wide = int(version) < 90 and kind == "dkv" and width == 128 and tile.bm == tile.bn == 64
    return replace(tile, warps=8) if wide else tile


def around(kind: Kind, width: int, target: str) -> tuple[tuple[int, int, int, int], ...]:
    """Rows, columns, warps and stages of tiles that pass over their own block, whose rows are few: four warps, and as many columns
    as their registers have room for, which several programs on a multiprocessor load in turn. The first is for columns that whole
    chunks hold, but for a smaller one. (): as they cost."""
    family, _, version = target.partition(":")
    if family == "hip":
        return ()
    late, wide, square = int(version) >= 90, (64, 128, 4, 1), (64, 64, 4, 2)
    if kind == "dkv" and width <= 64:
        narrow = square if width <= 32 else (64, 32, 2, 2)  # 32 rows of a warp read each chunk once
        return (wide, wide if int(version) >= 100 else square) if late else (narrow, narrow)
    if kind == "dkv":
        return (square, square) if late else ((64, 32, 4, 2),) * 2
    if kind == "forward" and not late and width > 64:
        return (64, 128, 4, 2), square
    if kind == "dq" and not late and width > 64:
        return ((64, 64, 4, 1),) * 2
    return (wide, wide) if kind == "forward" or (late and width <= 64) else (square, square)


def scaled(sides: tuple[int, ...], up: bool) -> tuple[int, ...]:
    """Sides with the longest of them doubled or halved."""
    at = sides.index(max(sides))
    return (*sides[:at], sides[at] * 2 if up else sides[at] // 2, *sides[at + 1 :])


def _half(tile: Tile, stages: int | None = None) -> Tile:
    """With half the chunk."""
    return replace(tile, chunk=scaled(tile.chunk, up=False), stages=stages or tile.stages)


def _ampere(tile: Tile, kind: Kind, width: int, facts: Facts) -> Tile:
    """Operands pass through registers."""
    sides = (tile.bm, tile.bn)
    if kind == "dkv":
        if width == 64 and sides == (128, 64) and facts.whole:  # a warp's rows read each chunk anew: 32 of them are cheaper than 16
            return replace(_half(tile), warps=4)
        if width == 64 and sides == (64, 64) and (facts.residual or not facts.exact):
            return _half(tile)
        if width == 128 and tile.bm == 128:
            return replace(tile, rows=scaled(tile.rows, up=False), warps=4)
        if width == 128 and sides == (64, 32) and not facts.whole and facts.most > 8:
            # rows' places and a long box are kept beside both sums: no room for the places of the next chunk
            return replace(tile, stages=1)
    elif kind == "dq":
        if sides == (128, 128) and (width == 64 or not facts.exact):
            return _half(tile)
        if width == 64 and sides == (64, 64) and facts.residual:
            return _half(tile)
        if width == 128 and tile.bm == 128 and facts.most <= 8:  # a loop so short is unrolled, and its chunks overlap
            return replace(tile, rows=scaled(tile.rows, up=False), warps=4, stages=1)
    elif sides == (128, 128) and width <= 32 and facts.exact and facts.most > 8:
        return replace(_half(tile), warps=4)
    elif sides == (128, 128) and (facts.residual if width <= 64 else facts.one_box and not (facts.exact and facts.whole)):
        return _half(tile)
    elif width == 128 and sides == (64, 128) and (facts.residual or facts.tables):
        return _half(_half(tile, stages=1)) if facts.tables else _half(tile, stages=1)
    return tile


def _hopper(tile: Tile, kind: Kind, width: int, target: str, facts: Facts, facts_of: Callable[[Tile], Facts]) -> Tile:
    """Warpgroups multiply out of shared memory, with sums in registers or, on sm_100, in a memory of their own."""
    sides = (tile.bm, tile.bn)
    if kind == "dkv" and width == 128 and sides == (64, 32) and facts.tables:
        return _half(tile, stages=1)
    if width != 64:
        return tile
    if sides == (64, 64) and tile.warps == 4 and facts.residual and (kind == "dkv" or (kind == "dq" and target != "cuda:90")):
        return _half(tile)
    if kind == "dq" and sides == (128, 128) and target == "cuda:100":  # pipelined, both products' sums leave tensor memory
        return _half(tile, stages=1) if facts.residual else replace(tile, stages=1)
    if kind == "dkv" and sides == (128, 64):
        # fewer instructions by one warpgroup that does not pipeline (several of them share a multiprocessor)
        half = replace(tile, rows=scaled(tile.rows, up=False), warps=4, stages=1)
        wide = replace(half, chunk=scaled(tile.chunk, up=True))
        square = replace(tile, chunk=wide.chunk, stages=1)
        facts = facts_of(square)
        if facts.mixed and not (facts.passes or facts.residual or facts.tables) and target == "cuda:90":
            return square  # one loop over chunks with a mask, of one comparison, leaves the registers that wide chunks take
        return wide if facts_of(wide).exact or (target == "cuda:100" and not facts.residual) else half
    return tile


def _cdna(tile: Tile, kind: Kind, width: int, facts: Facts) -> Tile:
    """512 registers a lane, which waves of four share: one wave to a quarter of 64 rows."""
    if width != 64 or tile.warps != 8 or tile.bm != 128:
        return tile
    if kind == "forward" and not facts.residual:
        return tile if facts.exact else replace(tile, stages=1)
    chunk, most = tile.chunk, 32 if kind == "dkv" else 64
    while math.prod(chunk) > most:
        chunk = scaled(chunk, up=False)
    return replace(tile, rows=scaled(tile.rows, up=False), chunk=chunk, warps=4, stages=2 if kind == "dkv" else 1)


def _rdna(tile: Tile, kind: Kind, width: int, facts: Facts) -> Tile:
    """256 registers a lane, and rows of which each half of a wave holds a copy: waves share what is beside two sums and a mask."""
    if kind != "dkv" or width > 64:
        return tile
    rows, shared = tile.rows, (facts.mixed and not facts.one_box) or facts.tables
    while math.prod(rows) > (32 if shared else 64) and max(rows) % 2 == 0:
        rows = scaled(rows, up=False)
    return replace(tile, rows=rows, warps=4 if shared else min(tile.warps, 4))
