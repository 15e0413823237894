"""Dilated attention: DiNAT's dilated neighbourhood, and CrossFormer's long-distance groups (Wang et al. 2022)."""

from __future__ import annotations

from attnc.lang.pattern import Pattern, per_axis
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.neighborhood import neighborhood
from attnc.patterns.relation import Bias, Place, Places, Size, biased, every


@recorded
def dilated(size: Size, dilation: Size, *, bias: Bias = None) -> Pattern:
    """The neighbourhood of `size` among tokens `dilation` apart."""
    pattern = neighborhood(size, dilation, bias=bias)
    pattern.name = f"dilated({size!r}, {dilation!r})"
    return pattern


@recorded
def dilated_blocks(size: Size, interval: Size, *, bias: Bias = None) -> Pattern:
    """Groups of `size` tokens sampled `interval` apart: same q % interval, same q // (interval * size) on every axis."""

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        terms, places = [], []
        for a, b, s, d in zip(q, k, per_axis(size, q.axes, "size"), per_axis(interval, q.axes, "interval"), strict=True):
            terms += [a % d == b % d, a // d // s == b // d // s]
            places.append(Place(a // d % s, b // d % s, s))
        return every(terms), places

    return biased(f"dilated_blocks({size!r}, {interval!r})", body, bias)
