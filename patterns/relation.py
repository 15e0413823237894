"""What library patterns share: conjunction over axes, and the bias tables every one of them takes.

`bias="relative"` reads a runtime table `bias` [H or 1, 2 s_y - 1, 2 s_x - 1] at query - key + s - 1 per axis, in units of the
dilation; `bias="absolute"` reads [H or 1, s_q^2, s_k^2] at the row-major places of query and key in their group
(Swin, CrossFormer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from attnc.errors import DeclarationError
from attnc.lang.functions import HEAD, SCORE, Statement, where
from attnc.lang.pattern import Pattern
from attnc.lang.symbols import Point, Sym, Table

Size = int | Sequence[int]
Bias = Literal["relative", "absolute"] | None
# per axis: (query place, key place, span): places count in units of the dilation, from 0 to span - 1 where "absolute" is asked
Places = list[tuple[Sym, Sym, int]]


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
        if bias is not None and any(span < 1 for _, _, span in places):
            raise DeclarationError(f"{name}: bias={bias!r} needs groups of a fixed size on every axis")
        if bias == "relative":
            score = SCORE + table[(HEAD, *(a - b + (span - 1) for a, b, span in places))]
        elif bias == "absolute":
            row, column = places[0][0], places[0][1]
            for a, b, span in places[1:]:
                row, column = row * span + a, column * span + b
            score = SCORE + table[HEAD, row, column]
        return where(relation, score)

    return Pattern(name, tracer)
