"""A flat index that falls into digits: the rewritten expression has the same value at every index, whatever was found."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import strategies as draws
from hypothesis import given
from hypothesis import strategies as st

from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.analysis.lift import Digits, chains, grid_of
from attnc.ir import Expr, make

Q, K = ir.coord("q", 0), ir.coord("k", 0)


def num(n: int) -> Expr:
    return ir.const(n)


def div(e: Expr, n: int) -> Expr:
    return make("floordiv", e, num(n))


def mod(e: Expr, n: int) -> Expr:
    return make("mod", e, num(n))


def values(e: Expr, leaves: dict[Expr, object], shape: tuple[int, int]) -> np.ndarray:  # type: ignore[type-arg]
    with np.errstate(divide="ignore"):
        return np.broadcast_to(evaluate(e, leaves, np), shape)


def same(e: Expr, chain: tuple[int, ...], n_q: int, n_k: int) -> Expr:
    """The rewritten expression, after a look at every pair."""
    grids = {"q": grid_of(n_q, chain), "k": grid_of(n_k, chain)}
    new = Digits(chain, grids).rewrite(e)  # type: ignore[arg-type]
    q, k = np.arange(n_q)[:, None], np.arange(n_k)[None]
    leaves: dict[Expr, object] = {}
    for role, flat in (("q", q), ("k", k)):
        for axis, c in enumerate(np.unravel_index(flat, grids[role])):
            leaves[ir.coord(role, axis)] = c  # type: ignore[arg-type]
    assert np.array_equal(values(new, leaves, (n_q, n_k)), values(e, {Q: q, K: k}, (n_q, n_k))), ir.show(new)
    return new


@pytest.mark.parametrize(
    ("e", "shown"),
    [
        (div(Q, 8), "q.y"),
        (mod(Q, 8), "q.x"),
        (make("sub", div(Q, 8), div(K, 8)), "q.y - k.y"),
        (div(div(Q, 8), 3), "q.y // 3"),
        (mod(div(Q, 8), 3), "q.y % 3"),
        (div(mod(Q, 8), 3), "q.x // 3"),
        (make("add", make("mul", div(Q, 8), num(8)), mod(Q, 8)), "q.y * 8 + q.x"),
        (make("sub", Q, make("mul", div(Q, 8), num(8))), "q.x"),
        (div(make("add", Q, num(16)), 8), "q.y + 2"),
        (mod(make("add", Q, num(3)), 8), "(q.x + 3) % 8"),
        (div(make("add", Q, num(3)), 8), "q.y + (q.x + 3) // 8"),
        (make("abs", make("sub", mod(Q, 8), mod(K, 8))), "abs(q.x - k.x)"),
        (Q, "q.y * 8 + q.x"),
    ],
)
def test_digits(e: Expr, shown: str) -> None:
    assert ir.show(same(e, (8,), 48, 48), ("y", "x")) == shown
    same(e, (8,), 16, 48)


def test_three_digits() -> None:
    e = make("add", make("mul", mod(div(Q, 4), 3), num(100)), make("add", div(Q, 12), mod(mod(K, 12), 4)))
    assert ir.show(same(e, (4, 12), 48, 24), ("t", "y", "x")) == "q.y * 100 + q.t + k.x"
    assert ir.show(same(div(mod(Q, 12), 4), (4, 12), 48, 48), ("t", "y", "x")) == "q.y"


def test_chains_are_found() -> None:
    assert chains([div(Q, 8), mod(K, 8)], (48, 16)) == [(8,)]
    assert chains([div(Q, 12), mod(div(Q, 4), 3)], (48, 48)) == [(4, 12)]
    assert chains([div(Q, 12), div(mod(K, 12), 4)], (48, 48)) == [(12,), (4, 12)]
    assert chains([mod(div(Q, 4), 3)], (48, 48)) == [(4,), (4, 12)]
    assert chains([div(Q, 5)], (48, 48)) == []  # 5 does not divide 48
    assert chains([div(Q, 8)], (48, 20)) == []
    assert chains([div(Q, 8), mod(Q, 3)], (48, 48)) == []
    assert chains([div(Q, 2), div(Q, 4), div(Q, 8)], (48, 48)) == []  # more axes than there are names for
    assert chains([Q, mod(Q, 1), div(Q, 100)], (48, 48)) == []
    assert chains([div(Q, -2)], (48, 48)) == []


def expressions(depth: int) -> st.SearchStrategy[Expr]:
    leaf = st.sampled_from([Q, K, ir.HEAD]) | st.integers(-9, 9).map(num)
    if depth == 0:
        return leaf
    inner = expressions(depth - 1)
    divisor = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]).map(num)
    return st.one_of(
        inner,
        st.builds(make, st.sampled_from(["add", "sub", "mul", "min", "max"]), inner, inner),
        st.builds(make, st.sampled_from(["floordiv", "mod"]), inner, divisor),
        st.builds(make, st.sampled_from(["neg", "abs"]), inner),
        st.builds(lambda a, b, c, d: make("where", make("lt", a, b), c, d), inner, inner, inner, inner),
    )


@draws.examples(300)
@given(expressions(4), st.sampled_from([(4,), (6,), (4, 12), (3, 6), (2, 24)]), st.sampled_from([24, 48, 72]))
def test_random_expressions(e: Expr, chain: tuple[int, ...], n_k: int) -> None:
    e = ir.substitute(e, {ir.HEAD: num(5)})
    same(e, chain, 48, n_k)


def test_every_number_of_one_index() -> None:
    for inner, outer, offset in product((1, 2, 3, 4, 5, 8), (2, 3, 4, 8), range(-5, 6)):
        shifted = make("add", Q, num(offset))
        for e in (div(div(shifted, inner), outer), mod(div(shifted, inner), outer), div(mod(shifted, outer), inner)):
            same(e, (8,), 24, 8)


def test_a_grid_holds_what_its_index_counts() -> None:
    assert grid_of(48, (4,)) == (12, 4)
    assert grid_of(48, (4, 12)) == (4, 3, 4)


def test_reals_have_no_digits() -> None:
    """2.0 * s is no multiple of 2.0."""
    twice = make("mul", ir.SCORE, ir.const(2.0))
    for op in ("floordiv", "mod"):
        new = Digits((4,), {"q": (6, 4), "k": (6, 4)}).rewrite(make(op, twice, ir.const(2.0)))
        assert evaluate(new, {ir.SCORE: 0.75}, np) == evaluate(make(op, twice, ir.const(2.0)), {ir.SCORE: 0.75}, np)
