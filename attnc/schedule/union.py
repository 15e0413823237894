"""Unions of structured relations: run as partial programs that are merged exactly through their log-sum-exp.

A relation `a | b | ...` whose parts have intervals of their own, but whose union has none, would be dense with a predicate.
Part i gets the residual "not in an earlier part", so each key counts once. The backward of each part takes the merged output and
LSE, which is what makes the sum of the parts' gradients the gradient of the whole.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from attnc import ir
from attnc.schedule.geometry import geometry

GAIN = 0.7  # a union is split where its parts' boxes hold less than this share of the whole's


def disjuncts(e: ir.Expr) -> tuple[ir.Expr, ...]:
    """The terms of a disjunction, left to right."""
    return disjuncts(e.args[0]) + disjuncts(e.args[1]) if e.op == "or" else (e,)


def _boxes(program: ir.Program, q_grid: tuple[int, ...], k_grid: tuple[int, ...]) -> int:
    """Score elements inside the per-axis intervals, whatever the residual predicate leaves of them."""
    total = 1
    for a in geometry(program, q_grid, k_grid).axes:
        total *= a.pairs()
    return total


@lru_cache(maxsize=512)
def parts(program: ir.Program, q_grid: tuple[int, ...], k_grid: tuple[int, ...]) -> tuple[ir.Program, ...]:
    """The partial programs of a union on concrete grids; the program alone where splitting gains nothing or cannot be merged."""
    a = program.attend
    if not isinstance(a, ir.Attend) or a.normalizer != ir.SOFTMAX or program.queries.prefix or program.keys.prefix:
        return (program,)
    # a conjunct beside the union (a | b) & c belongs to every part
    common = [c for c in ir.conjuncts(a.relation) if c.op != "or"]
    unions = [c for c in ir.conjuncts(a.relation) if c.op == "or"]
    if len(unions) != 1:
        return (program,)
    out, earlier = [], ir.TRUE
    for term in disjuncts(unions[0]):
        relation = ir.make("and", ir.make("and", ir.all_of(tuple(common)), term), earlier)
        out.append(replace(program, attend=replace(a, relation=relation)))
        earlier = ir.make("and", earlier, ir.make("not", term))
    split = sum(_boxes(p, q_grid, k_grid) for p in out)
    return tuple(out) if split < GAIN * _boxes(program, q_grid, k_grid) else (program,)
