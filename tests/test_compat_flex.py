"""`attnc.compat.flex` against torch's own definition of FlexAttention, forward and backward.

torch's public function has no backward on CPUs; the scores of its dense definition, which it runs eagerly, have one.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as theirs
from torch import Tensor
from torch._higher_order_ops.flex_attention import _math_attention_inner

import attnc
from attnc import ir
from attnc.compat import flex
from attnc.compiler import has_compiler
from attnc.report.subject import subject

B, H, N, W = 2, 4, 48, 8
DOUBLE = torch.float64
Mod = Callable[..., Any]


def definition(q: Tensor, k: Tensor, v: Tensor, score_mod: Mod | None, mask_mod: Mod | None, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse from torch's own scores, which are -inf for what its mask excludes; differentiable, without NaN in empty rows."""
    mask = theirs.create_block_mask(mask_mod or theirs.noop_mask, None, None, q.shape[2], k.shape[2], device="cpu")
    score_mod = score_mod or (lambda score, b, h, q_idx, kv_idx: score)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).expand(q.shape[0], -1, -1, -1) for x in (k, v))
    _, scores = _math_attention_inner(q, k, v, score_mod, mask.as_tuple(), scale, {})
    some = (scores > -math.inf).any(-1, keepdim=True)
    finite = torch.where(some, scores, 0.0)
    lse = torch.where(some[..., 0], finite.logsumexp(-1), -math.inf)
    return torch.where(some, finite.softmax(-1), 0.0) @ v, lse


def agree(
    score_mod: Mod | None,
    mask_mod: Mod | None,
    backend: str,
    captured: list[Tensor] | None = None,
    shape: tuple[int, int, int, int, int] = (B, H, H, N, N),
    seed: int = 0,
    **options: Any,
) -> None:
    """Outputs, lse and every gradient agree, in float64."""
    b, h, hkv, n, m = shape
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(s, generator=g, dtype=DOUBLE).requires_grad_() for s in ((b, h, n, 6), (b, hkv, m, 6), (b, hkv, m, 5))]
    leaves = [*rows, *(t for t in captured or [] if t.requires_grad)]
    ours = flex.flex_attention(
        *rows, score_mod, mask_mod, scale=0.4, enable_gqa=h != hkv, return_lse=True, backend=backend, **options
    )
    results = []
    for out, lse in (ours, definition(*rows, score_mod, mask_mod, 0.4)):
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=DOUBLE) for t in (out, lse)]
        loss = (out * weights[0]).sum() + (torch.where(torch.isfinite(lse), lse, 0.0) * weights[1]).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([out, lse, *(torch.zeros_like(x) if d is None else d for x, d in zip(leaves, grads, strict=True))])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------------------------- mods in use
def learned(*shape: int, at: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(at), dtype=DOUBLE).requires_grad_()


BIAS, SLOPES, TEMPERATURE = learned(H, 2 * W - 1, 2 * W - 1), learned(H), learned(at=3)
DOCUMENT = torch.randint(0, 3, (B, N), generator=torch.Generator().manual_seed(1))
BUCKETS = torch.randint(0, 5, (N, N), generator=torch.Generator().manual_seed(2))
BUCKET_BIAS, KEEP = learned(5, H), torch.rand(N, N, generator=torch.Generator().manual_seed(4)) > 0.4
LIMITS = torch.tensor([5, 40])


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def sliding(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx - kv_idx <= 5) & (q_idx >= kv_idx)


def document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return DOCUMENT[b, q_idx] == DOCUMENT[b, kv_idx]


def prefix_lm(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx < 7) | (q_idx >= kv_idx)


def natten(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """attention-gym's: a clamped centre per axis of a grid 8 wide."""
    qy, qx, ky, kx = q_idx // W, q_idx % W, kv_idx // W, kv_idx % W
    cy, cx = qy.clamp(1, N // W - 2), qx.clamp(2, W - 3)
    return ((cy - ky).abs() <= 1) & ((cx - kx).abs() <= 2)


def dilated(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    qy, qx, ky, kx = q_idx // W, q_idx % W, kv_idx // W, kv_idx % W
    return (qy % 2 == ky % 2) & ((qx - kx) % 2 == 0) & ((qy // 2 - ky // 2).abs() <= 1)


def windows(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx // W // 3 == kv_idx // W // 3) & (q_idx % W // 4 == kv_idx % W // 4)


def video(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """4 frames of 3 x 4: neighbours in time, the same row."""
    near = (q_idx // 12 - kv_idx // 12).abs() <= 1
    return near & (q_idx % 12 // 4 == kv_idx % 12 // 4) & ((q_idx % 4 - kv_idx % 4).abs() <= 2)


def by_head(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.where(h < 2, q_idx >= kv_idx, (q_idx - kv_idx).abs() < 3)


def lengths(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx < LIMITS[b]) & torch.logical_not(q_idx == 11)


def dense_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return KEEP[q_idx, kv_idx] | (q_idx == kv_idx)


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + torch.exp2(-((h + 1) * 8.0 / H)) * (kv_idx - q_idx)


def slopes(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + SLOPES[h] * (q_idx - kv_idx).abs() + 0.1 * SLOPES[h] ** 2


def relative(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + BIAS[h, q_idx // W - kv_idx // W + W - 1, q_idx % W - kv_idx % W + W - 1]


def counted_from_the_end(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + BIAS[h, (q_idx - kv_idx).clamp(-7, 7), -1] + BIAS[0, ..., 3][q_idx % 5 - 5] + BIAS.sum(0)[kv_idx % 3, q_idx % 3]


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    capped = 2.0 * torch.tanh(score / 2.0)
    return torch.where(q_idx >= kv_idx, capped, -float("inf"))


def temperature(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * TEMPERATURE.exp() + torch.where((q_idx - kv_idx).abs() < 20, 0.0, -math.inf)


def buckets(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A table of integers indexes the learned one (T5, SwinV2)."""
    return score + BUCKET_BIAS[BUCKETS[q_idx, kv_idx], h]


def leaky(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.where(score > 0, score, 0.1 * score).masked_fill(q_idx + 3 < kv_idx, float("-inf"))


def distance(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Euclidean, with floats on the way that stay integers."""
    dy = (torch.div(q_idx, W, rounding_mode="floor") - kv_idx // W).double()
    dx = torch.remainder(q_idx, W).to(torch.float64) - torch.fmod(kv_idx, W)
    return score - (dy.square() + dx * dx).sqrt() / 3 + torch.sigmoid(score).log1p() - torch.rsqrt(1.0 + dx.pow(2))


def documents_twice(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """The same integers decide the score here, and the mask in `document`."""
    return score - (DOCUMENT[b, q_idx] - DOCUMENT[b, kv_idx]).abs() * 0.5 + (DOCUMENT[b, q_idx] == 1) * 0.25


CASES: list[tuple[Mod | None, Mod | None]] = [
    *((None, m) for m in (causal, sliding, document, prefix_lm, natten, dilated, windows, video, by_head, lengths, dense_mask)),
    *((s, None) for s in (alibi, slopes, relative, counted_from_the_end, soft_cap, temperature, buckets, leaky, distance)),
    (relative, natten),
    (slopes, document),
    (documents_twice, document),
    (soft_cap, theirs.and_masks(sliding, document)),
    (None, theirs.or_masks(sliding, document)),
    (buckets, flex.or_masks(natten, causal)),
    (alibi, flex.and_masks(natten, flex.or_masks(causal, document))),
]
LEARNED = [BIAS, SLOPES, TEMPERATURE, BUCKET_BIAS]


def named(case: tuple[Mod | None, Mod | None]) -> str:
    return "-".join(getattr(m, "__name__", "none") for m in case)


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_mods_in_use(case: tuple[Mod | None, Mod | None], backend: str) -> None:
    agree(*case, backend, LEARNED)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
@pytest.mark.parametrize("case", [(relative, natten), (buckets, None), (documents_twice, by_head)], ids=named)
def test_mods_on_the_cpu(case: tuple[Mod | None, Mod | None]) -> None:
    agree(*case, "cpp", LEARNED)


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_mods_in_interpreted_triton() -> None:
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, test_compat_flex as t
from attnc.compat import flex
for score_mod, mask_mod in ((t.relative, t.natten), (t.buckets, t.causal), (t.documents_twice, t.document)):
    x = [torch.randn(2, 4, t.N, 8).requires_grad_() for _ in range(3)]
    wanted = [u.detach().double().requires_grad_() for u in x]
    out = flex.flex_attention(*x, score_mod, mask_mod, scale=0.4, backend="triton")
    true = t.definition(*wanted, score_mod, mask_mod, 0.4)[0]
    torch.testing.assert_close(out.double(), true, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(out)
    table = [u for u in t.LEARNED if score_mod is not t.documents_twice][:4]
    grads = torch.autograd.grad(out, [*x, *table], g, allow_unused=True)
    expected = torch.autograd.grad(true, [*wanted, *table], g.double(), allow_unused=True)
    for a, b in zip(grads, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
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


# --------------------------------------------------------------------------------------------------------------------- structure
@pytest.mark.parametrize(
    ("mask_mod", "grid", "strategy"),
    [
        (causal, (N,), "banded"),
        (sliding, (N,), "banded"),
        (prefix_lm, (N,), "banded"),
        (natten, (6, 8), "banded"),
        (dilated, (6, 8), "banded"),
        (windows, (6, 8), "grouped"),
        (video, (4, 3, 4), "banded"),
        (by_head, (N,), "banded + banded"),
        (document, (N,), "dense"),
        (lambda b, h, q, k: q // 16 == k // 16, (N,), "grouped"),
        (lambda b, h, q, k: q % 16 == k % 16, (N,), "grouped"),
        (lambda b, h, q, k: q // 7 == k // 7, (N,), "grouped"),
        (lambda b, h, q, k: (q // 5 - k // 5).abs() + (q % 5 - k % 5).abs() < 3, (N,), "dense"),  # 5 does not divide 48
    ],
)
def test_structure_that_is_found(mask_mod: Mod, grid: tuple[int, ...], strategy: str) -> None:
    mods = flex.trace(mask_mod=mask_mod, Q_LEN=N, B=B, H=H)
    assert mods.grid == grid
    found = subject(mods.pattern, grid=mods.grid, heads=H)
    assert found.strategy == strategy
    agree(None, mask_mod, "torch")


def test_structured_masks_leave_no_predicate() -> None:
    for mask_mod in (causal, sliding, prefix_lm, natten, dilated, windows, video):
        mods = flex.trace(mask_mod=mask_mod, Q_LEN=N)
        (part,) = subject(mods.pattern, grid=mods.grid).parts
        assert part.structure.residual == ir.TRUE, mask_mod.__name__


def test_soft_caps_with_a_mask_inside_have_its_structure() -> None:
    mods = flex.trace(soft_cap, Q_LEN=N)
    (part,) = subject(mods.pattern, grid=mods.grid).parts
    assert (part.structure.strategy, part.structure.residual) == ("banded", ir.TRUE)
    assert ir.show(part.attend.score) == "tanh(SCORE / 2.0) * 2.0"


def test_cross_attention_between_grids_of_one_width() -> None:
    def near(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((q_idx // W * 2 - kv_idx // W).abs() <= 1) & ((q_idx % W - kv_idx % W).abs() <= 1)

    mods = flex.trace(mask_mod=near, Q_LEN=24, KV_LEN=48)
    assert (mods.grid, mods.kv_grid) == ((3, 8), (6, 8))
    agree(None, near, "torch", shape=(1, 2, 2, 24, 48))
    agree(None, causal, "torch", shape=(1, 2, 1, 24, 48))


# ------------------------------------------------------------------------------------------------------------------------- masks
def rows(n: int = N, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, n, 6, generator=g, dtype=dtype) for _ in range(3)]


def test_block_masks_are_torchs_or_ours_or_a_mod() -> None:
    x = rows()
    wanted, _ = definition(*x, None, sliding, 6**-0.5)
    for mask in (
        theirs.create_block_mask(sliding, None, None, N, N, device="cpu", BLOCK_SIZE=16),
        theirs.create_block_mask(sliding, B, H, N, N, device="cpu", BLOCK_SIZE=(8, 16), separate_full_blocks=False),
        flex.create_block_mask(sliding, B, None, N, N),
        sliding,
    ):
        torch.testing.assert_close(flex.flex_attention(*x, block_mask=mask, backend="torch"), wanted)
    torch.testing.assert_close(flex.flex_attention(*x, mask_mod=sliding, backend="torch"), wanted)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:return_lse is deprecated")
def test_torchs_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that users call, run eagerly: outputs and lse, no keys for some rows."""
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    x = rows()
    with torch.no_grad():
        for score_mod, mask_mod in ((relative, natten), (alibi, lambda b, h, q, k: q > k + 3), (soft_cap, document)):
            mask = theirs.create_block_mask(mask_mod, B, H, N, N, device="cpu")
            wanted = theirs.flex_attention(*x, score_mod, mask, return_lse=True)
            torch.testing.assert_close(flex.flex_attention(*x, score_mod, mask, return_lse=True, backend="torch"), wanted)


def test_lists_of_blocks_that_say_more_than_the_mod_count() -> None:
    """BlockMask.from_kv_blocks: full blocks are allowed as a whole, partial ones where the mod says so, others not."""
    size, n = 16, 48
    full = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.int32)
    partial = torch.tensor([[0, 1, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.int32)

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        return blocks.sum(-1, dtype=torch.int32)[None, None], torch.argsort(blocks, dim=-1, descending=True, stable=True).int()[
            None, None
        ]

    mask = theirs.BlockMask.from_kv_blocks(*ordered(partial), *ordered(full), BLOCK_SIZE=size, mask_mod=causal)
    wide = [t.repeat_interleave(size, 0).repeat_interleave(size, 1).bool() for t in (full, partial)]
    allowed = wide[0] | (wide[1] & torch.ones(n, n).tril().bool())
    x = rows()
    out = flex.flex_attention(*x, block_mask=mask, backend="torch")
    score = (x[0] @ x[1].transpose(-1, -2) * 6**-0.5).masked_fill(~allowed, -math.inf)
    torch.testing.assert_close(out, score.softmax(-1).nan_to_num(0.0) @ x[2])


def test_keys_of_one_batch_item_serve_all() -> None:
    q, k, v = rows()
    mask = flex.create_block_mask(causal, None, None, N, N)
    out = flex.flex_attention(q, k[:1], v[:1], block_mask=mask, backend="torch")
    torch.testing.assert_close(out, definition(q, k[:1], v[:1], None, causal, 6**-0.5)[0])


def test_auxiliary_outputs() -> None:
    x = rows()
    out, aux = flex.flex_attention(*x, mask_mod=causal, return_aux=theirs.AuxRequest(lse=True), backend="torch")
    wanted = definition(*x, None, causal, 6**-0.5)
    torch.testing.assert_close((out, aux.lse), wanted)
    out, aux = flex.flex_attention(*x, return_aux=theirs.AuxRequest(), backend="torch")
    assert aux == theirs.AuxOutput()


def test_captures_of_every_kind() -> None:
    """Parameters of modules, partial arguments, callable objects, numpy numbers, tables with room for more heads."""

    class Bias(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(learned(16, 3).detach())

        def forward(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            assert isinstance(q_idx, Tensor)
            assert score.dtype.is_floating_point
            assert q_idx.shape == ()
            return score + self.table[h, (q_idx - kv_idx) % 3].to(score.dtype)

    module = Bias()
    agree(module, functools.partial(lambda reach, b, h, q, k: (q - k).abs() <= reach, 4), "torch", [module.table])
    few = torch.tensor([3])
    agree(None, lambda b, h, q, k: q + few[0] >= k, "torch")


def test_rows_of_a_table_are_indexed_later() -> None:
    """torch's own backward cannot do this, so it is held to the same indices in one pair of brackets."""

    def later(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        mine = BIAS[h]
        near = mine[q_idx % 5][kv_idx % 3] + mine[3, q_idx % 2]
        return score + near + BIAS[:, 2:, 1][h][q_idx % 4] + BIAS[..., h, 2][0]

    def at_once(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        more = BIAS[h, q_idx % 4 + 2, 1] + BIAS[0, h, 2]
        return score + BIAS[h, q_idx % 5, kv_idx % 3] + BIAS[h, 3, q_idx % 2] + more

    x = rows()
    found = []
    for mod in (later, at_once):
        out = flex.flex_attention(*x, mod, backend="torch")
        found.append([out, torch.autograd.grad(out.square().sum(), BIAS)[0]])
    torch.testing.assert_close(*found)


def test_traced_mods_are_patterns() -> None:
    mods = flex.trace(relative, natten, Q_LEN=N, H=H)
    assert list(mods.tables) == ["captured0"]
    assert mods.tables["captured0"] is BIAS
    text = attnc.explain(mods.pattern, grid=mods.grid, heads=H)
    assert "flex(relative, natten) on (6x8): banded" in text
    x = rows()
    op = attnc.compile(mods.pattern, grid=mods.grid, backend="torch")
    out = torch.compile(lambda *a: op(*a, **mods.tables), backend="aot_eager", fullgraph=True)(*x)
    torch.testing.assert_close(out, flex.flex_attention(*x, relative, natten, backend="torch"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it where a graph breaks
def test_a_compiled_function_breaks_its_graph_there() -> None:
    x = rows()

    def f(q: Tensor) -> Tensor:
        out: Tensor = flex.flex_attention(q * 2, q, q, slopes, causal, backend="torch").sin()
        return out

    torch.testing.assert_close(torch.compile(f, backend="aot_eager")(x[0]), f(x[0]))
