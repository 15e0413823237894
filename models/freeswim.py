"""FreeSwim: videos of ultra-high resolution from a video transformer trained on smaller ones (Wu et al. 2025, arXiv:2511.14712).

Nothing is trained. Every latent runs twice through Wan2.1's diffusion transformer: in the window branch a token attends to as large
a window of its frame as the model was trained on, in every frame; in the full branch to everything, and what the full branch reads
from the text overrides that of the window branch, which keeps the whole picture in order. Names are those of diffusers' Wan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.relative_window import check_heads
from attnc.models.blocks.rotary import grid_angles, rotate
from attnc.models.official import official
from attnc.models.registry import variants

# "dual": both branches, the text read by the full one. "reuse": the window branch in the place of both, the text as read before.
# "window": the window branch in the place of both, which reads the text itself.
Pass = Literal["dual", "reuse", "window"]
TRAINED, BASE = 30 * 52 * 2, 30 * 52  # tokens whose logarithms set the scale of self-attention


@cache  # layers share operators
def window_operator(d_h: int, d_w: int, backend: str) -> attnc.Operator:
    """Inward windows in space, every frame in time, on ``[B, T, H, W, h, d]``."""
    pattern = attnc.patterns.inward_window((d_h, d_w)).on("y", "x")
    return attnc.compile(pattern, layout="b t y x h d", backend=backend)


@cache
def full_operator(backend: str) -> attnc.Operator:
    """Attention of tokens to others, on q ``[B, N, h, d]`` and k, v ``[B, M, h, d]``."""
    return attnc.compile(attnc.patterns.full(), grid={"x": None}, kv_grid=(None,), layout="b x h d", backend=backend)


class RowNorm(nn.RMSNorm):
    """RMSNorm, computed in float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


class WanAttention(nn.Module):
    """The projections of Wan's attentions; q and k are normalised over all heads together.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(self, dim: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = (RowNorm(dim, eps) for _ in range(2))

    def queries(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, h, d]``."""
        return torch.unflatten(self.norm_q(self.to_q(x)), 2, (self.heads, -1))

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[B, N, C] -> [B, N, h, d]``."""
        k, v = self.norm_k(self.to_k(x)), self.to_v(x)
        return k.unflatten(2, (self.heads, -1)), v.unflatten(2, (self.heads, -1))

    def out(self, mixed: Tensor) -> Tensor:
        """``[B, N, h, d] -> [B, N, C]``."""
        return cast(Tensor, self.to_out[0](mixed.flatten(2)))


Place = tuple[
    tuple[int, int, int], Tensor, Tensor
]  # frames, rows and columns; cosines and sines of the tokens' angles [N, 1, d / 2]


def place_of(sizes: tuple[int, int, int], head_dim: int, theta: float, x: Tensor) -> Place:
    """Rotary positions of a grid for heads of `head_dim` channels: a third of them turns with the row, a third with the column."""
    side = 2 * (head_dim // 6)
    angles = grid_angles(sizes, (head_dim - 2 * side, side, side), theta, x.device).flatten(0, 2)[:, None]
    return sizes, angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class SelfAttention(WanAttention):
    """Two branches, one after the other in the batch: inward windows, and everything.

    softmax(q k^T sqrt(ln(3120) / ln(1560) / d)) v with rotary positions, in both.

    Args:
        dim, heads, eps: channels, heads, and epsilon of the norms.
        d_h, d_w: how far a window of 2 d_h + 1 by 2 d_w + 1 tokens reaches.
        backend: of the attnc operators.
    """

    def __init__(self, dim: int, heads: int, d_h: int, d_w: int, eps: float = 1e-6, *, backend: str = "auto") -> None:
        super().__init__(dim, heads, eps)
        if (dim // heads) % 2:
            raise DeclarationError(f"{heads} heads of {dim // heads} channels: rotary positions need an even number")
        self.scale = math.sqrt(math.log(TRAINED) / math.log(BASE) / (dim // heads))
        self.near, self.far = window_operator(d_h, d_w, backend), full_operator(backend)

    def forward(self, x: Tensor, place: Place, *, window_only: bool = False) -> Tensor:
        """``[2B, N, C] -> [2B, N, C]``; `window_only`: the window branch's result for both."""
        sizes, cos, sin = place
        half = len(x) // 2
        x = x[:half] if window_only else x
        q, (k, v) = self.queries(x), self.keys(x)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        near = self.near(*(torch.unflatten(t[:half], 1, sizes) for t in (q, k, v)), scale=self.scale).flatten(1, 3)
        if window_only:
            return self.out(near).repeat(2, 1, 1)
        far = self.far(*(t[half:] for t in (q, k, v)), scale=self.scale)
        return self.out(torch.cat([near, far]))


class CrossAttention(WanAttention):
    """Attention to the text, from the queries of one branch, for both.

    Args:
        dim, heads, eps: see `SelfAttention`.
        backend: of the attnc operator.
    """

    def __init__(self, dim: int, heads: int, eps: float = 1e-6, *, backend: str = "auto") -> None:
        super().__init__(dim, heads, eps)
        self.attend = full_operator(backend)

    def forward(self, x: Tensor, text: Tensor, *, window_only: bool = False, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[2B, N, C] -> [2B, N, C]``, and what was read from the text ``[B or 1, M, C]`` before the projection, ``[B, N, h, d]``.

        It is read by the full branch, by the window branch if `window_only`, or not at all if it was `kept` from an earlier step.
        """
        if kept is None:
            half = len(x) // 2
            k, v = self.keys(text.expand(half, -1, -1))
            kept = self.attend(self.queries(x[:half] if window_only else x[half:]), k, v)
        return self.out(kept).repeat(2, 1, 1), kept


class WideNorm(nn.LayerNorm):
    """LayerNorm, computed in float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``, in the dtype it was computed in."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps)


class Hidden(nn.Module):
    """The first layer of a feed-forward: a linear map and the GELU's approximation by tanh."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., hidden]``."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear C -> hidden, GELU, Linear hidden -> C."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Hidden(dim, hidden), nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``."""
        return cast(Tensor, self.net(x))


class Block(nn.Module):
    """Self-attention, the text, and a feed-forward layer; the time of diffusion shifts, scales and gates the first and the last.

    Args:
        dim, ffn_dim, heads: channels, hidden channels, heads.
        d_h, d_w, eps: see `SelfAttention`.
        cross_attn_norm: whether the text is read from normalised tokens.
        backend: of the attnc operators.
    """

    def __init__(
        self, dim: int, ffn_dim: int, heads: int, d_h: int, d_w: int, eps: float, cross_attn_norm: bool, *, backend: str
    ) -> None:
        super().__init__()
        self.norm1 = WideNorm(dim, eps, elementwise_affine=False)
        self.attn1 = SelfAttention(dim, heads, d_h, d_w, eps, backend=backend)
        self.attn2 = CrossAttention(dim, heads, eps, backend=backend)
        self.norm2 = WideNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, ffn_dim)
        self.norm3 = WideNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, text: Tensor, time: Tensor, place: Place, which: Pass, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x ``[2B, N, C]``, text ``[B or 1, M, C]``, time ``[2B, 6, C]`` to x and what was read from the text ``[B, N, h, d]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + time).unsqueeze(2).unbind(1)
        h = (self.norm1(x) * (1 + scale1) + shift1).to(x.dtype)
        x = (x + gate1 * self.attn1(h, place, window_only=which != "dual")).to(x.dtype)
        read, kept = self.attn2(self.norm2(x).to(x.dtype), text, window_only=which == "window", kept=kept)
        x = x + read
        h = (self.norm3(x) * (1 + scale2) + shift2).to(x.dtype)
        return (x + gate2 * self.ffn(h)).to(x.dtype), kept


class TwoLayers(nn.Module):
    """Linear, an activation, Linear."""

    def __init__(self, before: int, dim: int, act: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(before, dim)
        self.act = act
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., before] -> [..., C]``."""
        return cast(Tensor, self.linear_2(self.act(self.linear_1(x))))


class Condition(nn.Module):
    """The time of diffusion as a vector and as the blocks' modulation, and the text in the model's channels."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayers(text_dim, dim, nn.GELU("tanh"))

    def forward(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """timestep ``[2B]``, text ``[B or 1, M, text_dim]`` to ``[2B, C]``, ``[2B, 6, C]`` and ``[B or 1, M, C]``."""
        wide = torch.promote_types(text.dtype, torch.float32)
        half = self.freq_dim // 2
        rate = torch.exp(torch.arange(half, dtype=wide, device=timestep.device) * (-math.log(10000) / half))
        angle = timestep.to(wide)[:, None] * rate
        time = self.time_embedder(torch.cat([angle.cos(), angle.sin()], -1).to(text.dtype))
        return time, self.time_proj(F.silu(time)).unflatten(1, (6, -1)), self.text_embedder(text)


class Step(NamedTuple):
    """One pass of the transformer: its sample, and for each block what was read from the text."""

    sample: Tensor
    kept: list[Tensor]


WAN: dict[str, Any] = {"attention_head_dim": 128}


@variants(
    freeswim_wan_1_3b={**WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "d_h": 15, "d_w": 26},
    # its base videos have 720 x 1280 pixels, 45 x 80 tokens
    freeswim_wan_14b={**WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "d_h": 22, "d_w": 40},
)
class FreeSwim(nn.Module):
    """Wan2.1's diffusion transformer in two branches, for latents ``[2B, in_channels, T, H, W]``: B of the window branch, then B.

    Args:
        patch_size: frames, rows and columns of latents in a token.
        num_attention_heads, attention_head_dim: heads, and channels of each.
        in_channels, out_channels: of the latents, and of the sample.
        text_dim, freq_dim: channels of the text, and of the sinusoids of time.
        ffn_dim, num_layers: hidden channels, and blocks.
        cross_attn_norm: whether the text is read from normalised tokens.
        eps: of the norms.
        d_h, d_w: how many tokens a window reaches up and down, left and right: half of the frame that the model was trained on.
        rope_theta: of the rotary positions.
        grad_checkpointing: recompute each block in the backward.
        backend: of the attnc operators.

    Raises:
        DeclarationError: heads have an odd number of channels.
    """

    def __init__(
        self,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        d_h: int = 15,
        d_w: int = 26,
        rope_theta: float = 10000.0,
        *,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.patch = (patch_size[0], patch_size[1], patch_size[2])
        self.head_dim, self.out_channels, self.rope_theta = attention_head_dim, out_channels, rope_theta
        self.grad_checkpointing = grad_checkpointing
        self.patch_embedding = nn.Conv3d(in_channels, dim, self.patch, self.patch)
        self.condition_embedder = Condition(dim, freq_dim, text_dim)
        self.blocks = nn.ModuleList(
            Block(dim, ffn_dim, num_attention_heads, d_h, d_w, eps, cross_attn_norm, backend=backend) for _ in range(num_layers)
        )
        self.norm_out = WideNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * math.prod(self.patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """latents ``[2B, c, T, H, W]``, text ``[B or 1, M, text_dim]`` and timestep ``[2B]`` to ``[2B, out_channels, T, H, W]``."""
        return self.refresh(latents, text, timestep).sample

    def refresh(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Step:
        """`forward`, and what each block read from the text, for `reuse`."""
        return self._run(latents, text, timestep, "dual", None)

    def reuse(self, latents: Tensor, text: Tensor, timestep: Tensor, kept: list[Tensor]) -> Tensor:
        """The window branch in the place of both, with what was read from the text in an earlier step."""
        return self._run(latents, text, timestep, "reuse", kept).sample

    def window_only(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """The window branch in the place of both, which reads the text itself: for the empty text of guidance."""
        return self._run(latents, text, timestep, "window", None).sample

    def _run(self, latents: Tensor, text: Tensor, timestep: Tensor, which: Pass, kept: list[Tensor] | None) -> Step:
        batch, sizes = len(latents), tuple(n // p for n, p in zip(latents.shape[2:], self.patch, strict=True))
        if batch % 2 or any(n % p for n, p in zip(latents.shape[2:], self.patch, strict=True)):
            raise ShapeError(
                f"FreeSwim: latents {list(latents.shape)}: an even number of them, those of the window branch first, in whole "
                f"patches of {self.patch}"
            )
        x = cast(Tensor, self.patch_embedding(latents)).flatten(2).transpose(1, 2)
        place = place_of((sizes[0], sizes[1], sizes[2]), self.head_dim, self.rope_theta, x)
        time, modulation, text = self.condition_embedder(timestep, text)
        read = []
        for i, block in enumerate(self.blocks):
            arguments = (x, text, modulation, place, which, None if kept is None else kept[i])
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, found = cast("tuple[Tensor, Tensor]", checkpoint(block, *arguments, use_reentrant=False))
            else:
                x, found = block(*arguments)
            read.append(found)
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, 1)
        x = self.proj_out((self.norm_out(x) * (1 + scale) + shift).to(x.dtype))
        x = x.view(batch, *sizes, *self.patch, self.out_channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return Step(x.flatten(6, 7).flatten(4, 5).flatten(2, 3), read)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the blocks' activations for computing them again in the backward."""
        self.grad_checkpointing = enable


@torch.no_grad()
def refine(
    model: FreeSwim,
    base: Tensor,
    text: Tensor,
    empty: Tensor,
    *,
    steps: int = 50,
    strength: float = 0.7,
    shift: float = 9.0,
    guidance: float = 5.0,
    cache_steps: int | None = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents of a video in high resolution from those of its enlarged base video, by Euler steps along the flow.

    Args:
        model: the transformer.
        base: latents of the enlarged video ``[B, c, T, H, W]``.
        text, empty: the prompt's embedding and that of no text, ``[B or 1, M, text_dim]``.
        steps: of the whole flow, of which the last share `strength` is gone, after as much noise.
        shift: of the flow's times: t becomes shift t / (1 + (shift - 1) t).
        guidance: how far the prompt's flow is followed, from that of no text.
        cache_steps: both branches run in each step that this divides, the window branch alone in all others; None: in every step.
        generator: of the noise.

    Raises:
        DeclarationError: an argument is out of range.
    """
    if not 0 < strength <= 1 or steps < 1 or (cache_steps is not None and cache_steps < 1):
        raise DeclarationError(f"refine: {steps=} and {cache_steps=} are at least 1, {strength=} lies in (0, 1]")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[steps - max(1, int(steps * strength)) :]
    times = shift * times / (1 + (shift - 1) * times)
    noise = torch.randn(base.shape, generator=generator, dtype=base.dtype, device=base.device)
    x = float(1 - times[0]) * base + float(times[0]) * noise
    kept: list[Tensor] = []
    for i, (now, then) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        both, at = x.repeat(2, 1, 1, 1, 1), x.new_full((2 * len(x),), 1000 * now)
        if cache_steps is None:
            flow, idle = model(both, text, at), model(both, empty, at)
        else:
            if i % cache_steps:
                flow = model.reuse(both, text, at, kept)
            else:
                flow, kept = model.refresh(both, text, at)
            idle = model.window_only(both, empty, at)
        flow, idle = flow[: len(x)], idle[: len(x)]
        x = x + (then - now) * (idle + guidance * (flow - idle))
    return x


# the frame's size follows from the latents; the processors have no dropout
IGNORED = ("T", "qk_norm", "rope_max_seq_len", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len")


@official("freeswim", "WanAttention + WanFlexAttnProcessor_", ignores=("rope_cos", "rope_sin", "window_mask"))
class _OfficialSelf(SelfAttention):
    """On tokens of a video of T x H x W tokens."""

    def __init__(
        self,
        dim: int,
        heads: int,
        d_h: int,
        d_w: int,
        T: int,
        H: int,
        W: int,
        eps: float = 1e-6,
        patch_size: Sequence[int] = (1, 2, 2),
        rope_theta: float = 10000.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads, d_h, d_w, eps, backend=backend)
        self.sizes, self.theta = (T, H, W), rope_theta

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, place_of(self.sizes, x.shape[2] // self.heads, self.theta, x))


@official("freeswim", "WanAttention + WanCrossAttnProcessor")
class _OfficialCross(CrossAttention):
    """Without what was read."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, text)[0]


@official("freeswim", "WanTransformer3DModel (cache)", ignores=IGNORED)
class _OfficialCached(FreeSwim):
    """A step that reads the text, the next one, and one of guidance."""

    def forward(self, latents: Tensor, latents2: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        first, kept = self.refresh(latents, text, timestep)
        return {
            "sample_refresh": first,
            "sample_reuse": self.reuse(latents2, text, timestep, kept),
            "sample_uncond": self.window_only(latents2, text, timestep),
            "cached0": kept[0],
        }


official("freeswim", "WanTransformer3DModel (nocache)", ignores=IGNORED)(FreeSwim)
