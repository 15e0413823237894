"""Every score of the library in one, two and three dimensions, forward and backward, on every backend."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from strategies import Problem, hold, weighted

import attnc
from attnc import patterns
from attnc.compiler import has_compiler

GRIDS = {1: (9,), 2: (3, 5), 3: (2, 3, 4)}
Shapes = dict[str, tuple[int, ...]]
NEAR = 3


def tables(grid: tuple[int, ...], **more: tuple[int, ...]) -> Shapes:
    """Shapes of a relative bias of neighbourhoods and of other tables, two heads."""
    return {"bias": (2, *[2 * NEAR - 1] * len(grid)), **more}


# name: the pattern, and its tables on a grid of two heads
SCORES: dict[str, tuple[Callable[[], attnc.Pattern], Callable[[tuple[int, ...]], Shapes]]] = {
    "relative bias": (lambda: patterns.neighborhood(NEAR, bias="relative"), tables),
    "absolute bias": (
        lambda: patterns.window(2, bias="absolute"),
        lambda g: {"bias": (2, 2 ** len(g), 2 ** len(g))},
    ),
    "alibi": (lambda: patterns.alibi(), lambda g: {}),
    "manhattan decay": (lambda: patterns.decay(), lambda g: {"slopes": (2,)}),
    "euclidean decay": (lambda: patterns.decay(metric="euclidean"), lambda g: {"slopes": (1,)}),
    "decay after the softmax": (
        lambda: patterns.decay(patterns.neighborhood(NEAR), after=True),
        lambda g: {"slopes": (2,)},
    ),
    "Gaussian mixture": (
        lambda: patterns.gaussian_mixture(2, patterns.neighborhood(NEAR, bias="relative")),
        lambda g: tables(g, alpha=(2, 2), sigma=(2, 2)),
    ),
    "polyline": (lambda: patterns.polyline(), lambda g: paths(g)),
    "polyline, the other corner": (lambda: patterns.polyline(corner="key row"), lambda g: paths(g)),
    "soft cap": (lambda: patterns.soft_cap(2.0, patterns.neighborhood(NEAR, bias="relative")), tables),
    "scale per head": (lambda: patterns.head_scale(patterns.window(2)), lambda g: {"temperature": (2,)}),
    "cosine": (
        lambda: patterns.cosine(patterns.neighborhood(NEAR, bias="relative")),
        lambda g: tables(g, logit_scale=(2,)),
    ),
    "positional": (lambda: patterns.positional(), lambda g: {"weight": (2, len(g) + 1)}),
    "sink": (lambda: weighted(patterns.neighborhood(NEAR, bias="relative"), "sink"), lambda g: tables(g, sink=(2,))),
    "rotary": (lambda: weighted(patterns.neighborhood(NEAR), "softmax", maps="rotary"), lambda g: {"unused": ()}),
}


def paths(grid: tuple[int, ...]) -> Shapes:
    """The tables of a polyline, of one image for all."""
    return dict.fromkeys(("across", "down", "through")[: len(grid)], (1, 2, *grid))


def problem(name: str, rank: int, **options: object) -> Problem:
    make, shapes = SCORES[name]
    found = {n: s for n, s in shapes(GRIDS[rank]).items() if n != "unused"}
    return Problem(make(), GRIDS[rank], tables=found, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("rank", GRIDS)
@pytest.mark.parametrize("name", SCORES)
def test_scores_on_every_grid(name: str, rank: int, backend: str) -> None:
    hold(problem(name, rank), backend)


# what the scores above are made of, all at once: each builds kernels for seconds
def everything(rank: int) -> Problem:
    """Cosine with its temperature under a mixture, capped, with a path's decay, a bias, a factor after the softmax and a sink."""
    core = patterns.cosine(patterns.gaussian_mixture(1, patterns.neighborhood(NEAR, bias="relative")))
    p = weighted(patterns.decay(patterns.polyline(patterns.soft_cap(3.0, core)), after=True), "sink")
    more = dict.fromkeys(("slopes", "logit_scale", "sink"), (2,)) | dict.fromkeys(("alpha", "sigma"), (1, 2)) | paths(GRIDS[rank])
    return Problem(p, GRIDS[rank], batch=1, tables=tables(GRIDS[rank], **more))


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
@pytest.mark.parametrize("rank", [1, 3])
def test_all_scores_at_once_in_cpp(rank: int) -> None:
    hold(everything(rank), "cpp")


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
@pytest.mark.skipif(not os.environ.get("ATTNC_TEST_MANY_KERNELS"), reason="ATTNC_TEST_MANY_KERNELS is not set")
@pytest.mark.parametrize("rank", GRIDS)
@pytest.mark.parametrize("name", SCORES)
def test_each_score_in_cpp(name: str, rank: int) -> None:
    hold(problem(name, rank), "cpp")


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_scores_in_interpreted_triton() -> None:
    script = """
import os, sys; sys.path.insert(0, sys.argv[1])
import test_scores_on_every_grid as t
t.GRIDS.update({1: (6,), 2: (2, 3), 3: (2, 1, 3)})
for rank in t.GRIDS:
    t.hold(t.everything(rank), "triton")
    for name in t.SCORES if os.environ.get("ATTNC_TEST_MANY_KERNELS") else ():
        t.hold(t.problem(name, rank, batch=1), "triton")
        print(rank, name, flush=True)
print("held")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(Path(__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("held\n")
