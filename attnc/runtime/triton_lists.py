"""Lists of the chunks that the tiles of a call's Triton kernels visit, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnc import ir
from attnc.schedule import tiles
from attnc.schedule.geometry import Geometry
from attnc.schedule.list_choice import Known, Limits, listed
from attnc.schedule.lists import BlockLists


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
        return max(tiles.padded(self.head_dim), tiles.padded(self.value_dim))

    @property
    def limits(self) -> Limits:
        """Rows and columns that registers have room for."""
        side = 64 if self.itemsize <= 2 else 32
        side = side if self.width <= 128 else side // 2
        side = 16 if tiles.rdna(self.target) and self.itemsize <= 2 else side
        return Limits(side, side, lattice=True)


@dataclass(frozen=True, eq=False)
class Lists:
    """Tiles of the kernels, and per direction what each tile of queries, and each of keys, visits."""

    tiles: tiles.Tiles
    queries: BlockLists
    keys: BlockLists


def obstacle(g: Geometry) -> str | None:
    """What keeps Triton kernels from lists, whatever these would save."""
    if g.padded or any(a.queries != a.real_queries for a in g.axes):
        return "virtual rows"
    return "residue classes" if any(f.split != ir.ONE for f in g.structure.axes) else None


@lru_cache(maxsize=64)
def of(g: Geometry, kernels: Kernels, heads: int, batch: int, tables: Known) -> Lists | None:
    """The lists of a call; None where its tiles walk boxes: lists save too little, or something is in their way."""
    if obstacle(g) is not None or g.structure.residual == ir.TRUE:
        return None
    own = tiles.tiles(g, kernels.head_dim, kernels.value_dim, kernels.itemsize, kernels.target)
    found = listed(g, kernels.limits, own.forward.rows, heads, batch, tables)
    if found is None:
        return None
    chosen = tiles.of_lists((found.query_sides, found.key_sides), kernels.width, kernels.itemsize, kernels.target, own.flat)
    return None if chosen is None else Lists(chosen, *found.for_chunks())


@lru_cache(maxsize=64)
def on(lists: Lists, device: torch.device) -> tuple[tuple[Tensor, ...], ...]:
    """What launches are given: offsets, numbers of full chunks, and chunks, of queries and of keys."""
    each = (lists.queries, lists.keys)
    return tuple(tuple(torch.from_numpy(x).to(device) for x in (y.offsets, y.full, y.blocks)) for y in each)
