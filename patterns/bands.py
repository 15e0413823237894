"""Dense attention, causal attention and bands."""

from __future__ import annotations

from attnc.errors import DeclarationError
from attnc.lang.pattern import Pattern, per_axis
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import Bias, Place, Places, Size, always, biased, every, whole


@recorded
def full(*, bias: Bias = None) -> Pattern:
    """Every query sees every key (Vaswani et al. 2017)."""
    return biased("full()", lambda q, k: (always(q), whole(q, k) if bias else []), bias)


@recorded
def causal(*, bias: Bias = None) -> Pattern:
    """k <= q on every axis. (Causal in row-major order is `q.index >= k.index`.)"""
    return biased("causal()", lambda q, k: (every([b <= a for a, b in zip(q, k, strict=True)]), whole(q, k)), bias)


@recorded
def band(left: Size, right: Size, *, bias: Bias = None) -> Pattern:
    """Keys from q - left to q + right on every axis, cut at the borders.

    A relative bias is indexed q - k + max(left, right), so it has 2 max(left, right) + 1 entries per axis.
    """

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        lefts, rights = per_axis(left, q.axes, "left", least=0), per_axis(right, q.axes, "right", least=0)
        terms, places = [], []
        for a, b, low, high in zip(q, k, lefts, rights, strict=True):
            terms += [b >= a - low, b <= a + high]
            places.append(Place(a, b, max(low, high) + 1))
        return every(terms), places

    if bias == "absolute":
        raise DeclarationError("band: bias='absolute' has no meaning here, windows slide; use 'relative'")
    return biased(f"band({left!r}, {right!r})", body, bias)
