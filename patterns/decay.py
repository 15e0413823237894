"""Scores that fall with distance: ALiBi (Press et al. 2022), RMT's Manhattan decay (Fan et al. 2024), decays after the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from attnc import ir
from attnc.errors import DeclarationError
from attnc.lang.functions import HEAD, Statement, exp, maximum, sqrt
from attnc.lang.pattern import Pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym, Table
from attnc.patterns.relation import rescored

Metric = Literal["manhattan", "chebyshev", "euclidean", "squared"]


def _sum(values: Sequence[Sym]) -> Sym:
    out = values[0]
    for v in values[1:]:
        out = out + v
    return out


METRICS: dict[str, Callable[[list[Sym]], Sym]] = {
    "manhattan": lambda steps: _sum([abs(d) for d in steps]),
    "chebyshev": lambda steps: maximum(*(abs(d) for d in steps)) if len(steps) > 1 else abs(steps[0]),
    "euclidean": lambda steps: sqrt(_sum([d * d for d in steps])),
    "squared": lambda steps: _sum([d * d for d in steps]),
}


def distance(q: Point, k: Point, metric: Metric) -> Sym:
    """Between two points of one grid."""
    return METRICS[metric]([a - b for a, b in zip(q, k, strict=True)])


@recorded
def decay(of: Pattern | None = None, *, metric: Metric = "manhattan", after: bool = False) -> Pattern:
    """score - slopes[h] * distance(q, k): a table `slopes` [H or 1], fixed or learned.

    after: weights are multiplied by exp(-slopes[h] * distance) after the softmax instead, and not normalised again.
    """
    if metric not in METRICS:
        raise DeclarationError(f"decay(metric={metric!r}): one of {', '.join(METRICS)}")
    slopes = Table("slopes")

    def change(q: Point, k: Point, s: Statement) -> Statement:
        fall = slopes[HEAD] * distance(q, k, metric)
        if not after:
            return replace(s, score=(Sym(s.score) - fall).expr)
        if s.post is not None:
            raise DeclarationError("decay(after=True): the pattern has a factor after the softmax already")
        return replace(s, post=exp(-fall).expr)

    return rescored("decay", of, change)


@recorded
def alibi(of: Pattern | None = None) -> Pattern:
    """score - 2 ** (-8 (h + 1) / H) * distance: ALiBi's fixed slopes, no table; the distance is the sum over axes."""

    def change(q: Point, k: Point, s: Statement) -> Statement:
        slope = exp((HEAD + 1) * (-8 * math.log(2)) / Sym(ir.HEADS))
        return replace(s, score=(Sym(s.score) - slope * distance(q, k, "manhattan")).expr)

    return rescored("alibi", of, change)
