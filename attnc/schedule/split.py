"""Statements that run as several: heads with patterns of their own, and unions of structured relations.

Heads that follow different parts of a relation run apart, each part with its own structure. A union `a | b | ...` whose parts
have intervals of their own, but whose union has none, runs as partial programs: part i gets the residual "not in an earlier
part", so each key counts once, and the parts are merged exactly through their log-sum-exp, or added where weights have no
sum. The backward of each part takes the merged output and LSE, which is what makes the sum of the parts' gradients the
gradient of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import numpy as np

from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.schedule.geometry import geometry

# what costs as much as a score element without a mask, measured on CPUs: one that is masked, and what each part does for a query
# whatever its keys
MASKED, QUERY = 1.4, 80.0


@dataclass(frozen=True)
class HeadRun:
    """Query heads first .. last - 1, which read key heads kv_first .. kv_last - 1, and the disjoint programs they run (or none).

    cut: tables whose dimension is indexed by the head alone; the run gets their rows first .. last - 1.
    """

    first: int
    last: int
    kv_first: int
    kv_last: int
    parts: tuple[ir.Program, ...]
    cut: tuple[tuple[str, int], ...] = ()


def disjuncts(e: ir.Expr) -> tuple[ir.Expr, ...]:
    """The terms of a disjunction, left to right."""
    return disjuncts(e.args[0]) + disjuncts(e.args[1]) if e.op == "or" else (e,)


def any_of(terms: tuple[ir.Expr, ...]) -> ir.Expr:
    """Disjunction of any number of terms."""
    out = ir.FALSE
    for t in terms:
        out = ir.make("or", out, t)
    return out


def _about_heads(e: ir.Expr) -> bool:
    ops = {n.op for n in ir.walk(e)}
    return "head" in ops and not ops & {"load", *ir.LEAVES} - {"head", "heads", "const"}


def _on_heads(relation: ir.Expr, heads: int) -> list[ir.Expr]:
    """For each head, the relation with every condition that reads the head alone decided."""

    def of(h: int) -> ir.Expr:
        def rule(n: ir.Expr) -> ir.Expr | None:
            if n.kind == "bool" and n.op in ("eq", "ne", "lt", "le") and _about_heads(n):
                return ir.const(bool(evaluate(n, {ir.HEAD: h, ir.HEADS: heads}, np)))
            return None

        return ir.rewrite(relation, rule)

    return [of(h) for h in range(heads)]


def _work(program: ir.Program, q_grid: tuple[int, ...], k_grid: tuple[int, ...]) -> float:
    """Of the score elements inside the per-axis intervals, without their gaps where these say it all, else masked; of queries."""
    g = geometry(program, q_grid, k_grid)
    clear = g.gaps or g.structure.residual == ir.TRUE
    return math.prod(a.pairs(gaps=g.gaps) for a in g.axes) * (1.0 if clear else MASKED) + QUERY * g.n_queries


def _union(program: ir.Program, q_grid: tuple[int, ...], k_grid: tuple[int, ...]) -> tuple[ir.Program, ...]:
    """Disjoint partial programs of a union; the program alone where splitting gains nothing or parts cannot be merged."""
    a = program.attend
    if not isinstance(a, ir.Attend) or program.queries.prefix or program.keys.prefix:
        return (program,)
    if a.normalizer.over != "keys" or a.normalizer.sink is not None:
        return (program,)  # a sink counts once, and is not there where kernels run (see codegen.around)
    # a conjunct beside the union, (a | b) & c, belongs to every part
    common = tuple(c for c in ir.conjuncts(a.relation) if c.op != "or")
    unions = [c for c in ir.conjuncts(a.relation) if c.op == "or"]
    if len(unions) != 1:
        return (program,)
    out, earlier = [], ir.TRUE
    for term in disjuncts(unions[0]):
        relation = ir.make("and", ir.make("and", ir.all_of(common), term), earlier)
        out.append(replace(program, attend=replace(a, relation=relation)))
        earlier = ir.make("and", earlier, ir.make("not", term))
    split = sum(_work(p, q_grid, k_grid) for p in out)
    return tuple(out) if split < _work(program, q_grid, k_grid) else (program,)


def _key_heads(first: int, last: int, group: int) -> tuple[int, int] | None:
    """The key heads that a run of query heads reads, where it divides evenly over them."""
    a, b = first // group, -(-last // group)
    aligned = first % group == 0 and last % group == 0
    return (a, b) if aligned or b - a == 1 else None


def tables_by(a: ir.Attend, leaf: ir.Expr) -> tuple[tuple[str, int], ...]:
    """(table, dimension) where every element read has the bare leaf (the head, or the batch item) as that index."""
    reads: dict[str, list[tuple[ir.Expr, ...]]] = {}
    for e in (a.relation, a.score, a.post):
        for n in ir.walk(e) if e is not None else ():
            if n.op == "load":
                reads.setdefault(n.args[0], []).append(n.children)
    found = []
    for name, each in reads.items():
        dims = [d for d in range(len(each[0])) if all(i[d] == leaf for i in each)]
        found += [(name, dims[0])] if dims else []
    return tuple(found)


def shifted(e: ir.Expr, leaf: ir.Expr, first: ir.Expr, cut: tuple[tuple[str, int], ...]) -> ir.Expr:
    """The expression where the leaf (the head, or the batch item) counts from 0 what starts at `first`.

    cut: tables whose dimension the leaf alone selects, which get their part.
    """
    dims = dict(cut)

    def rule(n: ir.Expr) -> ir.Expr | None:
        if n.op == "load" and n.args[0] in dims:
            kept = dims[n.args[0]]
            indices = tuple(i if d == kept else ir.rewrite(i, rule) for d, i in enumerate(n.children))
            return ir.load(n.args[0], indices, n.kind)
        return ir.make("add", n, first) if n == leaf else None

    return ir.rewrite(e, rule)


@lru_cache(maxsize=512)
def split(program: ir.Program, q_grid: tuple[int, ...], k_grid: tuple[int, ...], heads: int, kv_heads: int) -> tuple[HeadRun, ...]:
    """The runs of heads of a program on concrete grids; most programs are one run of one part."""
    whole = (HeadRun(0, heads, 0, kv_heads, _union(program, q_grid, k_grid)),)
    a = program.attend
    if not isinstance(a, ir.Attend) or not any(_about_heads(n) for n in ir.walk(a.relation) if n.kind == "bool"):
        return whole
    runs, cut = [], tables_by(a, ir.HEAD)
    for relation, members in groupby(enumerate(_on_heads(a.relation, heads)), key=lambda pair: pair[1]):
        at = [h for h, _ in members]
        first, last = at[0], at[-1] + 1
        keys = _key_heads(first, last, heads // kv_heads)
        if keys is None:
            return whole
        own_relation, score, post, dropout = (
            None if e is None else shifted(ir.substitute(e, {ir.HEADS: ir.const(heads)}), ir.HEAD, ir.const(first), cut)
            for e in (relation, a.score, a.post, a.dropout)
        )
        assert own_relation is not None and score is not None
        own = replace(a, relation=own_relation, score=score, post=post, dropout=dropout)
        parts = () if relation == ir.FALSE else _union(replace(program, attend=own), q_grid, k_grid)
        runs.append(HeadRun(first, last, *keys, parts, cut))
    if a.normalizer.sink is not None or program.queries.prefix or program.keys.prefix:
        return whole  # a sink, and prefix keys, belong to heads without a pattern too
    return tuple(runs)
