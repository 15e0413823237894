"""Builds a C++ source with the system compiler and calls it through ctypes. Needs the standard library and torch, nothing else:
the runtime imports this file, and stand-alone modules contain its text."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLAGS = [
    "-O2",
    "-fno-tree-vectorize",
    "-fno-gcse",
    "-march=native",
    "-std=gnu++20",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
Number, Pointer = ctypes.c_int64, ctypes.c_void_p


def compilers() -> list[str]:
    """C++ compilers of this machine, the first choice first."""
    wanted = [os.environ.get("CXX", ""), "g++", "c++", "clang++"]
    return [c for c in dict.fromkeys(wanted) if c and shutil.which(c)]


def compile_source(path: Path, library: Path) -> str:
    """Build a shared library. Gives "" or, where no compiler can, what the compilers said."""
    said = []
    for compiler in compilers():
        for flags in (FLAGS, [f for f in FLAGS if f != "-march=native"]):
            done = subprocess.run(
                [compiler, *flags, "-shared", "-fPIC", str(path), "-o", str(library)], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                return ""
            said.append(f"$ {compiler} {' '.join(flags)}\n{done.stderr[:4000]}")
    return "\n".join(said) or "no C++ compiler found: install g++ or clang++, or set CXX"


@lru_cache(maxsize=64)
def problem_type(rank: int, grid: int, table_rank: int, tables: int, int_tables: int, lists: bool, gaps: bool) -> Any:
    """The C structure `Problem` (and `Layout`, `Axis`, `Table` in it) for a kernel of these ranks, which takes lists, and gaps, or
    not."""

    class Layout(ctypes.Structure):
        _fields_ = [(n, Number) for n in ("batch", "head", "channel", "prefix", "start", "merged")] + [("axis", Number * grid)]

    class Axis(ctypes.Structure):
        numbers = ("split", "columns", "queries_before", "keys_before", "real_keys", "pieces", "segments", "owners")
        _fields_ = [(n, Number) for n in numbers] + [(n, Pointer) for n in ("lo", "hi", "piece", "segment", "owner")]
        _fields_ += [("gap_lo", Pointer), ("gap_hi", Pointer)] if gaps else []
        _fields_ += [("key_pieces", Number), ("key_piece", Pointer)] if lists else []

    class Table(ctypes.Structure):
        _fields_ = [("data", Pointer), ("stride", Number * table_rank), ("last", Number), ("gradient", Pointer)]

    class IntTable(ctypes.Structure):
        _fields_ = [("data", Pointer), ("stride", Number * table_rank), ("last", Number)]

    class Problem(ctypes.Structure):
        _fields_ = [
            *((n, Number) for n in ("batch", "heads", "kv_heads", "q_prefix", "k_prefix", "threads")),
            ("scale", ctypes.c_double),
            *((n, Pointer) for n in ("q", "k", "v", "out", "lse", "grad_out", "grad_lse", "dq", "dk", "dv")),
            *((f"{n}_layout", Layout) for n in LAYOUTS),
            ("axes", Axis * rank),
            *((n, Number * grid) for n in ("q_grid", "k_grid", "q_size", "k_size")),
            *((n, Pointer) for n in ("pad_k", "pad_v")),
            *((n, Number) for n in ("pad_k_head", "pad_v_head", "sum_rows", "whole", "split", "continues")),
            *((n, Pointer) for n in ("pad_k_gradient", "pad_v_gradient")),
            ("tables", Table * (tables + 1)),
            ("int_tables", IntTable * (int_tables + 1)),
            *((n, Number) for n in ("gaps",) if gaps),
            *((n, Pointer) for n in ("list_offset", "list_full", "list_block") if lists),
        ]

    return Problem


LAYOUTS = ("q", "k", "v", "out", "lse", "grad_out", "grad_lse", "dq", "dk", "dv")
OF_KEYS, PER_QUERY, PADS = ("k", "v", "dk", "dv"), ("lse", "grad_lse"), ("pad_k", "pad_v")
AXIS_NUMBERS = ("split", "queries_before", "keys_before", "real_keys")


class Ready:
    """What calls of one kernel on one grid share: sizes and the tables of the axes, as C arrays.

    axes: per axis a mapping with split, queries_before, keys_before, real_keys and lists lo, hi ([split][columns]), pieces,
    segments, owners. sizes: (q_grid, k_grid, q_size, k_size). prefix: tokens of queries and keys. lists: None where the kernel
    takes none, else () or the blocks that tiles visit (offsets, full, blocks; axes then have key_pieces). gaps: None where the
    kernel takes none, else whether they are all that the axes' intervals do not tell (axes then may have gap_lo and gap_hi).
    """

    def __init__(
        self, axes: list[dict[str, Any]], sizes: tuple[tuple[int, ...], ...], prefix: tuple[int, int],
        names: tuple[tuple[str, ...], tuple[str, ...]], table_rank: int, sums: tuple[int, bool, bool, bool],
        lists: tuple[Any, ...] | None = None, gaps: bool | None = None,
    ) -> None:  # fmt: skip
        self.axes, self.sizes, self.prefix, self.names, self.table_rank = axes, sizes, prefix, names, table_rank
        self.sum_rows, self.whole, self.split, self.covers = sums
        self.lists, self.gaps = lists, gaps
        self.keep: list[Any] = []  # C arrays that the structure points into
        kinds = lists is not None, gaps is not None
        self.type = problem_type(len(axes), len(sizes[0]), table_rank, len(names[0]), len(names[1]), *kinds)
        self.blank = self._blank()
        self.filled: dict[Any, bytes] = {}

    def _array(self, rows: Any) -> int:
        flat = [int(x) for row in rows for x in row]
        array = (ctypes.c_int32 * max(len(flat), 1))(*flat)
        self.keep.append(array)
        return ctypes.addressof(array)

    def _blank(self) -> bytes:
        p = self.type()
        p.q_prefix, p.k_prefix = self.prefix
        p.sum_rows, p.whole, p.split = self.sum_rows, self.whole, self.split
        for name, values in zip(("q_grid", "k_grid", "q_size", "k_size"), self.sizes, strict=True):
            for i, n in enumerate(values):
                getattr(p, name)[i] = n
        for a, x in zip(p.axes, self.axes, strict=True):
            for name in AXIS_NUMBERS:
                setattr(a, name, int(x[name]))
            a.columns = len(x["lo"][0]) if len(x["lo"]) else 0
            a.pieces, a.segments, a.owners = len(x["pieces"]), len(x["segments"]), len(x["owners"])
            a.lo, a.hi, a.piece = self._array(x["lo"]), self._array(x["hi"]), self._array(x["pieces"])
            a.segment, a.owner = self._array(x["segments"]), self._array(x["owners"])
            for name in ("gap_lo", "gap_hi") if self.gaps else ():
                setattr(a, name, self._array(x[name]) if name in x else None)
            if self.lists:
                a.key_pieces, a.key_piece = len(x["key_pieces"]), self._array(x["key_pieces"])
        if self.gaps is not None:
            p.gaps = self.gaps
        if self.lists:
            p.list_offset, p.list_full, p.list_block = (self._array([x]) for x in self.lists)
        return bytes(p)

    def problem(self, scale: float, tensors: dict[str, Tensor], tables: dict[str, Tensor], given: int = len(LAYOUTS)) -> Any:
        """The structure of one call. What follows from shapes and strides is filled in once for each combination of them.

        tensors: by the names of `LAYOUTS`, q and k among them; from the strides of the first `given` those of the others follow.
        tables: in the dtypes that the kernel reads, contiguous.
        """
        signature = (*[(t.shape, t.stride()) for t in islice(tensors.values(), given)], *[t.shape for t in tables.values()])
        filled = self.filled.get(signature)
        if filled is None:
            if len(self.filled) >= 256:
                self.filled.clear()
            filled = self.filled[signature] = self._fill(tensors, tables)
        p = self.type.from_buffer_copy(filled)
        p.scale, p.threads = scale, torch.get_num_threads()
        for name, t in tensors.items():
            setattr(p, name, t.data_ptr())
        for names, entries in zip(self.names, (p.tables, p.int_tables), strict=True):
            for i, name in enumerate(names):
                entries[i].data = tables[name].data_ptr()
        for name in PADS:
            if name in tables:
                setattr(p, name, tables[name].data_ptr())
        return p

    def _fill(self, tensors: dict[str, Tensor], tables: dict[str, Tensor]) -> bytes:
        p = self.type.from_buffer_copy(self.blank)
        q, k = tensors["q"], tensors["k"]
        p.batch, p.heads, p.kv_heads = q.shape[0], q.shape[1], k.shape[1]
        for name, t in tensors.items():
            self._place(getattr(p, f"{name}_layout"), t.stride(), name in OF_KEYS, name not in PER_QUERY)
        for names, entries in zip(self.names, (p.tables, p.int_tables), strict=True):
            for c, t in zip(entries, (tables[n] for n in names), strict=False):
                c.last = max(t.numel() - 1, 0)
                for i, (n, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
                    c.stride[i] = 0 if n == 1 else stride
        for name in PADS:
            if name in tables:
                setattr(p, f"{name}_head", tables[name].shape[1] if tables[name].shape[0] > 1 else 0)
        return bytes(p)

    def _place(self, layout: Any, s: tuple[int, ...], keys: bool, rows: bool) -> None:
        """A tensor's strides. Tokens are dimension 2, or the grid's axes follow; `rows`: channels come last."""
        grid, prefix = self.sizes[1 if keys else 0], self.prefix[1 if keys else 0]
        layout.batch, layout.head, layout.channel = s[0], s[1], s[-1] if rows else 0
        tokens = s[2:-1] if rows else s[2:]
        if len(tokens) == 1:
            layout.prefix, layout.start, layout.merged = tokens[0], prefix * tokens[0], 1
            step = tokens[0]
            for i in reversed(range(len(grid))):
                layout.axis[i] = step
                step *= grid[i]
        else:
            long = [(a, n) for a, n in zip(tokens, grid, strict=True) if n != 1] or [(tokens[-1], 1)]
            layout.merged = all(a == b * n for (a, _), (b, n) in pairwise(long))
            for i, n in enumerate(tokens):
                layout.axis[i] = n
            if grid[-1] == 1:  # a flat index goes by the innermost axis that has a length
                layout.axis[len(grid) - 1] = long[-1][0]

    def readable(self, tables: dict[str, Tensor], real: torch.dtype) -> dict[str, Tensor]:
        """Tables in the dtype of sums (those of the relation: int32), contiguous; they live as long as this mapping."""
        if not tables:
            return tables
        return {n: integers(n, t) if n in self.names[1] else t.to(real).contiguous() for n, t in tables.items()}


def integers(name: str, t: Tensor) -> Tensor:
    """A table of integers as kernels read it: int32, contiguous. Raises OverflowError for numbers that are none."""
    if t.dtype == torch.int64 and t.numel():
        low, high = (int(x) for x in torch.aminmax(t))
        if low < -(2**31) or high >= 2**31:
            raise OverflowError(
                f"the table {name!r} holds {high if high >= 2**31 else low}, and kernels read 32 bits of an integer"
            )
    return t.to(torch.int32).contiguous()


def real_of(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outermost_first(strides: tuple[int, ...]) -> list[int]:
    """The dimensions in the order of memory. One that is broadcast (stride 0) has no place of its own: the batch comes first, any
    other right before the dimension that follows it, as if it had been unflattened from the two.
    """
    placed = list(strides)
    for d in reversed(range(len(placed) - 1)):
        if placed[d] == 0:
            placed[d] = placed[d + 1] if d else max(placed)
    return sorted(range(len(placed)), key=lambda d: (-placed[d], d))


@lru_cache(maxsize=1024)
def strides_in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor of this shape, its dimensions in memory in the order of these strides."""
    dense, step = [0] * len(shape), 1
    for d in reversed(outermost_first(strides)):
        dense[d] = step
        step *= max(shape[d], 1)
    return tuple(dense)


def empty_in_order(t: Tensor, channels: int) -> Tensor:
    """A dense tensor shaped as t but for the last dimension, its dimensions in memory in the order of t's strides."""
    shape = (*t.shape[:-1], channels)
    return torch.empty_strided(shape, strides_in_order(shape, t.stride()), dtype=t.dtype, device=t.device)


def run_forward(
    run: Callable[[Any], Any], ready: Ready, q: Tensor, k: Tensor, v: Tensor, scale: float, tables: dict[str, Tensor],
    into: Any = None, continues: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse, `into` these two tensors or new ones. continues: their softmax goes on, over keys that it has not seen."""
    given = len(LAYOUTS) if into else 3
    if into is None:
        tokens = q.shape[2] if q.dim() == 4 else q.shape[2:-1].numel()
        into = empty_in_order(q, v.shape[-1]), torch.empty((*q.shape[:2], tokens), dtype=real_of(q.dtype))
    out, lse = into
    tables = ready.readable(tables, lse.dtype)
    p = ready.problem(scale, {"q": q, "k": k, "v": v, "out": out, "lse": lse}, tables, given)
    p.continues = continues
    if lse.numel():
        run(ctypes.byref(p))
    return out, lse


def run_backward(
    run: Callable[[Any], Any], ready: Ready, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    grad_out: Tensor, grad_lse: Tensor | None, scale: float, tables: dict[str, Tensor], into: Any = None, continues: int = 0,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """dq, dk, dv (`into` three tensors or new ones) and the gradients of the real tables (and of pad_k, pad_v), in the tables'
    shapes and dtypes. continues: dq (1), dk and dv (2) are added to what `into` holds."""
    real = real_of(q.dtype)
    dq, dk, dv = into or (empty_in_order(t, t.shape[-1]) for t in (q, k, v))
    tensors = {"q": q, "k": k, "v": v, "out": out, "grad_out": grad_out.to(q.dtype), "dq": dq, "dk": dk, "dv": dv}
    tensors["lse"] = lse.to(real)
    if grad_lse is not None:
        tensors["grad_lse"] = grad_lse.to(real)
    given, tables = tables, ready.readable(tables, real)
    p = ready.problem(scale, tensors, tables)
    p.continues = continues
    gradients = {name: torch.zeros(tables[name].shape, dtype=real) for name in ready.names[0]}
    for i, t in enumerate(gradients.values()):
        p.tables[i].gradient = t.data_ptr()
    pads = {}
    for name, width in zip(PADS, (k.shape[-1], v.shape[-1]), strict=True):
        if name in tables:
            pads[name] = torch.zeros((k.shape[1], width), dtype=real)
            setattr(p, f"{name}_gradient", pads[name].data_ptr())
    if not continues & 2 and (not ready.covers or not lse.numel()):
        for t in (dk, dv):
            t.zero_()
    if lse.numel():
        run(ctypes.byref(p))
    for name, t in pads.items():
        gradients[name] = t if tables[name].shape[0] == t.shape[0] else t.sum(0, keepdim=True)
    return dq, dk, dv, {name: t.to(given[name].dtype) for name, t in gradients.items()}


class ChannelLayout(ctypes.Structure):
    """Strides of [B, H, N, D]."""

    _fields_ = [(n, Number) for n in ("batch", "head", "token", "channel")]


CHANNEL_TENSORS = ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv")


class ChannelProblem(ctypes.Structure):
    """The C structure `Problem` of channel attention."""

    _fields_ = [
        *((n, Number) for n in ("batch", "heads", "tokens", "threads")),
        ("scale", ctypes.c_double),
        *((n, Pointer) for n in CHANNEL_TENSORS),
        *((f"{n}_layout", ChannelLayout) for n in CHANNEL_TENSORS),
    ]


@lru_cache(maxsize=256)
def channel_problem(names: tuple[str, ...], shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> bytes:
    """The structure of calls with these tensors, but for what differs from call to call."""
    p = ChannelProblem(*shape[:3])
    for name, s in zip(names, strides, strict=True):
        setattr(p, f"{name}_layout", ChannelLayout(*s))
    return bytes(p)


def run_channel(function: Any, scale: float, tensors: dict[str, Tensor]) -> None:
    """One call of channel attention, forward or backward; tensors by the names of the structure, [B, H, N, D] each."""
    blank = channel_problem(tuple(tensors), tensors["q"].shape, tuple([t.stride() for t in tensors.values()]))
    p = ChannelProblem.from_buffer_copy(blank)
    p.threads, p.scale = torch.get_num_threads(), scale
    for name, t in tensors.items():
        setattr(p, name, t.data_ptr())
    if tensors["q"].numel():
        function(ctypes.byref(p))
