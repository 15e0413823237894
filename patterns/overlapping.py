"""Overlapping windows: HAT's cross attention (Chen et al. 2023), halo attention (Vaswani et al. 2021), MaxSR, OmniSR."""

from __future__ import annotations

from attnc.errors import DeclarationError
from attnc.lang.pattern import Pattern, per_axis
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import Bias, Place, Places, Size, biased, every


@recorded
def overlapping_window(size: Size, kv_size: Size, *, bias: Bias = None) -> Pattern:
    """Queries in windows of `size`; their keys in the window of `kv_size` around it, cut at the borders of the grid.

    Keys of the window that starts at w: w - halo .. w - halo + kv_size - 1, with halo = (kv_size - size) // 2. A relative bias has
    size + kv_size - 1 entries per axis, at (query - w) - (key - w + halo) + kv_size - 1; an absolute one [size^2, kv_size^2]. HAT
    keeps the zeros around the grid as keys: `overlapping_window(s, kv).shift(halo)` with `pad=((halo, halo), ...)`.
    """

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        terms, places = [], []
        for a, b, s, kv in zip(q, k, per_axis(size, q.axes, "size"), per_axis(kv_size, q.axes, "kv_size"), strict=True):
            if kv < s:
                raise DeclarationError(f"kv_size={kv} is less than size={s}: queries would not see themselves; use window({kv})")
            window, halo = a // s * s, (kv - s) // 2
            terms += [b >= window - halo, b <= window + (kv - 1 - halo)]
            places.append(Place(a % s, b - window + halo, s, kv))
        return every(terms), places

    return biased(f"overlapping_window({size!r}, {kv_size!r})", body, bias)
