"""Tiles for GPU kernels: which ones a target can hold, what they cost, and which is cheapest."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from attnc import ir
from attnc.schedule.geometry import Axis, Geometry
from attnc.schedule.settled import Facts, around, listed, settled
from attnc.schedule.walks import Side, Tile, Walk, asks, innermost, joins, padded, walks, whole

Kind = Literal["forward", "dq", "dkv"]
MOST = 128  # rows or columns of a tile at most
LANES = 32


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels that walk a relation, and of the plain kernels that prefix tokens need."""

    forward: Tile
    dq: Tile
    dkv: Tile
    flat: Tile
    # products are mma.sync's: Triton lays all warps along the columns of one that has fewer rows than columns, where each then has
    # a part of every row, so that an output of more channels than its tile has rows is summed in parts
    sync: bool = False


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def _lengths(axis: Axis) -> tuple[int, int]:
    """Rows of a residue class, and the longest interval."""
    per = -(-axis.queries // axis.split)
    width = int(np.maximum(axis.hi - axis.lo + 1, 1).max(initial=1))
    return per, width


def _grouped(g: Geometry) -> Tile | None:
    """Whole groups: every axis a block or a point, and the group fits into one tile."""
    rows = []
    for axis, form in zip(g.axes, g.structure.axes, strict=True):
        kind = form.kind.split(" of ")[-1]
        if axis.block and form.equivalence:
            rows.append(axis.block)
        elif kind == "point":
            rows.append(1)
        elif kind in ("full", "residue"):
            length = _lengths(axis)[0]
            rows.append(length if form.split.op != "const" else 1 << (length - 1).bit_length())
        else:
            return None
    if not 9 <= math.prod(rows) <= 64 or all(f.full for f in g.structure.axes):
        return None
    return Tile(tuple(rows), tuple(rows))


def instructions(tile: Tile, width: int, steps: Any, programs: Any, masked: float) -> Any:
    """Thread-instructions, roughly: per chunk its elements, its rows' statistics, its columns' loads; per program its rows.

    The weights were fitted to counted instructions of kernels compiled for sm_90. Counts may be sympy expressions. masked: the
    share of chunks whose pairs are compared.
    """
    lanes = LANES * tile.warps
    each = 5.0 + masked
    per_chunk = tile.bm * tile.bn * each + tile.bn * width * 0.6 + tile.bm * (width + 8) + 24 * lanes
    return steps * per_chunk + programs * (160 * lanes + tile.bm * width * 1.5)


def _cost(g: Geometry, side: Side, tile: Tile, width: int) -> float:
    """Instructions of one head's programs."""
    ws = walks(g, side, tile)
    steps, programs = math.prod(w.steps for w in ws), math.prod(w.programs for w in ws)
    return float(instructions(tile, width, steps, programs, masked(ws, asks(g, tile))))


def masked(ws: tuple[Walk, ...], asked: bool) -> float:
    """The share of chunks with a mask: none where chunks are exact; where one axis is not, its chunks that are not full.

    asked: a condition is evaluated for each pair.
    """
    if asked:
        return 1.0
    cut = [w for w in ws if not w.exact]
    if len(cut) == 1 and cut[0].steps:
        return float(cut[0].partial / cut[0].steps)
    return 1.0 if cut else 0.0


# score elements that one lane may hold at head dimensions up to 64, by how many tiles of them a kernel keeps alive
_HELD = {"forward": 128, "dq": 64, "dkv": 32}
# multiply-adds of one float32 product that one lane may do: they are unrolled, and each is an instruction to compile
_UNROLLED = 512
# bytes of shared memory that a block may have; targets without an entry have at least those of cuda:80
_SHARED = {"cuda:75": 64, "cuda:86": 99, "cuda:89": 99, "cuda:90": 227, "cuda:100": 227, "cuda:120": 99}
_SHARED |= {"hip:gfx942": 64, "hip:gfx1100": 64}
_WARPGROUPS = ("cuda:90", "cuda:100")  # multiply out of shared memory


# channels of a chunk's columns that the lanes of RDNA's waves, which hold an operand twice, have registers for
_RDNA = {"forward": 4096, "dq": 1024, "dkv": 1024}


def rdna(target: str) -> bool:
    """Whether a target is of RDNA: 256 registers a lane, and products of 16 rows by a wave of 32."""
    return target.startswith("hip:gfx11")


def by_sync(itemsize: int, target: str) -> bool:
    """Whether products of a target are mma.sync's."""
    return itemsize <= 2 and target.startswith("cuda") and target not in _WARPGROUPS


def shared_limit(target: str) -> int:
    """Bytes of shared memory that one program may take on a target."""
    return 1024 * _SHARED.get(target, 163)


def alike(target: str) -> str:
    """A target for which the same tiles are chosen."""
    known = ("cuda:80", "cuda:90", "cuda:75", "cuda:86", "hip:gfx942", "hip:gfx1100")
    return next((t for t in known if _like(t) == _like(target)), target)


def _like(target: str) -> tuple[str, int, bool]:
    """What a choice depends on: the family, its shared memory, and whether it is sm_90 or later (see `settled`)."""
    kind, _, version = target.partition(":")
    return "rdna" if rdna(target) else kind, shared_limit(target), kind == "cuda" and int(version) >= 90


def per_pair(g: Geometry, tile: Tile) -> bool:
    """Whether a table or a condition is evaluated for each pair."""
    return bool(g.attend.tables) or asks(g, tile)


def shared_bytes(kind: Kind, tile: Tile, width: int, itemsize: int, target: str = "cuda:80", pairs: bool = False) -> int:
    """Shared memory of one program, from above: rows that products reread, two tensors' chunks of columns, and the weights with
    the gradients of scores. Where warpgroups multiply out of it, both chunks of a pipeline are there, statistics, and barriers.
    pairs: a table or a condition is evaluated for each pair of a chunk, and goes through it to the scores' lanes."""
    rows, columns, weights = tile.bm * width * itemsize, 2 * tile.bn * width * itemsize, tile.bm * tile.bn * itemsize
    rows *= min(tile.stages, 2) if tile.batch > 1 else 1  # those of the next batch item as well
    if target.startswith("hip"):  # rows pass through it once, before the loop
        return max(rows, columns + weights, columns * (1 if tile.warps == 1 else min(tile.stages, 2)))
    more = 1 if kind == "forward" else 2
    columns += (4 * tile.bm + 8) * tile.bn if pairs and tile.batch == 1 else 0  # a whole group has its pairs' values ready
    if target in _WARPGROUPS and itemsize <= 2:
        return more * (rows + weights) + min(tile.stages, 2) * columns + 8 * tile.bn + (64 if target == "cuda:100" else 0)
    return more * (rows + weights) + columns


def unrolled(tile: Tile, width: int) -> float:
    """Multiply-adds of one lane in one product that runs without tensor cores."""
    return tile.bm * tile.bn * width / (LANES * tile.warps)


def _warps(bm: int, bn: int, width: int, itemsize: int, target: str) -> int:
    """Warps of a tile: enough of them that accumulators, and unrolled float32 products, stay small."""
    if rdna(target) and itemsize <= 2:
        return min(bm // 16, 8)
    warps = 1 if bm <= 32 else 4 if bm <= 64 else 8
    if width > 128:
        warps = 2 if bm <= 16 else 4 if bm <= 32 else 8
    if itemsize > 2 and width > 32:
        warps = max(warps, 2)
    while itemsize > 2 and warps < 8 and bm * bn * width > _UNROLLED * LANES * warps:
        warps *= 2
    return warps


def _whole(g: Geometry, width: int, kind: Kind, itemsize: int, target: str) -> Tile | None:
    """A whole group as one tile, where it fits. The same tile for dq and dkv lets one kernel compute all gradients."""
    tile = _grouped(g)
    if width > 32 and rdna(target):
        return None
    if tile is None or (tile.bm > 64 and width > 64) or (kind == "dkv" and width > 128):
        return None
    wraps = tuple(joins(a) for a in g.axes)
    cut = any(a.shift and not w for a, w in zip(g.axes, wraps, strict=True))
    if kind == "forward":
        warps = 2 if width <= 32 and itemsize <= 2 and not cut else 4 if width <= (128 if itemsize <= 2 else 64) else 8
    else:
        # warps beyond four of 16 rows each repeat products, which only pays where registers run out: beside a mask of pairs
        # at 128 channels, and where a table's gradient in float32 lives beside those of rows
        four = itemsize <= 2 and (width <= 64 or target in _WARPGROUPS or (target.startswith("cuda") and not any(wraps)))
        warps = 4 if four or (itemsize > 2 and width <= 64 and not (width > 32 and g.attend.tables)) else 8
    while itemsize > 2 and warps < 8 and tile.bm * tile.bn * width > _UNROLLED * LANES * warps:
        warps *= 2
    # beside a table's gradient in registers there is no room for rows of 128 channels on their way to shared memory, nor beside
    # the mask of two groups where warps have whole rows of both operands
    stages = 2 if kind != "forward" and itemsize <= 2 and width > 64 and g.attend.tables and target == "cuda:90" else 1
    stages = 2 if kind == "forward" and width > 64 and any(wraps) and by_sync(itemsize, target) else stages
    tile = Tile(tile.rows, tile.chunk, len(tile.rows) - 1, warps, stages, 8 if tile.bm <= 64 else 1, wraps if any(wraps) else ())
    if itemsize > 2 and unrolled(tile, width) > _UNROLLED:
        return None
    return tile if shared_bytes(kind, tile, width, itemsize, target) <= shared_limit(target) else None


def _facts(g: Geometry, side: Side, tile: Tile) -> Facts:
    """What a tile's registers depend on."""
    ws = walks(g, side, tile)
    return Facts(
        exact=all(w.exact for w in ws),
        whole=all(whole(a, f, side, n) for a, f, n in zip(g.axes, g.structure.axes, tile.rows, strict=True)),
        one_box=all(w.one_box for w in ws),
        most=max(w.most for w in ws),
        passes=any(w.passes for w in ws),
        mixed=any(0 < w.full < w.steps and not w.exact for w in ws),
        residual=asks(g, tile),
        tables=bool(set(g.attend.tables) - set(g.attend.int_tables)),
    )


@lru_cache(maxsize=1024)
def choose(g: Geometry, width: int, kind: Kind = "forward", itemsize: int = 2, target: str = "cuda:80") -> Tile:
    """The cheapest tile for one kernel that the target can hold; `width` is the larger head dimension in registers."""
    whole = _whole(g, width, kind, itemsize, target)
    if whole is not None:
        return whole
    fitting, least = _fitting(g, width, kind, itemsize, target)
    if not fitting:
        return _launched(g, kind, least, target)
    best = min(fitting, key=lambda x: x[0])[1]
    if itemsize <= 2 and g.structure.residual != ir.TRUE and not asks(g, best):
        best = _around(g, kind, width, target, fitting) or best
        return _launched(g, kind, best, target)
    if itemsize <= 2:
        side: Side = "k" if kind == "dkv" else "q"
        best = settled(best, kind, width, target, lambda t: _facts(g, side, t))
    return _launched(g, kind, best, target)


def _around(g: Geometry, kind: Kind, width: int, target: str, fitting: list[tuple[float, Tile]]) -> Tile | None:
    """The cheapest tile of those that pass over their own block and have one chunk on every other axis, with as many columns as
    such tiles have registers for."""
    wanted = around(kind, width, target)
    side: Side = "k" if kind == "dkv" else "q"
    lines = [i for i, a in enumerate(g.axes) if a.others]

    def alone(t: Tile) -> bool:
        return all(w.most <= 1 or i in lines for i, w in enumerate(walks(g, side, t)))

    for _, t in sorted(fitting, key=lambda x: x[0]):
        rest, at = math.prod(t.chunk) // t.chunk[lines[0]], lines[0]
        for (rows, columns, warps, stages), uneven in zip(wanted, (False, True), strict=False):
            if t.bm != rows or t.bn < 32 or asks(g, t) or columns % rest or not alone(t):
                continue
            wide = replace(t, chunk=(*t.chunk[:at], columns // rest, *t.chunk[at + 1 :]), warps=warps, stages=stages)
            if uneven or all(w.exact for w in walks(g, side, wide)):
                return wide if shared_bytes(kind, wide, width, 2, target, per_pair(g, wide)) <= shared_limit(target) else None
    return None


def _launched(g: Geometry, kind: Kind, tile: Tile, target: str) -> Tile:
    """A tile with its inner axis, the one with the most chunks, and its stages."""
    ws = walks(g, "k" if kind == "dkv" else "q", tile)
    inner = innermost(ws)
    most = 1 if tile.warps == 1 or rdna(target) else 2
    return Tile(tile.rows, tile.chunk, inner, tile.warps, min(tile.stages, most))


def _fitting(
    g: Geometry, width: int, kind: Kind, itemsize: int, target: str, packed: bool = False
) -> tuple[list[tuple[float, Tile]], Tile]:
    """Every tile that the target can hold with its cost, and the least of all tiles. packed: also several blocks to a tile."""
    side: Side = "k" if kind == "dkv" else "q"
    most = MOST if itemsize <= 2 and width <= 128 else 64
    held = _HELD[kind] * min(1.0, 64 / width) * (1.0 if itemsize <= 2 else 0.5)
    per_axis = []
    for axis in g.axes:
        length, span = _lengths(axis)
        rows = [t for t in _powers(most) if t < 2 * length]
        if axis.block:
            rows += [t for t in range(1, min(axis.block, most) + 1) if axis.block % t == 0]
            rows += [t for t in range(axis.block, most + 1, axis.block) if packed and t < length + axis.block]
        if axis.others:
            rows += [t for t in range(1, most + 1) if axis.others[0] % t == 0]
        chunks = [c for c in _powers(most) if c < max(2 * span + 2 * max(rows), 32)]
        if rdna(target) and axis.block:  # no group is a tile there, and a loop over whole chunks alone holds less than two loops
            chunks += [c for c in range(3, min(axis.block, 16) + 1) if axis.block % c == 0 and c not in chunks]
        per_axis.append((sorted(set(rows)), chunks))
    longest = math.prod(max(r) for r, _ in per_axis)
    found: list[tuple[float, Tile]] = []
    least: Tile | None = None
    for rows_ in itertools.product(*[r for r, _ in per_axis]):
        if not min(16, longest) <= math.prod(rows_) <= most:
            continue
        for chunk_ in itertools.product(*[c for _, c in per_axis]):
            if not (9 if rdna(target) else 16) <= math.prod(chunk_) <= most:
                continue
            bm, bn = padded(math.prod(rows_)), padded(math.prod(chunk_))
            tile = Tile(rows_, chunk_, 0, _warps(bm, bn, width, itemsize, target))
            if least is None or bm * bn < least.bm * least.bn:
                least = tile
            if shared_bytes(kind, tile, width, itemsize, target, per_pair(g, tile)) > shared_limit(target):
                continue
            if itemsize > 2 and unrolled(tile, width) > _UNROLLED:
                continue
            if itemsize <= 2 and rdna(target) and bn > 16 and bn * width > _RDNA[kind] // (1 if tile.warps > 2 else 2):
                continue
            one = tile.warps == 1 and all(w.most <= 1 for w in walks(g, side, tile))
            limit = held if one else min(held, 64) if tile.warps > 1 else held / 2 if kind != "dkv" else held
            rows_held = tile.bm * width / (LANES * tile.warps)  # operands stay in registers where one warp multiplies
            columns_held = tile.bn * width / LANES
            # beside them forwards keep a table's addresses
            tight = kind == "dkv" or (width > 32 and (kind == "dq" or bool(g.attend.tables)))
            most_rows, most_columns = (32, 64) if tight else (64, 128)
            if tile.warps == 1 and (rows_held > most_rows or columns_held > most_columns):
                continue
            if tile.bm * tile.bn > max(limit * LANES * tile.warps, 16 * 16):
                continue
            found.append((_cost(g, side, tile, width), tile))
    assert least is not None  # 16 columns fit every axis
    return found, least


@lru_cache(maxsize=256)
def candidates(
    g: Geometry, width: int, kind: Kind = "forward", itemsize: int = 2, target: str = "cuda:80", most: int = 24
) -> tuple[Tile, ...]:
    """What a tuner may choose among for one kernel: the model's own choice, that tile with other warps, stages and batch items,
    the tile that loads the fewest columns for each row among those not much dearer, then others by their cost."""
    own = choose(g, width, kind, itemsize, target)
    fitting, _ = _fitting(g, width, kind, itemsize, target, packed=True)
    best = [_launched(g, kind, t, target) for _, t in heapq.nsmallest(most, fitting, key=lambda x: x[0])]
    out = [own, *(replace(own, warps=w) for w in (own.warps // 2, 2 * own.warps) if 1 <= w <= 8)]
    if own.batch > 1:
        out += [replace(own, batch=b) for b in (1, 4 * own.batch)]
    side: Side = "k" if kind == "dkv" else "q"
    if any(w.most > 1 for w in walks(g, side, own)):  # one chunk is no pipeline
        out += [replace(own, stages=s) for s in (1, 2, 3, 4)]
    if fitting:
        least = min(cost for cost, _ in fitting)
        out.append(_launched(g, kind, min((t for c, t in fitting if c < DEARER * least), key=lambda t: reread(g, side, t)), target))
    out += best
    fits = (t for t in out if itemsize <= 2 or unrolled(t, width) <= _UNROLLED)
    return tuple(itertools.islice(dict.fromkeys((own, *fits)), most))


DEARER = 1.7  # times the least cost that a tile may have which spares memory


def reread(g: Geometry, side: Side, tile: Tile) -> float:
    """Columns loaded for each row: what a tile costs the memory."""
    rows = math.prod(a.queries if side == "q" else a.keys for a in g.axes)
    return float(math.prod(w.steps for w in walks(g, side, tile)) * tile.bn / max(rows, 1))


def of_lists(sides: tuple[tuple[int, ...], tuple[int, ...]], width: int, itemsize: int, target: str, flat: Tile) -> Tiles | None:
    """The tiles of kernels that walk lists of chunks, of these sides of queries and of keys; None where the target has no room."""
    queries, keys = sides
    bm, bn = math.prod(queries), math.prod(keys)
    if bm != padded(bm) or bn != padded(bn):  # a chunk that fills no registers would need a mask of its own
        return None
    tile = Tile(queries, keys, len(queries) - 1, _warps(bm, bn, width, itemsize, target))
    turned = replace(tile, rows=keys, chunk=queries)
    kinds: list[tuple[Kind, Tile]] = [("forward", tile), ("dq", tile), ("dkv", turned)]
    if itemsize <= 2:
        kinds = [(kind, listed(t, kind, width, target)) for kind, t in kinds]
    small = all(shared_bytes(kind, t, width, itemsize, target, pairs=True) <= shared_limit(target) for kind, t in kinds)
    forward, dq, dkv = (t for _, t in kinds)
    fits = small and (itemsize <= 2 or unrolled(tile, width) <= _UNROLLED)
    return Tiles(forward, dq, dkv, flat, by_sync(itemsize, target)) if fits else None


def tiles(g: Geometry, head_dim: int, value_dim: int, itemsize: int = 2, target: str = "cuda:80") -> Tiles:
    """The tiles of all kernels of a program at one size."""
    width = max(padded(head_dim), padded(value_dim))
    forward, dq, dkv = (choose(g, width, kind, itemsize, target) for kind in ("forward", "dq", "dkv"))
    wide = itemsize > 2 and width > 64
    flat = Tile((16,), (16 if wide else 32 if width > 128 or itemsize > 2 else 64,), 0, 4 if wide else 2, 2)
    return Tiles(forward, dq, dkv, flat, by_sync(itemsize, target))
