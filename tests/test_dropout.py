"""Dropout on weights: one mask on every backend and tiling, a fair one; exact gradients for it; no kernel of its own at p = 0."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import by_the_book
import pytest
import torch
from strategies import Problem, hold, weighted
from torch import Tensor

import attnc
from attnc import patterns
from attnc.analysis.dropout import philox
from attnc.compiler import has_compiler

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
BACKENDS = ("eager", "torch", pytest.param("cpp", marks=needs_compiler))
# a kernel takes the C++ compiler seconds: these build theirs when asked for
SOME_BACKENDS = BACKENDS if os.environ.get("ATTNC_TEST_MANY_KERNELS") else BACKENDS[:2]
SEED = 0x123456789ABCDEF
SIZES: list[tuple[attnc.Pattern, tuple[int, ...], dict[str, Any]]] = [
    (patterns.full(), (5, 9), {}),
    (patterns.neighborhood(3), (5, 8), {"prefix": 3}),
    (patterns.window(3, shift=1), (7, 8), {"pad": ((1, 0), (0, 2))}),
    (patterns.window(3), (4, 7), {"pad": ((1, 0), (2, 1)), "prefix": 2}),
]


def factors(p: attnc.Pattern, grid: tuple[int, ...], backend: str, **options: Any) -> Tensor:
    """[B, H, N, N], N keys without virtual ones: what weights are multiplied by, NaN where there is no weight. Scores are 0."""
    tokens = torch.Size(grid).numel() + options.get("prefix", 0)
    q, v = torch.zeros(2, 4, tokens, 8), torch.eye(tokens).expand(2, 2, -1, -1)
    op = attnc.compile(p, grid=grid, backend=backend, **options)
    plain = attnc.compile(p, grid=grid, backend="torch", **options)(q, q[:, :2], v)
    return torch.where(plain > 0, op(q, q[:, :2], v, dropout_p=0.3, seed=SEED) / plain, float("nan"))


def expected(grid: tuple[int, ...], prefix: int = 0, pad: tuple[tuple[int, int], ...] | str | None = None) -> Tensor:
    """The same for all pairs of tokens, from their numbers."""
    pad = pad if isinstance(pad, tuple) else ((0, pad is not None),) * len(grid)  # "multiple" of windows that lack one row
    extended = torch.arange(torch.Size([n + a + b for n, (a, b) in zip(grid, pad, strict=True)]).numel()) + prefix
    inside = extended.view([n + a + b for n, (a, b) in zip(grid, pad, strict=True)])
    for axis, (n, (a, _)) in enumerate(zip(grid, pad, strict=True)):
        inside = inside.narrow(axis, a, n)
    numbers = torch.cat([torch.arange(prefix), inside.flatten()])
    return by_the_book.dropout(0.3, SEED, 2, 4, numbers, numbers)


def hold_masks(backend: str) -> None:
    for p, grid, options in SIZES:
        found, wanted = factors(p, grid, backend, **options), expected(grid, **options)
        there = found.isfinite()
        assert there.float().mean() > 0.05
        assert torch.equal(found[there] > 0, wanted[there] > 0), (p, grid, options)
        torch.testing.assert_close(found[there], wanted[there].float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_is_that_of_the_numbers_of_tokens(backend: str) -> None:
    """Whatever the pattern, and so the tiles: dense, bands, blocks, beside prefix tokens and among virtual keys."""
    hold_masks(backend)


def test_philox_is_the_published_one() -> None:
    """Random123's known answer for counter 0 and key 0."""
    assert [philox(i, 0, 0, 0, 0, 0) for i in range(4)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_mask_is_fair(p: float) -> None:
    """Rates of the whole, of each query and key, and products of neighbours, within 5 standard deviations of independence."""
    n = 512
    numbers = torch.arange(n)
    kept = by_the_book.dropout(p, 3, 2, 2, numbers, numbers) > 0
    x = (kept.double() - (1 - p)) / (p * (1 - p)) ** 0.5  # mean 0, variance 1

    def normal(t: Tensor, count: int) -> None:
        assert float(t.abs().max()) < 5 * count**0.5

    normal(x.sum(), x.numel())
    for dims in ((0, 1, 2), (0, 1, 3), (2, 3)):
        normal(x.sum(dims), x.numel() // x.sum(dims).numel())
    shifts = [(0, 1), (0, 2), (0, 16), (1, 0), (1, 1), (7, 3)]
    for i, j in shifts:
        pairs = x[:, :, i:, j:] * x[:, :, : n - i, : n - j]
        normal(pairs.sum(), pairs.numel())
    for a, b in ((x[0], x[1]), (x[:, 0], x[:, 1]), (x, (by_the_book.dropout(p, 8, 2, 2, numbers, numbers) > 0).double() - (1 - p))):
        normal((a * b).sum(), a.numel())


CASES = {
    "bias and post": Problem(weighted(patterns.neighborhood(3, bias="relative"), "sink", post=True), (5, 6), prefix=1, dropout=0.3),
    "window": Problem(patterns.window(3, bias="relative"), (6, 6), dropout=0.5),
    "grouped queries": Problem(patterns.causal(), (3, 5), heads=4, dropout=0.1, strides="guarded"),
    "sigmoid": Problem(weighted(patterns.window(3), "sigmoid", post=True), (4, 5), prefix=2, dropout=0.3),
    "over queries": Problem(weighted(patterns.neighborhood(3), "queries", post=True), (4, 5), prefix=2, dropout=0.3),
    "union": Problem(patterns.cross(2), (9, 10), batch=1, dropout=0.3),
    "runs of heads": Problem(patterns.per_head([patterns.window(2), patterns.neighborhood(3)]), (4, 5), dropout=0.3),
    "virtual keys": Problem(patterns.window(3), (4, 5), pad=((1, 1), (0, 1)), dropout=0.3),
    "half": Problem(patterns.window(3), (5, 7), dtype=torch.bfloat16, d=24, dropout=0.3),
    "three axes": Problem(patterns.neighborhood(3), (3, 2, 4), dtype=torch.float64, dropout=0.3),
}
BUILT = ("bias and post", "over queries")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_mask(name: str, backend: str) -> None:
    if backend == "cpp" and name not in BUILT and not os.environ.get("ATTNC_TEST_MANY_KERNELS"):
        pytest.skip("built when ATTNC_TEST_MANY_KERNELS is set")
    hold(CASES[name], backend)


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_dropout_in_interpreted_triton() -> None:
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import test_dropout as t
from dataclasses import replace
t.SIZES = [(t.patterns.neighborhood(3), (4, 5), {"prefix": 2}), (t.patterns.window(2), (3, 5), {"pad": ((1, 0), (0, 2))})]
both = {"pad": ((1, 0), (1, 2)), "prefix": 2}, {"pad": "multiple", "prefix": 1}
t.SIZES += [(t.patterns.window(2), grid, options) for grid, options in zip(((3, 4), (3, 3)), both)]
t.hold_masks("triton")
for name in ("window", "bias and post", "sigmoid", "over queries", "runs of heads"):
    t.hold(replace(t.CASES[name], batch=1, grid=(3, 4) if name != "window" else (3, 6)), "triton")
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


# ---------------------------------------------------------------------------------------------------------------------------- calls
def rows(n: int = 15, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, 8, generator=g, dtype=dtype) for _ in range(3)]


OP = attnc.compile(patterns.window(3), grid=(3, 5), backend="torch")


def test_no_dropout_is_the_plain_call() -> None:
    x = rows()
    assert torch.equal(OP(*x, dropout_p=0.0, seed=5), OP(*x))
    assert OP.program(2).attend.dropout is None
    assert "dropout" not in OP._traced(2).text


def test_without_a_seed_torchs_generator_gives_one() -> None:
    x = rows()
    torch.manual_seed(3)
    first, second = (OP(*x, dropout_p=0.4) for _ in range(2))
    torch.manual_seed(3)
    again = OP(*x, dropout_p=0.4)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_seeds_batch_items_and_heads_have_masks_of_their_own() -> None:
    q, v = torch.zeros(2, 2, 15, 8), torch.eye(15).expand(2, 2, -1, -1)
    op = attnc.compile(patterns.full(), grid=(3, 5), backend="torch")
    seeds = (0, 1, -1, 1 << 32, 2**64 - 2, 2**63)
    masks = [m for s in seeds for m in (op(q, q, v, dropout_p=0.5, seed=s) > 0).flatten(0, 1)]
    assert len({tuple(m.flatten().tolist()) for m in masks}) == len(masks)
    assert torch.equal(op(q, q, v, dropout_p=0.5, seed=-1), op(q, q, v, dropout_p=0.5, seed=2**64 - 1))


@pytest.mark.parametrize("backend", SOME_BACKENDS)
def test_lse_is_that_of_all_weights_and_the_mean_that_of_no_dropout(backend: str) -> None:
    op = attnc.compile(patterns.neighborhood(3), grid=(7, 6), backend=backend)
    x = rows(42)
    plain, lse = op(*x, return_lse=True)
    found = [op(*x, return_lse=True, dropout_p=0.3, seed=s) for s in range(100)]
    assert all(torch.equal(log, lse) for _, log in found)
    mean = torch.stack([out for out, _ in found]).mean(0)
    assert float((mean - plain).abs().max()) < 0.3
    assert float((mean - plain).mean().abs()) < 0.01


@needs_compiler
def test_another_seed_or_p_builds_nothing() -> None:
    from attnc.runtime import cpp

    op = attnc.compile(patterns.full(), grid=(7, 6), backend="cpp")
    x = rows(42)
    op(*x, dropout_p=0.3, seed=1)
    before = cpp._function.cache_info().misses
    for p, seed in ((0.1, 1), (0.9, 2), (1 - 2**-40, 3), (2**-40, 4)):
        assert op(*x, dropout_p=p, seed=seed).isfinite().all()
    assert cpp._function.cache_info().misses == before


def test_a_compiled_graph_draws_and_takes_seeds() -> None:
    x = [t.requires_grad_() for t in rows()]
    for options in ({"dropout_p": 0.2}, {"dropout_p": 0.2, "seed": 7}):

        def call(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any] = options) -> Tensor:
            return OP(q, k, v, **options)

        graph = torch.compile(call, fullgraph=True, backend="aot_eager")
        found = []
        for f in (graph, call):
            torch.manual_seed(11)
            out = f(*x)
            found.append([out, *torch.autograd.grad(out.square().sum(), x)])
        torch.testing.assert_close(*found)
        assert torch.equal(graph(*x), graph(*x)) == ("seed" in options)
    numbers = torch.compile(lambda p, s: OP(*x, dropout_p=p, seed=s), fullgraph=True, backend="aot_eager")
    for p, s in ((0.1, 3), (0.3, 4), (0.4, -9)):
        torch.testing.assert_close(numbers(p, s), OP(*x, dropout_p=p, seed=s))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own copies of list arguments
def test_opcheck_with_a_seed() -> None:
    dropped = OP._traced(2).dropped
    assert dropped is not None
    x = [t.requires_grad_() for t in rows()]
    rest = (0.3, (3, 5), (3, 5), dropped.text, "torch", False, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.attnc.attend.default, (*x, [torch.tensor([1, 2, 1 << 30])], *rest), test_utils=tests)


def test_gradcheck() -> None:
    x = [t.requires_grad_() for t in rows(dtype=torch.float64)]
    op = attnc.compile(patterns.window(3, bias="relative"), grid=(3, 5), backend="torch")
    bias = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: op(*a[:3], bias=a[3], dropout_p=0.4, seed=5), (*x, bias), fast_mode=True)


def test_a_packed_tensor_and_its_unpacked_rows_have_one_mask() -> None:
    x = torch.randn(2, 15, 3 * 2 * 8, generator=torch.Generator().manual_seed(0))
    packed = attnc.compile(patterns.window(3), grid=(3, 5), layout="b (y x) (three h d)", heads=2, backend="torch")
    q, k, v = x.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    out = OP(q, k, v, dropout_p=0.3, seed=4)
    torch.testing.assert_close(packed(x, dropout_p=0.3, seed=4), out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan"), True, "a half", torch.tensor(0.1)])
def test_what_is_no_probability(p: Any) -> None:
    with pytest.raises(attnc.ShapeError, match=r"window\(3\): dropout_p=.*: the probability of dropping a weight, a number from 0"):
        OP(*rows(), dropout_p=p)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 0.5, True])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(attnc.ShapeError, match=r"window\(3\): seed=.*: a 64-bit integer, or None"):
        OP(*rows(), dropout_p=0.1, seed=seed)


def test_mechanisms_have_no_dropout() -> None:
    with pytest.raises(attnc.ShapeError, match=r"mechanism channel\(\): unexpected argument dropout_p"):
        attnc.compile(patterns.channel(), backend="torch")(*rows(), dropout_p=0.1)
