"""Grid attention of MaxViT (Tu et al. 2022)."""

from __future__ import annotations

from attnc.lang.pattern import Pattern, per_axis
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import Bias, Place, Places, Size, biased, every


@recorded
def grid(size: Size, *, bias: Bias = None) -> Pattern:
    """`size` tokens per axis, evenly spaced over the whole grid: equal coordinates modulo m = ceil(n / size)."""

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        terms, places = [], []
        for a, b, n, s in zip(q, k, q.size, per_axis(size, q.axes, "size"), strict=True):
            m = (n + s - 1) // s
            terms.append(a % m == b % m)
            places.append(Place(a // m, b // m, s))
        return every(terms), places

    return biased(f"grid({size!r})", body, bias)
