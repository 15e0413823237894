"""The structure of a whole relation: one normal form per axis and the residual predicate that no axis explains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attnc import ir
from attnc.analysis.forms import AxisForm, recognise


@dataclass(frozen=True)
class Structure:
    """relation = the product of the axes' intervals, and `residual` (TRUE where the product says it all).

    flat: the relation and score live on the row-major index, so the grid was proved to be one axis.
    separable: per axis, the conjuncts that mention only that axis (what tables may be built from).
    """

    axes: tuple[AxisForm, ...]
    residual: ir.Expr
    flat: bool
    unknown: tuple[tuple[ir.Expr, ...], ...]

    @property
    def strategy(self) -> str:
        """dense, grouped (an equivalence: every axis full, a point or blocks) or banded."""
        if all(f.full for f in self.axes):
            return "dense"
        return "grouped" if all(f.equivalence for f in self.axes) else "banded"


def _axes_of(e: ir.Expr) -> set[int]:
    return {n.args[1] for n in ir.walk(e) if n.op == "coord"}


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
    for c in ir.conjuncts(relation):
        axes = _axes_of(c)
        if len(axes) == 1 and not _mentions(c, ("load", "head", "heads", "batch")):
            per_axis[axes.pop()].append(c)
        else:
            residual.append(c)
    forms, unknown = [], []
    for axis, terms in enumerate(per_axis):
        form, left = recognise(tuple(terms), axis, roles)
        forms.append(form)
        unknown.append(left)
        residual += left
    return Structure(tuple(forms), ir.all_of(tuple(residual)), flat, tuple(unknown))
