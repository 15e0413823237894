"""Windows that slide over the border: a convolution's taps as keys (TiC, Zhang et al. 2023; SASA, Ramachandran et al. 2019)."""

from __future__ import annotations

from attnc.errors import DeclarationError
from attnc.lang.functions import HEAD, SCORE, Statement, where
from attnc.lang.pattern import Pattern, per_axis
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym
from attnc.patterns.relation import Bias, Place, Places, Size, biased, every


def reach(size: int, dilation: int) -> int:
    """Tokens from a window's middle to its end, which is what a convolution pads to keep the grid. The size must be odd."""
    if not size % 2:
        raise DeclarationError(f"a window of {size} has no middle: give an odd size")
    return dilation * (size // 2)


@recorded
def sliding_window(size: Size, dilation: Size = 1, *, pooled: int = 1, bias: Bias = None) -> Pattern:
    """Keys q + dilation * (u - size // 2) for u = 0 .. size - 1, size odd; those outside the grid are missing, the window stays.

    With ``pad=((r, r), ...)``, r = dilation * (size // 2), the keys outside exist as rows of zeros, which take their share of the
    softmax, as a convolution's padding does (TiC). `pooled`: keys lie on a grid that many times coarser (`kv_grid=`, also padded),
    the window around the key above the query. A relative bias has 2 size - 1 entries per axis, at size - 1 + query - key.
    """
    if not isinstance(pooled, int) or isinstance(pooled, bool) or pooled < 1:
        raise DeclarationError(f"sliding_window(pooled={pooled!r}): a positive int")

    def body(q: Point, k: Point) -> tuple[Sym, Places]:
        terms: list[Sym] = []
        places = []
        for a, b, s, d in zip(q, k, per_axis(size, q.axes, "size"), per_axis(dilation, q.axes, "dilation"), strict=True):
            far = reach(s, d)
            # queries are counted from the first padded row too
            middle = (a - far) // pooled + far if pooled > 1 else a
            if d > 1:
                terms.append(middle % d == b % d)
            terms += [b >= middle - far, b <= middle + far]
            places.append(Place(middle // d, b // d, s))
        return every(terms), places

    if bias == "absolute":
        raise DeclarationError("sliding_window: bias='absolute' has no meaning here, windows slide; use 'relative'")
    extra = "".join(f", {n}={x!r}" for n, x in (("dilation", dilation), ("pooled", pooled)) if x != 1)
    return biased(f"sliding_window({size!r}{extra})", body, bias)


@recorded
def taps(size: Size, dilation: Size = 1) -> Pattern:
    """Head m sees one key, tap m of the sliding window in row-major order: the lse of a call is the window's scores, tap by tap.

    Taps outside the grid are keys of zeros where the operator is compiled with ``pad=``, see `sliding_window`.
    """

    def tracer(q: Point, k: Point) -> Statement:
        sizes, dilations = per_axis(size, q.axes, "size"), per_axis(dilation, q.axes, "dilation")
        terms: list[Sym] = []
        rest: Sym = HEAD
        for a, b, s, d in reversed(list(zip(q, k, sizes, dilations, strict=True))):
            far = reach(s, d)
            terms += [b >= a - far, b <= a + far, b - a == d * (rest % s) - far]  # the first two bound it for every head
            rest = rest // s
        return where(every(terms), SCORE)

    return Pattern(f"taps({size!r}{f', dilation={dilation!r}' if dilation != 1 else ''})", tracer)
