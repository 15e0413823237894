"""`attnc.compat.natten` against NATTEN's definition, written here key by key from its documentation."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor

import attnc
from attnc.compat import natten
from attnc.compiler import has_compiler

DOUBLE = torch.float64
FUNCTIONS = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}


def seen(i: int, n: int, kernel: int, stride: int, dilation: int, causal: bool) -> set[int]:
    """The keys of query i on one axis of n tokens.

    Tokens fall into `dilation` groups. In its group, a query shares a leader with the `stride` queries of its block: the middle one
    (the right one of two), at most the last token. The window is centred on the leader, with kernel // 2 keys to its left and
    one fewer to its right where the kernel is even, after the centre was moved so that the window stays inside the group. A
    causal window ends at the query; its leader is the last query of the block, and keys are fewer than `kernel` behind it.
    """
    group = list(range(i % dilation, n, dilation))
    me, last = group.index(i), len(group) - 1
    block = me // stride * stride
    if causal:
        leader = min(block + stride - 1, last)
        return {group[k] for k in range(last + 1) if k <= me and leader - k < kernel}
    left, right = kernel // 2, kernel - 1 - kernel // 2
    centre = max(min(block + stride // 2, last, last - right), left)
    return {group[k] for k in range(last + 1) if centre - left <= k <= centre + right}


def mask(grid: tuple[int, ...], size: Any, stride: Any, dilation: Any, causal: Any) -> Tensor:
    """bool [N, N]."""
    per_axis = []
    for n, k, s, d, c in zip(grid, size, stride, dilation, causal, strict=True):
        keys = [seen(i, n, k, s, d, c) for i in range(n)]
        per_axis.append([[j in keys[i] for j in range(n)] for i in range(n)])
    points = list(product(*map(range, grid)))
    rows = [[all(m[a][b] for m, a, b in zip(per_axis, p, r, strict=True)) for r in points] for p in points]
    return torch.tensor(rows)


def definition(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Dense attention of heads-last tensors [B, N, heads, dim]."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
    score = torch.where(allowed, q @ k.transpose(-1, -2) * scale + bias, -math.inf)
    return (score.softmax(-1) @ v).transpose(1, 2), score.logsumexp(-1).transpose(1, 2)


def check(
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    backend: str,
    *,
    heads: tuple[int, int] = (2, 2),
    extra: int = 0,
    scale: float | None = None,
    seed: int = 0,
) -> None:
    """Outputs, lse and gradients."""
    g, rank = torch.Generator().manual_seed(seed), len(grid)
    shapes = [(2, *grid, h, d) for h, d in ((heads[0], 6), (heads[1], 6), (heads[1], 5))]
    shapes += [(2, extra, heads[1], d) for d in (6, 5)] if extra else []
    leaves = [torch.randn(s, generator=g, dtype=DOUBLE).requires_grad_() for s in shapes]
    named = dict(zip(("additional_keys", "additional_values"), leaves[3:], strict=False))
    options: Any = {"stride": stride, "dilation": dilation, "is_causal": is_causal, "scale": scale, **named}
    ours = FUNCTIONS[rank](*leaves[:3], kernel_size, return_lse=True, backend=backend, **options)
    q, k, v = (t.flatten(1, rank) for t in leaves[:3])
    allowed = mask(grid, kernel_size, stride, dilation, is_causal)
    if extra:
        k, v = torch.cat([k, leaves[3]], 1), torch.cat([v, leaves[4]], 1)
        allowed = torch.cat([allowed, torch.ones(len(allowed), extra, dtype=torch.bool)], 1)
    out, lse = definition(q, k, v, allowed, scale or 6**-0.5)
    theirs = out.unflatten(1, grid), lse.unflatten(1, grid)
    found = []
    for pair in (ours, theirs):
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=DOUBLE) for t in pair]
        loss = sum((t * w).sum() for t, w in zip(pair, weights, strict=True))
        found.append([*pair, *torch.autograd.grad(loss, leaves)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@st.composite
def settings(draw: st.DrawFn) -> dict[str, Any]:
    """What NATTEN accepts: kernels from 2 up to the axis over the dilation, strides up to the kernel."""
    rank = draw(st.sampled_from((1, 2, 2, 3)))
    grid = [draw(st.integers(2, {1: 24, 2: 8, 3: 5}[rank])) for _ in range(rank)]
    size = [draw(st.integers(2, n)) for n in grid]
    dilation = [draw(st.integers(1, n // k)) for n, k in zip(grid, size, strict=True)]
    stride = [draw(st.integers(1, k)) for k in size]
    kv = draw(st.integers(1, 2))
    return {
        "grid": tuple(grid),
        "kernel_size": tuple(size),
        "stride": tuple(stride),
        "dilation": tuple(dilation),
        "is_causal": tuple(draw(st.booleans()) for _ in grid),
        "heads": (kv * draw(st.integers(1, 2)), kv),
        "extra": draw(st.sampled_from((0, 0, 3))),
        "scale": draw(st.sampled_from((None, 0.3))),
        "seed": draw(st.integers(0, 1000)),
    }


@examples(60)
@given(settings())
def test_random_settings(drawn: dict[str, Any]) -> None:
    check(**drawn, backend="torch")


CASES: list[dict[str, Any]] = [
    {"grid": (7, 9), "kernel_size": (3, 4), "stride": (2, 3), "dilation": (2, 1), "is_causal": (False, False)},
    {"grid": (8, 8), "kernel_size": (4, 4), "stride": (4, 2), "dilation": (1, 2), "is_causal": (True, False), "extra": 5},
    {"grid": (4, 4, 5), "kernel_size": (2, 3, 5), "stride": (1, 3, 2), "dilation": (2, 1, 1), "is_causal": (True, False, True)},
    {"grid": (17,), "kernel_size": (5,), "stride": (3,), "dilation": (3,), "is_causal": (False,), "heads": (4, 2)},
]


@pytest.mark.parametrize("backend", ["eager", *(["cpp"] if has_compiler() else [])])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c["grid"])))
def test_every_backend(case: dict[str, Any], backend: str) -> None:
    check(**case, backend=backend)


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_triton() -> None:
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from attnc.compat import natten
from test_compat_natten import definition, mask
cases = [
    ((6, 7), ((3, 4), (2, 3), (2, 1), (False, False))),
    ((3, 4, 3), ((2, 3, 2), (1, 2, 2), (1, 1, 1), (True, False, False))),
]
for grid, how in cases:
    q, k, v = (torch.randn(1, *grid, 2, 8).requires_grad_() for _ in range(3))
    out = [natten.na2d, natten.na3d][len(grid) - 2](q, k, v, *how, backend="triton")
    true = definition(*(t.double().flatten(1, len(grid)) for t in (q, k, v)), mask(grid, *how), 8**-0.5)[0]
    torch.testing.assert_close(out.double().flatten(1, len(grid)), true, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(true, (q, k, v), g.double().flatten(1, len(grid)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
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


def tensors(*grid: int, heads: int = 2, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, *grid, heads, 6, generator=g, dtype=DOUBLE).to(dtype) for _ in range(3)]


def test_every_kernel_on_a_short_axis() -> None:
    """All windows on axes up to 9 long, at every place."""
    for n, kernel in product(range(2, 10), range(2, 10)):
        for d, s, c in product(range(1, n // kernel + 1) if kernel <= n else (), range(1, kernel + 1), (False, True)):
            wanted = [seen(i, n, kernel, s, d, c) for i in range(n)]
            assert all(len(w) == kernel for w in wanted) or c
            found = attnc.mask(attnc.patterns.neighborhood(kernel, d, s, c), grid=(n,))[0]
            assert [set(r.nonzero().flatten().tolist()) for r in found] == wanted, (n, kernel, d, s, c)


def test_a_stride_of_the_kernel_is_blocks_where_it_divides() -> None:
    """Documented: stride == kernel_size is blocked attention."""
    x = tensors(6, 8)
    blocks = attnc.compile(attnc.patterns.blocks((3, 4)), layout="b y x h d", backend="torch")(*x)
    torch.testing.assert_close(natten.na2d(*x, (3, 4), stride=(3, 4), backend="torch"), blocks)


def test_defaults_and_corners() -> None:
    x = tensors(7, 7)
    plain = natten.na2d(*x, 3, backend="torch")
    for other in (
        natten.na2d(*x, [3, 3], None, None, None, backend="torch"),
        natten.na2d(*x, (3, 3), 1, 1, False, 0.0, backend="torch"),  # a scale of 0 is the default scale there
        natten.na2d(*x, 3, scale=6**-0.5, q_tile_shape=(8, 8), kernel_schedule="coop", backend="torch"),
    ):
        assert torch.equal(plain, other)
    assert natten.na2d(*x, 3, backend="cutlass-fna").shape == plain.shape
    whole = natten.na2d(*x, 7, backend="torch")  # the kernel is the input: self attention
    torch.testing.assert_close(whole.flatten(1, 2), natten.attention(*(t.flatten(1, 2) for t in x), backend="torch"))


def test_the_relative_position_bias_of_older_versions() -> None:
    """rpb [heads, 2 k - 1, 2 k - 1], indexed key - query + k - 1; the checkpoints of NAT and DiNAT have it."""
    grid, k, d = (6, 7), 3, 2
    x = tensors(*grid)
    rpb = torch.randn(2, 5, 5, dtype=DOUBLE).requires_grad_()
    out = natten.na2d(*x, k, dilation=d, rpb=rpb, backend="torch")
    y, c = (t.flatten() for t in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    at = [((b[None] // d - b[:, None] // d) + k - 1).clamp(0, 4) for b in (y, c)]
    allowed = mask(grid, (k, k), (1, 1), (d, d), (False, False))
    wanted = definition(*(t.flatten(1, 2) for t in x), allowed, 6**-0.5, rpb[:, at[0], at[1]])[0].unflatten(1, grid)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), rpb)[0] for o in (out, wanted)))


def test_attention_and_merging() -> None:
    q, k, v = tensors(12)
    whole = natten.attention(q, k, v, return_lse=True, backend="torch")
    torch.testing.assert_close(whole, definition(q, k, v, torch.tensor(True), 6**-0.5))
    parts = [natten.attention(q, k[:, a:b], v[:, a:b], return_lse=True, backend="torch") for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(natten.merge_attentions(*zip(*parts, strict=True)), whole)
    lower = natten.attention(q, k, v, is_causal=True, return_lse=True, backend="torch")
    torch.testing.assert_close(lower, definition(q, k, v, torch.ones(12, 12).tril().bool(), 6**-0.5))


def test_half_precision_keeps_its_dtype() -> None:
    q, k, v = tensors(5, 6, dtype=torch.bfloat16)
    extra = torch.randn(2, 3, 2, 6).bfloat16()
    out, lse = natten.na2d(q, k, v, 3, additional_keys=extra, additional_values=extra, return_lse=True, backend="torch")
    assert (out.dtype, lse.dtype, lse.shape) == (torch.bfloat16, torch.float32, (2, 5, 6, 2))


def test_compiled_as_one_graph() -> None:
    x = tensors(5, 6, dtype=torch.float32)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = natten.na2d(q * 2, k, v, 3, dilation=(1, 2), backend="torch")
        beside = k[:, 0, :2]
        return natten.na2d(out, k, v, 4, additional_keys=beside, additional_values=beside, backend="torch").sin()  # type: ignore[no-any-return]

    torch.testing.assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(*x), f(*x))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (attnc.DeclarationError, r"kernel_size=1: an int of at least 2.*neighborhood\(1\)", {"kernel_size": 1}),
        (attnc.DeclarationError, r"kernel_size=\(3, 3, 3\)", {"kernel_size": (3, 3, 3)}),
        (attnc.DeclarationError, "kernel_size=3.0", {"kernel_size": 3.0}),
        (attnc.DeclarationError, "stride=0", {"stride": 0}),
        (attnc.DeclarationError, r"stride=\(4, 4\) is greater than kernel_size=\(3, 3\)", {"stride": 4}),
        (attnc.DeclarationError, "dilation=True", {"dilation": True}),
        (attnc.ShapeError, r"kernel_size=\(3, 3\) times dilation=\(1, 3\) is greater than the grid \(7, 8\)", {"dilation": (1, 3)}),
        (attnc.ShapeError, "greater than the grid", {"kernel_size": 8}),
        (attnc.DeclarationError, "is_causal=1: a bool", {"is_causal": 1}),
        (attnc.DeclarationError, "give both or neither", {"additional_keys": torch.zeros(2, 3, 2, 6)}),
        (
            attnc.ShapeError,
            "give them the same",
            {"additional_keys": torch.zeros(2, 3, 1, 6), "additional_values": torch.zeros(2, 3, 1, 6)},
        ),
        (attnc.DeclarationError, "backend='fast'", {"backend": "fast"}),
        (attnc.ShapeError, r"rpb has shape \(2, 5, 7\), expected \(2, 5, 5\)", {"rpb": torch.zeros(2, 5, 7)}),
        (attnc.DeclarationError, "NATTEN had it for neither", {"rpb": torch.zeros(2, 5, 5), "is_causal": True}),
    ],
)
def test_what_natten_refuses(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        natten.na2d(*tensors(7, 8, dtype=torch.float32), **{"kernel_size": 3, **arguments})


def test_tensors_that_do_not_fit() -> None:
    x = tensors(7, 8)
    for message, call in [
        (r"na1d: query is \(2, 7, 8, 2, 6\)", lambda: natten.na1d(*x, 3)),
        ("q lies on", lambda: natten.na2d(x[0], x[1][:, :5], x[2][:, :5], 3, backend="torch")),
        (r"\[batch, tokens, heads, dim\]", lambda: natten.attention(*x)),
        ("give equally many", lambda: natten.attention(*(t[:, :, 0] for t in (x[0], x[1][:, :5], x[2][:, :5])), is_causal=True)),
        ("give two or more", lambda: natten.merge_attentions([x[0]], [x[0][..., 0]])),
        ("all outputs have one shape", lambda: natten.merge_attentions([x[0], x[0]], [x[0][..., 0], x[0]])),
    ]:
        with pytest.raises(attnc.ShapeError, match=message):
            call()


def test_signatures_are_nattens() -> None:
    for f in FUNCTIONS.values():
        names = list(inspect.signature(f).parameters)
        assert names[:11] == [
            *("query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale"),
            *("additional_keys", "additional_values", "attention_kwargs"),
        ]
        assert names[11] == "backend"
        assert "return_lse" in names
