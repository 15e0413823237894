"""Mods of FlexAttention that compare and round floats: thresholds, T5's buckets, time stamps. torch's definition is the truth."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.attention.flex_attention as theirs
from test_compat_flex import DOUBLE, B, H, Mod, N, W, agree, learned, named, rows
from torch import Tensor

import attnc
from attnc.compat import flex
from attnc.compiler import has_compiler


def draw(*shape: int, at: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(at))


GATE = learned(H, N, at=11)
IMPORTANCE, TIME = draw(N, at=12), draw(B, N, at=13) * 10
SLOPES, OFFSET = torch.tensor([0.25, 0.5, 0.125, 0.3]), torch.tensor(0.75)
T5 = learned(32, H, at=14)


def gated(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return GATE[h, q_idx] > 0.5


def faded(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """ALiBi's bias, cut where it gets too low."""
    return (SLOPES[h] * (q_idx - kv_idx) > -3.0) & (q_idx >= kv_idx - 30)


def in_time(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (TIME[b, q_idx] - TIME[b, kv_idx]).abs() < 1.5


def causal_and_heavy(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx >= kv_idx) & (IMPORTANCE[q_idx] + IMPORTANCE[kv_idx] >= OFFSET)


def disk(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    dy, dx = q_idx // W - kv_idx // W, q_idx % W - kv_idx % W
    return torch.sqrt((dy**2 + dx**2).float()) <= 2.5


def same_second(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.floor(TIME[b, q_idx]).to(torch.int32) == TIME[b, kv_idx].int()


def logarithmic(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Keys 2^n back (LogSparse), where log2 is whole; the token itself gives -inf."""
    far = torch.log2((q_idx - kv_idx).clamp_min(0).float())
    return (far == far.round()) | (q_idx == kv_idx)


def rounded(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.round(TIME[b, q_idx] - TIME[b, kv_idx]) % 3 == torch.ceil(IMPORTANCE[kv_idx] * 4) - 2


def remainders(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    x = (TIME[b, q_idx] - 5) * (GATE[h, kv_idx].float() + 0.1)
    return (x % 2.5 < 1.25) | (torch.fmod(x, -1.5) > 0.5) | (x // 0.5 == 3) | (torch.frac(x).clamp(-0.5, 0.5) > 0.25)


def t5(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """transformers' T5Attention._relative_position_bucket, both ways."""
    relative = kv_idx - q_idx
    bucket, relative = torch.where(relative > 0, 16, 0), torch.abs(relative)
    large = 8 + (torch.log(relative.float() / 8) / math.log(128 / 8) * 8).to(torch.long)
    large = torch.minimum(large, torch.full_like(large, 15))
    return score + T5[bucket + torch.where(relative < 8, relative, large), h]


def t5_causal(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    back = -torch.min(kv_idx - q_idx, torch.zeros_like(kv_idx))
    large = 16 + (torch.log(back.float() / 16) / math.log(128 / 16) * 16).to(torch.long)
    return score + T5[torch.where(back < 16, back, torch.clamp(large, max=31)), h]


def later_only(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.where(TIME[b, q_idx] >= TIME[b, kv_idx], score, -math.inf)


def bucket_of_floats(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Floats of both sides make the index of a table, some of them beyond either of its ends."""
    at = torch.floor((TIME[b, q_idx] - TIME[b, kv_idx]) * 1.5).long()
    return score + T5[at.clamp(-9, 9) + 10, h] * torch.where(IMPORTANCE[q_idx] > IMPORTANCE[kv_idx], 1.0, 0.5)


def steps(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Staircases of scores and learned numbers have no slope of their own."""
    return score - torch.floor(score * 2) / 4 + torch.frac(GATE[h, q_idx] * 3) * torch.round(score) + torch.trunc(GATE[h, kv_idx])


CASES: list[tuple[Mod | None, Mod | None]] = [
    *((None, m) for m in (gated, faded, in_time, causal_and_heavy, disk, same_second, logarithmic, rounded, remainders)),
    *((s, None) for s in (t5, t5_causal, later_only, bucket_of_floats, steps)),
    (t5, in_time),
    (bucket_of_floats, flex.and_masks(disk, gated)),
    (later_only, flex.or_masks(causal_and_heavy, faded)),
]


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_floats_that_decide(case: tuple[Mod | None, Mod | None], backend: str) -> None:
    agree(*case, backend, [GATE, T5])


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
@pytest.mark.parametrize("case", [*CASES[2:4], *CASES[7:9], *CASES[12:]], ids=named)
def test_floats_that_decide_on_the_cpu(case: tuple[Mod | None, Mod | None]) -> None:
    agree(*case, "cpp", [GATE, T5])


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_floats_that_decide_in_interpreted_triton() -> None:
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import test_compat_flex_floats as t
for case in (*t.CASES[2:4], *t.CASES[7:9], *t.CASES[12:]):
    t.held(case, "triton")
print("held")
"""
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("held\n")


def held(case: tuple[Mod | None, Mod | None], backend: str) -> None:
    """Output and gradients of float32 calls beside the float64 meaning of the same trace."""
    results = []
    for dtype, by in ((torch.float32, backend), (DOUBLE, "eager")):
        x = [t.detach().to(dtype).requires_grad_() for t in rows()]
        out, lse = flex.flex_attention(*x, case[0], mask_mod=case[1], scale=0.4, return_lse=True, backend=by)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum()
        grads = torch.autograd.grad(loss + torch.where(torch.isfinite(lse), lse, 0.0).sum(), [*x, GATE, T5], allow_unused=True)
        results.append([out, lse, *(torch.zeros(()) if g is None else g for g in grads)])
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), true.double(), rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------- what it is
def relation(mask_mod: Mod) -> str:
    mods = flex.trace(None, mask_mod, Q_LEN=N, H=H, B=B)
    axes = attnc.ir.AXES[len(mods.grid)]
    return attnc.ir.show(mods.pattern.trace(axes).relation, axes)


def test_conditions_on_coordinates_keep_their_structure() -> None:
    assert relation(disk) == "(q.y - k.y) * (q.y - k.y) + (q.x - k.x) * (q.x - k.x) <= 6"
    assert relation(lambda b, h, q, k: torch.log((q - k).abs().float() + 1) < 1.5) == "abs(q.x - k.x) + 1 <= 4"
    assert relation(lambda b, h, q, k: ((q - k) / 3).round() == 1) == "(2 <= q.x - k.x) & (q.x - k.x <= 4)"
    assert relation(lambda b, h, q, k: (q * 0.5).exp() < 0) == "False"
    assert relation(gated) == "listed0[HEAD, q.x] != 0"
    assert relation(in_time) == "abs(captured0[BATCH, q.x] - captured0[BATCH, k.x]) < 1.5"


def test_nothing_of_two_sides_is_listed() -> None:
    mods = flex.trace(None, faded, Q_LEN=512, H=H)
    assert {n: tuple(t.shape) for n, t in mods.tables.items()} == {"listed0": (H, 2 * 512 - 1)}


def test_torch_computes_what_is_listed() -> None:
    """0.1 * 3 <= 0.3 holds in float32 and not in float64; bfloat16 rounds 1.001 to 1."""
    for dtype, least in ((torch.float32, 3), (DOUBLE, 2)):
        tenth = torch.tensor([0.1], dtype=dtype)
        assert relation_allows(lambda b, h, q, k, t=tenth: t[0] * (q - k) <= 0.3, 3) == (least == 3)
    near = torch.tensor([1.001], dtype=torch.bfloat16)
    assert not relation_allows(lambda b, h, q, k: near[q * 0] > 1.0, 3)
    assert relation_allows(lambda b, h, q, k: near.float()[q * 0] + 1e-3 > 1.0, 3)


def relation_allows(mask_mod: Mod, q_idx: int) -> bool:
    """Whether query q_idx of 8 sees key 0."""
    q, k = torch.zeros(1, 1, 8, 1), torch.zeros(1, 1, 8, 1)
    v = torch.zeros(1, 1, 8, 1)
    v[0, 0, 0] = 1
    return bool(flex.flex_attention(q, k, v, mask_mod=mask_mod, backend="torch")[0, 0, q_idx, 0] > 0)


def test_a_table_may_change_between_calls() -> None:
    gate = torch.zeros(8)
    q = torch.randn(1, 1, 8, 4)
    for _ in range(3):
        gate.copy_(torch.randn(8))
        _, lse = flex.flex_attention(q, q, q, mask_mod=lambda b, h, q, k: gate[k] > 0.0, return_lse=True, backend="torch")
        scores = (q @ q.mT / 2).masked_fill(gate <= 0, -math.inf)
        torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_torchs_block_mask_of_floats() -> None:
    block_mask = theirs.create_block_mask(in_time, B, None, N, N, device="cpu", BLOCK_SIZE=16)
    q = torch.randn(B, H, N, 6, dtype=DOUBLE)
    mine = flex.flex_attention(q, q, q, block_mask=block_mask, backend="torch")
    torch.testing.assert_close(mine, flex.flex_attention(q, q, q, mask_mod=in_time, backend="eager"))


def test_rounding_stops_at_two_to_the_thirtieth() -> None:
    """Beyond it, and at no number, torch's own conversions differ from machine to machine."""
    large = torch.tensor([1e12, -1e12, math.nan, 3.7, -3.7])
    mods = flex.trace(lambda s, b, h, q, k: s + large[q].floor().long(), Q_LEN=5)
    assert mods.tables["listed0"].tolist() == [1 << 30, -(1 << 30), -(1 << 30), 3, -4]


def test_what_torch_compares_in_float64_is_not_compared_in_float32() -> None:
    """Unix time in seconds has 31 bits before the point."""
    stamp = torch.arange(N, dtype=DOUBLE) * 0.25 + 1.7e9

    def near(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (stamp[q_idx] - stamp[kv_idx]).abs() <= 1.0

    x = [t.float() for t in rows()]
    with pytest.raises(
        attnc.UnsupportedError, match=r"flex\(near\): the mask decides `abs.* in float64, pair by pair.*take off first"
    ):
        flex.flex_attention(*x, mask_mod=near, backend="torch")
    agree(None, near, "torch")
    since = (stamp - stamp[0]).float()
    mine = flex.flex_attention(*x, mask_mod=lambda b, h, q, k: (since[q] - since[k]).abs() <= 1.0, backend="torch")
    torch.testing.assert_close(mine, flex.flex_attention(*x, mask_mod=lambda b, h, q, k: (q - k).abs() <= 4, backend="torch"))
