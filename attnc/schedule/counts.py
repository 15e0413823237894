"""Programs and chunks of an axis as sympy expressions in its length: what `tiles.walk` counts at one size, for every size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import sympy as sp

from attnc import ir
from attnc.analysis.algebra import Choice, FloorDiv, FloorMod, NotAlgebraic, symbol, to_sympy
from attnc.analysis.axis import AxisForm, I, J, R
from attnc.analysis.structure import Structure
from attnc.errors import UnsupportedError
from attnc.schedule.walks import Side, Tile


class Let(sp.Function):  # type: ignore[misc]
    """Let(e, x, a): e at x = a, left as it stands (put in, sympy would take seconds to find its maxima)."""

    nargs = (3,)

    def _eval_is_integer(self) -> bool:
        return True


T = sp.Symbol("t", integer=True, nonnegative=True)


def counts(name: str, s: Structure, side: Side, tile: Tile, *, same_grid: bool = True) -> tuple[sp.Expr, sp.Expr]:
    """(programs, chunks visited) of one head, functions of `ir.size` symbols: products over the axes.

    Raises:
        UnsupportedError: an end of an axis has no closed form.
    """
    programs, steps = sp.Integer(1), sp.Integer(1)
    for axis, form in enumerate(s.axes):
        p, c = axis_counts(name, form, axis, side, tile.rows[axis], tile.chunk[axis], same_grid=same_grid)
        if tile.wrapped(axis):  # every tile is a whole block
            p = c = FloorDiv(symbol(ir.size("q", axis)), sp.Integer(tile.rows[axis]))
        programs, steps = programs * p, steps * c
    return programs, steps


def axis_counts(
    name: str, form: AxisForm, axis: int, side: Side, rows: int, chunk: int, *, same_grid: bool = True
) -> tuple[sp.Expr, sp.Expr]:
    """One axis, of an unpadded statement: tiles begin at block borders, rows past the end see what the last row sees."""
    j, r = symbol(J), symbol(R) if form.split != ir.ONE else sp.Integer(0)
    nq, nk = (symbol(ir.size(role, axis)) for role in ("q", "q" if same_grid else "k"))
    size, other = (nq, nk) if side == "q" else (nk, nq)
    try:
        split, shift = _sympy(form.split), _sympy(form.shift)
        block = None if form.block is None else _sympy(form.block)
        columns = side == "k" and form.inverse_lo is None
        ends = (form.lo, form.hi) if side == "q" or columns else (form.inverse_lo, form.inverse_hi)
        lo, hi = (_sympy(e).xreplace({symbol(I): j, symbol(R): r}) for e in ends if e is not None)
    except NotAlgebraic as e:
        raise UnsupportedError(f"pattern {name}: axis {axis} has no closed form to count with ({e}); count it at a size") from e
    off = FloorMod(-shift, block) if block is not None else sp.Integer(0)
    begin = rows * FloorDiv(off, rows) - off
    tiles = _ceil(_ceil(size, split) - begin, rows)
    length = _ceil(other - r, split)  # columns of the class
    last_row = FloorDiv(size - 1 - r, split)
    last = sp.Max(sp.Min(begin + T * rows + rows - 1, last_row), 0)
    first = sp.Min(sp.Max(begin + T * rows, 0), last)
    left = sp.Max(Let(lo, j, first), 0, evaluate=False)
    right = sp.Min(Let(hi, j, last), length - 1, evaluate=False) + 1
    if columns:
        left, right = sp.Integer(0), length
    classes = sp.Min(split, size)
    per_tile = sp.Max(_ceil(right - left, chunk), 0, evaluate=False)
    if form.full and form.split == ir.ONE:  # every tile walks the whole axis
        return tiles, tiles * _ceil(other, chunk)
    if form.split == ir.ONE:
        return tiles, sp.Sum(per_tile, (T, 0, tiles - 1))
    return tiles * classes, sp.Sum(per_tile, (T, 0, tiles - 1), (r, 0, classes - 1))


def _sympy(e: ir.Expr) -> sp.Expr:
    """As `to_sympy`, with the choices that inverse ends make."""
    chosen: dict[ir.Expr, ir.Expr] = {}

    def place(n: ir.Expr) -> ir.Expr | None:
        return chosen.setdefault(n, ir.var(f"choice{len(chosen)}")) if n.op == "where" else None

    out = to_sympy(ir.rewrite(e, place))
    for n, v in chosen.items():
        test, a, b = n.children
        if test.op != "le":
            raise NotAlgebraic(ir.show(n))
        t = _sympy(test.children[0]) - _sympy(test.children[1])
        out = out.xreplace({symbol(v): Choice(t, _sympy(a), _sympy(b))})
    return out


def _ceil(a: Any, b: Any) -> Any:
    return -FloorDiv(-a, sp.sympify(b), evaluate=False)


def value(e: Any, sizes: Mapping[sp.Symbol, int]) -> int:
    """An expression of `counts` at concrete sizes: sums are summed, nothing is guessed."""
    found = _value(e, sizes)
    assert found == int(found), e
    return int(found)


def _value(e: Any, sizes: Mapping[sp.Symbol, int]) -> Any:  # int or Fraction
    if e.is_Rational:
        return int(e) if e.is_Integer else Fraction(int(e.p), int(e.q))
    if e.is_Symbol:
        return sizes[e]
    if isinstance(e, sp.Sum):
        *limits, (x, a, b) = e.limits  # the last is the outermost
        inner = sp.Sum(e.function, *limits) if limits else e.function
        return sum(_value(inner, {**sizes, x: n}) for n in range(value(a, sizes), value(b, sizes) + 1))
    if isinstance(e, Let):
        return _value(e.args[0], {**sizes, e.args[1]: value(e.args[2], sizes)})
    if isinstance(e, Choice):
        return _value(e.args[1 if _value(e.args[0], sizes) <= 0 else 2], sizes)
    found: list[Any] = [_value(a, sizes) for a in e.args]
    if e.is_Add:
        return sum(found)
    if e.is_Mul:
        return math.prod(found)
    if e.is_Pow:
        return Fraction(found[0]) ** int(found[1])
    if isinstance(e, sp.Min | sp.Max):
        return min(found) if isinstance(e, sp.Min) else max(found)
    if isinstance(e, FloorDiv | FloorMod):
        return found[0] // found[1] if isinstance(e, FloorDiv) else found[0] % found[1]
    if isinstance(e, sp.Abs):
        return abs(found[0])
    raise TypeError(f"not an expression of counts: {e}")
