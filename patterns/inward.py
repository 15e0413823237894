"""Inward sliding windows of FreeSwim (Wu et al. 2025): pushed back inside at the borders, so that all queries see as many keys."""

from __future__ import annotations

from attnc.errors import DeclarationError
from attnc.lang.functions import maximum
from attnc.lang.pattern import Pattern, per_axis
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import Bias, Place, Places, Size, biased, every


@recorded
def inward_window(reach: Size, *, bias: Bias = None) -> Pattern:
    """Keys from q - d - max(d + q - n + 1, 0) to q + d + max(d - q, 0), on an axis of n tokens, d its `reach`.

    2 d + 1 keys, or all where there are no more: `neighborhood(2 d + 1)`. FreeSwim's videos are bound in space only:
    ``inward_window((15, 26)).on("y", "x")`` on a grid (t, y, x). A relative bias has 4 d + 1 entries per axis, at q - k + 2 d.
    """

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        terms, places = [], []
        for a, b, n, d in zip(q, k, q.size, per_axis(reach, q.axes, "reach", least=0), strict=True):
            terms += [b >= a - d - maximum(d + a - n + 1, 0), b <= a + d + maximum(d - a, 0)]
            places.append(Place(a, b, 2 * d + 1))
        return every(terms), places

    if bias == "absolute":
        raise DeclarationError("inward_window: bias='absolute' has no meaning here, windows slide; use 'relative'")
    return biased(f"inward_window({reach!r})", body, bias)
