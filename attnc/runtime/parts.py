"""What a call of a statement runs: heads in runs, each with the statements whose merged result is its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from attnc import ir
from attnc.codegen.around import core_program
from attnc.runtime.call import Call
from attnc.schedule import bounds
from attnc.schedule.geometry import Geometry, geometry
from attnc.schedule.split import HeadRun, split


@lru_cache(maxsize=1024)
def program_of(text: str) -> ir.Program:
    """The program in an operator's JSON argument."""
    return ir.from_json(text)


@dataclass(frozen=True)
class TableSpec:
    """One of an operator's `tables`: its name, number of dimensions, and whether it holds integers."""

    name: str
    rank: int
    integer: bool


@lru_cache(maxsize=1024)
def table_specs(p: ir.Program) -> tuple[TableSpec, ...]:
    """The tables of a program, in the order operators take them; `pad_k` and `pad_v` last."""
    a = p.attend
    assert isinstance(a, ir.Attend)
    padded = p.keys.pad is not None or p.keys.pad_multiple is not None
    pads = [TableSpec(n, 2, False) for n in ("pad_k", "pad_v")] if padded else []
    return (*(TableSpec(n, a.table_rank(n), n in a.int_tables) for n in a.tables), *pads)


def table_names(p: ir.Program) -> tuple[str, ...]:
    """Names of the tensors in an operator's `tables`, in order."""
    return tuple(s.name for s in table_specs(p))


def softmax_over_queries(program: str) -> bool:
    """Such a statement runs with queries and keys exchanged."""
    a = program_of(program).attend
    return isinstance(a, ir.Attend) and a.normalizer.over == "queries"


@dataclass(frozen=True)
class Part:
    """A run of heads: slices of q, k and v along the head dimension, the statements whose merged result it is, with the names of
    their tables and what backends keep for their calls, and which slice of which table is its own."""

    heads: slice
    key_heads: slice
    statements: tuple[tuple[ir.Program, Geometry, tuple[str, ...], dict[Any, Any]], ...]
    cuts: dict[str, tuple[int, slice]]

    def calls(self, tables: dict[str, Tensor], scale: float) -> list[Call]:
        """Its statements with the tensors of a call."""
        mine = {n: rows_of(t, self.cuts.get(n)) for n, t in tables.items()} if self.cuts else tables
        union = len(self.statements) > 1
        return [Call(p, g, scale, {n: mine[n] for n in names}, union, kept=kept) for p, g, names, kept in self.statements]


@lru_cache(maxsize=4096)
def parts_of(
    program: str,
    q_grid: tuple[int, ...],
    k_grid: tuple[int, ...],
    heads: int,
    kv_heads: int,
    batch: int,
    backend: str,
    *shapes: tuple[int, ...],
) -> tuple[tuple[str, ...], tuple[Part, ...]]:
    """Names of the tables, whose shapes these are, and what a call of these sizes runs; checked once."""
    whole = program_of(program)
    names = table_names(whole)
    named = dict(zip(names, shapes, strict=True))
    bounds.check(whole, q_grid, k_grid, heads, batch, tuple((n, tuple(s)) for n, s in named.items()), backend in ("eager", "torch"))
    runs = split(whole, q_grid, k_grid, heads, kv_heads)
    if backend == "eager":  # the meaning is the statement as a whole, which proofs and their parts are held to
        runs = (HeadRun(0, heads, 0, kv_heads, (whole,)),)
    parts = []
    for r in runs:
        mine, keys = slice(r.first, r.last), slice(r.kv_first, r.kv_last)
        cuts = {n: (d, mine) for n, d in r.cut} | dict.fromkeys(("pad_k", "pad_v"), (0, keys))
        cuts = {n: at for n, at in cuts.items() if n in named and named[n][at[0]] > 1} if len(runs) > 1 else {}
        spoken = [_with_heads(p, heads) for p in r.parts]
        shapes_of = [(p, geometry(core_program(p), q_grid, k_grid), table_names(p)) for p in spoken]
        parts.append(Part(mine, keys, tuple((*s, {}) for s in shapes_of), cuts))
    return names, tuple(parts)


def _with_heads(p: ir.Program, heads: int) -> ir.Program:
    """The program with its number of heads written in, where it asks for it."""
    a = p.attend
    assert isinstance(a, ir.Attend)
    spoken = [e for e in (a.relation, a.score, a.post) if e is not None]
    if not any(n == ir.HEADS for e in spoken for n in ir.walk(e)):
        return p
    relation, score, *post = (ir.substitute(e, {ir.HEADS: ir.const(heads)}) for e in spoken)
    return replace(p, attend=replace(a, relation=relation, score=score, post=post[0] if post else None))


def sized(
    q: Tensor, k: Tensor, tables: list[Tensor], q_grid: Any, k_grid: Any, program: str, backend: str
) -> tuple[dict[str, Tensor], tuple[Part, ...]]:
    """The tables by name, and what the call runs."""
    sizes = q.shape[1], k.shape[1], q.shape[0]
    names, parts = parts_of(program, tuple(q_grid), tuple(k_grid), *sizes, backend, *[t.shape for t in tables])
    return dict(zip(names, tables, strict=True)), parts


def calls(
    q: Tensor, k: Tensor, tables: dict[str, Tensor], scale: float, q_grid: Any, k_grid: Any, program: str, backward: bool = False
) -> list[tuple[slice, slice, Call]]:
    """The calls of the C++ backend that this comes to, in their order, with their heads of queries and of keys. Empty where it
    is run in another way."""
    if softmax_over_queries(program):
        return []
    named, parts = sized(q, k, list(tables.values()), q_grid, k_grid, program, "cpp")
    runs = [(p, p.calls(named, scale)) for p in parts]
    if not all(mine for _, mine in runs):  # queries without keys
        return []
    return [(p.heads, p.key_heads, call) for p, call in going_on(runs, backward)]


def going_on(runs: Iterable[tuple[Part, list[Call]]], backward: bool) -> Iterator[tuple[Part, Call]]:
    """The calls of runs of heads, each to go on from what earlier ones of the same heads left."""
    written: set[int] = set()  # key heads (two runs have all of theirs in common, or none)
    for part, mine in runs:
        for i, call in enumerate(mine):
            again = i > 0 or part.key_heads.start in written
            yield part, replace(call, continues=(i > 0) + 2 * again if backward else i > 0)
        written.update(range(part.key_heads.start, part.key_heads.stop) if mine else ())


def rows_of(t: Tensor, cut: tuple[int, slice] | None) -> Tensor:
    """A view of the slice that a run of heads gets of a table."""
    return t if cut is None else t.narrow(cut[0], cut[1].start, cut[1].stop - cut[1].start)


def rows_of_part(p: Part, rows: tuple[Any, ...]) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    """A part's heads of q, k and v, and of out, lse, grad_out and grad_lse."""
    q, k, v, *rest = rows
    mine = (q[:, p.heads], k[:, p.key_heads], v[:, p.key_heads])
    return mine, tuple(t if t is None else t[:, p.heads] for t in rest)
