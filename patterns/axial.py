"""Axial attention (Ho et al. 2019; Wang et al. 2020)."""

from __future__ import annotations

from attnc.errors import DeclarationError
from attnc.lang.pattern import Pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import ORIGIN, Bias, Place, Places, always, biased, every


@recorded
def axial(axis: str, *, bias: Bias = None) -> Pattern:
    """Keys run along `axis` and share the query's coordinate on every other axis."""

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        if axis not in q.axes:
            raise DeclarationError(f"axial({axis!r}): this grid has the axes {', '.join(q.axes)}")
        terms, places = [], []
        for name, a, b, n in zip(q.axes, q, k, q.size, strict=True):
            if name == axis:
                places.append(Place(a, b, n))
            else:
                terms.append(a == b)
                places.append(Place(ORIGIN, ORIGIN, 1))
        return every(terms or [always(q)]), places

    return biased(f"axial({axis!r})", body, bias)
