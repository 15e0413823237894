"""Geometry at concrete sizes: per axis, O(axis length), and exactly what the statement says over whole grids."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import strategies as draws
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnc
from attnc import ShapeError, ir, patterns
from attnc.schedule import bounds
from attnc.schedule.geometry import Geometry, geometry

Grid = tuple[int, ...]


def made(p: attnc.Pattern, grid: Grid, pad: tuple[tuple[int, int], ...] | None = None, prefix: int = 0) -> Geometry:
    tokens = ir.Tokens((None,) * len(grid), prefix, pad)
    return geometry(ir.Program(p.trace(ir.AXES[len(grid)]), tokens, tokens), grid, grid)


def lattice(shape: Grid) -> np.ndarray[Any, Any]:
    return np.stack([c.ravel() for c in np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")])


def whole(g: Geometry, heads: int = 1) -> np.ndarray[Any, Any]:
    """The mask over real queries and all, also virtual, keys."""
    q = lattice(tuple(a.queries for a in g.axes))
    real = np.ones(q.shape[1], bool)
    for c, a in zip(q, g.axes, strict=True):
        real &= (c >= a.before_queries) & (c < a.before_queries + a.real_queries)
    return g.mask(q[:, real], lattice(tuple(a.keys for a in g.axes)), heads)


grids = st.sampled_from((1, 2, 2, 2, 3)).flatmap(
    lambda rank: st.tuples(draws.patterns(rank), st.tuples(*[st.integers(1, {1: 40, 2: 8, 3: 4}[rank])] * rank))
)


@draws.examples(60)
@given(grids)
def test_the_algebra_on_whole_grids(drawn: tuple[attnc.Pattern, Grid]) -> None:
    """Ends, splits and residual make the statement's own mask; its count is the count; the tiles' rows cover it."""
    p, grid = drawn
    g = made(p, grid)
    if g.attend.int_tables:
        with pytest.raises(ShapeError, match="reads runtime tables"):
            g.allowed()
        return
    truth = attnc.mask(p, grid=grid, heads=3).numpy()
    assert np.array_equal(whole(g, 3), truth)
    assert g.allowed(3) == truth.sum()
    seen = sum(int(g.mask(q, k, 3).sum()) for q, k in g.query_rows())
    assert seen == truth.sum()


@draws.examples(40)
@given(st.tuples(draws.patterns(2), *[st.integers(1, 5)] * 2, *[st.integers(0, 3)] * 4))
def test_padding_evaluates_the_statement_on_the_extended_grid(drawn: tuple[Any, ...]) -> None:
    p, y, x, *pads = drawn
    pad = ((pads[0], pads[1]), (pads[2], pads[3]))
    g = made(p, (y, x), pad)
    if g.attend.int_tables:
        return
    extended = (y + pads[0] + pads[1], x + pads[2] + pads[3])
    truth = attnc.mask(p, grid=extended).view(1, *extended, -1)
    truth = truth[:, pads[0] : pads[0] + y, pads[2] : pads[2] + x].reshape(1, y * x, -1)
    assert np.array_equal(whole(g), truth.numpy())
    assert g.allowed() == truth.sum()
    assert g.padded == (any(pads))


@pytest.mark.parametrize("p", [patterns.window(7), patterns.neighborhood(7), patterns.causal(), patterns.grid(7), patterns.full()])
def test_counts_at_sizes_nobody_can_list(p: attnc.Pattern) -> None:
    """Products over axes of sums along one axis: 10^12 pairs counted at once, each count being an exact integer."""
    one = made(p, (1001,)).allowed() if p.name != "full()" else 1001**2
    both = made(p, (1001, 1001)).allowed(12)
    assert both == 12 * one * one
    assert 0 < both <= 12 * 1001**4


def test_flat_statements_are_one_axis() -> None:
    g = made(attnc.pattern(lambda q, k: q.index >= k.index)(), (30, 40))
    assert len(g.axes) == 1
    assert g.allowed() == 1200 * 1201 // 2
    padded = made(attnc.pattern(lambda q, k: q.index >= k.index)(), (3, 4), ((0, 1), (0, 0)))
    assert len(padded.axes) == 2  # virtual rows keep the axes apart


def test_prefix_tokens_see_and_are_seen() -> None:
    g = made(patterns.window(2), (4, 4), prefix=3)
    assert g.n_queries == g.n_keys == 19
    assert g.allowed(2) == 2 * (16 * 4 + 3 * 19 + 16 * 3)


def test_building_a_map_takes_memory_of_the_axes_not_of_the_pairs() -> None:
    """FlexAttention's block mask of such a grid is a dense tensor of 4 * 10^10 elements."""
    grid = (450, 450)
    made(patterns.neighborhood(7, 2), (8, 8))  # sympy's own caches are not the map
    tracemalloc.start()
    g = made(patterns.neighborhood(13, 2), grid)
    assert g.allowed() == 5850**2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_long_axes_without_a_form_stay_a_predicate() -> None:
    """Beyond the longest table an axis whose ends resist a closed form is full, and its predicate is evaluated in tiles."""
    p = attnc.pattern(lambda q, k: (q.x - k.x) * (q.x - k.x) <= 4)()
    g = made(p, (5000,))
    assert int(g.axes[0].lo.max()) == 0
    assert g.allowed() == 5000 * 5 - 6
    short = made(p, (50,))
    assert (short.axes[0].hi - short.axes[0].lo).max() == 4


@pytest.mark.parametrize("n", [1, 5, 12])
@pytest.mark.parametrize(
    "p",
    [
        patterns.neighborhood(3, 2),
        patterns.window(4, shift=1),
        patterns.neighborhood(5, stride=3),
        patterns.causal(),
        patterns.full(),
    ],
    ids=str,
)
def test_inverse_ends_are_the_transposed_map(p: attnc.Pattern, n: int) -> None:
    """Of each key of each residue class, and of no more keys than there are."""
    a = made(p, (n,)).axes[0]
    assert a.inverse_lo.shape == a.inverse_hi.shape == (a.split, -(-n // a.split))
    for r in range(a.classes):
        queries, keys = (range(a.count(length, r)) for length in (a.queries, a.keys))
        for i in keys:
            seen_by = [j for j in queries if a.lo[r, j] <= i <= a.hi[r, j]]
            found = list(range(a.inverse_lo[r, i], a.inverse_hi[r, i] + 1))
            assert found == seen_by


def test_tightened_ends_are_monotone_and_hold_every_key() -> None:
    p = attnc.pattern(lambda q, k: (q.x * q.x // 9 == k.x * k.x // 9) | (k.x == 0))()
    for n in (1, 5, 17, 40):
        a = made(p, (n,)).axes[0]
        truth = attnc.mask(p, grid=(n,))[0].numpy()
        assert (np.diff(a.lo[0]) >= 0).all()
        assert (np.diff(a.hi[0]) >= 0).all()
        i = np.arange(n)[None]
        assert (truth <= ((a.lo[0][:, None] <= i) & (i <= a.hi[0][:, None]))).all()


def test_a_grid_of_another_rank_is_refused() -> None:
    tokens = ir.Tokens((None, None))
    program = ir.Program(patterns.window(2).trace(("y", "x")), tokens, tokens)
    with pytest.raises(ShapeError, match=r"window\(2\): grid \(4,\) has 1 axes, the pattern was traced on 2"):
        geometry(program, (4,), (4,))


# --------------------------------------------------------------------------------------------------------------------- ranges
@draws.examples(80)
@given(st.lists(draws.conditions(1), min_size=0, max_size=2), st.integers(1, 12), st.integers(0, 9), st.integers(1, 4))
def test_ranges_hold_every_value_and_tight_ones_are_attained(terms: list[Any], n: int, kind: int, s: int) -> None:
    def index(q: Any, k: Any) -> Any:
        return (
            lambda: q.x - k.x,
            lambda: (q.x - k.x) % s,
            lambda: q.x // s - k.x // s,
            lambda: abs(q.x - k.x) * s,
            lambda: attnc.min(q.x, s) + attnc.max(k.x, s),
            lambda: q.x * k.x,
            lambda: q.x % s * s + k.x % s,
            lambda: -k.x // s,
            lambda: q.size.x - k.x + attnc.HEAD,
            lambda: attnc.where(q.x > k.x, q.x, -k.x),
        )[kind]()

    def body(q: Any, k: Any, *, t: attnc.Table) -> Any:
        relation = k.x >= 0
        for term in terms:
            relation = relation & term(q, k)
        return attnc.where(relation, attnc.SCORE + t[index(q, k)])

    def indexed(q: Any, k: Any) -> Any:
        return index(q, k) == v

    p = attnc.pattern(body)()
    g = made(p, (n,))
    box = bounds.Box(g, 2, 1)
    e = next(iter(bounds._loads(ir.flatten_index(g.attend.score, 1, True))))[0].children[0]
    found = box.of(e, ir.conjuncts(g.structure.residual))
    truth = attnc.mask(p, grid=(n,), heads=2)
    q, k, h = torch.arange(n)[None, :, None], torch.arange(n)[None, None], torch.arange(2)[:, None, None]
    leaves = {ir.coord("q", 0): q, ir.coord("k", 0): k, ir.HEAD: h, ir.size("q", 0): n}
    values = torch.as_tensor(_evaluate(e, leaves)).expand(2, n, n)[truth]
    for v in values.unique().tolist():
        assert v in found
    if found.tight and found.low <= found.high and not terms:
        assert {found.low, found.high} <= set(values.tolist())


def _evaluate(e: ir.Expr, leaves: dict[ir.Expr, Any]) -> Any:
    from attnc.analysis.evaluate import evaluate

    return evaluate(e, leaves, torch)


JOINS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
JOINS |= {"floordiv": np.floor_divide, "mod": np.mod}


@pytest.mark.parametrize("op", JOINS)
@draws.examples(30)
@given(st.tuples(*[st.integers(-5, 5)] * 4))
def test_ranges_of_what_joins_two_axes(op: str, numbers: tuple[int, ...]) -> None:
    """Sums, products and bounds of what reads one axis each: the very ends. Of quotients and remainders: none is outside."""
    a, b, c, d = numbers
    y, x = (a * np.arange(3) + b)[:, None], (c * np.arange(4) + d)[None]
    if op in ("floordiv", "mod") and (x == 0).any():
        return  # refused
    parts = [
        ir.make("add", ir.make("mul", ir.const(n), coord), ir.const(more))
        for n, coord, more in ((a, ir.coord("q", 0), b), (c, ir.coord("k", 1), d))
    ]
    found = bounds.Box(made(patterns.window(9), (3, 4)), 1, 1).of(ir.make(op, *parts))
    values = JOINS[op](y, x)
    if op in ("floordiv", "mod"):
        assert found.low <= values.min() and values.max() <= found.high
    else:
        assert (found.low, found.high) == (values.min(), values.max())
