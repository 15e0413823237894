"""The bridge between IR integers and sympy.

sympy's own floor and Mod rewrite `(q + 3) // 7` into rational arithmetic, so the two integer operations get functions of our
own that only do what is always true over the integers: fold numbers and pull multiples of the divisor out.
"""

from __future__ import annotations

from typing import Any

import sympy as sp

from attnc import ir


class NotAlgebraic(Exception):
    """The expression holds something proofs know nothing about (a table, a condition)."""


def _parts(a: sp.Expr, b: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """a = b * multiple + rest, with every term that is visibly a multiple of b in the first part."""
    multiple, rest = sp.Integer(0), sp.Integer(0)
    for term in sp.Add.make_args(sp.expand(a)):
        ratio = term / b
        # no denominator may be left: sympy 1.14 takes Max(0, 6 * z + 2 * n) / 6 for an integer
        if ratio.is_integer and sp.fraction(ratio)[1] == 1:
            multiple += ratio
        elif term.is_Integer and b.is_Integer:
            multiple += term // b
            rest += term % b
        else:
            rest += term
    return multiple, rest


class FloorDiv(sp.Function):  # type: ignore[misc]
    """a // b with b > 0."""

    nargs = (2,)

    @classmethod
    def eval(cls, a: sp.Expr, b: sp.Expr) -> sp.Expr | None:
        if b == 1:
            return a
        if a.is_Integer and b.is_Integer:
            return a // b
        multiple, rest = _parts(a, b)
        if multiple != 0 or rest != a:
            return multiple + (cls(rest, b) if rest != 0 else 0)
        return None

    def _eval_is_integer(self) -> bool:
        return True

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[0].is_nonnegative and self.args[1].is_positive else None

    def _eval_is_positive(self) -> bool | None:
        return True if self.args[1].is_positive and (self.args[0] - self.args[1]).is_nonnegative else None


class FloorMod(sp.Function):  # type: ignore[misc]
    """a % b with b > 0: a value from 0 to b - 1."""

    nargs = (2,)

    @classmethod
    def eval(cls, a: sp.Expr, b: sp.Expr) -> sp.Expr | None:
        if b == 1:
            return sp.Integer(0)
        if a.is_Integer and b.is_Integer:
            return a % b
        multiple, rest = _parts(a, b)
        return cls(rest, b) if multiple != 0 or rest != a else None

    def _eval_is_integer(self) -> bool:
        return True

    def _eval_is_nonnegative(self) -> bool:
        return True


_LEAVES: dict[sp.Symbol, ir.Expr] = {}


def symbol(e: ir.Expr) -> sp.Symbol:
    """The sympy symbol of a leaf."""
    positive = e.op in ("size", "heads")
    name = "_".join([e.op, *map(str, e.args)])
    s = sp.Symbol(name, integer=True, positive=True) if positive else sp.Symbol(name, integer=True, nonnegative=True)
    _LEAVES[s] = e
    return s


def to_sympy(e: ir.Expr) -> sp.Expr:
    """An integer expression as sympy. Raises NotAlgebraic on tables, conditions and reals."""
    if e.op == "const" and e.kind == "int":
        return sp.Integer(e.args[0])
    if e.op in ("coord", "size", "head", "heads", "batch", "var", "index"):
        return symbol(e)
    if e.kind != "int" or e.op in ("load", "where"):
        raise NotAlgebraic(ir.show(e))
    a = [to_sympy(c) for c in e.children]
    match e.op:
        case "add":
            return a[0] + a[1]
        case "sub":
            return a[0] - a[1]
        case "mul":
            return sp.expand(a[0] * a[1])
        case "neg":
            return -a[0]
        case "abs":
            return sp.Abs(a[0])
        case "min":
            return sp.Min(*a)
        case "max":
            return sp.Max(*a)
        case "floordiv" | "mod":
            if not a[1].is_positive:
                raise NotAlgebraic(f"{ir.show(e)}: the divisor is not known to be positive")
            return (FloorDiv if e.op == "floordiv" else FloorMod)(*a)
    raise NotAlgebraic(ir.show(e))


def from_sympy(s: Any) -> ir.Expr:
    """Back to the IR, printed with `//` and `%`."""
    if s.is_Integer:
        return ir.const(int(s))
    if s.is_Symbol:
        return _LEAVES[s]
    if isinstance(s, FloorDiv | FloorMod):
        return ir.make("floordiv" if isinstance(s, FloorDiv) else "mod", *(from_sympy(a) for a in s.args))
    if isinstance(s, sp.Min | sp.Max):
        args = sorted((from_sympy(a) for a in s.args), key=lambda e: (len(ir.show(e)), ir.show(e)))
        out = args[0]
        for a in args[1:]:
            out = ir.make("min" if isinstance(s, sp.Min) else "max", out, a)
        return out
    if isinstance(s, Choice):
        t, a, b = (from_sympy(x) for x in s.args)
        return ir.make("where", ir.make("le", t, ir.ZERO), a, b)
    if isinstance(s, sp.Abs):
        return ir.make("abs", from_sympy(s.args[0]))
    if s.is_Mul:
        c, rest = s.as_coeff_Mul()
        if c == -1:
            return ir.make("neg", from_sympy(rest))
        if c != 1:
            return ir.make("mul", from_sympy(c), from_sympy(rest))
        out = from_sympy(s.args[0])
        for a in s.args[1:]:
            out = ir.make("mul", out, from_sympy(a))
        return out
    if s.is_Add:
        terms = sorted(s.args, key=lambda t: (t.is_Integer, bool(t.could_extract_minus_sign()), str(t)))
        out = from_sympy(terms[0])
        for t in terms[1:]:
            minus = bool(t.could_extract_minus_sign())
            out = ir.make("sub" if minus else "add", out, from_sympy(-t if minus else t))
        return out
    raise NotAlgebraic(str(s))


def nondecreasing(e: sp.Expr, x: sp.Symbol) -> bool:
    """Whether e never falls as x grows: a proof by structure, False when there is none."""
    if not e.has(x) or e == x:
        return True
    if e.is_Add or isinstance(e, sp.Min | sp.Max):
        return all(nondecreasing(a, x) for a in e.args)
    if e.is_Mul:
        c, rest = e.as_independent(x)
        if rest.is_Mul:  # several factors that read x
            return bool(c.is_nonnegative) and all(a.is_nonnegative and nondecreasing(a, x) for a in rest.args)
        return bool(c.is_nonnegative) and nondecreasing(rest, x)
    return isinstance(e, FloorDiv) and not e.args[1].has(x) and nondecreasing(e.args[0], x)


def gathered(e: sp.Expr, x: sp.Symbol) -> sp.Expr:
    """u + c * max(a, b) as max(u + c * a, u + c * b) where the sum shows no monotony: x - max(x - n, 0) becomes min(n, x)."""
    if not e.is_Add or nondecreasing(e, x):
        return e
    for term in e.args:
        c, m = term.as_coeff_Mul()
        if isinstance(m, sp.Min | sp.Max) and m.has(x):
            made = m.func if c > 0 else sp.Min if isinstance(m, sp.Max) else sp.Max
            return made(*(gathered(sp.expand(e - term + c * a), x) for a in m.args))
    return e


def solve_at_most(f: sp.Expr, x: sp.Symbol, bound: sp.Expr, never: sp.Expr, always: sp.Expr) -> sp.Expr:
    """The greatest x with f(x) <= bound, for a nondecreasing f: `never` where no x will do, `always` where every one does."""
    return _invert(f, x, bound, never, always, at_most=True)


def solve_at_least(f: sp.Expr, x: sp.Symbol, bound: sp.Expr, never: sp.Expr, always: sp.Expr) -> sp.Expr:
    """The least x with f(x) >= bound, for a nondecreasing f."""
    return _invert(f, x, bound, never, always, at_most=False)


class Choice(sp.Function):  # type: ignore[misc]
    """Choice(t, a, b): a where t <= 0, else b."""

    nargs = (3,)

    @classmethod
    def eval(cls, t: sp.Expr, a: sp.Expr, b: sp.Expr) -> sp.Expr | None:
        return a if t.is_nonpositive else b if t.is_positive else None

    def _eval_is_integer(self) -> bool:
        return True


def _invert(f: sp.Expr, x: sp.Symbol, bound: sp.Expr, never: sp.Expr, always: sp.Expr, *, at_most: bool) -> sp.Expr:
    if f == x:
        return bound
    if not f.has(x):
        return Choice(f - bound if at_most else bound - f, always, never)
    if f.is_Add:
        inside, outside = [a for a in f.args if a.has(x)], [a for a in f.args if not a.has(x)]
        if len(inside) == 1:
            return _invert(inside[0], x, sp.expand(bound - sp.Add(*outside)), never, always, at_most=at_most)
    if f.is_Mul:
        c, rest = f.as_independent(x)
        if c.is_positive and not rest.is_Mul:
            return _invert(rest, x, FloorDiv(bound if at_most else bound + c - 1, c), never, always, at_most=at_most)
    if isinstance(f, FloorDiv) and not f.args[1].has(x):
        u, s = f.args
        return _invert(u, x, sp.expand(s * bound + (s - 1 if at_most else 0)), never, always, at_most=at_most)
    if isinstance(f, sp.Min | sp.Max):
        # max(a, b) <= bound asks for both, so the smaller answer counts; min(a, b) <= bound for either. The same holds for >=.
        parts = [_invert(a, x, bound, never, always, at_most=at_most) for a in f.args]
        return (sp.Min if isinstance(f, sp.Max) else sp.Max)(*parts)
    raise NotAlgebraic(str(f))
