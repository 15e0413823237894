"""Attention calls to be run again: see `attnc.runtime.replay`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.cpp_host import PADS, Ready, real_of
from attnc.runtime import cpp, operator, tuner
from attnc.runtime.call import Call, empty_like_order, known_tables
from attnc.runtime.layout import Layout, rows_of_out, rows_undone, three
from attnc.runtime.replay import CPU, Given, Plan, Replay

BACKWARD = ("q", "k", "v", "out", "lse", "grad_out", "dq", "dk", "dv")  # the order of addresses


def _plan(run: Callable[[Any], Any], ready: Ready, scale: float, rows: dict[str, Tensor], tables: dict[str, Tensor]) -> Plan:
    """Addresses are those of `rows`, then of `tables`; in a backward, those of the gradients of real tables follow."""
    kind, filled = ready.type, ready.problem(scale, rows, tables)
    places = [getattr(kind, n).offset for n in rows]
    data, gradient = {n: getattr(kind, n).offset for n in PADS}, []
    for group, names in zip(("tables", "int_tables"), ready.names, strict=True):
        entries = getattr(filled, group)
        for n, entry in zip(names, entries, strict=False):
            start = ctypes.addressof(entry) - ctypes.addressof(filled)
            data[n] = start + type(entry).data.offset
            if group == "tables" and "dq" in rows:
                gradient.append(start + type(entry).gradient.offset)
    places += [*(data[n] for n in tables), *gradient]
    words = ctypes.sizeof(kind) // 8
    return Plan(run, ctypes.c_uint64 * words, bytes(filled), tuple(p // 8 for p in places))


@dataclass(eq=False)
class AttendReplay(Replay):
    """One kernel of attention."""

    call: Call
    layout: Layout
    views: Callable[..., tuple[Tensor, ...]]  # q, k and v (or the one tensor) as rows
    rest: tuple[Any, ...]  # what operators take after the tables
    count: int  # tensors that hold q, k and v
    moves: tuple[int, ...]  # bytes from the beginning of the one tensor to q, k and v
    read: tuple[tuple[str, int | Tensor, torch.dtype | None], ...]  # tables: which one given or what else; the dtype that is read
    forward: Plan
    out: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides, as the user gets it
    rows: torch.Size  # its shape as rows
    lse: torch.Size
    dtype: torch.dtype
    backwards: dict[tuple[int, ...], tuple[Plan, Ready]] = field(default_factory=dict)  # by the strides of the output's gradient

    @property
    def tune(self) -> bool:
        """Candidates are measured where nothing is kept of them."""
        return bool(self.rest[-2])

    def differentiable(self, return_lse: bool) -> bool:
        maps = self.call.attend.q_map, self.call.attend.k_map
        return not return_lse and maps == (None, None) and not any(n in PADS for n, _, _ in self.read)

    def _addresses(self, tensors: tuple[Tensor, ...]) -> list[int]:
        """Of q, k and v, or of their gradients."""
        if self.count == 3:
            return [t.data_ptr() for t in tensors[:3]]
        start = tensors[0].data_ptr()
        return [start + m for m in self.moves]

    def _tables(self, given: Given) -> list[Tensor]:
        """As the kernel reads them."""
        tables = [t if isinstance(t, Tensor) else given[t] for _, t, _ in self.read]
        return [t if dtype is None else t.to(dtype).contiguous() for t, (_, _, dtype) in zip(tables, self.read, strict=True)]

    def run(self, given: Given) -> tuple[Tensor, Tensor]:
        out = torch.empty_strided(*self.out, dtype=self.dtype, device=CPU)
        lse = torch.empty(self.lse, dtype=real_of(self.dtype), device=CPU)
        tables = self._tables(given)
        self.forward([*self._addresses(given), out.data_ptr(), lse.data_ptr(), *[t.data_ptr() for t in tables]])
        return out, lse

    def gradients(self, given: Given, made: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
        out, lse = made
        into = tuple(empty_like_order(t, t.shape[-1]) for t in given[: self.count])
        tables = self._tables(given)
        strides = grad_out.stride()
        if strides not in self.backwards:
            self.backwards[strides] = self._backward(given, tables, out, lse, grad_out, into)
        plan, ready = self.backwards[strides]
        if not ready.covers:
            for t in into if self.count == 1 else into[1:]:
                t.zero_()
        sums = {
            n: torch.zeros(t.shape, dtype=lse.dtype, device=CPU)
            for n, t in _named(self.read, tables).items()
            if n in ready.names[0]
        }
        kept = (out, lse, grad_out, *tables, *(sums[n] for n in ready.names[0]))
        o, s, g, *others = (t.data_ptr() for t in kept)
        plan([*self._addresses(given), o, s, g, *self._addresses(into), *others])
        found: list[Tensor | None] = [*into, *[None] * (len(given) - self.count)]
        for n, at, _ in self.read:
            if n in sums and isinstance(at, int):
                found[at] = sums[n].to(given[at].dtype)
        return found

    def _backward(
        self, given: Given, tables: list[Tensor], out: Tensor, lse: Tensor, grad_out: Tensor, into: Given
    ) -> tuple[Plan, Ready]:
        q, k, v = three(self.views(*given[: self.count]))
        read = _named(self.read, tables)
        call = replace(self.call, tables=read)
        seen = (rows_of_out(t, self.layout, self.rows) for t in (out, grad_out))
        rows = {"q": q, "k": k, "v": v, "lse": lse} | dict(zip(("out", "grad_out"), seen, strict=True))
        if self.tune:
            tuner.settle(cpp, call, (q, k, v), (rows["out"], lse, rows["grad_out"], None))
        found = cpp.planned(call, q, k, v, True)
        rows |= dict(zip(("dq", "dk", "dv"), three(self.views(*into)), strict=True))
        return _plan(*found, self.call.scale, {n: rows[n] for n in BACKWARD}, read), found[1]

    def gradients_seen(self, given: Given, made: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
        out, lse = made
        rows = self.views(*given[: self.count])
        backward: Any = torch.ops.attnc.attend_backward if self.count == 3 else torch.ops.attnc.attend_packed_backward
        seen = [rows_of_out(t, self.layout, self.rows) for t in (out, grad_out)]
        tables = [given[t] for _, t, _ in self.read if isinstance(t, int)]
        *moved, sums = backward(*rows, tables, seen[0], lse, seen[1], None, *self.rest)
        found: list[Tensor | None] = [rows_undone(g, self.layout, t.shape) for g, t in zip(moved, given, strict=False)]
        found += [None] * (len(given) - self.count)
        for (_, t, _), g in zip(self.read, sums, strict=True):
            if isinstance(t, int) and given[t].is_floating_point():
                found[t] = g
        return found


def _named(read: tuple[tuple[str, Any, Any], ...], tables: list[Tensor]) -> dict[str, Tensor]:
    return {n: t for (n, _, _), t in zip(read, tables, strict=True)}


def record_attend(
    given: Given, names: tuple[str, ...], views: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...],
    tables: dict[str, Tensor], layout: Layout, found: tuple[Tensor, Tensor], rest: tuple[Any, ...],
) -> AttendReplay | None:  # fmt: skip
    """A call that has been run, for calls like it; None where it is more than one kernel, or the next may differ.

    given: the user's tensors, of which the tables are called `names`. rows: q, k and v seen by `views`. tables: all that the
    statement reads. found: out as the user got it, and lse. rest: what operators take after the tables.
    """
    scale, q_grid, k_grid, program, *_ = rest
    q, k, v = three(rows)
    call = operator.single(q, k, tables, scale, q_grid, k_grid, program)
    out, lse = found
    if call is None or not lse.numel() or known_tables(call) or not all(t.is_cpu for t in (*given, *tables.values())):
        return None
    run, ready = cpp.planned(call, q, k, v, False)
    count, real = len(rows), real_of(q.dtype)
    at = {n: count + i for i, n in enumerate(names)}
    wanted = {n: torch.int32 if n in ready.names[1] else real for n in tables}
    read = tuple((n, at.get(n, t), None if t.dtype == wanted[n] and t.is_contiguous() else wanted[n]) for n, t in tables.items())
    shape = torch.Size((*q.shape[:-1], v.shape[-1]))
    tensors = {"q": q, "k": k, "v": v, "out": rows_of_out(out, layout, shape), "lse": lse}
    plan = _plan(run, ready, scale, tensors, {n: t.to(wanted[n]).contiguous() for n, t in tables.items()})
    moves = tuple(t.data_ptr() - given[0].data_ptr() for t in (q, k, v)) if count == 1 else ()
    looks = (out.shape, out.stride()), shape, lse.shape, out.dtype
    return AttendReplay(replace(call, tables={}), layout, views, rest, count, moves, read, plan, *looks)
