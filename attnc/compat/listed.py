"""What a mod rounds or compares that is no integer, listed for every value of the integers that it depends on.

`torch.log(distance.float()).long()` reads one integer, `slopes[h] * (q_idx - kv_idx) > -3.0` two of few values: torch itself
computes these, in the mod's own dtype, for each value that the integers can have. The list is a table of integers, which every
backend reads alike, or, for a condition on coordinates that holds on a few runs of one integer, those runs. So the relation keeps
its structure, and no rounding of a kernel decides who attends to whom. Floats of the query against floats of the key (`time[q_idx]
- time[kv_idx] < 0.5`) would be a list of N x N: they stay, and kernels compute them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc import ir
from attnc.analysis.evaluate import WHOLE, evaluate
from attnc.compat.statement import Lengths, flat_program
from attnc.compat.torch_ops import LN2
from attnc.ir import Expr, make
from attnc.schedule.bounds import Box
from attnc.schedule.geometry import geometry

PER_TOKEN = 8  # most entries of a list per token (and head and batch item)
RUNS = 4  # most runs that a condition is written with
COMPARE = ("eq", "ne", "lt", "le")
LOGARITHMS = {1 / LN2: torch.log2, 1 / math.log(10.0): torch.log10}


def listed(
    relation: Expr, score: Expr, n: Lengths, dtypes: Mapping[Expr, torch.dtype], tables: Mapping[str, Tensor], device: torch.device
) -> tuple[Expr, Expr, dict[str, Tensor]]:
    """Relation and score with lists, and the tables that hold them. dtypes: what torch computes a rounding or comparison in."""
    found: dict[str, Tensor] = {}
    ranges = Box(geometry(flat_program("", ir.TRUE, ir.SCORE, 1, n), (n.queries,), (n.keys,)), n.heads, n.batch, everywhere=True)

    def rule(e: Expr) -> Expr | None:
        if not (e.op in COMPARE or e.kind == "int") or not _inexact(e):
            return None
        seeds = _seeds(e)
        spans = [ranges.of(s) for s in seeds]
        per = math.prod(many for leaf, many in ((ir.HEAD, n.heads), (ir.BATCH, n.batch)) if any(leaf in ir.walk(s) for s in seeds))
        size = math.prod(s.high - s.low + 1 for s in spans)
        if not 0 < size <= PER_TOKEN * (n.queries + n.keys) * per:
            return None
        first = tuple(int(s.low) for s in spans)
        kinds = [dtypes[m] for m in ir.walk(e) if m in dtypes] or [torch.get_default_dtype()]
        dtype = max(kinds, key=lambda d: (d.itemsize, d != torch.float16))
        shape = tuple(int(s.high - s.low) + 1 for s in spans)
        if any(m.op == "load" for m in ir.walk(e)):
            values = _values(e, seeds, first, shape, dtype, tables, device)
        else:
            values = _known(e, seeds, first, shape, dtype)
            if e.kind == "bool" and len(seeds) == 1 and (runs := _runs(seeds[0], first[0], values)) is not None:
                return runs
        name = f"listed{len(found)}"
        low, high = torch.aminmax(values.long())
        fits = low >= -(2**31) and high < 2**31
        found[name] = values.to(device=device, dtype=torch.int32 if fits else torch.int64)
        at = ir.load(name, tuple(make("sub", s, ir.const(low)) for s, low in zip(seeds, first, strict=True)), "int")
        return make("ne", at, ir.ZERO) if e.kind == "bool" else at

    return ir.rewrite(relation, rule), ir.rewrite(score, rule), found


def _inexact(e: Expr) -> bool:
    """Decides by reals other than SCORE."""
    inside = list(ir.walk(e))
    return any(m.op == "floor" or (m.kind == "real" and m.op != "const") for m in inside) and ir.SCORE not in inside


def _exact(e: Expr) -> bool:
    """Made of coordinates, sizes, the head, the batch item and integers alone."""
    return all(m.kind == "int" and m.op not in ("load", "floor") for m in ir.walk(e))


def _seeds(e: Expr) -> tuple[Expr, ...]:
    """The integer expressions that e is a function of: the largest, but none that is made of another one."""

    def largest(x: Expr) -> list[Expr]:
        if _exact(x):
            return [x] if any(m.op in ("coord", "head", "batch") for m in ir.walk(x)) else []
        return [s for c in x.children for s in largest(c)]

    seeds = list(dict.fromkeys(largest(e)))
    while True:
        whole = next((s for s in seeds if any(t != s and t in ir.walk(s) for t in seeds)), None)
        if whole is None:
            return tuple(seeds)
        seeds = list(dict.fromkeys(t for s in seeds for t in ([u for c in s.children for u in largest(c)] if s == whole else [s])))


def _values(
    e: Expr,
    seeds: tuple[Expr, ...],
    first: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tables: Mapping[str, Tensor],
    device: torch.device,
) -> Tensor:
    """e for each value of its seeds, as torch computes it in this dtype."""
    names = [ir.var(f"seed{i}") for i in range(len(seeds))]
    leaves: dict[Expr, Any] = {}
    for i, (name, low, many) in enumerate(zip(names, first, shape, strict=True)):
        leaves[name] = torch.arange(low, low + many, device=device).view(-1, *(1,) * (len(seeds) - 1 - i))

    def load(name: str, indices: tuple[Any, ...]) -> Tensor:
        t = tables[name].detach()
        at = (_whole(torch.as_tensor(i, device=t.device)) for i in indices)
        found = t[tuple(torch.where(i < 0, i + m, i).clamp(0, m - 1) for i, m in zip(at, t.shape, strict=True))]
        return found.to(dtype) if t.is_floating_point() else found.long()

    def value(x: Expr) -> Any:
        return evaluate(ir.rewrite(x, by_torch), leaves, torch, load, lambda y: y.to(dtype))

    def by_torch(x: Expr) -> Expr | None:
        """What the IR spells by natural logarithms, where torch is exact at whole powers; and floats that floor leaves floats."""
        factor = x.args[1].args[0] if x.op == "mul" and x.args[1].op == "const" else None
        if factor in LOGARITHMS and x.args[0].op == "log":
            function, inner = LOGARITHMS[factor], x.args[0].args[0]
        elif x.op == "exp" and x.args[0].op == "mul" and x.args[0].args[1] == ir.const(LN2):
            function, inner = torch.exp2, x.args[0].args[0]
        elif x.op == "floor":
            function, inner = torch.floor, x.args[0]
        else:
            return None
        name = Expr("var", (f"value{len(leaves)}",), x.kind)
        found = function(torch.as_tensor(value(inner), device=device).to(dtype))
        leaves[name] = found.double() if x.kind == "int" else found  # integers of 53 bits, and what is none
        return name

    values = torch.as_tensor(value(ir.substitute(e, dict(zip(seeds, names, strict=True)))), device=device)
    return (values if values.dtype == torch.bool else _whole(values)).expand(shape)


def _whole(x: Tensor) -> Tensor:
    """Integers of what holds such, from -WHOLE to WHOLE; -WHOLE of what is no number."""
    return x.nan_to_num(nan=-WHOLE).clamp(-WHOLE, WHOLE).long() if x.is_floating_point() else x.clamp(-WHOLE, WHOLE)


@lru_cache(maxsize=256)
def _known(e: Expr, seeds: tuple[Expr, ...], first: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _values(e, seeds, first, shape, dtype, {}, torch.device("cpu"))


def _runs(seed: Expr, first: int, holds: Tensor) -> Expr | None:
    """The condition as runs of its seed; None where there are too many."""
    edges = torch.nn.functional.pad(holds.to(torch.int8), (1, 1)).diff()
    starts, ends = (torch.nonzero(edges == way).flatten().tolist() for way in (1, -1))
    if len(starts) > RUNS:
        return None
    out = ir.FALSE
    for a, b in zip(starts, ends, strict=True):
        above = make("le", ir.const(first + a), seed) if a else ir.TRUE
        below = make("le", seed, ir.const(first + b - 1)) if b < len(holds) else ir.TRUE
        out = make("or", out, make("and", above, below) if a != b - 1 else make("eq", seed, ir.const(first + a)))
    return out
