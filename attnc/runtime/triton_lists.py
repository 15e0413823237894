"""Lists of the chunks that the tiles of a call's Triton kernels visit, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from attnc import ir
from attnc.schedule import tiles
from attnc.schedule.geometry import Geometry
from attnc.schedule.list_choice import Known, Limits, listed
from attnc.schedule.lists import BlockLists, Ints
from attnc.schedule.walks import asks, padded


@dataclass(frozen=True)
class Kernels:
    """What the kernels of a call are made for."""

    head_dim: int
    value_dim: int
    itemsize: int
    target: str

    @property
    def width(self) -> int:
        """Channels in registers."""
        return max(padded(self.head_dim), padded(self.value_dim))

    @property
    def limits(self) -> Limits:
        """Rows and columns that registers have room for."""
        side = 64 if self.itemsize <= 2 else 32
        side = side if self.width <= 128 else side // 2
        side = 16 if tiles.rdna(self.target) and self.itemsize <= 2 else side
        return Limits(side, side, lattice=True)


@dataclass(frozen=True, eq=False)
class Lists:
    """Tiles of the kernels, and per direction what each tile of queries, and each of keys, visits: its lists, and where each chunk
    of them begins."""

    tiles: tiles.Tiles
    queries: BlockLists
    keys: BlockLists
    places: tuple[Ints, Ints]
    filled: bool  # no chunk needs a mask, and every tile has all of its rows


def obstacle(g: Geometry) -> str | None:
    """What keeps Triton kernels from lists, whatever these would save."""
    if g.padded or any(a.queries != a.real_queries for a in g.axes):
        return "virtual rows"
    if any(max(a.queries, a.keys) >> 64 // len(g.axes) for a in g.axes):
        return "long axes"
    return "residue classes" if any(f.split != ir.ONE for f in g.structure.axes) else None


@lru_cache(maxsize=64)
def of(g: Geometry, kernels: Kernels, heads: int, batch: int, tables: Known) -> Lists | None:
    """The lists of a call; None where its tiles walk boxes: lists save too little, or something is in their way."""
    if obstacle(g) is not None or g.structure.residual == ir.TRUE:
        return None
    own = tiles.tiles(g, kernels.head_dim, kernels.value_dim, kernels.itemsize, kernels.target)
    if not any(asks(g, t) for t in (own.forward, own.dq, own.dkv)):
        return None
    found = listed(g, kernels.limits, own.forward.rows, heads, batch, tables)
    if found is None:
        return None
    chosen = tiles.of_lists((found.query_sides, found.key_sides), kernels.width, kernels.itemsize, kernels.target, own.flat)
    if chosen is None:
        return None
    queries, keys = found.for_chunks()
    uncut = all(n % side == 0 for a, *sides in zip(g.axes, found.query_sides, found.key_sides, strict=True)
                for n, side in zip((a.queries, a.keys), sides, strict=True))  # fmt: skip
    filled = uncut and all(int(x.full.sum()) == x.visited for x in (queries, keys))
    return Lists(chosen, queries, keys, (_places(queries.blocks, found.keys), _places(keys.blocks, found.queries)), filled)


def _places(blocks: Ints, pieces: tuple[Ints, ...]) -> Ints:
    """First coordinates of blocks: of several axes in the bits of one number, the first axis in the highest."""
    out: Ints = np.zeros(len(blocks), np.int64)
    for p, at in zip(pieces, np.unravel_index(blocks, [len(p) for p in pieces]), strict=True):
        out = out << 64 // len(pieces) % 64 | p[at, 1].astype(np.int64)
    return out.astype(np.int32) if len(pieces) == 1 else out


@lru_cache(maxsize=64)
def on(lists: Lists, device: torch.device) -> tuple[tuple[Tensor, ...], ...]:
    """What launches are given: offsets, numbers of full chunks, and chunks' places, of queries and of keys."""
    each = zip((lists.queries, lists.keys), lists.places, strict=True)
    return tuple(tuple(torch.from_numpy(x).to(device) for x in (y.offsets, y.full, places)) for y, places in each)
