"""Symbols a declaration computes with. They wrap `ir.Expr`, so `==`, `//`, `%`, `&` build IR instead of computing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NoReturn

from attnc import ir
from attnc.errors import DeclarationError

Number = int | float


def as_expr(value: object) -> ir.Expr:
    """The IR of a symbol or a Python number."""
    if isinstance(value, Sym):
        return value.expr
    if isinstance(value, float) and math.isnan(value):
        raise DeclarationError("nan stands in the declaration: a score is a number")
    if isinstance(value, bool | int | float):
        return ir.const(value)
    if hasattr(value, "__index__"):
        with contextlib.suppress(TypeError):  # a tensor has the method, and refuses where it holds more than one integer
            return ir.const(value.__index__())
    raise DeclarationError(
        f"{value!r} ({type(value).__name__}) cannot stand in a declaration: use coordinates (q.y, k.x), attnc.SCORE, "
        "attnc.HEAD, a table's element, or Python numbers; runtime tensors are declared as `name: attnc.Table`"
    )


def number(value: object, what: str) -> ir.Expr:
    """The IR of an operand that must be a number; `what` names the operation for the message."""
    e = as_expr(value)
    if e.kind == "bool":
        raise DeclarationError(f"`{ir.show(e)}` is a condition; {what} needs numbers: attnc.where(condition, a, b) makes one of it")
    return e


class Sym:
    """A symbolic integer, real or boolean. Branching on it is an error: the declaration runs once, for all tokens."""

    __slots__ = ("expr",)

    def __init__(self, expr: ir.Expr) -> None:
        self.expr = expr

    def __repr__(self) -> str:
        return ir.show(self.expr)

    def __hash__(self) -> int:
        return hash(self.expr)

    def __bool__(self) -> NoReturn:
        hint = "`if`, `and`, `or`, `not`, `in`, chained comparisons and the builtin min()/max() ask for its truth"
        raise DeclarationError(
            f"the declaration branches on the symbol `{self!r}`: {hint}; use attnc.where(condition, a, b), `&`, `|`, `~`, "
            "attnc.min and attnc.max"
        )

    def __index__(self) -> NoReturn:
        raise DeclarationError(f"`{self!r}` is a symbol, not a Python integer: it cannot drive range(), a list index or a slice")

    __int__ = __index__
    __float__ = __index__

    def __iter__(self) -> NoReturn:
        raise DeclarationError(f"`{self!r}` is one symbol and cannot be iterated")

    def _binary(self, op: str, other: object, *, swap: bool = False) -> Sym:
        a, b = self.expr, as_expr(other)
        if swap:
            a, b = b, a
        if op == "mul":  # a condition times a number: 1 or 0 times it
            a, b = (ir.make("where", e, ir.ONE, ir.ZERO) if e.kind == "bool" else e for e in (a, b))
        elif op not in ("eq", "ne"):
            a, b = (number(Sym(e), f"`{ir.INFIX[op]}`") for e in (a, b))
        if op in ("floordiv", "mod"):
            if "real" in (a.kind, b.kind):
                text = f"{ir.show(a)} {ir.INFIX[op]} {ir.show(b)}"
                raise DeclarationError(f"`{text}`: coordinates are integers, a float cannot be used as one; use integer operands")
            if b == ir.ZERO:
                raise DeclarationError(f"`{ir.show(a)} {ir.INFIX[op]} 0` divides by zero")
        return Sym(ir.make(op, a, b))

    def __add__(self, o: object) -> Sym:
        return self._binary("add", o)

    def __radd__(self, o: object) -> Sym:
        return self._binary("add", o, swap=True)

    def __sub__(self, o: object) -> Sym:
        return self._binary("sub", o)

    def __rsub__(self, o: object) -> Sym:
        return self._binary("sub", o, swap=True)

    def __mul__(self, o: object) -> Sym:
        return self._binary("mul", o)

    def __rmul__(self, o: object) -> Sym:
        return self._binary("mul", o, swap=True)

    def __floordiv__(self, o: object) -> Sym:
        return self._binary("floordiv", o)

    def __rfloordiv__(self, o: object) -> Sym:
        return self._binary("floordiv", o, swap=True)

    def __mod__(self, o: object) -> Sym:
        return self._binary("mod", o)

    def __rmod__(self, o: object) -> Sym:
        return self._binary("mod", o, swap=True)

    def __truediv__(self, o: object) -> Sym:
        return self._binary("truediv", o)

    def __rtruediv__(self, o: object) -> Sym:
        return self._binary("truediv", o, swap=True)

    def __pow__(self, n: object) -> Sym:
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= 8:
            raise DeclarationError(f"`{self!r} ** {n!r}`: only integer powers from 0 to 8; use attnc.exp and attnc.log")
        out = Sym(ir.ONE)
        for _ in range(n):
            out = out * self
        return out

    def __neg__(self) -> Sym:
        return Sym(ir.make("neg", number(self, "`-`")))

    def __pos__(self) -> Sym:
        return self

    def __abs__(self) -> Sym:
        return Sym(ir.make("abs", number(self, "abs()")))

    def __divmod__(self, o: object) -> tuple[Sym, Sym]:
        return self // o, self % o

    def _no(self, *_: object) -> NoReturn:
        raise DeclarationError(
            f"`{self!r}`: round, floor, shifts, ^, powers of a symbol, len() and [] are no operations of a declaration; "
            "it has + - * / // % **n abs & | ~, comparisons, attnc.min, max, where, exp, log, tanh, sqrt"
        )

    __round__ = __floor__ = __ceil__ = __trunc__ = __len__ = __getitem__ = __call__ = _no
    __rpow__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __xor__ = __rxor__ = __matmul__ = __rmatmul__ = _no

    def __eq__(self, o: object) -> Sym:  # type: ignore[override]
        return self._binary("eq", o)

    def __ne__(self, o: object) -> Sym:  # type: ignore[override]
        return self._binary("ne", o)

    def __lt__(self, o: object) -> Sym:
        return self._binary("lt", o)

    def __le__(self, o: object) -> Sym:
        return self._binary("le", o)

    def __gt__(self, o: object) -> Sym:
        return self._binary("lt", o, swap=True)

    def __ge__(self, o: object) -> Sym:
        return self._binary("le", o, swap=True)

    def _logical(self, op: str, other: object) -> Sym:
        a, b = self.expr, as_expr(other)
        for side in (a, b):
            if side.kind != "bool":
                raise DeclarationError(f"`{ir.show(side)}` is not a condition: `{ir.INFIX[op]}` joins relations (comparisons)")
        return Sym(ir.make(op, a, b))

    def __and__(self, o: object) -> Sym:
        return self._logical("and", o)

    __rand__ = __and__

    def __or__(self, o: object) -> Sym:
        return self._logical("or", o)

    __ror__ = __or__

    def __invert__(self) -> Sym:
        if self.expr.kind != "bool":
            raise DeclarationError(f"`~` negates a relation; `{self!r}` is a number")
        return Sym(ir.make("not", self.expr))


class Table:
    """A runtime tensor named in a declaration (`bias: attnc.Table`); indexing it gives a symbol for one element."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Table({self.name!r})"

    def __eq__(self, o: object) -> bool:
        if self is not o:
            raise DeclarationError(f"the table `{self.name}` is compared as a whole: index it, e.g. {self.name}[attnc.HEAD]")
        return True

    def __hash__(self) -> int:
        return hash(self.name)

    def __getitem__(self, item: object) -> Sym:
        indices = tuple(as_expr(i) for i in (item if isinstance(item, tuple) else (item,)))
        for e in indices:
            if e.kind != "int":
                raise DeclarationError(f"`{self.name}[... {ir.show(e)} ...]`: a table index is an integer, this is {e.kind}")
        return Sym(ir.load(self.name, indices))


class Sizes:
    """Axis lengths of a grid: `q.size.y`, or iterate."""

    def __init__(self, axes: tuple[str, ...], exprs: tuple[ir.Expr, ...]) -> None:
        self._axes, self._exprs = axes, exprs

    def __getattr__(self, name: str) -> Sym:
        if name in self._axes:
            return Sym(self._exprs[self._axes.index(name)])
        raise DeclarationError(f"unknown axis `size.{name}`: this grid has the axes {', '.join(self._axes)}")

    def __iter__(self) -> Iterator[Sym]:
        return (Sym(e) for e in self._exprs)

    def __getitem__(self, i: int) -> Sym:
        return Sym(self._exprs[i])

    def __len__(self) -> int:
        return len(self._exprs)

    def _whole(self, _: object) -> NoReturn:
        raise DeclarationError("the sizes of a grid are compared axis by axis, e.g. q.size.y == k.size.y")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _whole
    __hash__ = None  # type: ignore[assignment]


class Point:
    """The query or the key of a declaration: `q.y`, `k.x`, `q.index`, `q.size.y`; iterating gives one coordinate per axis."""

    def __init__(
        self,
        axes: tuple[str, ...],
        coords: tuple[ir.Expr, ...],
        sizes: tuple[ir.Expr, ...],
        index: ir.Expr | None,
    ) -> None:
        self._axes, self._coords, self._sizes, self._index = axes, coords, sizes, index

    @staticmethod
    def on_grid(role: ir.Role, axes: tuple[str, ...], size_role: ir.Role) -> Point:
        """The plain point of a grid. Queries and keys on one grid share their sizes."""
        n = range(len(axes))
        sizes = tuple(ir.size(size_role, a) for a in n)
        return Point(
            axes,
            tuple(ir.coord(role, a) for a in n),
            sizes,
            ir.index(role) if len(axes) > 1 else ir.coord(role, 0),
        )

    def map(self, f: Callable[[ir.Expr, ir.Expr], tuple[ir.Expr, ir.Expr]]) -> Point:
        """A point whose (coordinate, size) pairs went through f; its flat index is spelt out in the new coordinates."""
        pairs = [f(c, n) for c, n in zip(self._coords, self._sizes, strict=True)]
        return Point(self._axes, tuple(c for c, _ in pairs), tuple(n for _, n in pairs), None)

    def only(self, axes: tuple[str, ...]) -> Point:
        """The point seen on some of its axes."""
        at = [self._axes.index(a) for a in axes]
        return Point(axes, tuple(self._coords[i] for i in at), tuple(self._sizes[i] for i in at), None)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes, slowest first."""
        return self._axes

    @property
    def size(self) -> Sizes:
        """Lengths of the axes."""
        return Sizes(self._axes, self._sizes)

    @property
    def index(self) -> Sym:
        """Row-major index on the grid."""
        if self._index is not None:
            return Sym(self._index)
        out = self._coords[0]
        for c, n in zip(self._coords[1:], self._sizes[1:], strict=True):
            out = ir.make("add", ir.make("mul", out, n), c)
        return Sym(out)

    def __iter__(self) -> Iterator[Sym]:
        return (Sym(c) for c in self._coords)

    def __len__(self) -> int:
        return len(self._coords)

    def __getitem__(self, i: int) -> Sym:
        return Sym(self._coords[i])

    def __getattr__(self, name: str) -> Sym:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._axes:
            return Sym(self._coords[self._axes.index(name)])
        raise DeclarationError(f"unknown axis `{name}`: this grid has the axes {', '.join(self._axes)} (and .index, .size)")

    def _whole(self, *_: object) -> NoReturn:
        raise DeclarationError(
            "a point is not compared as a whole: compare its coordinates, e.g. q.y == k.y, or q.index == k.index"
        )

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __sub__ = __mul__ = _whole
    __hash__ = None  # type: ignore[assignment]
