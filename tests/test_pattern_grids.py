"""Library relations on grids of one to three axes, and between two grids, against loops and the papers' own unfolds."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor
from torch.nn import functional

import attnc
from attnc import ir, patterns
from attnc.analysis.structure import analyse
from attnc.compiler import has_compiler

DOUBLE = torch.float64
Ends = Callable[[int, int, int], set[int]]  # (query, queries, keys) on one axis -> keys


def loops(p_axes: tuple[Ends, ...], grid: tuple[int, ...], kv_grid: tuple[int, ...]) -> Tensor:
    """bool [Nq, Nk] from one set of keys per axis."""
    axes = []
    for ends, n, m in zip(p_axes, grid, kv_grid, strict=True):
        keys = [ends(a, n, m) for a in range(n)]
        axes.append(torch.tensor([[b in keys[a] for b in range(m)] for a in range(n)]))
    out = axes[0]
    for a in axes[1:]:
        out = (out[:, None, :, None] & a[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    return out


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    score = torch.where(allowed, q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias, -math.inf)
    return score.softmax(-1) @ v


def tensors(n: int, m: int | None = None, heads: int = 2, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    shapes = ((2, heads, n, 6), (2, heads, m or n, 6), (2, heads, m or n, 5))
    return [torch.randn(s, generator=g, dtype=DOUBLE).to(dtype).requires_grad_() for s in shapes]


def check(
    p: attnc.Pattern,
    allowed: Tensor,
    backend: str,
    grid: tuple[int, ...],
    kv_grid: tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype = DOUBLE,
    tolerance: float = 1e-9,
) -> None:
    """Outputs and gradients of a relation."""
    mine = tensors(allowed.shape[0], allowed.shape[1], dtype=dtype)
    true = [t.detach().double().requires_grad_() for t in mine]
    out = attnc.compile(p, grid=grid, kv_grid=kv_grid, backend=backend)(*mine)
    wanted = dense(*true, allowed)
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    found = torch.autograd.grad(out, mine, cotangent.to(dtype))
    expected = torch.autograd.grad(wanted, true, cotangent)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=10 * tolerance, atol=10 * tolerance)


# ---------------------------------------------------------------------------------------------------------------- sets of one axis
def window(s: int, t: int = 0) -> Ends:
    return lambda a, n, m: {b for b in range(m) if n <= s or (a - t) // s == (b - t) // s}


def near(s: int, d: int = 1, stride: int = 1, causal: bool = False) -> Ends:
    def keys(a: int, n: int, m: int) -> set[int]:
        group = list(range(a % d, n, d))
        me, size = group.index(a), min(s, len(group))
        if causal:
            last = min(me // stride * stride + stride - 1, len(group) - 1)
            return {group[i] for i in range(len(group)) if last - s < i <= me}
        start = min(me // stride * stride + stride // 2, len(group) - 1) - s // 2
        start = max(min(start, len(group) - s), 0)
        return set(group[start : start + size])

    return keys


def spaced(s: int) -> Ends:
    return lambda a, n, m: {b for b in range(m) if a % -(-n // s) == b % -(-n // s)}


def groups(s: int, i: int) -> Ends:
    return lambda a, n, m: {b for b in range(m) if a % i == b % i and a // (s * i) == b // (s * i)}


def halo(s: int, kv: int) -> Ends:
    def keys(a: int, n: int, m: int) -> set[int]:
        first = a // s * s - (kv - s) // 2
        return set(range(max(first, 0), min(first + kv, m)))

    return keys


def taps(s: int, d: int) -> Ends:
    return lambda a, n, m: {a + d * (u - s // 2) for u in range(s)} & set(range(m))


def scaled(s: int) -> Ends:
    def keys(a: int, n: int, m: int) -> set[int]:
        middle = math.floor((a + 0.5) * m / n + 1e-9)  # of the query, in cells of the keys' grid
        first = max(min(middle - s // 2, m - s), 0)
        return set(range(first, min(first + s, m)))

    return keys


FULL: Ends = lambda a, n, m: set(range(m))  # noqa: E731
POINT: Ends = lambda a, n, m: {a}  # noqa: E731

VIDEO = (3, 4, 5)
CASES: dict[str, tuple[attnc.Pattern, tuple[Ends, ...], tuple[int, ...], tuple[int, ...] | None]] = {
    "windows of a video": (patterns.window((2, 2, 3)), (window(2), window(2), window(3)), VIDEO, None),
    "shifted windows of a video": (
        patterns.window((2, 3, 2), shift=(1, 0, 1)),
        (window(2, 1), window(3), window(2, 1)),
        VIDEO,
        None,
    ),
    "neighbours in a video": (patterns.neighborhood((2, 3, 3)), (near(2), near(3), near(3)), VIDEO, None),
    "strided, dilated, causal in time": (
        patterns.neighborhood((2, 2, 3), (1, 2, 1), (1, 1, 2), (True, False, False)),
        (near(2, causal=True), near(2, 2), near(3, 1, 2)),
        VIDEO,
        None,
    ),
    "inward windows, all frames": (patterns.inward_window((1, 1)).on("y", "x"), (FULL, near(3), near(3)), VIDEO, None),
    "taps of a convolution": (patterns.sliding_window((3, 5), (2, 1)), (taps(3, 2), taps(5, 1)), (7, 9), None),
    "along time": (patterns.axial("t"), (FULL, POINT, POINT), VIDEO, None),
    "every frame by itself": (patterns.window((1, 9, 9)), (POINT, FULL, FULL), VIDEO, None),
    "strips of time": (patterns.strip("t", 2), (FULL, window(2), window(2)), VIDEO, None),
    "grid of a video": (patterns.grid((3, 2, 2)), (spaced(3), spaced(2), spaced(2)), VIDEO, None),
    "sizes that do not divide": (patterns.window((5, 4)), (window(5), window(4)), (7, 9), None),
    "groups of unequal length": (patterns.neighborhood((3, 4), (3, 2)), (near(3, 3), near(4, 2)), (7, 9), None),
    "grid that does not divide": (patterns.grid((3, 4)), (spaced(3), spaced(4)), (7, 9), None),
    "long-distance groups per axis": (patterns.dilated_blocks((2, 3), (2, 1)), (groups(2, 2), groups(3, 1)), (7, 9), None),
    "strides per axis": (patterns.neighborhood((4, 5), 1, (2, 5)), (near(4, 1, 2), near(5, 1, 5)), (9, 11), None),
    "strides that blocks of queries share": (patterns.neighborhood(7, stride=4), (near(7, 1, 4), near(7, 1, 4)), (12, 13), None),
    "overlapping windows": (patterns.overlapping_window(4, 6), (halo(4, 6), halo(4, 6)), (8, 12), None),
    "overlapping windows, uneven": (patterns.overlapping_window((3, 4), (6, 4)), (halo(3, 6), halo(4, 4)), (7, 10), None),
    "pooled keys": (patterns.full(), (FULL, FULL), (6, 8), (3, 4)),
    "the key above": (patterns.cross_scale(1), (scaled(1), scaled(1)), (6, 8), (3, 4)),
    "the keys under a query": (patterns.cross_scale((2, 3)), (scaled(2), scaled(3)), (3, 4), (6, 12)),
    "around a query on a coarser grid": (patterns.cross_scale(3), (scaled(3), scaled(3)), (9, 8), (4, 5)),
    "around a query on a finer grid": (patterns.cross_scale((3, 4)), (scaled(3), scaled(4)), (4, 5), (9, 8)),
    "fewer keys than asked for": (patterns.cross_scale(5), (scaled(5), scaled(5)), (6, 8), (3, 6)),
}


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_relations_are_their_loops(name: str, backend: str) -> None:
    p, ends, grid, kv_grid = CASES[name]
    allowed = loops(ends, grid, kv_grid or grid)
    assert torch.equal(attnc.mask(p, grid=grid, kv_grid=kv_grid)[0], allowed)
    check(p, allowed, backend, grid, kv_grid)


ON_CPUS = ("strided, dilated, causal in time", "overlapping windows, uneven", "around a query on a coarser grid")


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
@pytest.mark.parametrize("name", CASES if os.environ.get("ATTNC_TEST_MANY_KERNELS") else ON_CPUS)
def test_relations_in_cpp(name: str) -> None:
    p, ends, grid, kv_grid = CASES[name]
    check(p, loops(ends, grid, kv_grid or grid), "cpp", grid, kv_grid)


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_relations_in_interpreted_triton() -> None:
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, test_pattern_grids as t
names = ["shifted windows of a video", "the keys under a query", "around a query on a coarser grid"]
for name in [*names, "overlapping windows", "strides that blocks of queries share"]:  # more keys than their blocks have queries
    p, ends, grid, kv_grid = t.CASES[name]
    t.check(p, t.loops(ends, grid, kv_grid or grid), "triton", grid, kv_grid, dtype=torch.float32, tolerance=2e-5)
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


@examples(40)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 6), st.integers(1, 5), st.integers(0, 4))
def test_two_grids_of_any_length(n: int, m: int, s: int, size: int, more: int) -> None:
    assert torch.equal(attnc.mask(patterns.cross_scale(s), grid=(n,), kv_grid=(m,))[0], loops((scaled(s),), (n,), (m,)))
    wider = attnc.mask(patterns.overlapping_window(size, size + more), grid=(n,))[0]
    assert torch.equal(wider, loops((halo(size, size + more),), (n,), (n,)))


def test_structure_of_two_grids() -> None:
    for p, same in ((patterns.cross_scale(3), False), (patterns.overlapping_window(4, 6), True)):
        s = analyse(p.trace(("y", "x"), same_grid=same), same)
        assert (s.strategy, s.residual) == ("banded", ir.TRUE)
        assert all(a.inverse_lo is not None for a in s.axes)
    blocks = analyse(patterns.overlapping_window(4, 6).trace(("y", "x")), True)
    assert [a.block for a in blocks.axes] == [ir.const(4)] * 2


# --------------------------------------------------------------------------------------------------------------------- papers' code
@pytest.mark.parametrize(("grid", "s", "kv"), [((8, 12), 4, 6), ((8, 8), 4, 8)])
def test_overlapping_windows_are_hats_unfold_with_its_bias(grid: tuple[int, int], s: int, kv: int) -> None:
    """OCAB: keys and values by nn.Unfold of kv with stride s and zero padding, which stays in the softmax."""
    pad, n, heads = (kv - s) // 2, grid[0] * grid[1], 2
    q, k, v = (t.detach() for t in tensors(n, heads=heads))
    table = torch.randn(heads, s + kv - 1, s + kv - 1, dtype=DOUBLE)

    def windows(t: Tensor, size: int, padding: int) -> Tensor:  # [B, H, windows, size^2, D]
        b, h, _, d = t.shape
        image = t.transpose(-1, -2).reshape(b, h * d, *grid)
        found = functional.unfold(image, size, stride=s, padding=padding)
        return found.view(b, h, d, size * size, -1).permute(0, 1, 4, 3, 2)

    offset = torch.arange(s)[:, None] - torch.arange(kv)[None] + kv - 1  # query - key, in the table's rows
    index = [t.expand(s, s, kv, kv).reshape(s * s, kv * kv) for t in (offset[:, None, :, None], offset[None, :, None, :])]
    mine, theirs, values = windows(q, s, 0), windows(k, kv, pad), windows(v, kv, pad)
    score = mine @ theirs.transpose(-1, -2) * q.shape[-1] ** -0.5 + table[:, index[0], index[1]][None, :, None]
    out = score.softmax(-1) @ values
    rows, columns = grid[0] // s, grid[1] // s
    wanted = out.view(2, heads, rows, columns, s, s, -1).transpose(3, 4).reshape(2, heads, n, -1)
    p = patterns.overlapping_window(s, kv, bias="relative").shift(pad)
    for backend in ("torch", "eager"):
        op = attnc.compile(p, grid=grid, pad=((pad, pad), (pad, pad)), backend=backend)
        torch.testing.assert_close(op(q, k, v, bias=table), wanted)


def test_bands_with_virtual_keys_are_tics_unfold() -> None:
    """MSA-Conv: k and v are zero-padded, dilated 5 x 3 taps; taps outside keep the logit 0 in the softmax."""
    grid, (kh, kw), d = (6, 7), (5, 3), 2
    q, k, v = (t.detach() for t in tensors(42))
    ph, pw = d * (kh - 1) // 2, d * (kw - 1) // 2

    def taps(t: Tensor) -> Tensor:  # [B, H, N, taps, D]
        b, h, n, c = t.shape
        image = t.transpose(-1, -2).reshape(b * h, c, *grid)
        return functional.unfold(image, (kh, kw), dilation=d, padding=(ph, pw)).view(b, h, c, kh * kw, n).permute(0, 1, 4, 3, 2)

    score = (q[..., None, :] * taps(k)).sum(-1) * q.shape[-1] ** -0.5
    wanted = (score.softmax(-1)[..., None] * taps(v)).sum(-2)
    for p in (patterns.sliding_window((kh, kw), d), patterns.band((kh // 2, kw // 2), (kh // 2, kw // 2)).dilate(d)):
        out = attnc.compile(p, grid=grid, pad=((ph, ph), (pw, pw)), backend="torch")(q, k, v)
        torch.testing.assert_close(out, wanted)


def test_sliding_windows_over_pooled_keys() -> None:
    """Around the key above the query, padded with zeros; the relative bias is that of the distance in pooled keys."""
    q, (_, k, v) = tensors(35)[0].detach(), (t.detach() for t in tensors(12))
    bias = torch.randn(2, 5, 5, dtype=DOUBLE)
    p = patterns.sliding_window(3, pooled=2, bias="relative")
    out = attnc.compile(p, grid=(5, 7), kv_grid=(3, 4), pad=((1, 1), (1, 1)), backend="torch")(q, k, v, bias=bias)
    keys, values = (functional.pad(t.view(2, 2, 3, 4, -1), (0, 0, 1, 1, 1, 1)) for t in (k, v))
    for y, x in itertools.product(range(5), range(7)):
        box = (slice(None), slice(None), slice(y // 2, y // 2 + 3), slice(x // 2, x // 2 + 3))
        around = bias[:, 1:4, 1:4].flip(1, 2).reshape(2, 1, 9)
        scores = q[:, :, y * 7 + x, None] @ keys[box].flatten(2, 3).mT * q.shape[-1] ** -0.5 + around
        torch.testing.assert_close(out[:, :, y * 7 + x], (scores.softmax(-1) @ values[box].flatten(2, 3))[:, :, 0])


def test_taps_give_the_scores_of_a_window() -> None:
    """Head m sees tap m alone: its lse is the score there, 0 on the padding; without padding there is no key, and -inf."""
    q, k, v = (t.detach() for t in tensors(42))
    q, k, v = q[:, :1].expand(-1, 15, -1, -1), k[:, :1], v[:, :1]
    p = patterns.taps((5, 3), 2)
    padded = attnc.compile(p, grid=(6, 7), pad=((4, 4), (2, 2)), backend="torch")
    bare = attnc.compile(p, grid=(6, 7), backend="torch")
    (_, scores), (_, inside) = (op(q, k, v, scale=1.0, return_lse=True) for op in (padded, bare))
    for tap, y, x in itertools.product(range(15), range(6), range(7)):
        row, column = y + 2 * (tap // 3) - 4, x + 2 * (tap % 3) - 2
        here = 0 <= row < 6 and 0 <= column < 7
        wanted = (q[:, 0, y * 7 + x] * k[:, 0, row * 7 + column]).sum(-1) if here else torch.zeros(2, dtype=DOUBLE)
        torch.testing.assert_close(scores[:, tap, y * 7 + x], wanted, check_dtype=False, atol=1e-5, rtol=1e-5)
        assert bool((inside[:, tap, y * 7 + x] > -torch.inf).all()) == here


def test_pooled_keys_are_a_grid_of_their_own() -> None:
    """PVT-like: keys and values pooled by 2, every query sees all of them; then only the one above it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 6, 8, generator=g, dtype=DOUBLE)  # [B, C, Y, X]
    pooled = functional.avg_pool2d(x, 2)
    q, k = (t.unflatten(1, (2, 4)).flatten(3).transpose(-1, -2) for t in (x, pooled))
    out = attnc.compile(patterns.full(), grid=(6, 8), kv_grid=(3, 4), backend="torch")(q, k, k)
    torch.testing.assert_close(out, functional.scaled_dot_product_attention(q, k, k))
    one = attnc.compile(patterns.cross_scale(1), grid=(6, 8), kv_grid=(3, 4), backend="torch")(q, k, k)
    nearest = functional.interpolate(pooled, scale_factor=2).unflatten(1, (2, 4)).flatten(3).transpose(-1, -2)
    torch.testing.assert_close(one, nearest)  # one key: its value


def test_biases_of_keys_near_a_query_on_another_grid() -> None:
    q, k, v = (t.detach() for t in tensors(12, 24))
    bias = torch.randn(2, 2, 3, dtype=DOUBLE)
    for kind, table in (("relative", bias), ("absolute", bias.flip(1, 2).reshape(2, 1, 6))):
        p = patterns.cross_scale((2, 3), bias=kind)  # type: ignore[arg-type]
        out = attnc.compile(p, grid=(3, 4), kv_grid=(6, 4), backend="torch")(q, k, v, bias=table)
        allowed = attnc.mask(p, grid=(3, 4), kv_grid=(6, 4))[0]
        full = torch.zeros(2, 12, 24, dtype=DOUBLE)
        for y, x in itertools.product(range(3), range(4)):
            keys = allowed[y * 4 + x].nonzero().flatten()
            full[:, y * 4 + x, keys] = bias.flip(1, 2).reshape(2, 6)
        torch.testing.assert_close(out, dense(q, k, v, allowed, full))


def test_a_window_and_a_dilated_global_part_count_each_key_once() -> None:
    local, far = patterns.window(3), patterns.grid(3)
    allowed = attnc.mask(local, grid=(6, 9))[0] | attnc.mask(far, grid=(6, 9))[0]
    check(local | far, allowed, "torch", (6, 9))


def test_what_they_refuse() -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: patterns.overlapping_window(4, 3).trace(("x",)), "kv_size=3 is less than size=4"),
        (lambda: patterns.overlapping_window(0, 3).trace(("x",)), "size=0: a positive int"),
        (lambda: patterns.sliding_window(4).trace(("x",)), "a window of 4 has no middle"),
        (lambda: patterns.sliding_window(3, pooled=0), "pooled=0"),
        (lambda: patterns.sliding_window(3, bias="absolute"), "windows slide"),
        (lambda: patterns.inward_window(3, bias="absolute"), "windows slide"),
        (lambda: patterns.inward_window(-1).trace(("x",)), "reach=-1"),
        (lambda: patterns.cross_scale((1, 2)).trace(("x",), same_grid=False), r"size=\(1, 2\)"),
    ]
    for make, message in cases:
        with pytest.raises(attnc.DeclarationError, match=message):
            make()
