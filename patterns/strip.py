"""Strips and crosses: CSWin-like stripes (Dong et al. 2022), CoSwin, the criss-cross of both."""

from __future__ import annotations

from attnc.errors import DeclarationError
from attnc.lang.functions import Statement
from attnc.lang.pattern import Pattern
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import every


def strip(axis: str, width: int) -> Pattern:
    """Blocks of `width` across, full along `axis`: same q // width on every other axis."""

    def tracer(q: Point, k: Point) -> Statement:
        if axis not in q.axes or width < 1:
            raise DeclarationError(f"strip({axis!r}, {width!r}): an axis of ({', '.join(q.axes)}) and a positive width")
        others: list[Sym] = [a // width == b // width for name, a, b in zip(q.axes, q, k, strict=True) if name != axis]
        return Statement(every(others or [q.index == q.index]).expr)

    return Pattern(f"strip({axis!r}, {width})", tracer)


def cross(width: int = 1) -> Pattern:
    """The union of the two strips through a query, each key once."""
    pattern = strip("y", width) | strip("x", width)
    pattern.name = f"cross({width})"
    return pattern
