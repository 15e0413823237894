"""Functions of symbols, and the pieces a declaration returns. `attnc.min` and friends replace the builtins, which would branch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

from attnc import ir
from attnc.errors import DeclarationError
from attnc.lang.symbols import Number, Sym, as_expr, number

SCORE, HEAD, BATCH = Sym(ir.SCORE), Sym(ir.HEAD), Sym(ir.BATCH)
Value = Sym | Number


@dataclass(frozen=True)
class Statement:
    """What a pattern function returns, taken apart: relation, score and how weights are made.

    typed: tables that the relation reads have their kinds, and reals may decide (traced mods); else they hold integers.
    """

    relation: ir.Expr
    score: ir.Expr = ir.SCORE
    normalizer: ir.Normalizer = ir.SOFTMAX
    post: ir.Expr | None = None
    q_map: ir.RowMap | None = None
    k_map: ir.RowMap | None = None
    typed: bool = False


def _fold(op: str, values: tuple[Value, ...]) -> Sym:
    if len(values) < 2:
        raise DeclarationError(f"attnc.{op} takes two values or more")
    out = number(values[0], f"attnc.{op}")
    for v in values[1:]:
        out = ir.make(op, out, number(v, f"attnc.{op}"))
    return Sym(out)


def _real(op: str, x: Value) -> Sym:
    e = number(x, f"attnc.{op}")
    if e.op != "const":
        return Sym(ir.make(op, e))
    try:
        return Sym(ir.const(float(getattr(math, op)(e.args[0]))))
    except (ValueError, OverflowError) as error:
        raise DeclarationError(f"attnc.{op}({ir.show(e)}): {error}; give it a number in its domain") from error


def minimum(*values: Value) -> Sym:
    """Smallest of two or more values."""
    return _fold("min", values)


def maximum(*values: Value) -> Sym:
    """Largest of two or more values."""
    return _fold("max", values)


def clamp(value: Value, low: Value, high: Value) -> Sym:
    """min(max(value, low), high)."""
    return minimum(maximum(value, low), high)


def exp(x: Value) -> Sym:
    """e ** x."""
    return _real("exp", x)


def log(x: Value) -> Sym:
    """Natural logarithm."""
    return _real("log", x)


def tanh(x: Value) -> Sym:
    """Hyperbolic tangent (soft cap: c * tanh(SCORE / c))."""
    return _real("tanh", x)


def sqrt(x: Value) -> Sym:
    """Square root."""
    return _real("sqrt", x)


def l2norm(eps: float = 1e-12) -> ir.RowMap:
    """A row map: x / max(|x|_2, eps), for cosine attention (Swin v2)."""
    return ir.RowMap("l2norm", eps)


def rotary(base: float = 10000.0, *, interleaved: bool = False) -> ir.RowMap:
    """A row map: rotary embedding of the token's coordinates, as q_map and k_map (Su et al. 2021; on a grid each axis has channels
    of its own). Prefix tokens stay as they are.

    Of D channels each of r axes has w = 2 * (D // (2 r)), in the order of the axes; the rest stays. Pair i of an axis turns by
    coordinate * base ** (-2 i / w): channels 2 i and 2 i + 1 (interleaved), or i and i + w / 2.
    """
    if isinstance(base, bool) or not isinstance(base, int | float) or not 0 < base < math.inf:
        raise DeclarationError(f"rotary(base={base!r}): a positive number")
    if not isinstance(interleaved, bool):
        raise DeclarationError(f"rotary(interleaved={interleaved!r}): True or False")
    return ir.RowMap("rotary", base=float(base), interleaved=interleaved)


def softmax(over: Literal["keys", "queries"] = "keys", sink: object = None) -> ir.Normalizer:
    """exp(s) / sum exp(s), over keys (default) or over queries; `sink` is a Table of one extra logit per head."""
    if over not in ("keys", "queries"):
        raise DeclarationError(f"softmax(over={over!r}): either 'keys' or 'queries'")
    name = getattr(sink, "name", None)
    if sink is not None and name is None:
        raise DeclarationError(f"softmax(sink={sink!r}): a sink is a table, declared as `sink: attnc.Table`")
    return ir.Normalizer("softmax", over, name)


def sigmoid() -> ir.Normalizer:
    """1 / (1 + exp(-s)) for each allowed key, no sum."""
    return ir.Normalizer("sigmoid")


def relu(power: int = 1) -> ir.Normalizer:
    """max(s, 0) ** power for each allowed key, no sum."""
    if not isinstance(power, int) or isinstance(power, bool) or power < 1:
        raise DeclarationError(f"relu(power={power!r}): a positive integer")
    return ir.Normalizer("relu", power=power)


@overload
def where(
    condition: Sym,
    value: Value,
    /,
    *,
    normalizer: ir.Normalizer | None = None,
    post: Value | None = None,
    q_map: ir.RowMap | None = None,
    k_map: ir.RowMap | None = None,
) -> Statement: ...
@overload
def where(condition: Sym, value: Value, other: Value, /) -> Sym: ...
def where(
    condition: Sym,
    value: Value,
    other: Value | None = None,
    /,
    *,
    normalizer: ir.Normalizer | None = None,
    post: Value | None = None,
    q_map: ir.RowMap | None = None,
    k_map: ir.RowMap | None = None,
) -> Statement | Sym:
    """Two uses. where(relation, score, normalizer=, post=, q_map=, k_map=): what a pattern returns.

    where(condition, a, b): the value a or b, inside a score or a coordinate expression.
    """
    test = as_expr(condition)
    if test.kind != "bool":
        raise DeclarationError(f"attnc.where: `{ir.show(test)}` is not a condition but {test.kind}; compare it with something")
    if other is not None:
        yes, no = as_expr(value), as_expr(other)
        if (yes.kind == "bool") != (no.kind == "bool"):
            raise DeclarationError(
                f"attnc.where: `{ir.show(yes)}` and `{ir.show(no)}` are a condition and a number: give two alike"
            )
        return Sym(ir.make("where", test, yes, no))
    weight = None if post is None else number(post, "post=")
    q_map, k_map = (m() if callable(m) else m for m in (q_map, k_map))  # attnc.l2norm means attnc.l2norm()
    normalizer = normalizer() if callable(normalizer) else normalizer
    if not isinstance(normalizer, ir.Normalizer | None):
        raise DeclarationError(f"attnc.where(normalizer={normalizer!r}): attnc.softmax(), attnc.sigmoid() or attnc.relu()")
    for name, m in (("q_map", q_map), ("k_map", k_map)):
        if not isinstance(m, ir.RowMap | None):
            raise DeclarationError(f"attnc.where({name}={m!r}): attnc.l2norm() or attnc.rotary()")
    return Statement(test, as_expr(value), normalizer or ir.SOFTMAX, weight, q_map, k_map)
