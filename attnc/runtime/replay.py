"""Calls of C++ kernels that look like an earlier call, run again with nothing new but the addresses of their tensors.

To find again all that follows from shapes and strides takes longer than a small kernel, and several times as long after other work
has taken the caches. What `attnc.compile` finds once is kept here as the kernel's structure and the places of addresses in it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.cpp_host import PADS, Ready, real_of
from attnc.runtime import cpp, direct, operator, tuner
from attnc.runtime.call import Call, empty_like_order, known_tables
from attnc.runtime.layout import Layout, rows_of_out, rows_undone

BACKWARD = ("q", "k", "v", "out", "lse", "grad_out", "dq", "dk", "dv")  # the order of addresses


@dataclass(frozen=True, eq=False)
class _Plan:
    """A kernel and its structure, as 64-bit words; places: which of them take the addresses of a call, in their order."""

    run: Callable[[Any], Any]
    words: Any
    filled: bytes
    places: tuple[int, ...]

    def __call__(self, addresses: list[int]) -> None:
        structure = self.words.from_buffer_copy(self.filled)
        for place, address in zip(self.places, addresses, strict=True):
            structure[place] = address
        self.run(structure)


def _plan(run: Callable[[Any], Any], ready: Ready, scale: float, rows: dict[str, Tensor], tables: dict[str, Tensor]) -> _Plan:
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
    return _Plan(run, ctypes.c_uint64 * words, bytes(filled), tuple(p // 8 for p in places))


@dataclass(eq=False)
class Replay:
    """A call, to be run again on tensors of the same shapes, strides and dtypes.

    given: q, k and v, or the one tensor that holds them, then the call's tables, all as the user has them.
    """

    call: Call
    layout: Layout
    views: Callable[..., tuple[Tensor, ...]]  # q, k and v (or the one tensor) as rows
    rest: tuple[Any, ...]  # what operators take after the tables
    count: int  # tensors that hold q, k and v
    moves: tuple[int, ...]  # bytes from the beginning of the one tensor to q, k and v
    read: tuple[tuple[str, int | Tensor, torch.dtype | None], ...]  # tables: which one given or what else; the dtype that is read
    forward: _Plan
    out: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides, as the user gets it
    rows: torch.Size  # its shape as rows
    lse: torch.Size
    dtype: torch.dtype
    backwards: dict[tuple[int, ...], tuple[_Plan, Ready]] = field(default_factory=dict)  # by the strides of the output's gradient

    def __call__(self, given: tuple[Tensor, ...], return_lse: bool) -> Tensor | tuple[Tensor, Tensor] | None:
        """out, with lse if asked for. None: gradients are wanted that only the operators give."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            if return_lse or any(n in PADS for n, _, _ in self.read):
                return None
            apply: Callable[..., Tensor] = _Replayed.apply
            return apply(self, *given)
        out, lse = self.run(given)
        return (out, lse) if return_lse else out

    def _addresses(self, tensors: tuple[Tensor, ...]) -> list[int]:
        """Of q, k and v, or of their gradients."""
        if self.count == 3:
            return [t.data_ptr() for t in tensors[:3]]
        start = tensors[0].data_ptr()
        return [start + m for m in self.moves]

    def _tables(self, given: tuple[Tensor, ...]) -> list[Tensor]:
        """As the kernel reads them."""
        tables = [t if isinstance(t, Tensor) else given[t] for _, t, _ in self.read]
        return [t if dtype is None else t.to(dtype).contiguous() for t, (_, _, dtype) in zip(tables, self.read, strict=True)]

    def run(self, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """out and lse."""
        out = torch.empty_strided(*self.out, dtype=self.dtype)
        lse = torch.empty(self.lse, dtype=real_of(self.dtype))
        tables = self._tables(given)
        self.forward([*self._addresses(given), out.data_ptr(), lse.data_ptr(), *[t.data_ptr() for t in tables]])
        return out, lse

    def gradients(self, given: tuple[Tensor, ...], out: Tensor, lse: Tensor, grad_out: Tensor) -> list[Tensor | None]:
        """Of what is given."""
        made = tuple(empty_like_order(t, t.shape[-1]) for t in given[: self.count])
        tables = self._tables(given)
        strides = grad_out.stride()
        if strides not in self.backwards:
            self.backwards[strides] = self._backward(given, tables, out, lse, grad_out, made)
        plan, ready = self.backwards[strides]
        if not ready.covers:
            for t in made if self.count == 1 else made[1:]:
                t.zero_()
        sums = {n: torch.zeros(t.shape, dtype=lse.dtype) for n, t in _named(self.read, tables).items() if n in ready.names[0]}
        kept = (out, lse, grad_out, *tables, *(sums[n] for n in ready.names[0]))
        o, s, g, *others = (t.data_ptr() for t in kept)
        plan([*self._addresses(given), o, s, g, *self._addresses(made), *others])
        found: list[Tensor | None] = [*made, *[None] * (len(given) - self.count)]
        for n, at, _ in self.read:
            if n in sums and isinstance(at, int):
                found[at] = sums[n].to(given[at].dtype)
        return found

    def _backward(
        self, given: tuple[Tensor, ...], tables: list[Tensor], out: Tensor, lse: Tensor, grad_out: Tensor, made: tuple[Tensor, ...]
    ) -> tuple[_Plan, Ready]:
        q, k, v = _three(self.views(*given[: self.count]))
        read = _named(self.read, tables)
        found = cpp.planned(replace(self.call, tables=read), q, k, v, True)
        rows = dict(zip(("dq", "dk", "dv"), _three(self.views(*made)), strict=True))
        rows |= {"q": q, "k": k, "v": v, "lse": lse}
        rows |= {n: rows_of_out(t, self.layout, self.rows) for n, t in (("out", out), ("grad_out", grad_out))}
        return _plan(*found, self.call.scale, {n: rows[n] for n in BACKWARD}, read), found[1]

    def gradients_seen(self, given: tuple[Tensor, ...], out: Tensor, lse: Tensor, grad_out: Tensor) -> list[Tensor | None]:
        """The same by the operators that PyTorch's dispatcher knows: somebody listens, or differentiates again."""
        rows = self.views(*given[: self.count])
        backward: Any = torch.ops.attnc.attend_backward if self.count == 3 else torch.ops.attnc.attend_packed_backward
        seen = [rows_of_out(t, self.layout, self.rows) for t in (out, grad_out)]
        tables = [given[t] for _, t, _ in self.read if isinstance(t, int)]
        *made, sums = backward(*rows, tables, seen[0], lse, seen[1], None, *self.rest)
        found: list[Tensor | None] = [rows_undone(g, self.layout, t.shape) for g, t in zip(made, given, strict=False)]
        found += [None] * (len(given) - self.count)
        for (_, t, _), g in zip(self.read, sums, strict=True):
            if isinstance(t, int) and given[t].is_floating_point():
                found[t] = g
        return found


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replay: Replay, *given: Tensor) -> Any:
        out, lse = replay.run(given)
        ctx.save_for_backward(out, lse, *given)
        ctx.replay = replay
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        out, lse, *given = ctx.saved_tensors
        replay: Replay = ctx.replay
        seen = torch.is_grad_enabled() or not direct.alone((out, lse, *given, grad_out))
        found = (replay.gradients_seen if seen else replay.gradients)(tuple(given), out, lse, grad_out)
        return None, *found


def _three(rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rows if len(rows) == 3 else rows[0].unbind(0)
    return q, k, v


def _named(read: tuple[tuple[str, Any, Any], ...], tables: list[Tensor]) -> dict[str, Tensor]:
    return {n: t for (n, _, _), t in zip(read, tables, strict=True)}


def key(tensors: tuple[Tensor, ...], *others: Any) -> tuple[Any, ...]:
    """What a call of these tensors and arguments has in common with those that are run in the same way."""
    look = [x for t in tensors for x in (t.shape, t.stride(), t.dtype, t.is_cpu)]
    return (*others, torch.get_num_threads(), tuner.version(), *look)


def record(
    given: tuple[Tensor, ...], names: tuple[str, ...], views: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...],
    tables: dict[str, Tensor], layout: Layout, found: tuple[Tensor, Tensor], rest: tuple[Any, ...],
) -> Replay | None:  # fmt: skip
    """A call that has been run, for calls like it; None where it is more than one kernel, or the next may differ.

    given: the user's tensors, of which the tables are called `names`. rows: q, k and v seen by `views`. tables: all that the
    statement reads. found: out as the user got it, and lse. rest: what operators take after the tables.
    """
    scale, q_grid, k_grid, program, *_ = rest
    q, k, v = _three(rows)
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
    return Replay(replace(call, tables={}), layout, views, rest, count, moves, read, plan, *looks)
