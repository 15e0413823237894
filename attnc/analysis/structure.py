"""The structure of a whole relation: one normal form per axis and the residual predicate that no axis explains."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from attnc import ir
from attnc.analysis.axis import AxisForm, from_data, to_data
from attnc.analysis.implied import axes_of, implied, split
from attnc.errors import CacheError

Prove = Callable[[], Any]
Keeper = Callable[[str, Prove], Any]
Blocks = tuple[int, int]  # tokens of a block, and where blocks begin (mod that)


@dataclass(frozen=True)
class Structure:
    """relation = the product of the axes' intervals, and `residual` (TRUE where the product says it all).

    flat: the relation and score live on the row-major index, so the grid was proved to be one axis.
    spoken: per axis, the conditions that mention it alone; those of `shadows` follow from a condition on several axes.
    unknown: per axis, those that no rule knew (what tables may be built from).
    """

    axes: tuple[AxisForm, ...]
    residual: ir.Expr
    flat: bool
    spoken: tuple[tuple[ir.Expr, ...], ...]
    shadows: frozenset[ir.Expr]
    unknown: tuple[tuple[ir.Expr, ...], ...]

    @property
    def by_axis(self) -> bool:
        """The residual is conditions that mention one axis each."""
        return self.residual != ir.TRUE and {e for left in self.unknown for e in left} - self.shadows == set(
            ir.conjuncts(self.residual)
        )

    @property
    def others(self) -> tuple[Blocks | None, ...]:
        """Axes on which a query sees every block of keys but its own, where that is all of the residual; else none of them."""
        found = [
            other_blocks(left[0]) if len(left) == 1 and form.full else None
            for form, left in zip(self.axes, self.unknown, strict=True)
        ]
        told = self.by_axis and all(x is not None for x, left in zip(found, self.unknown, strict=True) if left)
        return tuple(found) if told else (None,) * len(self.axes)

    @property
    def strategy(self) -> str:
        """dense, grouped (an equivalence: every axis full, a point or blocks) or banded."""
        if all(f.full for f in self.axes):
            return "dense"
        return "grouped" if all(f.equivalence for f in self.axes) else "banded"


def other_blocks(e: ir.Expr) -> Blocks | None:
    """The blocks where a condition is that a query and a key on one axis are in different ones; None of any other condition."""
    equal = ir.make("eq", *e.args) if e.op == "ne" else e.args[0] if e.op == "not" else ir.TRUE
    sides = [_numbered(x) for x in equal.args] if equal.op == "eq" else []
    if len(sides) != 2 or sides[0] is None or sides[0] != sides[1]:
        return None
    size, begin = sides[0]
    return (size, begin % size) if {c.args[0] for c in ir.walk(equal) if c.op == "coord"} == {"q", "k"} else None


def _numbered(e: ir.Expr) -> Blocks | None:
    """The size of the blocks that coord // n numbers, or (coord - c) // n, and where block 0 begins."""
    if e.op != "floordiv" or e.args[1].op != "const":
        return None
    at, size = e.args[0], int(e.args[1].args[0])
    begin = 0
    if at.op in ("add", "sub") and at.args[1].op == "const":
        begin = int(at.args[1].args[0]) * (1 if at.op == "sub" else -1)
        at = at.args[0]
    return (size, begin) if at.op == "coord" and size > 1 else None


_keeper: Keeper | None = None


def keep_proofs(keeper: Keeper) -> None:
    """Proofs are asked of `keeper(key, prove)` from now on: it gives what `prove()` gives for this key, now or at another time."""
    global _keeper
    _keeper = keeper


def _moved(e: ir.Expr, source: int, target: int) -> ir.Expr:
    """An expression about one axis, about another one (and the other way round)."""
    places = {source: target, target: source}

    def rule(n: ir.Expr) -> ir.Expr | None:
        make = {"coord": ir.coord, "size": ir.size}.get(n.op)
        return None if make is None else make(n.args[0], places.get(n.args[1], n.args[1]))

    return ir.rewrite(e, rule)


def _recognise(
    per_axis: list[tuple[ir.Expr, ...]], roles: tuple[ir.Role, ir.Role]
) -> tuple[list[AxisForm], list[tuple[ir.Expr, ...]]]:
    """The form of each axis and the conjuncts that no rule knew, proved with sympy or kept from an earlier proof."""

    def prove() -> list[Any]:
        from attnc.analysis.forms import recognise

        proved: dict[tuple[ir.Expr, ...], tuple[AxisForm, list[int]]] = {}  # on axis 0
        found = []
        for axis, terms in enumerate(per_axis):
            alike = tuple(_moved(e, axis, 0) for e in terms)
            if alike not in proved:
                form, left = recognise(alike, 0, roles)
                proved[alike] = form, [alike.index(e) for e in left]
            form, unknown = proved[alike]
            found.append([to_data(form.map(lambda e: _moved(e, 0, axis))), unknown])  # noqa: B023
        return found

    key = json.dumps([[[ir.expr_to_data(e) for e in terms] for terms in per_axis], roles])
    data = prove() if _keeper is None else _keeper(key, prove)
    try:
        return [from_data(form) for form, _ in data], [
            tuple(terms[i] for i in left) for terms, (_, left) in zip(per_axis, data, strict=True)
        ]
    except (TypeError, ValueError, IndexError) as e:
        raise CacheError(f"not a proof: {e}") from e


def _mentions(e: ir.Expr, ops: tuple[str, ...]) -> bool:
    return any(n.op in ops for n in ir.walk(e))


@lru_cache(maxsize=256)
def analyse(a: ir.Attend, same_grid: bool, padded: bool = False) -> Structure:
    """Prove the structure of a statement. Pure; sizes stay symbols. Virtual padded keys keep the grid's axes apart."""
    roles: tuple[ir.Role, ir.Role] = ("q", "q") if same_grid else ("q", "k")
    relation = a.relation
    spoken = [relation, a.score, *([a.post] if a.post is not None else [])]
    flat = a.rank > 1 and same_grid and not padded and not any(_mentions(e, ("coord",)) for e in spoken)
    if flat:  # q.index and k.index become the coordinates of a 1-D grid

        def one_axis(n: ir.Expr) -> ir.Expr | None:
            return ir.coord(n.args[0], 0) if n.op == "index" else None

        relation = ir.rewrite(relation, one_axis)
        if _mentions(relation, ("size",)):
            flat, relation = False, a.relation
    rank = 1 if flat else a.rank
    if not flat:
        relation = ir.flatten_index(relation, a.rank, same_grid)
    per_axis: list[list[ir.Expr]] = [[] for _ in range(rank)]
    residual: list[ir.Expr] = []
    for c in (part for whole in ir.conjuncts(relation) for part in (split(whole) if len(axes_of(whole)) > 1 else (whole,))):
        axes = axes_of(c)
        real = any(n.kind == "real" for n in ir.walk(c))  # rules are for integers
        if len(axes) == 1 and not real and not _mentions(c, ("load", "head", "heads", "batch")):
            per_axis[axes.pop()].append(c)
        else:
            residual.append(c)
    shadows = {(axis, e) for c in residual for axis, e in implied(c) if e not in per_axis[axis]}
    for axis, e in sorted(shadows, key=str):
        per_axis[axis].append(e)
    forms, unknown = _recognise([tuple(terms) for terms in per_axis], roles)
    follow = frozenset(e for _, e in shadows)
    residual += [e for left in unknown for e in left if e not in follow]
    alone = tuple(tuple(terms) for terms in per_axis)
    return Structure(tuple(forms), ir.all_of(tuple(residual)), flat, alone, follow, tuple(unknown))
