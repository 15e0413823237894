"""What integer expressions of a statement come to at concrete sizes: table indices inside their tables, divisors never zero.

Backends clamp the indices of pairs that the relation excludes and trust all others, so an index that leaves its table for an
allowed pair would be a silently wrong number (or a stray read). The ranges here cost O(axis length): exact where an expression
reads one axis, interval arithmetic where it joins several. Where intervals are too wide to decide, allowed pairs are evaluated
one query row at a time, once for each program and shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.errors import ShapeError, UnsupportedError
from attnc.schedule.geometry import Axis, Geometry, geometry

PAIRS = 1 << 22  # pairs of one axis that are listed one by one
ROWS = 1 << 26  # pairs of all axes that are looked at in doubt; beyond, an index that is not proven wrong is taken as right
INT32 = 1 << 31
Guards = tuple[ir.Expr, ...]


@dataclass(frozen=True)
class Range:
    """Least and greatest value. tight: both are attained by allowed pairs. Empty where low > high."""

    low: float
    high: float
    tight: bool = False

    def __contains__(self, n: int) -> bool:
        return self.low <= n <= self.high


ANY = Range(float("-inf"), float("inf"))
NOTHING = Range(1, 0)


def _leaves(e: ir.Expr, op: str) -> set[tuple[Any, ...]]:
    return {n.args for n in ir.walk(e) if n.op == op}


def _monotone(e: ir.Expr, role: ir.Role) -> int | None:
    """1: never falls as the role's coordinate grows, -1: never rises, 0: does not read it, None: unknown."""
    if not any(n.op == "coord" and n.args[0] == role for n in ir.walk(e)):
        return 0
    if e.op == "coord":
        return 1
    if e.op in ("add", "sub", "min", "max", "neg", "mul", "floordiv"):
        signs = [_monotone(c, role) for c in e.children]
        if None in signs:
            return None
        first = signs[0] or 0
        if e.op == "neg":
            return -first
        second = signs[1] or 0
        if e.op in ("mul", "floordiv"):
            factors = [c.args[0] for c in e.children if c.op == "const"]
            if e.op == "floordiv" and e.children[1].op != "const":
                return None
            return (first or second) * (1 if factors[0] >= 0 else -1) if factors else None
        second = -second if e.op == "sub" else second
        return first or second if 0 in (first, second) or first == second else None
    return None


class Box:
    """Ranges of expressions over the pairs that the interval ends of a geometry allow (all=True: over every pair of the grid)."""

    def __init__(self, g: Geometry, heads: int, batch: int, *, everywhere: bool = False) -> None:
        self.g, self.everywhere = g, everywhere
        self.leaves: dict[ir.Expr, Any] = {**g.sizes, ir.HEADS: heads}
        self.ends = {ir.HEAD: Range(0, heads - 1, True), ir.BATCH: Range(0, batch - 1, True)}

    def of(self, e: ir.Expr, guards: Guards = ()) -> Range:
        """The range of an integer expression."""
        if e in self.ends:
            return self.ends[e]
        if e.op == "load" or e.kind == "real":
            return ANY
        ops = {n.op for n in ir.walk(e)}
        if not ops & {"coord", "load", "head", "batch", "score"}:
            value = int(self._value(e, {}))
            return Range(value, value, True)
        axes = {a for _, a in _leaves(e, "coord")}
        if len(axes) == 1 and not ops & {"load", "head", "batch", "score"}:
            found = self._on_axis(e, axes.pop(), guards)
            if found is not None:
                return found
        return self._join(e, [self.of(c, guards) if c.kind == "int" else ANY for c in e.children])

    def _value(self, e: ir.Expr, coords: Mapping[ir.Expr, Any]) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return evaluate(e, {**self.leaves, **coords}, np)

    def _points(self, axis: Axis) -> tuple[Any, Any, Any]:
        """Real queries (extended coordinates) that see a key, and the first and last key each sees."""
        q = np.arange(axis.real_queries) + axis.before_queries
        r, j = q % axis.split, q // axis.split
        if self.everywhere:
            q = np.arange(axis.queries)
            return q, np.zeros_like(q), np.full_like(q, axis.keys - 1)
        lo, hi = axis.lo[r, j].astype(np.int64), axis.hi[r, j].astype(np.int64)
        some = lo <= hi
        return q[some], (lo * axis.split + r)[some], (hi * axis.split + r)[some]

    def _on_axis(self, e: ir.Expr, number: int, guards: Guards) -> Range | None:
        axis = self.g.axes[number]
        q, first, last = self._points(axis)
        if not len(q):
            return NOTHING
        cq, ck = ir.coord("q", number), ir.coord("k", number)
        mine = [g for g in guards if _one_axis(g) and _leaves(g, "coord") <= {("q", number), ("k", number)}]
        step = 1 if self.everywhere else axis.split
        if not mine:
            way = _monotone(e, "k")
            if way is not None:
                values = [np.broadcast_to(self._value(e, {cq: q, ck: k}), q.shape) for k in ((first, last) if way else (first,))]
                return _range(np.concatenate(values))
            if not any(n == cq for n in ir.walk(e)):
                reach = np.arange(axis.keys)[None] if self.everywhere else None
                if reach is None:
                    seen = np.zeros(axis.keys + step, np.int64)  # keys under any interval, by differences along each class
                    np.add.at(seen, first, 1)
                    np.add.at(seen, last + step, -1)
                    for start in range(step, len(seen), step):
                        seen[start : start + step] += seen[start - step : start - step + len(seen[start : start + step])]
                    reach = np.flatnonzero(seen[: axis.keys] > 0)[None]
                return _range(np.broadcast_to(self._value(e, {ck: reach}), reach.shape))
        widths = (last - first) // step + 1
        if int(widths.sum()) > PAIRS:
            return None
        pairs_q = np.repeat(q, widths)
        offset = np.arange(len(pairs_q)) - np.repeat(np.cumsum(widths) - widths, widths)
        pairs = {cq: pairs_q, ck: np.repeat(first, widths) + offset * step}
        keep = np.ones(len(pairs_q), bool)
        for g in mine:
            keep &= self._value(g, pairs)
        return _range(np.broadcast_to(self._value(e, pairs), pairs_q.shape)[keep])

    def _join(self, e: ir.Expr, parts: list[Range]) -> Range:
        """Interval arithmetic. The ends are attained where the parts read different axes; that is not looked at."""
        if any(p.low > p.high for p in parts if p is not ANY):
            return NOTHING
        a, b = parts[0], parts[1] if len(parts) > 1 else parts[0]
        apart = len(parts) < 2 or not (_places(e.children[0]) & _places(e.children[1]))
        tight = all(p.tight for p in parts) and apart
        match e.op:
            case "add":
                return Range(a.low + b.low, a.high + b.high, tight)
            case "sub":
                return Range(a.low - b.high, a.high - b.low, tight)
            case "neg":
                return Range(-a.high, -a.low, tight)
            case "abs":
                low = 0 if 0 in a else min(abs(a.low), abs(a.high))
                return Range(low, max(abs(a.low), abs(a.high)))
            case "mul":
                ends = [_times(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
                return Range(min(ends), max(ends), tight)
            case "min":
                return Range(min(a.low, b.low), min(a.high, b.high), tight)
            case "max":
                return Range(max(a.low, b.low), max(a.high, b.high), tight)
            case "floordiv" if 0 not in b:
                ends = [
                    x // y if abs(x) != float("inf") else x * (1 if y > 0 else -1) for x in (a.low, a.high) for y in (b.low, b.high)
                ]
                return Range(min(ends), max(ends))
            case "mod" if b.low > 0:
                return a if a.low >= 0 and a.high < b.low else Range(0, b.high - 1)
            case "mod" if b.high < 0:
                return Range(b.low + 1, 0)
            case "where":
                yes, no = parts[1], parts[2]
                return Range(min(yes.low, no.low), max(yes.high, no.high))
        return ANY


def _one_axis(e: ir.Expr) -> bool:
    """A condition on the coordinates of one axis."""
    return len({a for _, a in _leaves(e, "coord")}) == 1 and not any(n.op in ("load", "head", "batch") for n in ir.walk(e))


def _places(e: ir.Expr) -> set[Any]:
    """What an expression varies with: axes, head, batch."""
    return {n.args[1] if n.op == "coord" else n.op for n in ir.walk(e) if n.op in ("coord", "head", "batch")}


def _times(x: float, y: float) -> float:
    return 0 if 0 in (x, y) else x * y


def _range(values: Any) -> Range:
    return Range(int(values.min()), int(values.max()), True) if values.size else NOTHING


def _loads(e: ir.Expr, guards: Guards = ()) -> Iterator[tuple[ir.Expr, Guards]]:
    """Table reads, with the conditions of the `where` branches around them."""
    if e.op == "where":
        test, yes, no = e.children
        yield from _loads(test, guards)
        yield from _loads(yes, guards + ir.conjuncts(test))
        yield from _loads(no, (*guards, ir.make("not", test)))
        return
    if e.op == "load":
        yield e, guards
    for c in e.children:
        yield from _loads(c, guards)


def _spoken(program: ir.Program, g: Geometry) -> list[ir.Expr]:
    """Relation, score and post in the coordinates of the geometry's axes."""
    a = g.attend

    def flat(n: ir.Expr) -> ir.Expr | None:
        return ir.coord(n.args[0], 0) if n.op == "index" else None

    found = [e for e in (a.relation, a.score, a.post) if e is not None]
    if g.structure.flat:
        return [ir.rewrite(e, flat) for e in found]
    return [ir.flatten_index(e, a.rank, program.same_grid) for e in found]


def _attained(g: Geometry, load: ir.Expr, guards: Guards, d: int, heads: int, batch: int, fits: int) -> int | None:
    """An index that some allowed pair has outside the table, found by looking; None where there is none."""
    index = load.args[1 + d]
    for e in (index, *guards, g.structure.residual):
        if any(n.op == "load" for n in ir.walk(e)):
            return None  # known only from a table's values
    rows = sum(q.shape[1] * k.shape[1] for q, k in g.query_rows())
    if rows > ROWS:
        return None
    for q, k in g.query_rows():
        leaves: dict[ir.Expr, Any] = {**g.sizes, ir.HEADS: heads}
        leaves |= {ir.coord("q", i): c[:, None] for i, c in enumerate(q)}
        leaves |= {ir.coord("k", i): c[None, :] for i, c in enumerate(k)}
        leaves[ir.HEAD] = np.arange(heads)[:, None, None]
        leaves[ir.BATCH] = np.arange(batch)[:, None, None, None]
        ok = g.mask(q, k, heads, batch)
        with np.errstate(divide="ignore", invalid="ignore"):
            for guard in guards:
                ok = ok & evaluate(guard, leaves, np)
            value = evaluate(index, leaves, np)
        wrong = ok & ((value < 0) | (value >= fits))
        if wrong.any():
            return int(np.broadcast_to(value, wrong.shape)[wrong][0])
    return None


@lru_cache(maxsize=1024)
def check(
    program: ir.Program,
    q_grid: tuple[int, ...],
    k_grid: tuple[int, ...],
    heads: int,
    batch: int,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    wide: bool,
) -> None:
    """Raise ShapeError where a table is too small for an allowed pair, or a divisor can be zero; UnsupportedError on overflow.

    shapes: each table's name and shape. wide: integers have 64 bits in this backend, otherwise 32.
    """
    a = program.attend
    assert isinstance(a, ir.Attend)
    with np.errstate(divide="ignore"):  # a divisor that can be 0 is refused below
        g, tables = geometry(program, q_grid, k_grid), dict(shapes)
    spoken = _spoken(program, g)
    _check_integers(a.name, spoken, Box(g, heads, batch, everywhere=True), wide)
    if a.normalizer.sink is not None:
        check_sink(a, tables[a.normalizer.sink], heads)
    box = Box(g, heads, batch)
    axes = ("index",) if g.structure.flat else ir.AXES.get(a.rank)
    conditions = ir.conjuncts(g.structure.residual)
    for number, e in enumerate(spoken):
        for load, inside in _loads(e):
            guards = inside + conditions
            # values along one axis are attained where no condition ties that axis to another, to the head or to a table's values
            certain = all(_one_axis(c) for c in guards if number or not _leaves(c, "load"))
            for d, index in enumerate(load.children):
                fits = tables[load.args[0]][d]
                where = f"pattern {a.name}: the table {load.args[0]!r} has shape {tables[load.args[0]]}"
                many = heads if index == ir.HEAD else batch if index == ir.BATCH else None
                if many is not None and fits not in (1, many):
                    what = "query heads" if index == ir.HEAD else "batch items"
                    raise ShapeError(f"{where}; its dimension {d} counts {what}, of which this call has {many}: it is {many} or 1")
                if fits == 1 or many is not None:
                    continue  # one entry serves all
                r = box.of(index, guards)
                if r.low > r.high or (r.low >= 0 and r.high < fits):
                    continue
                found = None
                if r.tight and certain:
                    found = int(r.low) if r.low < 0 else int(r.high)
                elif number:
                    found = _attained(g, load, guards, d, heads, batch, fits)
                if found is not None:
                    raise ShapeError(
                        f"{where}, but `{ir.show(index, axes)}` (dimension {d}) comes to {found} for an allowed pair on the grid "
                        f"{q_grid}: give it more entries, or shift the index so that it starts at 0"
                    )


def check_sink(a: ir.Attend, shape: tuple[int, ...], heads: int) -> None:
    """Raise ShapeError where the statement's sink, a table of this shape, is not one logit for each query head or for all."""
    if tuple(shape) not in ((1,), (heads,)):
        raise ShapeError(
            f"pattern {a.name}: the sink {a.normalizer.sink!r} has {shape[0]} entries, expected one per query head ({heads}) or 1"
        )


def table_shapes(
    program: ir.Program, q_grid: tuple[int, ...], k_grid: tuple[int, ...], heads: int, batch: int
) -> dict[str, tuple[int, ...]]:
    """The least shape of each runtime table that the indices of all allowed pairs fit into.

    Raises ShapeError where an index has no known bound.
    """
    a = program.attend
    assert isinstance(a, ir.Attend)
    g = geometry(program, q_grid, k_grid)
    box = Box(g, heads, batch)
    found: dict[str, tuple[int, ...]] = {a.normalizer.sink: (heads,)} if a.normalizer.sink else {}
    for e in _spoken(program, g):
        for load, inside in _loads(e):
            name = load.args[0]
            ranges = [box.of(index, inside + ir.conjuncts(g.structure.residual)) for index in load.children]
            if any(r.high == float("inf") for r in ranges):
                raise ShapeError(f"pattern {a.name}: the size of the table {name!r} does not follow from the grid {q_grid}")
            sizes = tuple(max(int(r.high) + 1, 1) for r in ranges)
            found[name] = tuple(map(max, sizes, found.get(name, sizes)))
    return found


def _check_integers(name: str, spoken: list[ir.Expr], box: Box, wide: bool) -> None:
    limit = 1 << 63 if wide else INT32
    for e in dict.fromkeys(n for s in spoken for n in ir.walk(s) if n.kind == "int" and (n.op in ir.ARITY or n.op == "const")):
        if e.op in ("floordiv", "mod") and e.children[1].op != "const" and 0 in box.of(e.children[1]):
            divisor = ir.show(e.children[1])
            raise ShapeError(
                f"pattern {name}: `{ir.show(e)}` divides by `{divisor}`, which can be 0 on this grid: use attnc.max({divisor}, 1)"
            )
        r = box.of(e)
        if r is not ANY and max(abs(r.low), abs(r.high)) >= limit and float("inf") not in (abs(r.low), abs(r.high)):
            raise UnsupportedError(
                f"pattern {name}: `{ir.show(e)}` comes to {max(r.low, r.high, key=abs)} on this grid, more than the integers of "
                "this backend hold: use smaller numbers, or backend='torch'"
            )
