"""Stand-alone CPU modules: Python that holds the C++ as text and needs the standard library, torch and a C++ compiler only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from attnc import ir
from attnc.analysis.dropout import TABLE
from attnc.codegen import around, cpp_host, once
from attnc.codegen.cpp import Spec, channel_source, describe, source
from attnc.errors import ShapeError
from attnc.schedule.boxes import tiling
from attnc.schedule.choose import Choice, choose
from attnc.schedule.geometry import Geometry, geometry
from attnc.schedule.list_choice import Listed, listed, mentions

THREADS = 8  # what tiles are chosen for; any number runs them
CARRIED = 20_000  # blocks that a module's text lists at most

IMPORTS = """from __future__ import annotations

import atexit
import ctypes
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
"""

LIBRARY = '''

@lru_cache(maxsize=None)
def function(source: str, name: str) -> Any:
    """A function of a C++ source, built in a folder that lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="attention-"))
    atexit.register(shutil.rmtree, folder, True)
    (folder / "kernel.cpp").write_text(source)
    said = compile_source(folder / "kernel.cpp", folder / "kernel.so")
    if said:
        raise RuntimeError(f"the C++ compiler failed\\n{said}")
    found = getattr(ctypes.CDLL(os.fspath(folder / "kernel.so")), name)
    found.restype = ctypes.c_bool
    return found


def runner(sources: tuple[str, ...], name: str) -> Callable[[Any], Any]:
    """Runs a problem by the first kernel that takes it, each built when it is its turn."""
    return lambda problem: any(function(source, name)(problem) for source in sources)
'''

ATTENTION = '''

class Attention(torch.autograd.Function):
    """The two kernels as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, *tables: Tensor) -> @RESULT_TYPE@:
        named = dict(zip(TABLES, tables))
        out, lse = run_forward(runner(FORWARD, "attend_forward"), READY_FORWARD, q, k, v, scale, named)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, out, lse, *tables)
        return @RESULTS@

    @staticmethod
    def backward(ctx: Any, @COTANGENTS@) -> Any:
@ONCE@        q, k, v, out, lse, *tables = ctx.saved_tensors
        named = dict(zip(TABLES, tables))
        run = runner(BACKWARD, "attend_backward")
        dq, dk, dv, gradients = run_backward(run, READY_BACKWARD, q, k, v, out, lse, grad_out, @GRAD_LSE@, ctx.scale, named)
        return dq, dk, dv, None, *(gradients.get(name) for name in TABLES)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, @DROPOUT@**tables: Tensor) -> Tensor:
    """q [B, H, N, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv], any strides; `tables` by name: @NAMES@."""
    for t, tokens, width in ((q, @NQ@, @D@), (k, @NK@, @D@), (v, @NK@, @DV@)):
        if t.dtype != torch.@DTYPE@ or t.dim() != 4 or t.shape[2:] != (tokens, width):
            raise ValueError(f"this module takes torch.@DTYPE@ tensors [B, H, {tokens}, {width}], not {t.dtype} {tuple(t.shape)}")
@SCALE@@PADS@    missing = [name for name in @ALL_TABLES@ if name not in tables]
    if missing:
        raise TypeError(f"attention() needs the tables {missing}")
@END@
'''

SCALE = """\
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale={scale}; this module wants a finite one")
"""

CHANNEL = '''

class Attention(torch.autograd.Function):
    """The two kernels as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = empty_in_order(q, q.shape[-1])
        run_channel(function(FORWARD[0], "channel"), scale, {"q": q, "k": k, "v": v, "out": out})
        ctx.scale = scale
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
@ONCE@        q, k, v = ctx.saved_tensors
        dq, dk, dv = (empty_in_order(t, t.shape[-1]) for t in (q, k, v))
        tensors = {"q": q, "k": k, "v": v, "grad_out": grad_out.to(q.dtype), "dq": dq, "dk": dk, "dv": dv}
        run_channel(function(BACKWARD[0], "channel"), ctx.scale, tensors)
        return dq, dk, dv, None


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """q [B, H, N, @D@], k and v [B, H, N, @DV@], any strides."""
    for t, width in ((q, @D@), (k, @DV@), (v, @DV@)):
        if t.dtype != torch.@DTYPE@ or t.dim() != 4 or t.shape[-1] != width or t.shape[:3] != q.shape[:3]:
            raise ValueError(f"this module takes torch.@DTYPE@ tensors [B, H, N, {width}], not {t.dtype} {tuple(t.shape)}")
@SCALE@    return Attention.apply(q, k, v, scale)
'''


def _host() -> str:
    """The definitions of cpp_host.py."""
    text = Path(cpp_host.__file__).read_text()
    return text[text.index("FLAGS = ") :].rstrip() + "\n"


def axis_tables(
    geo: Geometry, spec: Spec, choice: Choice, backward: bool, items: int, threads: int, listed: Listed | None = None
) -> tuple[Any, ...]:
    """The arguments of `Ready`: sizes and tables of a call's axes, as plain numbers. listed: the blocks that tiles visit."""
    t = tiling(geo, spec.kernel(backward), choice.sides, items, threads)
    axes = [
        {
            **{name: int(getattr(a, name)) for name in cpp_host.AXIS_NUMBERS},
            **{name: getattr(a, name).tolist() for name in ("lo", "hi", "pieces", "segments", "owners")},
        }
        for a in t.axes
    ]
    gaps = geo.gaps if spec.gaps else None
    for a, axis in zip(axes, geo.axes, strict=True):
        a |= {n: x.tolist() for n in ("gap_lo", "gap_hi") if gaps and (x := getattr(axis, n)) is not None}
    lists: tuple[Any, ...] | None = () if spec.listed else None
    if listed is not None:
        for a, p in zip(axes, listed.keys, strict=True):
            a["key_pieces"] = p.tolist()
        lists = tuple(x.tolist() for x in (listed.lists.offsets, listed.lists.full, listed.lists.blocks))
    rank = len(geo.q_grid)
    lengths = [tuple(int(geo.sizes[ir.size(role, i)]) for i in range(rank)) for role in ("q", "k")]
    sizes = (geo.q_grid, geo.k_grid, *lengths)
    sums = (t.sum_rows, t.whole, t.split, t.covers)
    names = spec.tables, spec.int_tables
    return axes, sizes, (geo.q_prefix, geo.k_prefix), names, spec.table_rank, sums, lists, gaps


def _carried(geo: Geometry, spec: Spec, backward: bool, choice: Choice) -> Listed | None:
    """The lists that a module's text holds: short ones, the same for any batch and heads, and for any table."""
    if mentions(geo, "head") or mentions(geo, "batch") or mentions(geo, "load"):
        return None
    found = listed(geo, spec.list_limits(backward), choice.sides, 1, 1)
    return found if found is not None and found.lists.visited <= CARRIED else None


def _wrap(text: str, width: int = 110) -> str:
    """Long lists of numbers over several lines."""
    lines, line = [], ""
    for part in re.split(r"(?<=,) ", text):
        if line and len(line) + len(part) + 1 > width:
            lines.append(line)
            line = part
        else:
            line = f"{line} {part}" if line else part
    return "\n    ".join([*lines, line])


def _ready(args: tuple[Any, ...]) -> str:
    axes, sizes, prefix, names, rank, sums, lists, gaps = args
    told = "" if lists is None else f", {_wrap(repr(lists))}"
    told += "" if gaps is None else f", {gaps}"
    shown = "".join("    {\n" + "".join(f"        {k!r}: {_wrap(repr(v))},\n" for k, v in a.items()) + "    },\n" for a in axes)
    return f"Ready([\n{shown}], {sizes!r}, {prefix!r}, {names!r}, {rank}, {sums!r}{told})"


def _surroundings(p: ir.Program, a: ir.Attend, grids: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, str]:
    """What stands in the module's text for the row maps and the sink around its kernels."""
    sink = a.normalizer.sink
    end = around.lines(p, a, grids, "Attention.apply(q, k, v, scale, *(tables[name] for name in TABLES))", 'tables["{}"]')
    return {
        "RESULTS": "out" if sink is None else "out, lse",
        "RESULT_TYPE": "Tensor" if sink is None else "tuple[Tensor, Tensor]",
        "COTANGENTS": "grad_out: Tensor" if sink is None else "grad_out: Tensor, grad_lse: Tensor",
        "GRAD_LSE": "None" if sink is None else "grad_lse",
        "ALL_TABLES": "TABLES" if sink is None else f'(*TABLES, "{sink}")',
        "END": "\n".join(f"    {line}" for line in end),
    }


def emit_cpu(
    program: ir.Program, *, grid: tuple[int, ...] | None = None, kv_grid: tuple[int, ...] | None = None, heads: int,
    head_dim: int, value_dim: int | None = None, dtype: str = "float32",
) -> str:  # fmt: skip
    """The source of a module with `attention(q, k, v, *, scale=None, **tables)`, differentiable, for one grid (Channel: any)."""
    value_dim = head_dim if value_dim is None else value_dim
    names: dict[str, str] = {"D": str(head_dim), "DV": str(value_dim), "DTYPE": dtype}
    if isinstance(program.attend, ir.Channel):
        sources: list[tuple[str, ...]] = [(channel_source(dtype, head_dim, value_dim, b),) for b in (False, True)]
        head = [line[3:].rstrip() for line in sources[0][0].splitlines()[:5] if line.startswith("//")]
        tail = CHANNEL
        setup = ""
    else:
        whole = program.attend
        program = around.core_program(program)
        spec = Spec(program, head_dim, value_dim, dtype)
        if grid is None:
            raise ShapeError(f"pattern {spec.attend.name}: a stand-alone CPU module needs a grid")
        geo = geometry(program, grid, kv_grid or grid)
        choices = [choose(geo, spec.kernel(b), heads, THREADS) for b in (False, True)]
        lists = [_carried(geo, spec, b, choice) for b, choice in zip((False, True), choices, strict=True)]
        choices = [choice if x is None else Choice(x.query_sides) for choice, x in zip(choices, lists, strict=True)]
        # a band's kernel may find that the call is none on this machine's vectors: then the other one runs
        sources = [
            tuple(source(spec, b, band) for band in ((True, False) if choice.band else (False,)))
            for b, choice in zip((False, True), choices, strict=True)
        ]
        made = f"Made for the grid {'x'.join(map(str, grid))} and {heads} heads (any number runs)."
        head = [*describe(spec, False), *(f"Weights: {x}." for x in around.described(whole)), "", made]
        pads = [f'    tables.setdefault("pad_{n}", q.new_zeros(1, {w}))\n' for n, w in (("k", head_dim), ("v", value_dim))]
        tables = (*spec.tables, *spec.int_tables, *(("pad_k", "pad_v") if spec.padded else ()))
        drops = spec.attend.dropout is not None
        names["DROPOUT"] = "dropout_p: float = 0.0, seed: int | None = None, " if drops else ""
        spoken = (*(t for t in tables if t != TABLE), *((whole.normalizer.sink,) if whole.normalizer.sink else ()))
        names |= {"NQ": str(geo.n_queries), "NK": str(geo.n_keys), "NAMES": ", ".join(spoken) or "none"}
        seed = [
            "    if not 0 <= dropout_p < 1:\n",
            '        raise ValueError(f"dropout_p={dropout_p}; this module wants a number from 0 to less than 1")\n',
            f'    tables["{TABLE}"] = seed_table(dropout_p, seed, q.device)\n',
        ]
        names["PADS"] = "".join([*(pads if spec.padded else ()), *(seed if drops else ())])
        setup = f"TABLES = {tables!r}\n" + "".join(
            f"READY_{name} = {_ready(axis_tables(geo, spec, choice, name == 'BACKWARD', heads, THREADS, x))}\n"
            for name, choice, x in zip(("FORWARD", "BACKWARD"), choices, lists, strict=True)
        )
        tail = "".join(f"\n\n{text}" for text in around.texts(whole)) + ATTENTION
        names |= _surroundings(program, whole, (geo.q_grid, geo.k_grid))
    names |= {"ONCE": once.REFUSAL, "SCALE": SCALE}
    for name, text in names.items():
        tail = tail.replace(f"@{name}@", text)
    text = "\n".join(head).strip().replace('"""', "'''")
    doc = f'"""{text}\n\nBuilt on first use by the C++ compiler of the machine.\n"""\n\n'
    kernels = ""
    for name, texts in zip(("FORWARD", "BACKWARD"), sources, strict=True):
        kernels += f"\n{name} = (\n" + "".join(f'    r"""{text}""",\n' for text in texts) + ")\n"
    return f"{doc}{IMPORTS}\n{_host()}{LIBRARY}\n{setup}{tail}{kernels}"
