"""What library patterns share: conjunction over axes, and the bias tables every one of them takes.

`bias="relative"` reads a runtime table `bias` [H or 1, 2 s_y - 1, 2 s_x - 1] at query - key + s - 1 per axis, in units of the
dilation; `bias="absolute"` reads [H or 1, s_q^2, s_k^2] at the row-major places of query and key in their group
(Swin, CrossFormer). On an axis that a pattern leaves whole s is the axis's length, on one that it holds fixed s is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from attnc import ir
from attnc.errors import DeclarationError
from attnc.lang.functions import HEAD, SCORE, Statement, where
from attnc.lang.pattern import Pattern, a_pattern
from attnc.lang.symbols import Point, Sym, Table

Size = int | Sequence[int]
Bias = Literal["relative", "absolute"] | None


class Place(NamedTuple):
    """Where a query and a key stand on one axis of their group: from 0 to span - 1, in units of the dilation.

    keys: the span of keys, where it is not that of queries. Where windows slide, only the difference of the two has a meaning.
    """

    query: Sym
    key: Sym
    span: int | Sym
    keys: int | Sym | None = None


Places = list[Place]
ORIGIN = Sym(ir.ZERO)  # the only place on an axis that is held fixed


def every(terms: Sequence[Sym]) -> Sym:
    """The conjunction of one condition per axis."""
    out = terms[0]
    for t in terms[1:]:
        out = out & t
    return out


def biased(name: str, body: Callable[[Point, Point], tuple[Sym, Places]], bias: Bias) -> Pattern:
    """A pattern from `body(q, k) -> (relation, places)` and the kind of bias its score adds."""
    if bias not in (None, "relative", "absolute"):
        raise DeclarationError(f"{name}: bias={bias!r}: None, 'relative' or 'absolute'")
    table = Table("bias")

    def tracer(q: Point, k: Point) -> Statement:
        relation, places = body(q, k)
        score = SCORE
        if bias == "relative":
            score = SCORE + table[(HEAD, *(p.query - p.key + (_keys(p) - 1) for p in places))]
        elif bias == "absolute":
            row, column = places[0].query, places[0].key
            for p in places[1:]:
                row, column = row * p.span + p.query, column * _keys(p) + p.key
            score = SCORE + table[HEAD, row, column]
        return where(relation, score)

    return Pattern(name, tracer)


def rescored(name: str, of: Pattern | None, change: Callable[[Point, Point, Statement], Statement]) -> Pattern:
    """`of` (every key where it is None) with its statement changed: what makes a score part out of any relation."""
    if of is not None:
        of = a_pattern(of, name)

    def tracer(q: Point, k: Point) -> Statement:
        return change(q, k, where(always(q), SCORE) if of is None else of._tracer(q, k))

    return Pattern(f"{name}({of.name})" if of is not None else name if name.endswith(")") else f"{name}()", tracer)


def raw(statement: Statement, value: Sym) -> ir.Expr:
    """The statement's score with `value` in the place of SCORE, so that a bias is added afterwards."""
    return ir.substitute(statement.score, {ir.SCORE: value.expr})


def _keys(p: Place) -> int | Sym:
    return p.span if p.keys is None else p.keys


def always(q: Point) -> Sym:
    """The condition that always holds."""
    return q[0] == q[0]


def whole(q: Point, k: Point) -> Places:
    """The places on all axes at full length, where queries and keys share the grid."""
    return [Place(a, b, n, m) for a, b, n, m in zip(q, k, q.size, k.size, strict=True)]
