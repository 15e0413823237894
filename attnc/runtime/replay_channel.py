"""Calls of channel attention to be run again: see `attnc.runtime.replay`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.cpp_host import ChannelProblem, channel_problem
from attnc.runtime import cpp
from attnc.runtime.call import empty_like_order
from attnc.runtime.layout import Layout, rows_of_out, rows_undone, three
from attnc.runtime.replay import CPU, Given, Plan, Replay

WORDS = ctypes.c_uint64 * (ctypes.sizeof(ChannelProblem) // 8)


def _plan(scale: float, backward: bool, rows: dict[str, Tensor]) -> Plan:
    """Addresses are those of `rows`, by the names of the structure."""
    q = rows["q"]
    filled = ChannelProblem.from_buffer_copy(channel_problem(tuple(rows), q.shape, tuple([t.stride() for t in rows.values()])))
    filled.threads, filled.scale = torch.get_num_threads(), scale
    places = [getattr(ChannelProblem, n).offset // 8 for n in rows]
    return Plan(cpp.channel_kernel(q, rows["k"], rows["v"], backward), WORDS, bytes(filled), tuple(places))


@dataclass(eq=False)
class ChannelReplay(Replay):
    """One step of channel attention."""

    layout: Layout
    views: Callable[..., tuple[Tensor, ...]]  # what is given as rows
    roles: tuple[int, int, int]  # which of the rows the step takes as q, k and v
    scale: float
    backend: str
    moves: tuple[int, ...]  # bytes from the beginning of the one tensor to its three parts
    forward: Plan
    out: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides, as the user gets it
    rows: torch.Size  # its shape as rows
    dtype: torch.dtype
    backwards: dict[tuple[int, ...], Plan] = field(default_factory=dict)  # by the strides of the output's gradient

    def _addresses(self, tensors: Given) -> list[int]:
        given = [tensors[0].data_ptr() + m for m in self.moves] if len(tensors) == 1 else [t.data_ptr() for t in tensors]
        return [given[r] for r in self.roles]

    def _rows(self, tensors: Given) -> list[Tensor]:
        rows = three(self.views(*tensors))
        return [rows[r] for r in self.roles]

    def run(self, given: Given) -> tuple[Tensor, ...]:
        out = torch.empty_strided(*self.out, dtype=self.dtype, device=CPU)
        self.forward([*self._addresses(given), out.data_ptr()])
        return (out,)

    def gradients(self, given: Given, made: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
        into = tuple(empty_like_order(t, t.shape[-1]) for t in given)
        strides = grad_out.stride()
        if strides not in self.backwards:
            rows = dict(zip("qkv", self._rows(given), strict=True)) | {"grad_out": rows_of_out(grad_out, self.layout, self.rows)}
            rows |= dict(zip(("dq", "dk", "dv"), self._rows(into), strict=True))
            self.backwards[strides] = _plan(self.scale, True, rows)
        self.backwards[strides]([*self._addresses(given), grad_out.data_ptr(), *self._addresses(into)])
        return [*into]

    def gradients_seen(self, given: Given, made: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
        seen = rows_of_out(grad_out, self.layout, self.rows)
        found = torch.ops.attnc.channel_backward(*self._rows(given), seen, self.scale, self.backend)
        parts = [found[self.roles.index(i)] for i in range(3)]
        whole = [torch.stack(parts)] if len(given) == 1 else parts
        return [rows_undone(g, self.layout, t.shape) for g, t in zip(whole, given, strict=True)]


def record_channel(
    given: Given, views: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], steps: list[tuple[Any, tuple[int, int, int]]],
    layout: Layout, out: Tensor, scale: float, backend: str,
) -> ChannelReplay | None:  # fmt: skip
    """A call that has been run, for calls like it; None where it is more than one step.

    given: the user's tensors. rows: q, k and v seen by `views`. steps: of the mechanism. out: as the user got it.
    """
    values = three(rows)
    if len(steps) != 1 or sorted(steps[0][1]) != [0, 1, 2] or not out.numel():
        return None
    roles = steps[0][1]
    q, k, v = (values[r] for r in roles)
    plan = _plan(scale, False, {"q": q, "k": k, "v": v, "out": rows_of_out(out, layout, q.shape)})
    moves = tuple(t.data_ptr() - given[0].data_ptr() for t in values)
    return ChannelReplay(layout, views, roles, scale, backend, moves, plan, (out.shape, out.stride()), q.shape, out.dtype)
