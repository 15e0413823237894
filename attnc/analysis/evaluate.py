"""Evaluate an expression on arrays: numpy for geometry, torch for the meaning. One walk, the operators do the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from attnc import ir
from attnc.analysis.dropout import mix, philox

WHOLE = 1 << 30  # floor stops here, on either side, so that its integers fit 32 bits wherever it is computed
Load = Callable[[str, tuple[Any, ...]], Any]


def evaluate(
    e: ir.Expr,
    leaves: Mapping[ir.Expr, Any],
    xp: Any,
    load: Load | None = None,
    real: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of e. `leaves` maps coord, size, head, batch, score, var nodes to numbers or broadcastable arrays of module xp.

    real: makes reals of an array of integers that meets them; torch by itself would take 32 bits.
    """
    memo: dict[ir.Expr, Any] = {}

    def go(n: ir.Expr) -> Any:
        if n not in memo:
            memo[n] = step(n)
        return memo[n]

    def step(n: ir.Expr) -> Any:
        if n.op == "const":
            return n.args[0]
        if n.op in ir.LEAVES:
            return leaves[n]
        a = [go(c) for c in n.children]
        if real is not None and (n.kind == "real" or any(c.kind == "real" for c in n.children)) and n.op != "load":
            a = [real(x) if c.kind == "int" and not _plain(x) else x for x, c in zip(a, n.children, strict=True)]
        if n.op == "load":
            if load is None:
                raise KeyError(n.args[0])
            return load(n.args[0], tuple(a))
        return _apply(n.op, a, xp)

    return go(e)


def _plain(x: Any) -> bool:
    return isinstance(x, int | float | bool)


def _apply(op: str, a: list[Any], xp: Any) -> Any:
    match op:
        case "add":
            return a[0] + a[1]
        case "sub":
            return a[0] - a[1]
        case "mul":
            return a[0] * a[1]
        case "floordiv":
            return a[0] // a[1]
        case "mod":
            return a[0] % a[1]
        case "truediv":
            return a[0] / a[1]
        case "neg":
            return -a[0]
        case "abs":
            return abs(a[0])
        case "eq":
            return a[0] == a[1]
        case "ne":
            return a[0] != a[1]
        case "lt":
            return a[0] < a[1]
        case "le":
            return a[0] <= a[1]
        case "and":
            return a[0] & a[1]
        case "or":
            return a[0] | a[1]
        case "not":
            return (not a[0]) if isinstance(a[0], bool) else ~a[0]
        case "min" | "max":
            if _plain(a[0]) and _plain(a[1]):
                return min(a) if op == "min" else max(a)
            return xp.where(a[0] < a[1] if op == "min" else a[0] > a[1], a[0], a[1])
        case "where":
            return (a[1] if a[0] else a[2]) if _plain(a[0]) else xp.where(a[0], a[1], a[2])
        case "floor":
            return _floor(a[0], xp)
        case "philox":
            return philox(*a)
        case "mix":
            return mix(*a)
    if _plain(a[0]):  # the functions of torch refuse Python numbers
        return 1 / (1 + math.exp(-a[0])) if op == "sigmoid" else getattr(math, op)(a[0])
    return 1 / (1 + xp.exp(-a[0])) if op == "sigmoid" else getattr(xp, op)(a[0])


def _floor(x: Any, xp: Any) -> Any:
    """The integer at or below x, from -WHOLE to WHOLE; of what is no number, -WHOLE."""
    if _plain(x):
        return -WHOLE if not x >= -WHOLE else WHOLE if x >= WHOLE else math.floor(x)
    inside = xp.where(x >= -WHOLE, xp.where(x <= WHOLE, xp.floor(x), float(WHOLE)), float(-WHOLE))
    return inside.to(xp.int64) if hasattr(inside, "to") else inside.astype(xp.int64)
