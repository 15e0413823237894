"""A statement about a flat index that speaks of `i // W` and `i % W` is one about a grid W wide: this finds W and says it so.

An index is the sum of its digits times their weights, ((t * H) + y) * W + x; quotients and remainders of such sums by constants
fall apart into digits wherever the rest is proved to lie between 0 and the divisor. What does not fall apart stays as it was, in
the new coordinates, so the result is the same statement whatever was found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from attnc import ir
from attnc.ir import Expr, make

Terms = dict[Expr, int]  # what a sum adds: factor of each part
LONGEST = len(ir.AXES)


def chains(spoken: Iterable[Expr], lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Weights that the digits of an index may have, fastest digit (weight 1) left out, e.g. (W,) or (W, H * W).

    Each divides the next, and all `lengths` (numbers of queries and of keys).
    """
    direct: set[int] = set()
    deep: set[int] = set()
    for e in {n for s in spoken for n in ir.walk(s)}:
        if e.op not in ("floordiv", "mod") or e.args[1].op != "const":
            continue
        of, c = e.args
        if of.op == "coord":
            direct.add(c.args[0])
        elif of.op in ("floordiv", "mod") and of.args[0].op == "coord" and of.args[1].op == "const":
            inner = of.args[1].args[0]
            if of.op == "floordiv":  # (i // W) % H
                deep.add(inner * c.args[0])
            elif inner > 0 and c.args[0] > 0 and inner % c.args[0] == 0:  # i % (H * W) // W
                deep.add(c.args[0])
    found = []
    for weights in (direct, direct | deep):
        chain = tuple(sorted(w for w in weights if 1 < w < max(lengths)))
        divides = all(b % a == 0 for a, b in pairwise(chain))
        divides = divides and all(n % w == 0 for w in chain for n in lengths)
        if chain and divides and len(chain) < LONGEST and chain not in found and min(weights) > 1:
            found.append(chain)
    return found


def grid_of(length: int, chain: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of the axes that an index of this length falls into."""
    weights = (*reversed(chain), 1)
    return (length // weights[0], *(a // b for a, b in pairwise(weights)))


class Digits:
    """Rewrites expressions of one flat coordinate per role into coordinates of a grid."""

    def __init__(self, chain: tuple[int, ...], grids: Mapping[ir.Role, tuple[int, ...]]) -> None:
        self.weights = (*reversed(chain), 1)
        self.grids = grids
        self.seen: dict[Expr, Expr] = {}

    def rewrite(self, e: Expr) -> Expr:
        """The same value in the new coordinates."""
        if e not in self.seen:
            self.seen[e] = self._step(e)
        return self.seen[e]

    def _step(self, e: Expr) -> Expr:
        if e.kind == "int" and e.op in ("coord", "add", "sub", "neg", "mul", "floordiv", "mod"):
            return _sum(*self.linear(e))
        if not e.children:
            return e
        args = tuple(self.rewrite(a) if isinstance(a, Expr) else a for a in e.args)
        return make(e.op, *args) if e.op in ir.ARITY else Expr(e.op, args, e.kind)

    def linear(self, e: Expr) -> tuple[Terms, int]:
        """An integer expression as a sum of parts times factors, and a constant."""
        match e.op:
            case "const":
                return {}, e.args[0]
            case "coord":
                return {ir.coord(e.args[0], axis): w for axis, w in enumerate(self.weights)}, 0
            case "add" | "sub":
                (terms, constant), (others, other) = map(self.linear, e.args)
                sign = 1 if e.op == "add" else -1
                return _joined(terms, others, sign), constant + sign * other
            case "neg":
                terms, constant = self.linear(e.args[0])
                return {t: -w for t, w in terms.items()}, -constant
            case "mul":
                (terms, constant), (others, other) = map(self.linear, e.args)
                if not terms or not others:
                    factor, (terms, constant) = (constant, (others, other)) if not terms else (other, (terms, constant))
                    return ({t: w * factor for t, w in terms.items()} if factor else {}), constant * factor
            case "floordiv" | "mod" if e.args[1].op == "const" and e.args[1].args[0] > 0:
                return self._divided(e)
        made = e if not e.children else None
        if made is None:
            args = tuple(self.rewrite(a) if isinstance(a, Expr) else a for a in e.args)
            made = make(e.op, *args) if e.op in ir.ARITY else Expr(e.op, args, e.kind)
        return {made: 1}, 0

    def _divided(self, e: Expr) -> tuple[Terms, int]:
        terms, constant = self.linear(e.args[0])
        c = e.args[1].args[0]
        whole = {t: w // c for t, w in terms.items() if w % c == 0}
        rest, more = {t: w for t, w in terms.items() if w % c}, constant % c
        low, high = self._range(rest, more)
        if low >= 0 and high < c:
            return (whole, constant // c) if e.op == "floordiv" else (rest, more)
        left = make(e.op, _sum(rest, more), e.args[1])
        return (_joined(whole, {left: 1}, 1), constant // c) if e.op == "floordiv" else ({left: 1}, 0)

    def _range(self, terms: Terms, constant: int) -> tuple[float, float]:
        low: float = constant
        high: float = constant
        for t, w in terms.items():
            if t.op == "coord":
                first, last = 0.0, self.grids[t.args[0]][t.args[1]] - 1.0
            elif t.op == "mod" and t.args[1].op == "const" and t.args[1].args[0] > 0:
                first, last = 0.0, t.args[1].args[0] - 1.0
            else:
                first, last = float("-inf"), float("inf")
            low, high = low + min(w * first, w * last), high + max(w * first, w * last)
        return low, high


def _joined(terms: Terms, others: Terms, sign: int) -> Terms:
    out = dict(terms)
    for t, w in others.items():
        out[t] = out.get(t, 0) + sign * w
        if not out[t]:
            del out[t]
    return out


def _sum(terms: Terms, constant: int) -> Expr:
    out: Expr | None = None
    for t, w in sorted(terms.items(), key=lambda pair: pair[1] < 0):  # what is subtracted comes last
        part = make("mul", t, ir.const(abs(w)))
        if out is None:
            out = part if w > 0 else make("neg", part)
        else:
            out = make("add" if w > 0 else "sub", out, part)
    if out is None:
        return ir.const(constant)
    return make("add" if constant >= 0 else "sub", out, ir.const(abs(constant))) if constant else out
