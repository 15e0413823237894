"""A soft cap on scores (Gemma 2)."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Any

from attnc.errors import DeclarationError
from attnc.lang.functions import Statement, tanh
from attnc.lang.pattern import Pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import rescored


@recorded
def soft_cap(cap: float, of: Pattern | None = None) -> Pattern:
    """cap * tanh(score / cap), of the whole score, its bias included."""
    given: Any = cap
    if not isinstance(given, Real) or not cap > 0:
        raise DeclarationError(f"soft_cap({cap!r}): a positive number")

    def change(q: Point, k: Point, s: Statement) -> Statement:
        return replace(s, score=(tanh(Sym(s.score) / float(cap)) * float(cap)).expr)

    return rescored(f"soft_cap({cap!r})", of, change)
