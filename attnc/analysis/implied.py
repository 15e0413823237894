"""What a condition on several axes says about one of them: a disk is no product of axes, and lies in a square.

A condition `f(y) + g(x) <= c` whose terms are never negative implies `f(y) <= c` and `g(x) <= c`. These bound the tiles; the
condition itself stays a predicate that tiles evaluate, so nothing here need be sharp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from attnc import ir

Term = tuple[int, ir.Expr]  # a number times an expression; relations compare integers


def split(c: ir.Expr) -> tuple[ir.Expr, ...]:
    """A condition as several that say the same: max(a, b) <= c is a <= c and b <= c."""
    if c.op == "not" and c.args[0].op in ("lt", "le") and all(a.kind == "int" for a in c.args[0].args):  # not (a < b)  ==  b <= a
        a, b = c.args[0].args
        turned = ir.make("le" if c.args[0].op == "lt" else "lt", b, a)
        parts = split(turned)
        return parts if parts != (turned,) else (c,)
    if c.op in ("lt", "le") and c.args[0].op == "max":
        return tuple(t for part in c.args[0].args for t in split(ir.make(c.op, part, c.args[1])))
    if c.op in ("lt", "le") and c.args[1].op == "min":
        return tuple(t for part in c.args[1].args for t in split(ir.make(c.op, c.args[0], part)))
    return (c,)


def implied(c: ir.Expr) -> Iterator[tuple[int, ir.Expr]]:
    """(axis, condition on that axis alone) for each that follows from c."""
    for small, large in _at_most(c):
        terms = [(n, e, axes_of(e)) for n, e in (*_terms(small, 1), *_terms(large, -1))]
        free = [(-n, e) for n, e, axes in terms if not axes]
        for axis in sorted({a for _, _, axes in terms if len(axes) == 1 for a in axes}):
            mine = [(n, e) for n, e, axes in terms if axes == {axis}]
            others = [(n, e) for n, e, axes in terms if axes and axes != {axis}]
            if others and all(n > 0 and never_negative(e) for n, e in others):
                found = _square(mine, free) or ir.make("le", _sum(mine), _sum(free))
                if not any(n.op in ("load", "head", "heads", "batch") for n in ir.walk(found)):
                    yield axis, found


def axes_of(e: ir.Expr) -> set[int]:
    """The axes whose coordinates an expression reads."""
    return {n.args[1] for n in ir.walk(e) if n.op == "coord"}


def never_negative(e: ir.Expr) -> bool:
    """The value is 0 or more whatever the coordinates are."""
    if e.op == "const":
        return bool(e.args[0] >= 0)
    if e.op in ("abs", "coord", "size", "head", "heads", "batch"):
        return True
    if e.op == "mul" and e.args[0] == e.args[1]:
        return True
    if e.op in ("add", "mul", "floordiv", "min"):
        return all(map(never_negative, e.args))
    if e.op == "max":
        return any(map(never_negative, e.args))
    return e.op == "mod" and never_negative(e.args[1])


def _at_most(c: ir.Expr) -> Iterator[tuple[ir.Expr, ir.Expr]]:
    """(a, b) for each a <= b that a comparison says."""
    op, args = (c.args[0].op, c.args[0].args) if c.op == "not" else (c.op, c.args)
    if any(isinstance(a, ir.Expr) and a.kind != "int" for a in args):
        return
    if c.op == "not" and op == "lt":
        yield args[1], args[0]
    elif c.op == "not" and op == "le":
        yield args[1], ir.make("sub", args[0], ir.ONE)
    elif op == "le":
        yield args[0], args[1]
    elif op == "lt":
        yield args[0], ir.make("sub", args[1], ir.ONE)
    elif (op == "eq") != (c.op == "not") and op in ("eq", "ne"):
        yield args[0], args[1]
        yield args[1], args[0]


def _terms(e: ir.Expr, factor: int) -> Iterator[Term]:
    """A sum taken apart."""
    if e.op in ("add", "sub"):
        yield from _terms(e.args[0], factor)
        yield from _terms(e.args[1], -factor if e.op == "sub" else factor)
    elif e.op == "neg":
        yield from _terms(e.args[0], -factor)
    elif e.op == "mul" and any(a.op == "const" for a in e.args):
        number, rest = e.args if e.args[0].op == "const" else reversed(e.args)
        yield from _terms(rest, factor * number.args[0])
    elif e.op == "const":
        yield factor * e.args[0], ir.ONE
    else:
        yield factor, e


def _sum(terms: list[Term]) -> ir.Expr:
    out = ir.ZERO
    for n, e in terms:
        part = e if abs(n) == 1 else ir.make("mul", ir.const(abs(n)), e)
        out = ir.make("add" if n > 0 else "sub", out, part)
    return out


def _square(mine: list[Term], free: list[Term]) -> ir.Expr | None:
    """n * u * u <= c as abs(u) <= floor(sqrt(c / n)), which the rules for one axis know."""
    if len(mine) != 1 or any(e != ir.ONE for _, e in free):
        return None
    (n, e), most = mine[0], sum(n for n, _ in free)
    if e.op != "mul" or e.args[0] != e.args[1] or n <= 0 or most < 0:
        return None
    return ir.make("le", ir.make("abs", e.args[0]), ir.const(math.isqrt(most // n)))
