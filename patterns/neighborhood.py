"""Neighbourhood attention: NAT and DiNAT (Hassani et al. 2022, 2023), with GNA's stride (Hassani et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.errors import DeclarationError
from attnc.lang.functions import maximum, minimum
from attnc.lang.pattern import Pattern, per_axis
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import Bias, Place, Places, Size, biased, every


@recorded
def neighborhood(
    size: Size,
    dilation: Size = 1,
    stride: Size = 1,
    causal: bool | Sequence[bool] = False,
    *,
    bias: Bias = None,
) -> Pattern:
    """A window of `size` keys around each query, kept inside the axis (so every query has size keys where the axis has them).

    On the residue class of the query modulo `dilation`, with j its index there and g the class's length, the keys are
    start .. start + size - 1, start = max(min(c - size // 2, g - size), 0). The centre c is j, or the middle of j's group of
    `stride` queries, which all share one window. A causal axis ends its window at the query: keys j' with last - size < j' <=
    j, where last is the last query of the group. `size` is cut to the class.
    """

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        sizes = per_axis(size, q.axes, "size")
        dilations, strides = per_axis(dilation, q.axes, "dilation"), per_axis(stride, q.axes, "stride")
        causals = (causal,) * len(q.axes) if isinstance(causal, bool) else tuple(causal)
        if len(causals) != len(q.axes):
            raise DeclarationError(f"causal={causal!r}: a bool, or one per axis ({', '.join(q.axes)})")
        terms, places = [], []
        for a, b, n, s, d, st, one_way in zip(q, k, q.size, sizes, dilations, strides, causals, strict=True):
            if st > s:
                raise DeclarationError(f"stride={st} is greater than size={s}: some keys would never be seen")
            length = (n - a % d + d - 1) // d if d > 1 else n
            j, i = a // d, b // d
            if d > 1:
                terms.append(a % d == b % d)
            if one_way:
                last = minimum(j // st * st + st - 1, length - 1) if st > 1 else j
                terms += [i > last - s, i <= j]
            else:
                centre = minimum(j // st * st + st // 2, length - 1) if st > 1 else j
                start = maximum(minimum(centre - s // 2, length - s), 0)
                terms += [i >= start, i <= start + (s - 1)]
            places.append(Place(j, i, s))
        return every(terms), places

    if bias == "absolute":
        raise DeclarationError("neighborhood: bias='absolute' has no meaning here, windows slide; use 'relative'")
    extra = "".join(
        f", {n}={x!r}"
        for n, x, plain in (("dilation", dilation, 1), ("stride", stride, 1), ("causal", causal, False))
        if x != plain
    )
    return biased(f"neighborhood({size!r}{extra})", body, bias)
