"""Score elements that a backend's own tiles compute, next to those the statement allows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnc import ir
from attnc.report import boxes
from attnc.schedule.geometry import Geometry
from attnc.schedule.list_choice import Limits, Listed, listed, mentions


def issued(backend: str, program: ir.Program, g: Geometry, *, heads: int, head_dim: int, value_dim: int, dtype: str) -> int:
    """Elements of one batch item's forward: triton counts whole register tiles, cpp the runs of keys of its rows, eager everything;
    but for eager, the blocks of lists where calls walk such.

    dtype: "float32", "float16", ... Pairs with prefix tokens are counted once each, whatever the backend.
    """
    beside = heads * (g.q_prefix * g.n_keys + math.prod(g.q_grid) * g.k_prefix)
    if backend == "triton":
        from attnc.runtime import triton_lists
        from attnc.schedule.tiles import tiles
        from attnc.schedule.walks import issued as of_tile

        itemsize = 4 if dtype == "float32" else 2
        lists = triton_lists.of(g, triton_lists.Kernels(head_dim, value_dim, itemsize, "cuda:80"), heads, 1, ())
        if lists is not None:
            return heads * lists.queries.visited * lists.tiles.forward.bm * lists.tiles.forward.bn + beside
        return heads * of_tile(g, "q", tiles(g, head_dim, value_dim, itemsize).forward) + beside
    if backend == "cpp":
        from attnc.codegen.cpp import Spec
        from attnc.schedule.boxes import tiling
        from attnc.schedule.choose import band_elements, choose

        spec = Spec(program, head_dim, value_dim, dtype)
        kernel, threads = spec.kernel(backward=False), torch.get_num_threads()
        choice = choose(g, kernel, heads, threads)
        if choice.band:
            return heads * band_elements(g, kernel.lanes)
        found = _listed(g, spec.list_limits(backward=False), choice.sides, heads)
        if found is not None:
            return heads * found.elements() + beside
        axes = tiling(g, kernel, choice.sides, heads, threads).axes
        return heads * _runs([_extents(a) for a in axes], kernel.rows, kernel.lanes) + beside
    if backend == "torch":
        from attnc.codegen.torch import LIMITS, sides

        found = _listed(g, LIMITS, sides(g), heads)
        return heads * (boxes.count(g).elements if found is None else found.elements()) + beside
    return heads * g.n_queries * math.prod(a.keys for a in g.axes) + beside


def _listed(g: Geometry, limits: Limits, sides: tuple[int, ...], heads: int) -> Listed | None:
    """The blocks that tiles visit; None where boxes are walked, and where only a call's tables would tell."""
    return None if mentions(g, "load") else listed(g, limits, sides, heads, 1)


Extent = tuple[NDArray[np.int64], NDArray[np.int64]]  # of a piece's queries: first and last + 1 key, from the piece's first key on


def _extents(axis: Any) -> list[Extent]:
    """Per piece of an axis of the C++ tiling, the keys of each of its queries."""
    out = []
    for r, first, stop in axis.pieces:
        lo, hi = axis.lo[r, first:stop].astype(np.int64), axis.hi[r, first:stop].astype(np.int64)
        out.append((lo - lo[0], hi + 1 - lo[0]))
    return out


def _runs(axes: list[list[Extent]], rows: int, lanes: int) -> int:
    """Elements of all tiles: `rows` queries at a time share one run of their box's keys, in whole vectors. One or two keys after
    the last vector are none of their own.

    Runs are bounded on the first axis that has more than one key; on the axes after it every key of the box is computed.
    """
    total = 0
    for pieces in itertools.product(*axes):
        keys = [max(int(end[-1]), 0) for _, end in pieces]
        lead = next((i for i, n in enumerate(keys) if n > 1), len(keys) - 1)
        inner = math.prod(keys[lead + 1 :])
        shape = [len(begin) for begin, _ in pieces]
        at = np.indices(shape).reshape(len(shape), -1)[lead]
        begin, end = pieces[lead][0][at] * inner, pieces[lead][1][at] * inner
        if math.prod(keys) == 0:
            continue
        starts = np.arange(0, len(at), rows)
        first, last = np.minimum.reduceat(begin, starts), np.maximum.reduceat(end, starts)
        box = math.prod(keys[lead:])
        most = box if box >= lanes and box % lanes <= 2 else -(-box // lanes) * lanes
        width = np.minimum(-(-last // lanes) * lanes, most) - first // lanes * lanes
        total += int((np.maximum(width, 0) * np.diff([*starts, len(at)])).sum())
    return total
