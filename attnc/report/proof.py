"""The proof of an axis in words: which conjunct gave which end, and formulas in the axis's own short names.

Nothing is proved here. Each conjunct is handed to the same recogniser that proved the whole axis, next to the congruences that
split it, so what a line says is what the recogniser did with that conjunct.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnc import ir
from attnc.analysis.algebra import from_sympy, to_sympy
from attnc.analysis.axis import AxisForm
from attnc.analysis.forms import length, recognise
from attnc.analysis.structure import Structure

Roles = tuple[ir.Role, ir.Role]


@dataclass(frozen=True)
class Names:
    """Short names for one axis. `given` are the abbreviations used, each with what it stands for."""

    axis: str
    mapping: dict[ir.Expr, ir.Expr]
    given: tuple[tuple[str, str], ...]

    def show(self, e: ir.Expr) -> str:
        """A formula over j or i in these names."""
        return ir.show(ir.substitute(e, self.mapping))


@dataclass(frozen=True)
class Step:
    """One conjunct and what it gave: ends of i, a split, or nothing (then it stays a predicate)."""

    conjunct: str
    gives: str


def axis_names(axes: tuple[str, ...], axis: int, form: AxisForm, *, flat: bool, same_grid: bool) -> Names:
    """n<axis> for the query's length and m<axis> for the key's on a grid of its own; g tokens in residue class r; shift t."""
    name = "index" if flat else axes[axis]
    short = "" if flat else name
    roles: Roles = ("q", "q") if same_grid else ("q", "k")
    n, m = ir.var(f"n{short}"), ir.var(f"n{short}" if same_grid else f"m{short}")
    base = {ir.size("q", axis): n, ir.size("k", axis): m}
    mapping, given = dict(base), []

    def name_it(e: ir.Expr, as_name: str) -> None:
        given.append((as_name, ir.show(ir.substitute(e, base))))
        mapping[e] = ir.var(as_name)

    if form.split != ir.ONE:
        split = to_sympy(form.split)
        if form.split.op != "const":
            name_it(form.split, "s")
        group = length(roles[1], axis, split)
        for e, text in ((group, "g"), (length(roles[0], axis, split), "h")):
            whole = from_sympy(e)
            if whole not in mapping:
                given.append((text, ir.show(ir.substitute(whole, {**base, form.split: mapping.get(form.split, form.split)}))))
                mapping[whole] = ir.var(text)
                mapping[from_sympy(e - 1)] = ir.make("sub", ir.var(text), ir.ONE)
    shift = form.shift.args[0] if form.shift.op == "mod" else form.shift
    if shift.op not in ("const", "var"):
        name_it(shift, "t")
    return Names(name, mapping, tuple(given))


def steps(s: Structure, axis: int, roles: Roles, names: Names, axes: tuple[str, ...]) -> list[Step]:
    """One step per conjunct of an axis, in the order they were written."""
    conjuncts = s.spoken[axis]
    alone = {c: recognise((c,), axis, roles)[0].split for c in conjuncts}
    splits = tuple(c for c in conjuncts if alone[c] != ir.ONE)
    none = recognise(splits, axis, roles)[0]
    out = []
    for c in conjuncts:
        text = ir.show(c, axes) + (", which follows from what no axis explains" if c in s.shadows else "")
        if c in s.unknown[axis]:
            out.append(Step(text, "no rule gives an end: stays a predicate"))
        elif c in splits:
            out.append(Step(text, f"splits {names.axis} into {names.show(alone[c])} residue classes"))
        else:
            form = recognise((*splits, c), axis, roles)[0]
            ends = []
            if form.lo != none.lo:
                ends.append(f"i >= {names.show(form.lo)}")
            if form.hi != none.hi:
                ends.append(f"i <= {names.show(form.hi)}")
            out.append(Step(text, " and ".join(ends) or "always true on this axis"))
    return out


def symmetric(form: AxisForm) -> bool:
    """Whether the map seen from the keys is the same map."""
    if form.inverse_lo is None or form.inverse_hi is None:
        return False
    back = [ir.substitute(e, {ir.var("i"): ir.var("j")}) for e in (form.inverse_lo, form.inverse_hi)]
    return back == [form.lo, form.hi]


def equivalence(form: AxisForm) -> bool:
    """Whether the axis falls into groups whose members see each other and nobody else."""
    return form.equivalence and symmetric(form)
