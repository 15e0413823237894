"""Attention calls to be run again: see `attnc.runtime.replay`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnc import ir
from attnc.codegen.cpp_host import OF_KEYS, PADS, Ready, integers, real_of
from attnc.runtime import cpp, parts, tuner
from attnc.runtime.call import Call, empty_like_order, known_tables
from attnc.runtime.cpp import Function
from attnc.runtime.layout import Layout, rows_of_out, rows_undone, three
from attnc.runtime.replay import CPU, Given, Plan, Replay, places

OF_ROWS = ("dq", "dk", "dv")
BACKWARD = ("q", "k", "v", "out", "grad_out", "lse", *OF_ROWS)


def _away(part: Tensor, whole: Tensor) -> int:
    """Bytes from the beginning of a tensor to that of a part of it."""
    return part.data_ptr() - whole.data_ptr()


def _own(
    whole: dict[str, Tensor], begin: list[tuple[int, int]], heads: slice, key_heads: slice
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """Some heads of each tensor, and where they begin, in which tensor of a call."""
    part = {name: t[:, key_heads if name in OF_KEYS else heads] for name, t in whole.items()}
    return part, {n: (i, move + _away(part[n], t)) for (n, t), (i, move) in zip(whole.items(), begin, strict=True)}


@dataclass(eq=False)
class AttendReplay(Replay):
    """The kernels of attention, one after the other."""

    attend: ir.Attend  # the statement
    layout: Layout
    views: Callable[..., tuple[Tensor, ...]]  # q, k and v (or the one tensor) as rows
    rest: tuple[Any, ...]  # what operators take after the tables
    count: int  # tensors that hold q, k and v
    names: tuple[str, ...]  # of the tables
    at: dict[str, int]  # those that are given: which of the tensors they are
    held: dict[str, Tensor]  # the others, as the kernel reads them
    converted: tuple[tuple[int, torch.dtype], ...]  # tensors that it reads in another dtype, or made contiguous
    out: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides, as the user gets it
    rows: torch.Size  # its shape as rows
    lse: torch.Size
    dtype: torch.dtype
    real: torch.dtype  # of lse
    learned: tuple[str, ...]  # tables with gradients
    summed: bool  # rows have gradients of several kernels
    forward: tuple[Plan, ...] = ()
    # by the strides of the output's gradient: kernels, and whether they write dk and dv of every key
    backwards: dict[tuple[int, ...], tuple[tuple[Plan, ...], bool]] = field(default_factory=dict)

    @property
    def tune(self) -> bool:
        """Candidates are measured where nothing is kept of them."""
        return bool(self.rest[-2])

    def differentiable(self, return_lse: bool) -> bool:
        if return_lse or any(n in PADS for n in self.names) or (self.summed and self.dtype != self.real):
            return False
        return self.attend.q_map is None and self.attend.k_map is None

    def read(self, given: Given) -> Given:
        """As the kernel reads them; its addresses count only as long as these live."""
        if not self.converted:
            return given
        read = list(given)
        names = {i: n for n, i in self.at.items()}
        with cpp.integers_in(self.attend.name):
            for at, dtype in self.converted:
                t = read[at]
                read[at] = integers(names[at], t) if dtype == torch.int32 else t.to(dtype).contiguous()
        return tuple(read)

    def tables(self, read: Given) -> dict[str, Tensor]:
        return {n: read[self.at[n]] if n in self.at else self.held[n] for n in self.names}

    def plan(
        self, found: tuple[Function, Ready], call: Call, rows: dict[str, Tensor], read: Given, where: dict[str, tuple[int, int]],
        sums: dict[str, int], count: int,
    ) -> Plan:  # fmt: skip
        """One kernel. where: each of the rows is, in a call's `count` tensors. sums: which of those are tables' gradients."""
        kernel, ready = found
        kind, filled = ready.type, ready.problem(call.scale, rows, call.tables)
        filled.continues = call.continues
        moves = [(getattr(kind, n).offset, *place) for n, place in where.items()]
        whole = self.tables(read)
        away = {n: _away(t, whole[n]) for n, t in call.tables.items()}
        tables = {n: (self.at[n], away[n]) for n in call.tables if n in self.at}
        moves += [(getattr(kind, n).offset, *tables[n]) for n in PADS if n in tables]
        for group, names in zip(("tables", "int_tables"), ready.names, strict=True):
            for n, entry in zip(names, getattr(filled, group), strict=False):
                start = ctypes.addressof(entry) - ctypes.addressof(filled)
                if n in tables:
                    moves.append((start + type(entry).data.offset, *tables[n]))
                if n in sums:
                    moves.append((start + type(entry).gradient.offset, sums[n], away[n]))
        return Plan(kernel.again, bytes(filled), moves, count, ready)

    def run(self, given: Given, more: bool) -> tuple[Tensor, ...]:
        out = torch.empty_strided(*self.out, dtype=self.dtype, device=CPU)
        read = self.read(given) if self.converted else given
        addresses = [t.data_ptr() for t in read]
        addresses.append(out.data_ptr())
        if not more and len(self.forward) == 1:
            addresses.append(0)
            self.forward[0](addresses)
            return (out,)
        lse = torch.empty(self.lse, dtype=self.real, device=CPU)
        addresses.append(lse.data_ptr())
        for kernel in self.forward:
            kernel(addresses)
        return out, lse

    def gradients(self, given: Given, made: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
        out, lse = made
        into = tuple(empty_like_order(t, t.shape[-1]) for t in given[: self.count])
        read = self.read(given)
        strides = grad_out.stride()
        if strides not in self.backwards:
            self.backwards[strides] = self._backward(read, out, lse, grad_out, into)
        plans, covered = self.backwards[strides]
        if not covered:
            for t in into if self.count == 1 else into[1:]:
                t.zero_()
        tables = self.tables(read)
        sums = {n: torch.zeros(tables[n].shape, dtype=lse.dtype, device=CPU) for n in self.learned}
        addresses = [t.data_ptr() for t in (*read, out, lse, grad_out, *into, *sums.values())]
        for kernel in plans:
            kernel(addresses)
        found: list[Tensor | None] = [*into, *[None] * (len(given) - self.count)]
        for n, t in sums.items():
            if n in self.at:
                found[self.at[n]] = t.to(given[self.at[n]].dtype)
        return found

    def _backward(self, read: Given, out: Tensor, lse: Tensor, grad_out: Tensor, into: Given) -> tuple[tuple[Plan, ...], bool]:
        q, k, v = three(self.views(*read[: self.count]))
        gradients, n = three(self.views(*into)), len(read)
        seen = (rows_of_out(t, self.layout, self.rows) for t in (out, grad_out))
        whole = dict(zip(BACKWARD, (q, k, v, *seen, lse, *gradients), strict=True))
        begin = places(0, read[: self.count], (q, k, v)) + [(n, 0), (n + 2, 0), (n + 1, 0)] + places(n + 3, into, gradients)
        first = n + 3 + len(into)
        sums = {name: first + i for i, name in enumerate(self.learned)}
        plans: tuple[Plan, ...] = ()
        covered = True
        scale, q_grid, k_grid, program, *_ = self.rest
        for heads, key_heads, call in parts.calls(q, k, self.tables(read), scale, q_grid, k_grid, program, backward=True):
            part, where = _own(whole, begin, heads, key_heads)
            rows = part["q"], part["k"], part["v"]
            if self.tune:
                tuner.settle(cpp, call, rows, (part["out"], part["lse"], part["grad_out"], None))
            found = cpp.planned(call, *rows, True)
            plans += (self.plan(found, call, part, read, where, sums, first + len(sums)),)
            covered &= found[1].covers
        return plans, covered

    def gradients_seen(self, given: Given, made: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
        out, lse = made
        rows = self.views(*given[: self.count])
        backward: Any = torch.ops.attnc.attend_backward if self.count == 3 else torch.ops.attnc.attend_packed_backward
        seen = [rows_of_out(t, self.layout, self.rows) for t in (out, grad_out)]
        *moved, sums = backward(*rows, [*self.tables(given).values()], seen[0], lse, seen[1], None, *self.rest)
        found: list[Tensor | None] = [rows_undone(g, self.layout, t.shape) for g, t in zip(moved, given, strict=False)]
        found += [None] * (len(given) - self.count)
        for n, g in zip(self.names, sums, strict=True):
            if n in self.at and given[self.at[n]].is_floating_point():
                found[self.at[n]] = g
        return found


def record_attend(
    given: Given, names: tuple[str, ...], views: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...],
    tables: dict[str, Tensor], layout: Layout, found: tuple[Tensor, Tensor], rest: tuple[Any, ...],
) -> AttendReplay | None:  # fmt: skip
    """A call that has been run, for calls like it; None where the next may differ, or is run in another way.

    given: the user's tensors, of which the tables are called `names`. rows: q, k and v seen by `views`. tables: all that the
    statement reads. found: out as the user got it, and lse. rest: what operators take after the tables.
    """
    scale, q_grid, k_grid, program, *_ = rest
    q, k, v = three(rows)
    out, lse = found
    if not lse.numel() or not all(t.is_cpu for t in (*given, *tables.values())):
        return None
    count, real, shape = len(rows), real_of(q.dtype), torch.Size((*q.shape[:-1], v.shape[-1]))
    wanted = {s.name: torch.int32 if s.integer else real for s in parts.table_specs(parts.program_of(program))}
    at = {n: count + i for i, n in enumerate(names)}
    held = {n: t.to(wanted[n]).contiguous() for n, t in tables.items() if n not in at}
    converted = tuple((i, wanted[n]) for n, i in at.items() if tables[n].dtype != wanted[n] or not tables[n].is_contiguous())
    attend = parts.program_of(program).attend
    assert isinstance(attend, ir.Attend)
    backward = parts.calls(q, k, tables, scale, q_grid, k_grid, program, backward=True)
    made = AttendReplay(
        attend,
        layout,
        views,
        rest,
        count,
        tuple(tables),
        at,
        held,
        converted,
        (out.shape, out.stride()),
        shape,
        lse.shape,
        out.dtype,
        real,
        tuple(n for n, dtype in wanted.items() if dtype == real and n not in PADS),
        any(call.continues for *_, call in backward),
    )
    read, n = made.read(given), len(given)
    whole = {"q": q, "k": k, "v": v, "out": rows_of_out(out, layout, shape), "lse": lse}
    begin = [*places(0, given[:count], (q, k, v)), (n, 0), (n + 1, 0)]
    for heads, key_heads, call in parts.calls(q, k, made.tables(read), scale, q_grid, k_grid, program):
        if known_tables(call) or not all(t.is_contiguous() for t in call.tables.values()):
            return None
        part, where = _own(whole, begin, heads, key_heads)
        kernel = cpp.planned(call, part["q"], part["k"], part["v"], False)
        made.forward += (made.plan(kernel, call, part, read, where, {}, n + 2),)
    return made if made.forward else None
