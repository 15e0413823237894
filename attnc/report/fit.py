"""Whether a choice of tiles fits a GPU, found by compiling it: spilled registers, shared memory, occupancy. No GPU is needed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc.errors import BuildError
from attnc.report.inspect import compile_module
from attnc.report.weigh import code_of, occupancy
from attnc.runtime.call import Call, empty_like_order, lse_like
from attnc.runtime.triton import text_of
from attnc.runtime.triton_choice import Choice
from attnc.schedule.chips import chip

LEAST = 1 / 32  # of the threads an SM holds, alive at once: with fewer, nothing hides the wait for memory
Rows = tuple[Tensor, ...]


def flaw(call: Call, rows: Rows, choice: Choice, target: str) -> str | None:
    """Why a choice is not worth measuring on a target, or None. Kernels are compiled as the call would launch them."""
    shapes = tuple((tuple(t.shape), t.stride()) for t in rows)
    tables = tuple((n, tuple(t.shape), t.stride(), t.dtype) for n, t in call.tables.items())
    backward = choice.forward is None
    grids = (call.geometry.q_grid,) if call.program.same_grid else (call.geometry.q_grid, call.geometry.k_grid)
    return _flaw(text_of(call, rows, choice, target), shapes, rows[0].dtype, tables, call.scale, grids, backward, target)


@lru_cache(maxsize=1024)
def _flaw(
    text: str, shapes: Any, dtype: torch.dtype, tables: Any, scale: float, grids: Any, backward: bool, target: str
) -> str | None:
    from attnc.runtime.triton import load

    module = load(text)
    rows = [torch.empty_strided(*s, dtype=dtype, device="meta") for s in shapes]
    named = {n: torch.empty_strided(shape, stride, dtype=kind, device="meta") for n, shape, stride, kind in tables}
    out = empty_like_order(rows[0], rows[2].shape[-1])

    def launch() -> None:
        if backward:
            module.run_backward(*rows, out, lse_like(rows[0]), out, None, named, scale, *grids)
        else:
            module.run_forward(*rows, named, scale, *grids)

    try:
        launches = compile_module(module, target, launch)
    except BuildError as e:
        return str(e).splitlines()[0]
    most = 1024 * chip(target).shared_block
    for one in launches:
        code = code_of(one, target)
        if code.spill_bytes:
            return f"{one.name} spills {code.spill_bytes} bytes"
        if code.shared_bytes > most:
            return f"{one.name} takes {code.shared_bytes} bytes of shared memory, a block has {most}"
        share = occupancy(code, one.warps, target)
        if share < LEAST:
            return f"{one.name} keeps {share:.1%} of the threads alive"
    return None
