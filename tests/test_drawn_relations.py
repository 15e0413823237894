"""Relations that nobody wrote: drawn conditions on coordinates, sizes of any axis, `index` and the head, held to the meaning; and
those of them that once broke, by name, on every backend."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import strategies as draws
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Problem, hold

import attnc
from attnc.compiler import has_compiler


def number(r: random.Random, q: Any, k: Any, depth: int) -> Any:
    """An integer of the language, or of Python."""
    if depth == 0:
        p = r.choice((q, k))
        kinds: list[Callable[[], Any]] = [
            lambda: r.choice(list(p)),
            lambda: r.choice(list(p)),
            lambda: r.choice(list(p.size)),
            lambda: p.index,
            lambda: attnc.HEAD,
            lambda: r.randint(-2, 7),
        ]
        return r.choice(kinds)()
    a, b = number(r, q, k, depth - 1), number(r, q, k, depth - 1) if r.random() < 0.5 else r.randint(1, 4)
    steps: list[Callable[[], Any]] = [
        lambda: a + b,
        lambda: a - b,
        lambda: a * r.randint(-2, 3),
        lambda: a // r.randint(1, 4),
        lambda: a % r.randint(1, 5),
        lambda: abs(a),
        lambda: attnc.min(a, b),
        lambda: attnc.max(a, b),
    ]
    return r.choice(steps)()


def condition(r: random.Random, q: Any, k: Any, depth: int) -> Any:
    """A condition; a coordinate stands on its left side, so that it is none of Python's."""
    if depth and r.random() < 0.6:
        a, b = condition(r, q, k, depth - 1), condition(r, q, k, depth - 1)
        return r.choice((a & b, a & b, a | b, a & ~b))
    x, y = number(r, q, k, r.randint(0, 2)) + r.choice(list(r.choice((q, k)))), number(r, q, k, r.randint(0, 2))
    return r.choice((x <= y, x < y, x >= y, x == y, x != y, abs(x - y) <= 2))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    r = random.Random(draw(st.integers(0, 2**32)))
    rank = r.choice((1, 2, 2, 3))
    most = {1: 17, 2: 7, 3: 4}[rank]
    grid, kv_grid = (tuple(r.randint(1, most) for _ in range(rank)) for _ in range(2))
    seed = r.random()

    @attnc.pattern
    def drawn(q: Any, k: Any) -> Any:
        inner = random.Random(seed)
        relation = condition(inner, q, k, 2)
        return attnc.where(relation, attnc.SCORE * (1 + 0.1 * number(inner, q, k, 1)))

    return Problem(
        drawn(),
        grid,
        kv_grid=kv_grid if r.random() < 0.35 else None,
        pad=tuple((r.randint(0, 2), r.randint(0, 2)) for _ in range(rank)) if r.random() < 0.3 else None,
        prefix=r.choice((0, 0, 1, 2)),
        heads=r.choice((2, 4)),
        batch=1,
        dtype=torch.float64,
    )


@draws.examples(60)
@given(problems())
def test_torch_on_drawn_relations(p: Problem) -> None:
    hold(p, "torch")


# ------------------------------------------------------------------------------------------------------------------- those by name
@attnc.pattern
def squares(q: Any, k: Any) -> Any:
    """An axis bounded by the other axis's size."""
    return (q.x <= k.size.y + k.x) & (k.x < k.size.y) & (q.y >= k.y)


@attnc.pattern
def first_half_or_row(q: Any, k: Any) -> Any:
    return (k.x * 2 < k.size.y) | (q.y == k.y)


@attnc.pattern
def few_keys(q: Any, k: Any) -> Any:
    """The same keys for every query: ends without rows."""
    return k.x < 3


@attnc.pattern
def from_the_second(q: Any, k: Any) -> Any:
    return (k.x >= 2) & (k.x * 2 < k.size.x) & (k.y <= q.y)


@attnc.pattern
def few_queries(q: Any, k: Any) -> Any:
    return (q.x < 5) & (k.x % 2 == q.x % 2) & (k.x < q.size.y)


@attnc.pattern
def remainders(q: Any, k: Any) -> Any:
    """A remainder of a remainder, as a factor."""
    return attnc.where(k.x <= q.x, attnc.SCORE + 0.1 * q.x * (((q.x - k.x) % 5) % 3))


@attnc.pattern
def roots(q: Any, k: Any) -> Any:
    """Functions of reals, of integers."""
    return attnc.SCORE + attnc.sqrt(abs(q.x - k.x)) * attnc.exp(-abs(q.y - k.y)) - attnc.log(k.x + 1) + attnc.tanh(k.x - q.x)


NAMED = [p() for p in (squares, first_half_or_row, few_keys, from_the_second, few_queries, remainders, roots)]
PLACES = [
    Problem(p, grid, kv_grid=kv, pad=pad)
    for p in NAMED
    for grid, kv, pad in (((6, 9), None, ((1, 0), (0, 1))), ((5, 7), (4, 9), None))
]
NAMES = [f"{p.pattern.name}-{'kv' if p.kv_grid else 'pad'}" for p in PLACES]


@pytest.mark.parametrize("problem", PLACES, ids=NAMES)
def test_relations_by_name(problem: Problem) -> None:
    hold(problem, "torch")


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
@pytest.mark.parametrize("problem", [PLACES[1], PLACES[2], PLACES[7]], ids=[NAMES[1], NAMES[2], NAMES[7]])
def test_relations_by_name_on_the_cpu(problem: Problem) -> None:
    hold(problem, "cpp")


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_relations_by_name_in_interpreted_triton() -> None:
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import test_drawn_relations as t
for p in t.PLACES:
    t.hold(p, "triton")
print("held")
"""
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("held\n")
