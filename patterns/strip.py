"""Strips and crosses: CSWin-like stripes (Dong et al. 2022), CoSwin, the criss-cross of both."""

from __future__ import annotations

from attnc.errors import DeclarationError
from attnc.lang.pattern import Pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import Bias, Place, Places, always, biased, every, whole


@recorded
def strip(axis: str, width: int, *, bias: Bias = None) -> Pattern:
    """Blocks of `width` across, full along `axis`: same q // width on every other axis."""

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        if axis not in q.axes or not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise DeclarationError(f"strip({axis!r}, {width!r}): an axis of ({', '.join(q.axes)}) and a positive width")
        terms, places = [], []
        for name, a, b, n in zip(q.axes, q, k, q.size, strict=True):
            if name == axis:
                places.append(Place(a, b, n))
            else:
                terms.append(a // width == b // width)
                places.append(Place(a % width, b % width, width))
        return every(terms or [always(q)]), places

    return biased(f"strip({axis!r}, {width})", body, bias)


@recorded
def cross(width: int = 1, *, bias: Bias = None) -> Pattern:
    """The union of the two strips through a query, each key once. A bias counts places on the whole grid."""
    strips = strip("y", width) | strip("x", width)

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        return Sym(strips._tracer(q, k).relation), whole(q, k)

    return biased(f"cross({width})", body, bias)
