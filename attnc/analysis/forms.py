"""Normal forms: which keys one axis allows, as a residue split and two monotone interval ends, found from the expression.

For a query coordinate q = split * j + r, the keys are split * i + r with lo(j, r) <= i <= hi(j, r). Both ends never fall as j
grows, so the transposed map (for a key, its queries) is the pair of generalised inverses, and a tile of queries sees one
interval of keys.
"""

from __future__ import annotations

import contextlib

import sympy as sp

from attnc import ir
from attnc.analysis.algebra import (
    Choice,
    FloorDiv,
    FloorMod,
    NotAlgebraic,
    from_sympy,
    gathered,
    nondecreasing,
    solve_at_least,
    solve_at_most,
    symbol,
    to_sympy,
)
from attnc.analysis.axis import AxisForm, I, J, R

_J, _R, _I = symbol(J), symbol(R), symbol(I)


class _Unrecognised(Exception):
    """No rule applies to a conjunct."""


def length(role: ir.Role, axis: int, split: sp.Expr) -> sp.Expr:
    """Number of tokens of residue r on an axis."""
    n = symbol(ir.size(role, axis))
    return n if split == 1 else FloorDiv(n - _R + split - 1, split)


def _difference(c: ir.Expr) -> tuple[str, sp.Expr]:
    """A comparison as ("le" | "eq", e): e <= 0 or e == 0."""
    if c.op == "not":
        inner = c.args[0]
        if inner.op == "lt":  # not (a < b)  ==  b <= a
            return "le", to_sympy(inner.args[1]) - to_sympy(inner.args[0])
        if inner.op == "le":
            return "le", to_sympy(inner.args[1]) - to_sympy(inner.args[0]) + 1
        if inner.op == "ne":
            return "eq", to_sympy(inner.args[0]) - to_sympy(inner.args[1])
    if c.op in ("lt", "le", "eq"):
        e = to_sympy(c.args[0]) - to_sympy(c.args[1])
        return ("eq", e) if c.op == "eq" else ("le", e + (1 if c.op == "lt" else 0))
    raise _Unrecognised


def _congruence(c: ir.Expr, q: sp.Symbol, k: sp.Symbol) -> sp.Expr | None:
    """The modulus m where the conjunct says q == k (mod m)."""
    what, e = _difference(c)
    if what != "eq":
        return None
    mods = sorted(e.atoms(FloorMod), key=str)
    if len(mods) == 1 and e in (mods[0], -mods[0]):
        u, m = mods[0].args
    elif len(mods) == 2 and mods[0].args[1] == mods[1].args[1] and e in (mods[0] - mods[1], mods[1] - mods[0]):
        u, m = sp.expand(mods[0].args[0] - mods[1].args[0]), mods[0].args[1]
        if mods[0].args[0].has(q) == mods[0].args[0].has(k):
            return None
    else:
        return None
    return m if not m.has(q, k) and 0 in (sp.expand(u - (q - k)), sp.expand(u - (k - q))) else None


def _bounds(x: sp.Expr, i: sp.Symbol, bound: sp.Expr, *, upper: bool) -> list[tuple[str, sp.Expr]]:
    """x <= bound (upper) or x >= bound as a list of ends of i, all of which must hold."""
    if x == i:
        return [("hi" if upper else "lo", bound)]
    if x.is_Add:
        inside, outside = [a for a in x.args if a.has(i)], [a for a in x.args if not a.has(i)]
        if len(inside) == 1:
            return _bounds(inside[0], i, sp.expand(bound - sp.Add(*outside)), upper=upper)
        raise _Unrecognised
    if x.is_Mul:
        c, rest = x.as_independent(i)
        if rest.is_Mul:  # several factors that read the key
            raise _Unrecognised
        if c.is_positive:
            return _bounds(rest, i, FloorDiv(bound if upper else bound + c - 1, c), upper=upper)
        if c.is_negative:
            return _bounds(sp.expand(-c * rest), i, sp.expand(-bound), upper=not upper)
    if isinstance(x, FloorDiv) and not x.args[1].has(i):
        u, s = x.args
        return _bounds(u, i, sp.expand(s * bound + (s - 1 if upper else 0)), upper=upper)
    if isinstance(x, sp.Abs) and upper:
        u = sp.expand(x.args[0])
        return _bounds(u, i, bound, upper=True) + _bounds(u, i, sp.expand(-bound), upper=False)
    if isinstance(x, sp.Max if upper else sp.Min):  # max(a, b) <= bound: each of them
        return [end for a in x.args for end in (_bounds(a, i, bound, upper=upper) if a.has(i) else _free(a, bound, upper))]
    raise _Unrecognised


def _free(a: sp.Expr, bound: sp.Expr, upper: bool) -> list[tuple[str, sp.Expr]]:
    """A part of a min or max without the key: harmless where it always holds."""
    gap = a - bound if upper else bound - a
    if gap.is_nonpositive:
        return []
    raise _Unrecognised


def _ends(c: ir.Expr, replace: dict[sp.Symbol, sp.Expr], tidy: dict[sp.Expr, sp.Expr]) -> list[tuple[str, sp.Expr]]:
    """Ends of i that one conjunct asks for, after q and k were split into residue and index."""
    if c.op == "or":
        return _either(*(_interval([end for t in ir.conjuncts(d) for end in _ends(t, replace, tidy)]) for d in c.args))
    what, e = _difference(c)
    e = sp.expand(e.subs(replace, simultaneous=True).xreplace(tidy))
    inside, outside = (
        [a for a in sp.Add.make_args(e) if a.has(_I)],
        [a for a in sp.Add.make_args(e) if not a.has(_I)],
    )
    if not inside:
        raise _Unrecognised
    x, bound = sp.Add(*inside), sp.expand(-sp.Add(*outside))
    out = _bounds(x, _I, bound, upper=True)
    return out + _bounds(x, _I, bound, upper=False) if what == "eq" else out


Interval = tuple[sp.Expr | None, sp.Expr | None]  # None: no end on that side


def _interval(ends: list[tuple[str, sp.Expr]]) -> Interval:
    lows, highs = ([e for side, e in ends if side == want] for want in ("lo", "hi"))
    return sp.Max(*lows) if lows else None, sp.Min(*highs) if highs else None


def _either(a: Interval, b: Interval) -> list[tuple[str, sp.Expr]]:
    """Ends of the union of two intervals that meet or overlap, which is proved; one of them may also be empty."""
    for (_, hi), (lo, _) in ((a, b), (b, a)):
        if hi is not None and lo is not None and not sp.expand(hi - lo + 1).is_nonnegative:
            raise _Unrecognised
    ends = []
    if a[0] is not None and b[0] is not None:
        first = sp.expand(a[0] - b[0])
        ends.append(("lo", a[0] if first.is_nonpositive else b[0] if first.is_nonnegative else sp.Min(a[0], b[0])))
    if a[1] is not None and b[1] is not None:
        last = sp.expand(a[1] - b[1])
        ends.append(("hi", a[1] if last.is_nonnegative else b[1] if last.is_nonpositive else sp.Max(a[1], b[1])))
    if not ends:  # everything is allowed; no end would say that nothing was found
        raise _Unrecognised
    return ends


def recognise(
    conjuncts: tuple[ir.Expr, ...], axis: int, size_roles: tuple[ir.Role, ir.Role]
) -> tuple[AxisForm, tuple[ir.Expr, ...]]:
    """The form of one axis, and the conjuncts no rule knew (they stay a predicate that tiles evaluate).

    Conjuncts mention only this axis. `size_roles` says whose sizes the query and key axes have ("q", "q" on a shared grid).
    """
    q, k = symbol(ir.coord("q", axis)), symbol(ir.coord("k", axis))
    split, rest = sp.Integer(1), []
    for c in conjuncts:
        m = None
        with contextlib.suppress(NotAlgebraic, _Unrecognised):
            m = _congruence(c, q, k)
        if m is None:
            rest.append(c)
        elif split == 1 or split == m:
            split = m
        elif split.is_Integer and m.is_Integer:
            split = sp.Integer(sp.ilcm(split, m))
        else:
            rest.append(c)
    nq, nk = length(size_roles[0], axis, split), length(size_roles[1], axis, split)
    replace = {q: split * _J + _R, k: split * _I + _R} if split != 1 else {q: _J, k: _I}
    tidy = {FloorDiv(_R, split): sp.Integer(0), FloorMod(_R, split): _R} if split != 1 else {}
    lows, highs, unknown = [sp.Integer(0)], [nk - 1], []
    for c in rest:
        try:
            found = [(side, gathered(e, _J)) for side, e in _ends(c, replace, tidy)]
            if not all(nondecreasing(e, _J) for _, e in found):
                raise _Unrecognised
        except (NotAlgebraic, _Unrecognised):
            unknown.append(c)
            continue
        lows += [e for side, e in found if side == "lo"]
        highs += [e for side, e in found if side == "hi"]
    lo, hi = sp.Max(*lows), sp.Min(*highs)
    if nq == nk and len(highs) > 1 and any(_inside(e, nk, _J) for e in highs[1:]):
        hi = sp.Min(*highs[1:])
    inverse_lo, inverse_hi = _inverses(lo, hi, nq, nk)
    block, shift = _block(lo, hi)
    kind = _name(lo, hi, nq, nk)
    if block is None and kind in ("block", "shifted block"):
        kind = "interval"  # blocks whose borders differ from class to class
    if split != 1:
        kind = "residue" if kind == "full" else f"residue {from_sympy(split)} of {kind}"
    size = None if block is None else from_sympy(block)
    form = AxisForm(
        kind,
        from_sympy(split),
        from_sympy(lo),
        from_sympy(hi),
        inverse_lo,
        inverse_hi,
        size,
        from_sympy(shift),
    )
    return form, tuple(unknown)


def _inside(e: sp.Expr, n: sp.Expr, x: sp.Symbol) -> bool:
    """Whether e <= n - 1 follows from x <= n - 1."""
    slack = sp.Symbol("slack", integer=True, nonnegative=True)
    return bool(sp.expand((e - n + 1).subs(n, x + 1 + slack)).is_nonpositive)


def _inverses(lo: sp.Expr, hi: sp.Expr, nq: sp.Expr, nk: sp.Expr) -> tuple[ir.Expr | None, ir.Expr | None]:
    """For key i: the least j with hi(j) >= i and the greatest j with lo(j) <= i, cut to the axis."""

    def known(e: sp.Expr) -> sp.Expr:
        """Choices that follow from 0 <= i < nk are made."""
        for c in e.atoms(Choice):
            if _inside(c.args[0] + nk - 1, nk, _I):
                e = e.xreplace({c: c.args[1]})
        return e

    try:
        first = known(solve_at_least(hi, _J, _I, never=nq, always=sp.Integer(0)))
        last = known(solve_at_most(lo, _J, _I, never=sp.Integer(-1), always=nq - 1))
        if not (nq == nk and _inside(last, nq, _I)):
            last = sp.Min(nq - 1, last)
        return from_sympy(sp.Max(0, first)), from_sympy(last)
    except NotAlgebraic:
        return None, None


def _block(lo: sp.Expr, hi: sp.Expr) -> tuple[sp.Expr | None, sp.Expr]:
    """(s, t) where both ends depend on j through (j - t) // s alone, with one t for all residues: constant on blocks."""
    floors = {f for f in lo.atoms(FloorDiv) | hi.atoms(FloorDiv) if f.has(_J)}
    if len(floors) != 1:
        return None, sp.Integer(0)
    f = floors.pop()
    mark = sp.Symbol("block")
    shift = sp.expand(_J - f.args[0])
    if lo.xreplace({f: mark}).has(_J) or hi.xreplace({f: mark}).has(_J) or shift.has(_J) or shift.has(_R):
        return None, sp.Integer(0)
    s = f.args[1]
    return s, FloorMod(shift, s)


def _name(lo: sp.Expr, hi: sp.Expr, nq: sp.Expr, nk: sp.Expr) -> str:
    lows, highs = sp.Max.make_args(lo), sp.Min.make_args(hi)
    if lo == 0 and hi == nk - 1:
        return "full"
    if lo == _J and (hi == _J or set(highs) == {_J, nk - 1}):
        return "point"
    for f in lo.atoms(FloorDiv) if nq == nk else ():  # a block: the keys of a query are the queries of its own block
        s = f.args[1]
        first = sp.expand(s * f + _J - f.args[0])
        if first in lows and set(lows) <= {0, first} and first + s - 1 in highs and set(highs) <= {first + s - 1, nk - 1}:
            return "block" if f.args[0] == _J else "shifted block"
    if lo == 0 and set(highs) <= {_J, nk - 1}:
        return "causal"
    shifted = [e for e in (*lows, *highs) if e not in (0, nk - 1)]
    if all(sp.expand(e - _J).is_Integer or not (e - _J).has(_J) for e in shifted):
        return "band"
    if any(isinstance(a, sp.Max | sp.Min) and a.has(_J) for e in (lo, hi) for a in sp.preorder_traversal(e) if a not in (lo, hi)):
        return "clamped band"
    return "interval"
