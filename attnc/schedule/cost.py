"""The cost of a kernel as a model: operations, bytes, shared memory, waves, and a roofline time from public facts of a GPU.

Everything here is arithmetic on two counts per axis, the programs of a tiling and the chunks they visit (`tiles.walk`). Given
numbers it gives numbers; given `counts`, sympy expressions in the sizes, it gives the same as functions of the sizes. It is a
model: no figure of it was measured, and none claims to have been.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from attnc.schedule import tiles as schedule
from attnc.schedule.chips import Chip
from attnc.schedule.geometry import Geometry
from attnc.schedule.tiles import Kind
from attnc.schedule.walks import Side, Tile, asks, padded, walks

Count = Any  # an int, a float, or a sympy expression in sizes


@dataclass(frozen=True)
class Sizes:
    """What a launch is about besides its grid. Dimensions are those in registers: powers of two, at least 16."""

    heads: int
    kv_heads: int
    batch: int
    head_dim: int
    value_dim: int
    dtype: str = "float16"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 4 if self.dtype == "float32" else 2

    @property
    def width(self) -> int:
        """The larger dimension in registers."""
        return max(padded(self.head_dim), padded(self.value_dim))


@dataclass(frozen=True)
class Work:
    """One kernel's launch. issued: score elements computed; loaded: bytes of rows read, each program for itself; least: bytes if
    each tensor moved once; instructions: thread-instructions, roughly (constants fitted to compiled kernels)."""

    kind: Kind
    tile: Tile
    programs: Count
    issued: Count
    flops: Count
    loaded: Count
    stored: Count
    least: Count
    instructions: Count
    shared: int


@dataclass(frozen=True)
class Time:
    """Seconds by the model, and what bounds them: "tensor cores", "memory" or "instructions". waves: rounds of programs."""

    seconds: float
    bound: str
    waves: float


# what a kernel multiplies for a score element, as multiples of (head_dim, value_dim), and the rows it reads for a row of its
# tile and for a column of a chunk, likewise; rows it writes. `fused` is a group's whole backward in one program.
_PRODUCTS = {"forward": (1, 1), "dq": (2, 1), "dkv": (2, 2), "fused": (3, 2)}
_ROWS = {"forward": (1, 0), "dq": (1, 2), "dkv": (1, 1), "fused": (1, 1)}
_COLUMNS = {"forward": (1, 1), "dq": (1, 1), "dkv": (1, 1), "fused": (1, 1)}
_WRITES = {"forward": (0, 1), "dq": (1, 0), "dkv": (1, 1), "fused": (2, 1)}
# instructions of a kernel over `tiles.instructions`, which ranks the tiles of one kernel: counted for sm_90 (docs/tuning.md)
_HEAVIER = {"forward": 1.35, "dq": 1.35, "dkv": 1.55, "fused": 1.7}


def work(
    kind: str, tile: Tile, sizes: Sizes, *, programs: Count, chunks: Count, rows: Count, columns: Count, masked: float, target: str
) -> Work:
    """One launch, from the programs and chunks of one head. rows, columns: tokens on the tile's side and on the other."""
    s = sizes
    dims = np.array([padded(s.head_dim), padded(s.value_dim)])
    real = np.array([s.head_dim, s.value_dim])
    mine = s.kv_heads if kind == "dkv" else s.heads  # a program of dk and dv walks the heads that share its keys
    per, each = s.batch * s.heads, s.batch * mine
    lanes = schedule.LANES * tile.warps
    visited = chunks * tile.bn
    visited = int(visited) if isinstance(visited, Fraction) else visited  # a smaller chunk beside whole ones
    flops = per * visited * tile.bm * 2 * int(dims @ _PRODUCTS[kind])
    loaded = each * programs * tile.bm * int(real @ _ROWS[kind]) + per * visited * int(real @ _COLUMNS[kind])
    stored = each * rows * int(real @ _WRITES[kind])
    others = s.batch * (s.heads if kind == "dkv" else s.kv_heads)
    least = each * rows * int(real @ _ROWS[kind]) + others * columns * int(real @ _COLUMNS[kind])
    heavier = _HEAVIER[kind]
    instructions = heavier * per * schedule.instructions(tile, s.width, chunks, programs, masked)
    shared_kind: Kind = "forward" if kind == "forward" else "dq" if kind == "dq" else "dkv"
    shared = schedule.shared_bytes(shared_kind, tile, s.width, s.itemsize, target)
    if tile.warps == 1:  # its columns stay in registers
        shared = s.itemsize * tile.bm * (tile.bn + s.width * (1 if kind == "forward" else 2))
    launched = each * programs if tile.batch == 1 else _packed(each * programs, tile, s.batch, lanes)
    return Work(
        shared_kind, tile, launched, per * visited * tile.bm, flops, s.itemsize * loaded, s.itemsize * stored,
        s.itemsize * (least + stored), instructions, shared,
    )  # fmt: skip


def _packed(programs: Count, tile: Tile, batch: int, lanes: int) -> Count:
    """Programs launched where one walks several batch items: as many items as leave programs enough (as the printed host does)."""
    if not isinstance(programs, int):
        return programs / min(tile.batch, batch)
    per = max(1, min(tile.batch, programs // (1024 // tile.warps)))
    return programs // batch * -(-batch // per)


def of_geometry(g: Geometry, kind: str, tile: Tile, sizes: Sizes, target: str) -> Work:
    """One launch at concrete sizes (pairs of prefix tokens aside)."""
    side: Side = "k" if kind == "dkv" else "q"
    ws = walks(g, side, tile)
    rows = [(a.before_queries + a.real_queries, a.keys)[:: 1 if side == "q" else -1] for a in g.axes]
    return work(
        kind,
        tile,
        sizes,
        programs=math.prod(w.programs for w in ws),
        chunks=math.prod(w.steps for w in ws),
        rows=math.prod(r for r, _ in rows),
        columns=math.prod(c for _, c in rows),
        masked=schedule.masked(ws, asks(g, tile)),
        target=target,
    )


def waves(w: Work, sizes: Sizes, chip: Chip) -> float:
    """Rounds of programs the chip runs: programs over the places that threads, shared memory and registers leave. Registers are
    guessed from the tile's operands and accumulators."""
    lanes = chip.lanes * w.tile.warps
    held = (w.tile.bm * (w.tile.bn + 2 * sizes.width) + w.tile.bn * sizes.width * (w.tile.warps == 1)) / lanes
    registers = min(255, 40 + held)
    places = min(chip.threads // lanes, chip.blocks, int(chip.registers // (registers * lanes)))
    if w.shared:
        places = min(places, 1024 * chip.shared // (w.shared + 1024))
    return float(w.programs) / (chip.sms * max(places, 1))


def roofline(w: Work, sizes: Sizes, chip: Chip) -> Time:
    """The time of one kernel alone: the slowest of its products, its instructions and its memory.

    Rows that programs share come from memory once where those of the programs that run together fit into the L2, else each time;
    the last wave counts as a whole one.
    """
    rounds = waves(w, sizes, chip)
    tail = math.ceil(rounds) / rounds if rounds > 0 else 1.0
    together = float(w.least) * min(1.0, 1 / max(rounds, 1e-9))
    moved = float(w.least) if together <= chip.l2 * 2**20 else max(float(w.loaded + w.stored), float(w.least))
    parts = {
        "tensor cores": float(w.flops) / chip.rate(sizes.dtype) * tail,
        "instructions": float(w.instructions) / chip.instructions * tail,
        "memory": moved / (1e9 * chip.bandwidth),
    }
    bound = max(parts, key=parts.__getitem__)
    return Time(parts[bound], bound, rounds)


def total(times: Iterable[Time]) -> Time:
    """Kernels one after the other; what bounds them is what bounds the longest."""
    found = list(times)
    longest = max(found, key=lambda t: t.seconds)
    return Time(sum(t.seconds for t in found), longest.bound, sum(t.waves for t in found))


@lru_cache(maxsize=4096)
def seconds(g: Geometry, kind: str, tile: Tile, sizes: Sizes, chip: Chip) -> float:
    """The model's time of one kernel."""
    return roofline(of_geometry(g, kind, tile, sizes, chip.target), sizes, chip).seconds
