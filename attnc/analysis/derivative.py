"""Derivatives of a score with respect to SCORE or to one table element, as expressions of the same IR."""

from __future__ import annotations

from functools import lru_cache

from attnc import ir
from attnc.ir import Expr, make

NONE, UNIT = ir.const(0.0), ir.const(1.0)


def _is(e: Expr, value: float) -> bool:
    return e.op == "const" and e.kind != "bool" and bool(e.args[0] == value)


def _add(a: Expr, b: Expr) -> Expr:
    return b if _is(a, 0) else a if _is(b, 0) else make("add", a, b)


def _sub(a: Expr, b: Expr) -> Expr:
    return a if _is(b, 0) else _neg(b) if _is(a, 0) else make("sub", a, b)


def _neg(a: Expr) -> Expr:
    return NONE if _is(a, 0) else a.args[0] if a.op == "neg" else make("neg", a)


def _mul(a: Expr, b: Expr) -> Expr:
    if _is(a, 0) or _is(b, 0):
        return NONE
    return b if _is(a, 1) else a if _is(b, 1) else make("mul", a, b)


def _div(a: Expr, b: Expr) -> Expr:
    return NONE if _is(a, 0) else a if _is(b, 1) else make("truediv", a, b)


def _where(test: Expr, yes: Expr, no: Expr) -> Expr:
    return yes if yes == no else make("where", test, yes, no)


@lru_cache(maxsize=1024)
def derivative(score: Expr, wrt: Expr) -> Expr:
    """d score / d wrt over the reals, where wrt is ir.SCORE or one load node of the score.

    Each place where wrt occurs counts. At a kink (abs, min, max, where) it is the slope of the branch that the
    expression takes; abs has slope 0 at 0.
    """
    if score == wrt:
        return UNIT
    if score.kind != "real" or not any(n == wrt for n in ir.walk(score)):
        return NONE
    a = score.args
    match score.op:
        case "add":
            return _add(derivative(a[0], wrt), derivative(a[1], wrt))
        case "sub":
            return _sub(derivative(a[0], wrt), derivative(a[1], wrt))
        case "neg":
            return _neg(derivative(a[0], wrt))
        case "mul":
            return _add(_mul(derivative(a[0], wrt), a[1]), _mul(a[0], derivative(a[1], wrt)))
        case "truediv":
            return _div(_sub(derivative(a[0], wrt), _mul(score, derivative(a[1], wrt))), a[1])
        case "min":
            return _where(make("lt", a[0], a[1]), derivative(a[0], wrt), derivative(a[1], wrt))
        case "max":
            return _where(make("lt", a[1], a[0]), derivative(a[0], wrt), derivative(a[1], wrt))
        case "where":
            return _where(a[0], derivative(a[1], wrt), derivative(a[2], wrt))
        case "load":  # indices are integers
            return NONE
    x = derivative(a[0], wrt)
    match score.op:
        case "abs":
            return _where(make("lt", a[0], NONE), _neg(x), _where(make("lt", NONE, a[0]), x, NONE))
        case "exp":
            return _mul(x, score)
        case "log":
            return _div(x, a[0])
        case "sqrt":
            return _div(x, make("mul", ir.const(2.0), score))
        case "tanh":
            return _mul(x, make("sub", UNIT, make("mul", score, score)))
        case "sigmoid":
            return _mul(x, make("mul", score, make("sub", UNIT, score)))
    raise AssertionError(score.op)


def loads(e: Expr) -> tuple[Expr, ...]:
    """The real table elements that an expression reads, each once, in order of first use."""
    return tuple(dict.fromkeys(n for n in ir.walk(e) if n.op == "load" and n.kind == "real"))


def learned(a: ir.Attend) -> tuple[str, ...]:
    """The tables that get a gradient: those that weights have a slope in. What only decides conditions has none."""
    spoken = [e for e in (a.score, a.post) if e is not None]
    names = {n.args[0] for e in spoken for n in loads(e) if derivative(e, n) != NONE}
    return tuple(t for t in a.tables if t in names or t == a.normalizer.sink)
