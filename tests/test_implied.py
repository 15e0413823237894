"""Conditions on several axes bound each of them: what is implied holds wherever the condition does, and tiles shrink to it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnc
from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.analysis.implied import implied, never_negative, split
from attnc.analysis.structure import analyse
from attnc.schedule.geometry import geometry

DY, DX = (ir.make("sub", ir.coord("q", a), ir.coord("k", a)) for a in (0, 1))


def everywhere(side: int = 6) -> dict[ir.Expr, np.ndarray]:
    n = np.arange(side)
    axes = np.meshgrid(n, n, n, n, indexing="ij")
    return dict(zip((ir.coord(r, a) for r, a in itertools.product("qk", (0, 1))), axes, strict=True))


def terms(axis: int) -> st.SearchStrategy[ir.Expr]:
    d = (DY, DX)[axis]
    simple = [ir.make("abs", d), ir.make("mul", d, d), d, ir.make("neg", d), ir.coord("k", axis), ir.make("mod", d, ir.const(3))]
    return st.sampled_from([*simple, ir.make("floordiv", ir.coord("q", axis), ir.const(2))])


def scaled(e: st.SearchStrategy[ir.Expr]) -> st.SearchStrategy[ir.Expr]:
    return st.builds(lambda n, t: ir.make("mul", ir.const(n), t), st.integers(-2, 4), e)


sums = st.builds(
    lambda a, b, op, c: ir.make(op, ir.make("add", a, b), ir.const(c)),
    scaled(terms(0)),
    scaled(terms(1)),
    st.sampled_from(["add", "sub", "min", "max"]),
    st.integers(-4, 30),
)


def compared(op: str, a: ir.Expr, c: int, turn: bool, negate: bool) -> ir.Expr:
    e = ir.make(op, ir.const(c), a) if turn else ir.make(op, a, ir.const(c))
    return ir.make("not", e) if negate else e


operators = st.sampled_from(["lt", "le", "eq", "ne"])
conditions = st.builds(compared, operators, sums, st.integers(-6, 30), st.booleans(), st.booleans())


@settings(max_examples=300, deadline=None)
@given(conditions)
def test_what_is_implied_holds_wherever_the_condition_does(c: ir.Expr) -> None:
    at = everywhere()
    holds = np.broadcast_to(evaluate(c, at, np), (6,) * 4)
    for axis, e in implied(c):
        assert {n.args[1] for n in ir.walk(e) if n.op == "coord"} == {axis}
        assert np.broadcast_to(evaluate(e, at, np), holds.shape)[holds].all(), f"{ir.show(c)} does not imply {ir.show(e)}"
    parts = [np.broadcast_to(evaluate(p, at, np), holds.shape) for p in split(c)]
    assert (np.logical_and.reduce(parts) == holds).all()


@settings(max_examples=200, deadline=None)
@given(sums)
def test_never_negative_is_never_wrong(e: ir.Expr) -> None:
    assert not never_negative(e) or np.all(np.asarray(evaluate(e, everywhere(), np)) >= 0)


@attnc.pattern
def disk(q, k, *, radius):
    dy, dx = q.y - k.y, q.x - k.x
    return dy * dy + dx * dx <= radius * radius


@attnc.pattern
def ellipse(q, k):
    return 4 * (q.y - k.y) * (q.y - k.y) + 9 * ((q.x - k.x) * (q.x - k.x)) < 37


@attnc.pattern
def diamond(q, k):
    return ~(abs(q.y - k.y) + 2 * abs(q.x - k.x) > 4)


@attnc.pattern
def ring(q, k):
    distance = (q.y - k.y) * (q.y - k.y) + (q.x - k.x) * (q.x - k.x)
    return (distance <= 17) & (distance >= 4) & ((q.y - k.y) % 2 == 0)


@attnc.pattern
def chebyshev(q, k):
    return attnc.max(abs(q.y - k.y), abs(q.x - k.x)) <= 2


@attnc.pattern
def frame(q, k):
    return abs(q.y - k.y) + abs(q.x - k.x) == 3


BOUND = {
    "disk": (disk(radius=3), 3, 3),
    "diamond": (diamond(), 4, 2),
    "ring": (ring(), 4, 4),
    "frame": (frame(), 3, 3),
    "chebyshev": (chebyshev(), 2, 2),
}


@pytest.mark.parametrize("name", BOUND)
def test_axes_are_bound(name: str) -> None:
    pattern, *reach = BOUND[name]
    program = attnc.compile(pattern, grid=(24, 24)).program(2)
    s = analyse(program.attend, True)
    assert s.strategy == "banded"
    assert (s.residual == ir.TRUE) == (name == "chebyshev")  # a maximum of distances is a box, exactly
    g = geometry(program, (24, 24), (24, 24))
    assert g.allowed() == int(attnc.mask(pattern, grid=(24, 24)).sum())
    for axis, n in zip(g.axes, reach, strict=True):
        assert int((axis.hi - axis.lo).max()) * axis.split == 2 * n


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("pattern", [disk(radius=2), ellipse(), diamond(), ring()], ids=lambda p: p.name)
def test_backends_agree_with_the_meaning(pattern: attnc.Pattern, backend: str) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(1, 2, 63, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(1, 2, 63, 8, dtype=torch.float64)
    outs = [run(*rows) for run in (attnc.reference(pattern, grid=(7, 9)), attnc.compile(pattern, grid=(7, 9), backend=backend))]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-10, atol=1e-12)
    first, second = (torch.autograd.grad(o, rows, weight) for o in outs)
    torch.testing.assert_close(second, first, rtol=1e-10, atol=1e-12)


def test_explain_says_where_a_bound_comes_from() -> None:
    text = attnc.explain(disk(radius=3), grid=(28, 28))
    assert "abs(q.y - k.y) <= 3, which follows from what no axis explains" in text
    assert "evaluated for each pair a tile visits" in text
