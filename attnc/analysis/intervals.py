"""What a predicate is known to say of whole boxes of pairs: true of every pair, false of every pair, or neither proved.

Interval arithmetic over many boxes at once. It is sound and not complete: a box is called true or false only where that follows
from the ranges of its coordinates; whatever is not understood is unknown. Ranges are pairs of float64 arrays that hold integers
exactly; beyond 2 ** 52 an end counts as infinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnc import ir

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
LARGEST = 2.0**52
INF = float("inf")


class Span(NamedTuple):
    """Least and greatest value that an integer expression may have in each box."""

    low: Any
    high: Any


class Truth(NamedTuple):
    """Per box: a condition holds for every pair (must), and may hold for some (may). must implies may."""

    must: Any
    may: Any


ANY, UNKNOWN = Span(-INF, INF), Truth(False, True)


def span_of(low: Any, high: Any) -> Span:
    """A span whose ends are exact: what is not a number, or too large to be exact, is infinite."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return Span(np.where(low >= -LARGEST, low, -INF), np.where(high <= LARGEST, high, INF))


@dataclass
class RangeTable:
    """Least and greatest element of any box of a table's indices, by tables of boxes whose sides are powers of two."""

    values: NDArray[Any]
    levels: dict[tuple[int, ...], tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)

    def _level(self, level: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Of the boxes that begin at each index, 2 ** level long."""
        if level not in self.levels:
            d = next((d for d, n in enumerate(level) if n), None)
            if d is None:
                self.levels[level] = self.values, self.values
            else:
                below = self._level((*level[:d], level[d] - 1, *level[d + 1 :]))
                step, length = 1 << (level[d] - 1), below[0].shape[d]
                first, second = ((slice(None),) * d + (s,) for s in (slice(0, length - step), slice(step, length)))
                self.levels[level] = (
                    np.minimum(below[0][first], below[0][second]),
                    np.maximum(below[1][first], below[1][second]),
                )
        return self.levels[level]

    def of(self, spans: list[Span]) -> Span:
        """The span of the elements at these indices, one span each; unknown where an index may leave the table."""
        ends = np.broadcast_arrays(*[e for s in spans for e in s])
        shape = ends[0].shape
        inside = np.ones(shape, bool)
        first, last = [], []
        for low, high, n in zip(ends[::2], ends[1::2], self.values.shape, strict=True):
            if n > 1:  # one entry serves every index
                inside &= (low >= 0) & (high < n)
            first.append(np.clip(low if n > 1 else 0 * inside, 0, n - 1).astype(np.int64))
            last.append(np.clip(high if n > 1 else 0 * inside, 0, n - 1).astype(np.int64))
        least, most = np.full(shape, -INF), np.full(shape, INF)
        size = [np.frexp(np.maximum(b - a + 1, 1))[1] - 1 for a, b in zip(first, last, strict=True)]
        known, codes = np.flatnonzero(inside.ravel()), reduce(lambda code, s: code * 64 + s, size).ravel()
        for code in np.unique(codes[known]):
            at = known[codes[known] == code]
            level = tuple(int(s.ravel()[at[0]]) for s in size)
            small, large = self._level(level)
            found = [np.full(len(at), INF), np.full(len(at), -INF)]
            for corner in range(1 << len(level)):
                index = tuple(
                    b.ravel()[at] - (1 << n) + 1 if corner >> d & 1 else a.ravel()[at]
                    for d, (a, b, n) in enumerate(zip(first, last, level, strict=True))
                )
                found = [np.minimum(found[0], small[index]), np.maximum(found[1], large[index])]
            least.ravel()[at], most.ravel()[at] = found
        return span_of(least, most)


class Boxes:
    """Expressions over boxes. spans: of coordinates, sizes, head and batch; tables: integer tables whose values are known."""

    def __init__(self, spans: Mapping[ir.Expr, Span], tables: Mapping[str, RangeTable]) -> None:
        self.spans, self.tables = spans, tables
        self.memo: dict[ir.Expr, Any] = {}

    def truth(self, e: ir.Expr) -> Truth:
        """What is known of a condition."""
        if e not in self.memo:
            with np.errstate(all="ignore"):
                self.memo[e] = self._truth(e)
        found: Truth = self.memo[e]
        return found

    def span(self, e: ir.Expr) -> Span:
        """The range of an integer expression; a condition counts as 0 or 1."""
        if e.kind == "bool":
            t = self.truth(e)
            return Span(np.where(t.must, 1.0, 0.0), np.where(t.may, 1.0, 0.0))
        if e not in self.memo:
            with np.errstate(all="ignore"):
                self.memo[e] = span_of(*self._span(e)) if e.kind == "int" else ANY
        found: Span = self.memo[e]
        return found

    def _truth(self, e: ir.Expr) -> Truth:
        if e.op == "const":
            return Truth(bool(e.args[0]), bool(e.args[0]))
        if e.op in ("and", "or"):
            a, b = (self.truth(c) for c in e.args)
            join = np.logical_and if e.op == "and" else np.logical_or
            return Truth(join(a.must, b.must), join(a.may, b.may))
        if e.op == "not":
            a = self.truth(e.args[0])
            return Truth(np.logical_not(a.may), np.logical_not(a.must))
        if e.op == "where":
            test, yes, no = (self.truth(c) for c in e.args)
            must = np.where(test.must, yes.must, np.where(test.may, np.logical_and(yes.must, no.must), no.must))
            return Truth(must, np.where(test.must, yes.may, np.where(test.may, np.logical_or(yes.may, no.may), no.may)))
        if e.op not in ("eq", "ne", "lt", "le") or any(c.kind == "real" for c in e.args):
            return UNKNOWN
        x, y = (self.span(c) for c in e.args)
        if e.op == "lt":
            return Truth(x.high < y.low, x.low < y.high)
        if e.op == "le":
            return Truth(x.high <= y.low, x.low <= y.high)
        same, meet = (x.low == x.high) & (y.low == y.high) & (x.low == y.low), (x.low <= y.high) & (y.low <= x.high)
        return Truth(same, meet) if e.op == "eq" else Truth(np.logical_not(meet), np.logical_not(same))

    def _span(self, e: ir.Expr) -> Span:
        if e.op == "const":
            return Span(e.args[0], e.args[0])
        if e.op in ir.LEAVES:
            return self.spans.get(e, ANY)
        if e.op == "load":
            table = self.tables.get(e.args[0])
            return ANY if table is None or not e.children else table.of([self.span(c) for c in e.children])
        if e.op == "where":
            test, yes, no = self.truth(e.args[0]), self.span(e.args[1]), self.span(e.args[2])
            low, high = np.minimum(yes.low, no.low), np.maximum(yes.high, no.high)
            low = np.where(test.must, yes.low, np.where(test.may, low, no.low))
            return Span(low, np.where(test.must, yes.high, np.where(test.may, high, no.high)))
        s = [self.span(c) for c in e.children]
        a, b = s[0], s[-1]
        match e.op:
            case "add":
                return Span(a.low + b.low, a.high + b.high)
            case "sub":
                return Span(a.low - b.high, a.high - b.low)
            case "neg":
                return Span(-a.high, -a.low)
            case "abs":
                return Span(np.maximum(np.maximum(a.low, -a.high), 0), np.maximum(-a.low, a.high))
            case "min":
                return Span(np.minimum(a.low, b.low), np.minimum(a.high, b.high))
            case "max":
                return Span(np.maximum(a.low, b.low), np.maximum(a.high, b.high))
            case "mul" if e.args[0] == e.args[1]:
                least = np.maximum(np.maximum(a.low, -a.high), 0)
                most = np.maximum(-a.low, a.high)
                return Span(least * least, most * most)
            case "mul":
                return _corners(a, b, np.multiply)
            case "floordiv":
                found = _corners(a, b, _floor_divided)
                zero = (b.low <= 0) & (b.high >= 0)
                return Span(np.where(zero, -INF, found.low), np.where(zero, INF, found.high))
            case "mod":
                return _remainder(a, b)
        return ANY


def _corners(a: Span, b: Span, f: Any) -> Span:
    """The span of f, which is monotone in each argument while the other stands still; where an end is no number, none is known."""
    ends = [f(x, y) for x in a for y in b]
    low, high = reduce(np.minimum, ends), reduce(np.maximum, ends)  # which keep what is not a number
    return Span(low, high)


def _floor_divided(x: Any, y: Any) -> Any:
    """x // y; of an infinite x infinite."""
    return np.where(np.isinf(x), x * np.sign(y), np.where(np.isinf(y), np.nan, np.floor_divide(x, y)))


def _remainder(a: Span, b: Span) -> Span:
    """a % b, with the sign of b. Exact where a lies within one period of a b that is one number."""
    period = np.floor_divide(a.low, b.low)
    within = (b.low == b.high) & (b.low != 0) & (period == np.floor_divide(a.high, b.low))
    start = period * b.low
    unchanged = (a.low >= 0) & (a.high < b.low)
    low = np.where(b.low > 0, np.where(unchanged, a.low, 0.0), b.low + 1)
    high = np.where(b.low > 0, np.where(unchanged, a.high, b.high - 1), 0.0)
    low, high = np.where(within, a.low - start, low), np.where(within, a.high - start, high)
    unknown = (b.low <= 0) & (b.high >= 0)
    return Span(np.where(unknown, -INF, low), np.where(unknown, INF, high))
