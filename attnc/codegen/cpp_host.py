"""Builds a C++ source with the system compiler and calls it through ctypes. Needs the standard library and torch, nothing else:
the runtime imports this file, and stand-alone modules contain its text."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLAGS = ["-O2", "-march=native", "-std=gnu++20", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
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
def problem_type(rank: int, grid: int, table_rank: int, tables: int, int_tables: int) -> Any:
    """The C structure `Problem` (and `Layout`, `Axis`, `Table` in it) for a kernel of these ranks."""

    class Layout(ctypes.Structure):
        _fields_ = [(n, Number) for n in ("batch", "head", "channel", "prefix", "start", "merged")] + [("axis", Number * grid)]

    class Axis(ctypes.Structure):
        numbers = ("split", "columns", "queries_before", "keys_before", "real_keys", "pieces", "segments", "owners")
        _fields_ = [(n, Number) for n in numbers] + [(n, Pointer) for n in ("lo", "hi", "piece", "segment", "owner")]

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
            *((n, Number) for n in ("pad_k_head", "pad_v_head", "sum_rows", "whole", "split")),
            *((n, Pointer) for n in ("pad_k_gradient", "pad_v_gradient")),
            ("tables", Table * (tables + 1)),
            ("int_tables", IntTable * (int_tables + 1)),
        ]

    return Problem


LAYOUTS = ("q", "k", "v", "out", "lse", "grad_out", "grad_lse", "dq", "dk", "dv")
AXIS_NUMBERS = ("split", "queries_before", "keys_before", "real_keys")


class Ready:
    """What calls of one kernel on one grid share: sizes and the tables of the axes, as C arrays.

    axes: per axis a mapping with split, queries_before, keys_before, real_keys and lists lo, hi ([split][columns]), pieces,
    segments, owners. sizes: (q_grid, k_grid, q_size, k_size). prefix: tokens of queries and keys.
    """

    def __init__(
        self, axes: list[dict[str, Any]], sizes: tuple[tuple[int, ...], ...], prefix: tuple[int, int],
        names: tuple[tuple[str, ...], tuple[str, ...]], table_rank: int, sums: tuple[int, bool, bool, bool],
    ) -> None:  # fmt: skip
        self.axes, self.sizes, self.prefix, self.names, self.table_rank = axes, sizes, prefix, names, table_rank
        self.sum_rows, self.whole, self.split, self.covers = sums
        self.keep: list[Any] = []  # C arrays that the structure points into
        self.type = problem_type(len(axes), len(sizes[0]), table_rank, len(names[0]), len(names[1]))
        self.blank = self._blank()

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
        return bytes(p)

    def problem(self, q: Tensor, k: Tensor, scale: float) -> Any:
        """A structure filled with what does not depend on the tensors' addresses."""
        p = self.type.from_buffer_copy(self.blank)
        p.batch, p.heads, p.kv_heads, p.scale = q.shape[0], q.shape[1], k.shape[1], scale
        p.threads = torch.get_num_threads()
        return p

    def place(self, p: Any, name: str, t: Tensor, keys: bool = False, rows: bool = True) -> None:
        """A tensor's address and strides. Tokens are dimension 2, or the grid's axes follow; `rows`: channels come last."""
        setattr(p, name, t.data_ptr())
        grid, prefix = self.sizes[1 if keys else 0], self.prefix[1 if keys else 0]
        layout, s = getattr(p, f"{name}_layout"), t.stride()
        layout.batch, layout.head, layout.channel = s[0], s[1], s[-1] if rows else 0
        tokens = s[2:-1] if rows else s[2:]
        if len(tokens) == 1:
            layout.prefix, layout.start, layout.merged = tokens[0], prefix * tokens[0], 1
            step = tokens[0]
            for i in reversed(range(len(grid))):
                layout.axis[i] = step
                step *= grid[i]
        else:
            layout.merged = all(n == 1 or a == b * n for a, b, n in zip(tokens, tokens[1:], grid[1:], strict=False))
            for i, n in enumerate(tokens):
                layout.axis[i] = n

    def set_tables(self, p: Any, tables: dict[str, Tensor], real: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Tables in the dtype of sums; gives what must stay alive during the call, and the real ones by name."""
        alive: list[Tensor] = []
        reals: dict[str, Tensor] = {}
        for name, c in [*zip(self.names[0], p.tables, strict=False), *zip(self.names[1], p.int_tables, strict=False)]:
            is_real = name in self.names[0]
            t = tables[name].detach().to(real if is_real else torch.int32).contiguous()
            alive.append(t)
            if is_real:
                reals[name] = t
            c.data, c.last = t.data_ptr(), max(t.numel() - 1, 0)
            for i, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True)):
                c.stride[i] = 0 if n == 1 else s
        for name in ("pad_k", "pad_v"):
            if name in tables:
                t = tables[name].detach().to(real).contiguous()
                alive.append(t)
                setattr(p, name, t.data_ptr())
                setattr(p, f"{name}_head", t.shape[1] if t.shape[0] > 1 else 0)
        return alive, reals


def real_of(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_in_order(t: Tensor, channels: int) -> Tensor:
    """A dense tensor shaped as t but for the last dimension, its dimensions in memory in the order of t's strides."""
    shape = (*t.shape[:-1], channels)
    strides = t.stride()
    order = sorted(range(t.dim()), key=lambda d: (-strides[d], d))
    inverse = [order.index(d) for d in range(t.dim())]
    return torch.empty([shape[d] for d in order], dtype=t.dtype, device=t.device).permute(inverse)


def run_first(kernels: Iterable[Any], problem: Any) -> None:
    """Run the first kernel that takes the call: one for bands says no where this call's tokens are none."""
    for kernel in kernels:
        if kernel(ctypes.byref(problem)):
            return


def run_forward(
    kernels: Iterable[Any], ready: Ready, q: Tensor, k: Tensor, v: Tensor, scale: float, tables: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    out = empty_in_order(q, v.shape[-1])
    tokens = 1
    for n in q.shape[2:-1]:
        tokens *= n
    lse = torch.empty((*q.shape[:2], tokens), dtype=real_of(q.dtype))
    p = ready.problem(q, k, scale)
    for name, t, keys in (("q", q, False), ("k", k, True), ("v", v, True), ("out", out, False)):
        ready.place(p, name, t, keys)
    ready.place(p, "lse", lse, rows=False)
    alive, _ = ready.set_tables(p, tables, lse.dtype)
    if lse.numel():
        run_first(kernels, p)
    del alive
    return out, lse


def run_backward(
    kernels: Iterable[Any], ready: Ready, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    grad_out: Tensor, grad_lse: Tensor | None, scale: float, tables: dict[str, Tensor], into: Any = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """dq, dk, dv (`into` three tensors or new ones) and the gradients of the real tables (and of pad_k, pad_v), in the tables'
    shapes and dtypes."""
    real = real_of(q.dtype)
    dq, dk, dv = into or (empty_in_order(t, t.shape[-1]) for t in (q, k, v))
    p = ready.problem(q, k, scale)
    grad_out, lse = grad_out.to(q.dtype), lse.to(real)
    rows = (("q", q, 0), ("k", k, 1), ("v", v, 1), ("out", out, 0), ("grad_out", grad_out, 0))
    for name, t, keys in (*rows, ("dq", dq, 0), ("dk", dk, 1), ("dv", dv, 1)):
        ready.place(p, name, t, bool(keys))
    ready.place(p, "lse", lse, rows=False)
    if grad_lse is not None:
        grad_lse = grad_lse.to(real)
        ready.place(p, "grad_lse", grad_lse, rows=False)
    alive, reals = ready.set_tables(p, tables, real)
    gradients = {name: torch.zeros(t.shape, dtype=real) for name, t in reals.items()}
    for name, c in zip(ready.names[0], p.tables, strict=False):
        c.gradient = gradients[name].data_ptr()
    pads = {}
    for name, width in (("pad_k", k.shape[-1]), ("pad_v", v.shape[-1])):
        if name in tables:
            pads[name] = torch.zeros((k.shape[1], width), dtype=real)
            setattr(p, f"{name}_gradient", pads[name].data_ptr())
    if not ready.covers or not lse.numel():
        for t in (dk, dv):
            t.zero_()
    if lse.numel():
        run_first(kernels, p)
    del alive
    for name, t in pads.items():
        gradients[name] = t if tables[name].shape[0] == t.shape[0] else t.sum(0, keepdim=True)
    return dq, dk, dv, {name: t.to(tables[name].dtype) for name, t in gradients.items()}


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


def run_channel(function: Any, scale: float, tensors: dict[str, Tensor]) -> None:
    """One call of channel attention, forward or backward; tensors by the names of the structure, [B, H, N, D] each."""
    p = ChannelProblem(*tensors["q"].shape[:3], torch.get_num_threads(), scale)
    for name, t in tensors.items():
        setattr(p, name, t.data_ptr())
        setattr(p, f"{name}_layout", ChannelLayout(*t.stride()))
    if tensors["q"].numel():
        function(ctypes.byref(p))
