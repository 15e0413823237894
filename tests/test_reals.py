"""Reals of a score: functions have the values of `math`, derivatives those of torch's autograd, by each thing they read."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from attnc import ir
from attnc.analysis.derivative import derivative
from attnc.analysis.evaluate import evaluate
from attnc.ir import SCORE, Expr, make

FUNCTIONS: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "abs": abs,
    "neg": lambda x: -x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_those_of_mathematics(name: str) -> None:
    """Of Python's numbers, and of arrays of numpy and torch."""
    points = [x for x in (-2.5, -0.25, 0.3, 1.0, 4.0) if x > 0 or name not in ("log", "sqrt")]
    truth = [FUNCTIONS[name](x) for x in points]
    e = make(name, SCORE)
    assert [evaluate(e, {SCORE: x}, np) for x in points] == pytest.approx(truth)
    assert evaluate(e, {SCORE: np.array(points)}, np) == pytest.approx(np.array(truth))
    assert evaluate(e, {SCORE: torch.tensor(points, dtype=torch.float64)}, torch).tolist() == pytest.approx(truth)


ENTRY = ir.load("t", (ir.coord("q", 0),), "real")
LESS = make("add", make("mul", SCORE, ENTRY), ir.const(0.5))  # both operands of what has two read both
MORE = make("sub", make("mul", ENTRY, ENTRY), SCORE)
EXPRESSIONS: dict[str, Expr] = {
    **{op: make(op, LESS, MORE) for op in ("add", "sub", "mul", "truediv", "min", "max")},
    **{op: make(op, LESS) for op in FUNCTIONS},
    "where": make("where", make("lt", SCORE, ENTRY), make("mul", LESS, MORE), make("neg", MORE)),
    "nested": make("exp", make("neg", make("abs", make("truediv", LESS, make("add", make("mul", MORE, MORE), ir.const(1.0)))))),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_derivatives_are_those_of_autograd(name: str) -> None:
    s = torch.tensor([0.3, 1.1, 2.7, 4.9, 0.8], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([2.2, 0.4, 1.3, 0.7, 0.85], dtype=torch.float64, requires_grad=True)

    def value(e: Expr) -> torch.Tensor:
        found = evaluate(e, {SCORE: s, ir.coord("q", 0): torch.arange(5)}, torch, lambda _, at: t[at[0]])
        return torch.as_tensor(found, dtype=torch.float64).expand(5)

    e = EXPRESSIONS[name]
    truth = torch.autograd.grad(value(e).sum(), (s, t))
    for wrt, exact in zip((SCORE, ENTRY), truth, strict=True):
        torch.testing.assert_close(value(derivative(e, wrt)), exact, rtol=1e-12, atol=1e-12)


def test_what_is_flat_has_no_slope() -> None:
    assert derivative(make("floor", LESS), SCORE) == ir.const(0.0)
    assert derivative(ENTRY, SCORE) == derivative(make("abs", ir.coord("q", 0)), SCORE) == ir.const(0.0)
    assert evaluate(derivative(make("abs", SCORE), SCORE), {SCORE: 0.0}, np) == 0.0
