"""Backends against the meaning, on drawn problems; and metamorphic tests, which need no reference but what attention is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import strategies as draws
import torch
from hypothesis import Phase, given, seed, settings
from strategies import Problem, hold, run_operator
from torch import Tensor

import attnc
from attnc import ir, patterns
from attnc.compiler import has_compiler
from attnc.runtime.call import Call
from attnc.schedule.geometry import geometry

CPP = importlib.util.find_spec("attnc.runtime.cpp") is not None and has_compiler()
BACKENDS = ["torch", *(["cpp"] if CPP else [])]
# a kernel takes the C++ compiler seconds, and tests/test_cpp*.py build many: these build theirs when asked for
SOME_BACKENDS = ["torch", *(["cpp"] if CPP and os.environ.get("ATTNC_TEST_MANY_KERNELS") else [])]
DOUBLE = torch.float64


# ------------------------------------------------------------------------------------------------------------------ random problems
@draws.examples(25)
@given(draws.problems())
def test_eager_is_the_meaning(p: Problem) -> None:
    """The eager backend, which every other one is held to, against attention by the book."""
    hold(p, "eager")


@draws.examples(50)
@given(draws.problems())
def test_torch_on_random_problems(p: Problem) -> None:
    hold(p, "torch")


@pytest.mark.skipif(not CPP, reason="no C++ backend or no compiler here")
@pytest.mark.slow
@seed(int(os.environ.get("HYPOTHESIS_SEED", "0")))
@settings(max_examples=6 * int(os.environ.get("HYPOTHESIS_EXAMPLES", "1")), phases=(Phase.explicit, Phase.generate))
@given(draws.problems())
def test_cpp_on_random_problems(p: Problem) -> None:
    """Few, since each builds a kernel of its own; test_kernels_serve_every_size reuses them."""
    hold(p, "cpp")


FLOATS = [torch.float32, torch.float16, torch.bfloat16, DOUBLE]
# (pattern, dtype, D, Dv): one built kernel each, then held at many sizes, strides and batches
KERNELS: list[tuple[str, Callable[[], attnc.Pattern], torch.dtype, int, int]] = [
    ("window", lambda: patterns.window(3, bias="relative"), torch.float32, 32, 32),
    ("shifted window", lambda: patterns.window(3, shift=1, bias="absolute"), torch.float16, 24, 16),
    ("neighborhood", lambda: patterns.neighborhood(3, bias="relative"), torch.float32, 16, 16),
    ("dilated neighborhood", lambda: patterns.neighborhood(3, 2), torch.bfloat16, 17, 33),
    ("strided causal", lambda: patterns.neighborhood(4, 1, 2, causal=True), torch.float32, 1, 3),
    ("dilated blocks", lambda: patterns.dilated_blocks(2, 2, bias="relative"), DOUBLE, 5, 5),
    ("grid", lambda: patterns.grid(2), torch.float32, 8, 40),
    ("cross", lambda: patterns.cross(1), torch.float32, 12, 12),
    ("per head", lambda: patterns.per_head([patterns.window(2), patterns.neighborhood(3)]), torch.float32, 8, 8),
    ("flat causal with decay", lambda: draws.decay() & attnc.pattern(lambda q, k: q.index >= k.index)(), torch.float32, 8, 8),
    ("no rule", lambda: attnc.pattern(lambda q, k: (q.x * k.y + q.y * k.x) % 3 != 1)(), torch.float32, 8, 8),
    ("documents", lambda: patterns.window(4) & draws.documents(), torch.float32, 8, 8),
    ("soft cap", lambda: draws.capped(cap=2.0) & patterns.neighborhood(3), torch.float16, 64, 64),
]
SIZES: list[dict[str, Any]] = [
    {"grid": (5, 7), "heads": 4, "kv_heads": 2},
    {"grid": (1, 1), "batch": 1},
    {"grid": (1, 9), "strides": "packed"},
    {"grid": (8, 3), "strides": "guarded", "scale": 0.2},
    {"grid": (4, 6), "strides": "channels first", "pad": ((1, 2), (0, 1)), "heads": 4},
    {"grid": (3, 4), "strides": "tokens first", "prefix": 2},
    {"grid": (6, 6), "strides": "expanded", "batch": 3},
]


FEW = ("window", "dilated neighborhood", "per head", "documents")
BUILT = [(k, b) for k in KERNELS for b in (BACKENDS if k[0] in FEW else SOME_BACKENDS)]


@pytest.mark.parametrize(("kernel", "backend"), BUILT, ids=[f"{k[0]}-{b}" for k, b in BUILT])
def test_kernels_serve_every_size(kernel: tuple[str, Callable[[], attnc.Pattern], torch.dtype, int, int], backend: str) -> None:
    name, make, dtype, d, dv = kernel
    p = make()
    for i, how in enumerate(SIZES):
        options = {"heads": 2, "kv_heads": 2, **how}
        tables = {"bias": (options["heads"], 9, 9)} if name == "shifted window" else {}
        hold(Problem(p, d=d, dv=dv, dtype=dtype, seed=i, tables=tables, **options), backend)


@pytest.mark.parametrize("backend", SOME_BACKENDS)
@pytest.mark.parametrize("d", [1, 7, 96, 192, 255, 256])
def test_every_head_dimension(d: int, backend: str) -> None:
    """D = 192 and odd ones included; nothing is rounded up in memory."""
    hold(Problem(patterns.window(3), (4, 5), d=d, dv=257 - d, batch=1), backend)


# ------------------------------------------------------------------------------------------------------------------- metamorphic
def rows(n: int, *, batch: int = 2, heads: int = 2, d: int = 8, dtype: torch.dtype = DOUBLE, at: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(at)
    return [torch.randn(batch, heads, n, d, generator=g, dtype=dtype) for _ in range(3)]


def call(p: attnc.Pattern, grid: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, backend: str, **tables: Any) -> Tensor:
    return attnc.compile(p, grid=grid, backend=backend)(q, k, v, **tables)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias, -1) @ v


close = torch.testing.assert_close


@pytest.mark.parametrize("backend", SOME_BACKENDS)
def test_a_window_of_at_least_the_axis_is_dense(backend: str) -> None:
    q, k, v = rows(30)
    for p in (patterns.window(6), patterns.window(99), patterns.window(9, shift=4), patterns.neighborhood(9), patterns.grid(6)):
        close(call(p, (5, 6), q, k, v, backend), plain(q, k, v))
    flat = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(call(attnc.pattern(lambda q, k: q.index >= k.index)(), (5, 6), q, k, v, backend), flat)


@pytest.mark.parametrize("backend", SOME_BACKENDS)
@pytest.mark.parametrize("p", [patterns.neighborhood(3), patterns.window(2), patterns.causal(), patterns.band(1, 0)], ids=str)
def test_dilation_is_grouping_by_residue(p: attnc.Pattern, backend: str) -> None:
    y, x = 7, 9
    q, k, v = rows(y * x)
    out = call(p.dilate(2, 3), (y, x), q, k, v, backend).unflatten(2, (y, x))
    views = [t.unflatten(2, (y, x)) for t in (q, k, v)]
    for a in range(2):
        for b in range(3):
            part = [t[:, :, a::2, b::3] for t in views]
            grid = tuple(part[0].shape[2:4])
            close(out[:, :, a::2, b::3].flatten(2, 3), call(p, grid, *[t.flatten(2, 3) for t in part], backend))
    if p.name.startswith("neighborhood"):
        close(out.flatten(2, 3), call(patterns.neighborhood(3, (2, 3)), (y, x), q, k, v, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_disjoint_halves_merge_through_their_lse(backend: str) -> None:
    whole, half = patterns.neighborhood(5), attnc.pattern(lambda q, k: (q.y + k.x) % 2 == 0)()
    q, k, v = rows(42)

    def run(p: attnc.Pattern) -> tuple[Tensor, Tensor]:
        return attnc.compile(p, grid=(6, 7), backend=backend)(q, k, v, return_lse=True)

    (out, lse), (o1, l1), (o2, l2) = run(whole), run(whole & half), run(whole & ~half)
    both = torch.logaddexp(l1, l2)
    close(lse, both)
    close(out, o1 * (l1 - both).exp()[..., None] + o2 * (l2 - both).exp()[..., None])


@pytest.mark.parametrize("backend", SOME_BACKENDS)
def test_batch_and_head_permutations_commute(backend: str) -> None:
    p = patterns.neighborhood(3, bias="relative")
    q, k, v = rows(20, batch=3, heads=4)
    bias = torch.randn(4, 5, 5, dtype=DOUBLE)
    out = call(p, (4, 5), q, k, v, backend, bias=bias)
    items, heads = [2, 0, 1], [3, 1, 0, 2]
    moved = [t[items][:, heads] for t in (q, k, v)]
    close(call(p, (4, 5), *moved, backend, bias=bias[heads]), out[items][:, heads], rtol=0, atol=1e-15)


@pytest.mark.parametrize("backend", SOME_BACKENDS)
def test_a_grouped_query_is_its_keys_repeated(backend: str) -> None:
    q, k, v = rows(20, heads=6)
    k, v = k[:, :2], v[:, :2]
    p = patterns.window(2)
    close(call(p, (4, 5), q, k, v, backend), call(p, (4, 5), q, *[t.repeat_interleave(3, 1) for t in (k, v)], backend))


@pytest.mark.parametrize("backend", SOME_BACKENDS)
def test_a_reflection_of_the_grid_reflects_a_symmetric_pattern(backend: str) -> None:
    q, k, v = rows(35)
    for p in (patterns.neighborhood(3), patterns.band(2, 2), patterns.full(), patterns.cross(1)):
        out = call(p, (5, 7), q, k, v, backend)
        close(call(p, (5, 7), q.flip(2), k.flip(2), v.flip(2), backend), out.flip(2))


@pytest.mark.parametrize("backend", SOME_BACKENDS)
def test_a_transposed_grid_transposes_a_square_pattern(backend: str) -> None:
    q, k, v = rows(35)
    turned = [t.unflatten(2, (5, 7)).transpose(2, 3).flatten(2, 3) for t in (q, k, v)]
    for p in (patterns.neighborhood(3), patterns.window(3, shift=1), patterns.grid(2), patterns.dilated_blocks(2, 2)):
        out = call(p, (5, 7), q, k, v, backend).unflatten(2, (5, 7)).transpose(2, 3).flatten(2, 3)
        close(call(p, (7, 5), *turned, backend), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_tokens_beside_a_full_pattern_are_more_tokens(backend: str) -> None:
    q, k, v = rows(23)
    out, lse = attnc.compile(patterns.full(), grid=(4, 5), prefix=3, backend=backend)(q, k, v, return_lse=True)
    close(out, plain(q, k, v))
    close(lse, torch.logsumexp(q @ k.transpose(-1, -2) * 8**-0.5, -1))


@pytest.mark.parametrize("backend", SOME_BACKENDS)
def test_a_grid_of_one_token_returns_its_value(backend: str) -> None:
    q, k, v = rows(1)
    for p in (patterns.window(7), patterns.neighborhood(7, 3), patterns.causal(), patterns.cross(1)):
        close(call(p, (1, 1), q, k, v, backend), v, rtol=1e-15, atol=0)


# ---------------------------------------------------------------------------------------------------------- kernels of one process
@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("attnc.runtime.triton") is None, reason="no Triton backend yet")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_triton_on_small_problems() -> None:
    """A process of its own: Triton decides when it is imported whether it interprets."""
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, attnc
from attnc import patterns
from strategies import Problem, hold
cases = [
    Problem(patterns.window(2, bias="relative"), (3, 4), d=8, dv=8, batch=1),
    Problem(patterns.neighborhood(3, 2), (4, 5), d=5, dv=8, heads=2, kv_heads=1, batch=1, strides="packed"),
    Problem(patterns.window(2, shift=1), (3, 3), pad=((0, 1), (0, 1)), batch=1, dtype=torch.float16),
    Problem(patterns.causal(), (3, 3), prefix=1, batch=1, strides="guarded"),
]
for p in cases:
    try:
        hold(p, "triton")
    except attnc.UnsupportedError as e:
        print("refused:", e)
print("held")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("held\n")
    assert "refused" not in done.stdout, done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_call_gives_the_same_bits(backend: str) -> None:
    for p in (patterns.window(3, bias="relative"), patterns.neighborhood(3) & draws.decay(), patterns.cross(1)):
        problem = Problem(p, (6, 7), dtype=torch.float32, batch=2, heads=4, kv_heads=2, d=32)
        first, *rest = (run_operator(problem, backend) for _ in range(3))
        for again in rest:
            for name, t in first.items():
                assert torch.equal(t, again[name]), name


def test_what_the_torch_backend_computes_at_a_time() -> None:
    """Tiles alike go together, and no more of them than a bounded number of score elements over batch and heads."""
    from attnc.codegen import torch as portable

    def shapes(prefix: int, batch_heads: int) -> list[tuple[int, ...]]:
        tokens = ir.Tokens((None, None), prefix)
        program = ir.Program(patterns.window(4).trace(("y", "x")), tokens, tokens)
        call = Call(program, geometry(program, (32, 32), (32, 32)), 1.0, {})
        tiles = portable._tiles(call, torch.device("cpu"), batch_heads, heads=1)
        return [(*t.queries.shape, t.keys.shape[-1]) for t in tiles]

    assert shapes(0, 1) == [(64, 16, 16)]  # all windows at once
    assert shapes(0, portable.SCORES // 1024) == [(4, 16, 16)] * 16
    assert shapes(0, portable.SCORES) == [(1, 16, 16)] * 64  # one, however much that is
    assert shapes(5, 1) == [(64, 16, 21), (1, 5, 1029)]
    assert shapes(5, portable.SCORES // 4096)[-2:] == [(1, 3, 1029), (1, 2, 1029)]
