"""Attention between two grids of different resolution: pooled keys, finer keys, scale pyramids (FCAFormer, DuoFormer, P2T)."""

from __future__ import annotations

from attnc.lang.functions import maximum, minimum
from attnc.lang.pattern import Pattern, per_axis
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import ORIGIN, Bias, Place, Places, Size, biased, every


@recorded
def cross_scale(size: Size, *, bias: Bias = None) -> Pattern:
    """Each query sees `size` keys per axis around its own place on the keys' grid, kept inside it (`kv_grid=` says its lengths).

    The middle of query c is at (2 c + 1) m // (2 n) on an axis of n queries and m keys; the keys are start .. start + size - 1,
    with start = max(min(middle - size // 2, m - size), 0). With m = r n and size = r these are the r keys under the query; with
    n = r m and size = 1 the one key above it. A bias has size entries per axis, by the key's place among them: an absolute one
    [H or 1, 1, size^2], a relative one [H or 1, size, size], from the last key to the first.
    """

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        terms, places = [], []
        for a, b, n, m, s in zip(q, k, q.size, k.size, per_axis(size, q.axes, "size"), strict=True):
            middle = (2 * a + 1) * m // (2 * n)
            start = maximum(minimum(middle - s // 2, m - s), 0)
            terms += [b >= start, b <= start + (s - 1)]
            places.append(Place(ORIGIN, b - start, 1, s))
        return every(terms), places

    return biased(f"cross_scale({size!r})", body, bias)
