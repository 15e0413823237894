"""Axial attention (Ho et al. 2019; Wang et al. 2020)."""

from __future__ import annotations

from attnc.errors import DeclarationError
from attnc.lang.functions import Statement
from attnc.lang.pattern import Pattern
from attnc.lang.symbols import Point
from attnc.patterns.relation import every


def axial(axis: str) -> Pattern:
    """Keys run along `axis` and share the query's coordinate on every other axis."""

    def tracer(q: Point, k: Point) -> Statement:
        if axis not in q.axes:
            raise DeclarationError(f"axial({axis!r}): this grid has the axes {', '.join(q.axes)}")
        others = [a == b for name, a, b in zip(q.axes, q, k, strict=True) if name != axis]
        return Statement(every(others).expr) if others else Statement((q.index == q.index).expr)

    return Pattern(f"axial({axis!r})", tracer)
