"""Calls of channel attention to be run again: see `attnc.runtime.replay`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnc.codegen.cpp_host import ChannelProblem, channel_problem
from attnc.runtime import cpp
from attnc.runtime.call import empty_like_order
from attnc.runtime.layout import Layout, rows_of_out, rows_undone, three
from attnc.runtime.replay import CPU, Given, Plan, Replay, places

T = TypeVar("T")
ROWS, GRADIENTS = ("q", "k", "v"), ("dq", "dk", "dv")
Roles = tuple[int, int, int]


def _by_role(roles: Roles, names: tuple[str, str, str], of: Sequence[T]) -> dict[str, T]:
    return {n: of[r] for n, r in zip(names, roles, strict=True)}


def _plan(scale: float, backward: bool, rows: dict[str, Tensor], where: dict[str, tuple[int, int]], count: int) -> Plan:
    """where: each of the rows is, in a call's `count` tensors."""
    q = rows["q"]
    filled = ChannelProblem.from_buffer_copy(channel_problem(tuple(rows), q.shape, tuple([t.stride() for t in rows.values()])))
    filled.threads, filled.scale = torch.get_num_threads(), scale
    moves = [(getattr(ChannelProblem, n).offset, *place) for n, place in where.items()]
    return Plan(cpp.channel_kernel(q, rows["k"], rows["v"], backward).again, bytes(filled), moves, count)


@dataclass(eq=False)
class ChannelReplay(Replay):
    """One step of channel attention."""

    layout: Layout
    views: Callable[..., tuple[Tensor, ...]]  # what is given as rows
    roles: Roles  # which of the rows the step takes as q, k and v
    scale: float
    backend: str
    forward: Plan
    out: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides, as the user gets it
    rows: torch.Size  # its shape as rows
    dtype: torch.dtype
    backwards: dict[tuple[int, ...], Plan] = field(default_factory=dict)  # by the strides of the output's gradient

    def _rows(self, tensors: Given) -> tuple[Tensor, ...]:
        rows = three(self.views(*tensors))
        return tuple(rows[r] for r in self.roles)

    def run(self, given: Given, more: bool) -> tuple[Tensor, ...]:
        out = torch.empty_strided(*self.out, dtype=self.dtype, device=CPU)
        addresses = [t.data_ptr() for t in given]
        addresses.append(out.data_ptr())
        self.forward(addresses)
        return (out,)

    def gradients(self, given: Given, made: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
        into = tuple(empty_like_order(t, t.shape[-1]) for t in given)
        strides = grad_out.stride()
        if strides not in self.backwards:
            self.backwards[strides] = self._backward(given, grad_out, into)
        self.backwards[strides]([t.data_ptr() for t in (*given, grad_out, *into)])
        return [*into]

    def _backward(self, given: Given, grad_out: Tensor, into: Given) -> Plan:
        n = len(given)
        rows, where = {"grad_out": rows_of_out(grad_out, self.layout, self.rows)}, {"grad_out": (n, 0)}
        for names, first, tensors in ((ROWS, 0, given), (GRADIENTS, n + 1, into)):
            parts = three(self.views(*tensors))
            rows |= _by_role(self.roles, names, parts)
            where |= _by_role(self.roles, names, places(first, tensors, parts))
        return _plan(self.scale, True, rows, where, 2 * n + 1)

    def gradients_seen(self, given: Given, made: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
        seen = rows_of_out(grad_out, self.layout, self.rows)
        found = torch.ops.attnc.channel_backward(*self._rows(given), seen, self.scale, self.backend)
        parts = [found[self.roles.index(i)] for i in range(3)]
        whole = [torch.stack(parts)] if len(given) == 1 else parts
        return [rows_undone(g, self.layout, t.shape) for g, t in zip(whole, given, strict=True)]


def record_channel(
    given: Given, views: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], steps: list[tuple[Any, Roles]],
    layout: Layout, out: Tensor, scale: float, backend: str,
) -> ChannelReplay | None:  # fmt: skip
    """A call that has been run, for calls like it; None where it is more than one step.

    given: the user's tensors. rows: q, k and v seen by `views`. steps: of the mechanism. out: as the user got it.
    """
    values = three(rows)
    if len(steps) != 1 or sorted(steps[0][1]) != [0, 1, 2] or not out.numel():
        return None
    roles = steps[0][1]
    n, seen = len(given), _by_role(roles, ROWS, values)
    q = seen["q"]
    where = _by_role(roles, ROWS, places(0, given, values)) | {"out": (n, 0)}
    plan = _plan(scale, False, seen | {"out": rows_of_out(out, layout, q.shape)}, where, n + 1)
    return ChannelReplay(layout, views, roles, scale, backend, plan, (out.shape, out.stride()), q.shape, out.dtype)
