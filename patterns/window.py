"""Window attention: Swin (Liu et al. 2021), DaViT's spatial half (Ding et al. 2022), HAT, DRCT, ..."""

from __future__ import annotations

from attnc.lang.functions import clamp
from attnc.lang.pattern import Pattern, per_axis
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import Bias, Place, Places, Size, biased, every


@recorded
def window(size: Size, shift: Size | int = 0, *, bias: Bias = None) -> Pattern:
    """Tokens attend within windows of `size` (int, or one per axis) whose borders lie at `shift` mod size.

    Same window: (q - shift) // size == (k - shift) // size on every axis. With shift this is what Swin's roll by -shift with
    its mask computes; an axis no longer than the window is one window, unshifted.
    """

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        sizes = per_axis(size, q.axes, "size")
        shifts = per_axis(shift, q.axes, "shift", least=None)
        terms, places = [], []
        for a, b, n, s, t in zip(q, k, q.size, sizes, shifts, strict=True):
            if t % s:
                moved = t % s * clamp(n - s, 0, 1)  # no shift on an axis that fits in one window
                a, b = a - moved, b - moved
            terms.append(a // s == b // s)
            places.append(Place(a % s, b % s, s))
        return every(terms), places

    return biased(f"window({size!r}{f', shift={shift!r}' if shift else ''})", body, bias)


@recorded
def blocks(size: Size, *, bias: Bias = None) -> Pattern:
    """Tokens attend within blocks of `size`: window without a shift."""
    pattern = window(size, bias=bias)
    pattern.name = f"blocks({size!r})"
    return pattern
