"""Patterns on axes that are too short for them, as if padded to a least length (DiNAT, Hassani and Shi 2022)."""

from __future__ import annotations

from attnc import ir
from attnc.lang.functions import Statement
from attnc.lang.pattern import Pattern, a_pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point


@recorded
def at_least(length: int, of: Pattern) -> Pattern:
    """`of` on axes of max(n, length): for operators compiled with ``pad=((0, length),) * rank``, whatever n is.

    The padding always has `length` rows, so that one operator serves every grid; keys up to max(n, length) exist for `of`, and
    those beyond are seen by nobody. `of` must allow no key outside the length it is told.
    """

    of = a_pattern(of, "at_least")

    def shorten(c: ir.Expr, n: ir.Expr) -> tuple[ir.Expr, ir.Expr]:
        least = ir.const(length)
        return c, ir.make("max", ir.make("sub", n, least), least)

    def tracer(q: Point, k: Point) -> Statement:
        return of._tracer(q.map(shorten), k.map(shorten))

    return Pattern(f"at_least({length}, {of.name})", tracer)
