"""FreeSwim: parameter counts, the branches beside their equations, cached passes, the sampler. Goldens: test_goldens.py."""

from __future__ import annotations

import math
from typing import Any

import model_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, load_official
from attnc.models.freeswim import CrossAttention, SelfAttention, place_of, refine

PARAMETERS = {"freeswim_wan_1_3b": 1_418_996_800, "freeswim_wan_14b": 14_288_491_584}
SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 2,
    "out_channels": 3,
    "text_dim": 5,
    "freq_dim": 6,
    "ffn_dim": 12,
    "num_layers": 2,
    "d_h": 1,
    "d_w": 2,
    "backend": "torch",
}
TINY: dict[str, Any] = {**SMALL, "num_layers": 1, "out_channels": 2}


def small(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return create_model("freeswim_wan_1_3b", **{**SMALL, **overrides})


def inputs(size: tuple[int, int, int] = (2, 8, 10), batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 2, *size, generator=g)
    return latents, torch.randn(1, 3, 5, generator=g), torch.full((batch,), 637.0)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert checks.count(name) == PARAMETERS[name]


@pytest.mark.parametrize("size", [(1, 1), (5, 6), (3, 9), (4, 4)])
@pytest.mark.parametrize("reach", [(0, 1), (1, 2), (3, 1), (2, 4)])
def test_window_is_the_papers(size: tuple[int, int], reach: tuple[int, int]) -> None:
    def allowed(p: int, at: int, n: int, d: int) -> bool:
        return p - d - max(d + p - n + 1, 0) <= at <= p + d + max(d - p, 0)

    (height, width), (d_h, d_w) = size, reach
    found = attnc.mask(attnc.patterns.inward_window(reach).on("y", "x"), grid=(2, height, width))[0]
    frame = height * width
    for q in range(frame):
        for k in range(frame):
            here = allowed(q // width, k // width, height, d_h) and allowed(q % width, k % width, width, d_w)
            assert bool(found[q, k]) == bool(found[q + frame, k]) == bool(found[q, k + frame]) == here
    assert torch.equal(found, attnc.mask(attnc.patterns.neighborhood((2 * d_h + 1, 2 * d_w + 1)).on("y", "x"), grid=(2, *size))[0])


def test_window_is_proved_from_the_papers_formula() -> None:
    text = attnc.explain(attnc.patterns.inward_window((15, 26)).on("y", "x"), grid=(3, 68, 120))
    assert "Strategy: banded" in text
    assert "lo(j) = max(0, min(j - 15, ny - 31))" in text
    assert "hi(j) = min(nx - 1, max(52, j + 26))" in text


def rotary(x: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Rotated pair by pair, ``[B, N, h, d]``."""
    d = x.shape[3]
    side = 2 * (d // 6)
    axes = [(0, d - 2 * side), (1, side), (2, side)]
    out = x.clone()
    for n in range(x.shape[1]):
        place = (n // (sizes[1] * sizes[2]), n // sizes[2] % sizes[1], n % sizes[2])
        first = 0
        for axis, channels in axes:
            for i in range(channels // 2):
                angle = place[axis] * 10000 ** (-2 * i / channels)
                a, b = x[:, n, :, first + 2 * i], x[:, n, :, first + 2 * i + 1]
                out[:, n, :, first + 2 * i] = a * math.cos(angle) - b * math.sin(angle)
                out[:, n, :, first + 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
            first += channels
    return out


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def projected(attention: Any, x: Tensor, which: str) -> Tensor:
    rows = getattr(attention, f"to_{which}")(x)
    if which != "v":
        rows = rms(rows, getattr(attention, f"norm_{which}").weight, 1e-6)
    return rows.unflatten(2, (attention.heads, -1))


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None = None) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@pytest.mark.parametrize(
    ("dim", "heads", "sizes", "reach"), [(24, 2, (2, 5, 4), (1, 1)), (16, 4, (3, 2, 6), (2, 1)), (14, 1, (1, 7, 3), (0, 2))]
)
def test_self_attention_is_its_equation(dim: int, heads: int, sizes: tuple[int, int, int], reach: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(dim, heads, *reach, backend="torch").double()
    nn.init.normal_(attention.norm_q.weight)
    x = torch.randn(4, math.prod(sizes), dim, dtype=torch.float64, requires_grad=True)
    q, k, v = (projected(attention, x, which) for which in "qkv")
    q, k = rotary(q, sizes), rotary(k, sizes)
    scale = math.sqrt(math.log(30 * 52 * 2) / math.log(30 * 52) / (dim // heads))
    allowed = attnc.mask(attnc.patterns.inward_window(reach).on("y", "x"), grid=sizes)[0]
    near, far = dense(q[:2], k[:2], v[:2], scale, allowed), dense(q[2:], k[2:], v[2:], scale)
    expected = attention.to_out[0](torch.cat([near, far]).flatten(2))
    place = place_of(sizes, dim // heads, 10000.0, x)
    out = attention(x, place)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    leaves = [x, *attention.parameters()]
    for found, wanted in zip(torch.autograd.grad(out, leaves, weight), torch.autograd.grad(expected, leaves, weight), strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(attention(x, place, window_only=True), expected[:2].repeat(2, 1, 1))


def test_cross_attention_is_its_equation() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(12, 3, backend="torch").double()
    x, text = torch.randn(4, 7, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    k, v = projected(attention, text, "k"), projected(attention, text, "v")
    for window_only, mine in ((False, x[2:]), (True, x[:2])):
        read = dense(projected(attention, mine, "q"), k, v, 4**-0.5)
        out, kept = attention(x, text, window_only=window_only)
        torch.testing.assert_close(kept, read)
        torch.testing.assert_close(out, attention.to_out[0](read.flatten(2)).repeat(2, 1, 1))
    out, kept = attention(x, text, kept=k[:, :1].expand(-1, 7, -1, -1))
    torch.testing.assert_close(out, attention.to_out[0](kept.flatten(2)).repeat(2, 1, 1))
    torch.testing.assert_close(attention(x, text[:1])[0], attention(x, text[:1].expand(2, -1, -1))[0])


@torch.no_grad()
def described(model: Any, latents: Tensor, text: Tensor, timestep: Tensor, which: str, kept: list[Tensor]) -> Tensor:
    """One pass by the paper's steps; `kept` is read where which is "reuse", and filled otherwise."""
    dim, (frames, height, width) = 16, (latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)
    half = len(latents) // 2
    embedder = model.condition_embedder
    rate = torch.tensor([math.exp(-math.log(10000) * i / 3) for i in range(3)])
    angle = timestep[:, None] * rate
    time = embedder.time_embedder.linear_1(torch.cat([angle.cos(), angle.sin()], 1))
    time = embedder.time_embedder.linear_2(F.silu(time))
    modulation = embedder.time_proj(F.silu(time)).view(-1, 6, dim)
    text = embedder.text_embedder.linear_2(F.gelu(embedder.text_embedder.linear_1(text), approximate="tanh"))
    patches = latents.unfold(3, 2, 2).unfold(4, 2, 2)  # B c T H W 2 2
    weight = model.patch_embedding.weight[:, :, 0]
    x = torch.einsum("bcthwyx,dcyx->bthwd", patches, weight).flatten(1, 3) + model.patch_embedding.bias
    place = place_of((frames, height, width), 8, 10000.0, x)
    for i, block in enumerate(model.blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + modulation).unbind(1)
        h = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1[:, None]) + shift1[:, None]
        x = x + gate1[:, None] * block.attn1(h, place, window_only=which != "dual")
        h = F.layer_norm(x, (dim,), block.norm2.weight, block.norm2.bias, 1e-6)
        if which != "reuse":
            rows = projected(block.attn2, h[:half] if which == "window" else h[half:], "q")
            found = dense(rows, *(projected(block.attn2, text.expand(half, -1, -1), w) for w in "kv"), 8**-0.5)
            kept.append(found)
        x = x + block.attn2.to_out[0](kept[i].flatten(2)).repeat(2, 1, 1)
        h = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale2[:, None]) + shift2[:, None]
        x = x + gate2[:, None] * block.ffn.net[2](F.gelu(block.ffn.net[0].proj(h), approximate="tanh"))
    shift, scale = (model.scale_shift_table + time[:, None]).unbind(1)
    x = model.proj_out(F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
    out = torch.empty(len(latents), 3, frames, 2 * height, 2 * width)
    for n in range(x.shape[1]):
        t, y, z = n // (height * width), n // width % height, n % width
        out[:, :, t, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2] = x[:, n].view(-1, 2, 2, 3).permute(0, 3, 1, 2)
    return out


@pytest.mark.parametrize(("size", "batch"), [((2, 6, 10), 2), ((1, 8, 4), 4)])
def test_passes_are_the_described_ones(size: tuple[int, int, int], batch: int) -> None:
    model = small().eval()
    latents, text, timestep = inputs(size, batch)
    other = inputs(size, batch)[0].flip(3)
    kept: list[Tensor] = []
    expected = described(model, latents, text, timestep, "dual", kept)
    sample, read = model.refresh(latents, text, timestep)
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(sample, expected, **close)
    torch.testing.assert_close(model(latents, text, timestep), sample)
    for found, wanted in zip(read, kept, strict=True):
        torch.testing.assert_close(found, wanted, **close)
    torch.testing.assert_close(
        model.reuse(other, text, timestep, read), described(model, other, text, timestep, "reuse", kept), **close
    )
    torch.testing.assert_close(
        model.window_only(other, text, timestep), described(model, other, text, timestep, "window", []), **close
    )


def test_sampler() -> None:
    """Times are shifted, the flow is guided, both branches run in every second step, and the window branch's latents are kept."""
    model = small(**TINY).eval()
    base, text, _ = inputs((1, 4, 6), 1)
    empty = torch.zeros(1, 2, 5)
    generator = torch.Generator().manual_seed(3)
    found = refine(model, base, text, empty, steps=5, strength=0.6, shift=3.0, guidance=2.0, generator=generator)
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(3))
    times = [3 * t / (1 + 2 * t) for t in (0.6, 0.4, 0.2, 0.0)]
    x, kept = (1 - times[0]) * base + times[0] * noise, []
    with torch.no_grad():
        for i in range(3):
            both, at = torch.cat([x, x]), torch.full((2,), 1000 * times[i])
            if i == 1:
                flow = model.reuse(both, text, at, kept)
            else:
                flow, kept = model.refresh(both, text, at)
            idle = model.window_only(both, empty, at)
            x = x + (times[i + 1] - times[i]) * (idle + 2 * (flow - idle))[:1]
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)
    plain = refine(model, base, text, empty, steps=2, cache_steps=None, generator=torch.Generator().manual_seed(3))
    assert plain.shape == base.shape
    assert bool(plain.isfinite().all())


def test_training_lowers_the_loss() -> None:
    model = small()
    latents, text, timestep = inputs()
    target = torch.randn(2, 3, 2, 8, 10, generator=torch.Generator().manual_seed(3))
    checks.check_training(_Bound(model, text, timestep), latents, target, steps=20, lr=1e-2)


class _Bound(nn.Module):
    """The model of latents alone."""

    def __init__(self, model: nn.Module, text: Tensor, timestep: Tensor) -> None:
        super().__init__()
        self.model, self.text, self.timestep = model, text, timestep

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.model(latents, self.text, self.timestep)
        return out


def bound(**overrides: Any) -> nn.Module:
    _, text, timestep = inputs()
    return _Bound(small(**overrides), text, timestep)


def test_checkpointing() -> None:
    checks.check_checkpointing(bound, inputs()[0])


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_autocast(backend: str) -> None:
    checks.check_autocast(bound(backend=backend), inputs()[0])


def test_half_precision_model() -> None:
    """All weights in bfloat16: norms and modulation are still computed in float32, and the sample is bfloat16."""
    model = small().eval()
    latents, text, timestep = inputs()
    exact = model(latents, text, timestep)
    low = model.bfloat16()(latents.bfloat16(), text.bfloat16(), timestep)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


def test_torch_compile() -> None:
    checks.check_compiles(bound(), inputs()[0])


def test_official_inputs_that_follow_from_the_config() -> None:
    attention = SelfAttention(12, 2, 1, 1, backend="torch").eval()
    config = {"dim": 12, "heads": 2, "T": 1, "H": 3, "W": 4, "d_h": 1, "d_w": 1, "eps": 1e-6, "rope_theta": 10000.0}
    loaded = load_official("freeswim", "WanAttention + WanFlexAttnProcessor_", config, attention.state_dict(), backend="torch")
    x = torch.randn(2, 12, 12)
    torch.testing.assert_close(
        loaded(x=x, rope_cos=None, rope_sin=None, window_mask=None), attention(x, place_of((1, 3, 4), 6, 10000.0, x))
    )


def test_wrong_arguments() -> None:
    with pytest.raises(DeclarationError, match="rotary positions need an even number"):
        small(attention_head_dim=7)
    with pytest.raises(DeclarationError, match="does not divide dim = 10"):
        CrossAttention(10, 3)
    with pytest.raises(ShapeError, match="an even number of them"):
        small()(*inputs(batch=3))
    with pytest.raises(ShapeError, match="in whole patches"):
        small()(*inputs((2, 7, 10)))
    with pytest.raises(DeclarationError, match="lies in"):
        refine(small(), torch.zeros(1, 2, 1, 2, 2), torch.zeros(1, 1, 5), torch.zeros(1, 1, 5), strength=0.0)
