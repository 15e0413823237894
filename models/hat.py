"""HAT: Hybrid Attention Transformer for image restoration (Chen et al., CVPR 2023, arXiv:2205.04437 and 2309.05239).

Blocks add window attention and a channel-gated convolution; after each group, windows attend to larger windows
around them, whose part outside the image are zeros that take their share of the softmax. Parameter names are
those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.relative_window import (
    RelativeWindowAttention,
    check_heads,
    check_multiple,
    fitted_window,
    patches,
    relative_table,
)
from attnc.models.blocks.super_resolution import SuperResolution, residual_conv, run_residual_conv
from attnc.models.official import official, tokens
from attnc.models.registry import variants


@cache  # layers share operators
def overlapping_operator(window: int, keys: int, heads: int, backend: str) -> attnc.Operator:
    """Windows attend to the windows of side `keys` around them, on packed ``[B, H, W, 3C]``; keys outside are zeros."""
    halo = (keys - window) // 2
    pattern = attnc.patterns.overlapping_window(window, keys, bias="relative").shift(halo)
    around = ((halo, halo), (halo, halo))
    return attnc.compile(pattern, pad=around, layout="b y x (three h d)", heads=heads, backend=backend)


class ChannelGate(nn.Module):
    """Squeeze and excitation: x * sigmoid(W2 relu(W1 mean(x))), with C / squeeze_factor channels between."""

    def __init__(self, dim: int, squeeze_factor: int) -> None:
        super().__init__()
        hidden = dim // squeeze_factor
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        return x * cast(Tensor, self.attention(x))


class GatedConv(nn.Module):
    """CAB: 3x3 convolution to C / compress_ratio channels, GELU, 3x3 convolution back, channel gate."""

    def __init__(self, dim: int, compress_ratio: int, squeeze_factor: int) -> None:
        super().__init__()
        if not 1 <= compress_ratio <= dim or not 1 <= squeeze_factor <= dim:
            raise DeclarationError(f"{compress_ratio=} and {squeeze_factor=} must lie between 1 and dim = {dim}")
        hidden = dim // compress_ratio
        self.cab = nn.Sequential(
            nn.Conv2d(dim, hidden, 3, 1, 1), nn.GELU(), nn.Conv2d(hidden, dim, 3, 1, 1), ChannelGate(dim, squeeze_factor)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        out: Tensor = self.cab(x.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)


class HybridBlock(nn.Module):
    """HAB: x + attention(LN x) + conv_scale * gated convolution(LN x), then x + MLP(LN x).

    Args:
        dim, num_heads: channels and heads.
        input_resolution: height and width that decide, as in the official code, whether there is more than one
            window; the forward takes any multiple of the window.
        window_size, shift_size: of the attention.
        compress_ratio, squeeze_factor: of the convolutions and of their gate.
        conv_scale: weight of the convolutional branch, which is never dropped.
        mlp_ratio, qkv_bias, qk_scale, drop_path: as usual.

    Raises:
        DeclarationError: heads, ratios or the shift are out of range.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: int = 7,
        shift_size: int = 0,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        conv_scale: float = 0.01,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        window, shift = fitted_window(window_size, shift_size, input_resolution)
        self.conv_scale = conv_scale
        self.norm1 = nn.LayerNorm(dim)
        self.attn = RelativeWindowAttention(dim, window, num_heads, shift, qkv_bias, qk_scale, backend=backend)
        self.conv_block = GatedConv(dim, compress_ratio, squeeze_factor)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        u = self.norm1(x)
        x = x + self.drop_path(self.attn(u)) + self.conv_scale * self.conv_block(u)
        return x + cast(Tensor, self.drop_path(self.mlp(self.norm2(x))))


class OverlappingBlock(nn.Module):
    """OCAB: x + attention(LN x) from windows of w to the windows of w + int(w * overlap_ratio) around them, x + MLP(LN x).

    Rows around the map are keys of zeros with values of zeros, not masked: they add exp(bias) to the denominator.

    Raises:
        DeclarationError: the windows' difference is odd, or the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        window_size: int,
        overlap_ratio: float,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        mlp_ratio: float = 2.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.window_size = window_size
        self.overlap_size = window_size + int(window_size * overlap_ratio)
        if (self.overlap_size - window_size) % 2 or overlap_ratio < 0:
            raise DeclarationError(f"overlap_ratio={overlap_ratio}: int({window_size} * ratio) must be even and not negative")
        self.scale = qk_scale or None
        self.relative_position_bias_table = nn.Parameter(torch.zeros(self.span**2, num_heads))
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.attend = overlapping_operator(window_size, self.overlap_size, num_heads, backend)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    @property
    def span(self) -> int:
        """Differences between a query's and a key's place, per axis."""
        return self.window_size + self.overlap_size - 1

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``. Raises ShapeError where H or W is no multiple of the window."""
        check_multiple(x, self.window_size, "overlapping window attention")
        out = self.attend(self.qkv(self.norm1(x)), scale=self.scale, bias=self.table())
        x = self.proj(out) + x
        return x + cast(Tensor, self.mlp(self.norm2(x)))

    def table(self) -> Tensor:
        """The bias ``[h, span, span]`` at query - key + overlap_size - 1, both counted from their window's start.

        The official index of that place is (w - o_y) * span + w - o_x, which is negative for many and counts from the
        table's end then: the table read backwards, rotated.
        """
        turned = self.relative_position_bias_table.flip(0).roll(self.window_size * (self.span + 1) + 1, 0)
        return relative_table(turned, self.span, self.span)


class HybridGroup(nn.Module):
    """The blocks of a group (`residual_group` in the official names), the last one overlapping."""

    def __init__(self, blocks: Sequence[HybridBlock], overlap_attn: OverlappingBlock) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.overlap_attn = overlap_attn

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.overlap_attn(x))


class ResidualGroup(nn.Module):
    """RHAG: x + conv(group(x))."""

    def __init__(self, dim: int, group: HybridGroup, resi_connection: str) -> None:
        super().__init__()
        self.residual_group = group
        self.conv = residual_conv(dim, resi_connection)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        return run_residual_conv(self.conv, self.residual_group(x)) + x


def _variant(dim: int, groups: int, compress: int, squeeze: int, upscale: int) -> dict[str, Any]:
    return {
        "embed_dim": dim,
        "depths": (6,) * groups,
        "num_heads": (6,) * groups,
        "window_size": 16,
        "compress_ratio": compress,
        "squeeze_factor": squeeze,
        "mlp_ratio": 2.0,
        "upscale": upscale,
    }


@variants(
    **{f"hat_s_x{scale}": _variant(144, 6, 24, 24, scale) for scale in (2, 3, 4)},
    **{f"hat_x{scale}": _variant(180, 6, 3, 30, scale) for scale in (2, 3, 4)},
    **{f"hat_l_x{scale}": _variant(180, 12, 3, 30, scale) for scale in (2, 3, 4)},
    hat=_variant(180, 6, 3, 30, 4),
)
class HAT(SuperResolution):
    """Super-resolution of images ``[B, in_chans, H, W]`` whose height and width are multiples of the window.

    Args:
        img_size: height and width in training; only decides whether a window is smaller than the image.
        patch_size: by which `img_size` is divided for that; images are not cut into patches.
        in_chans, embed_dim: channels of the image and of the blocks.
        depths, num_heads: blocks and heads per group.
        window_size: side of the windows, officially 16.
        compress_ratio, squeeze_factor, conv_scale: of the blocks' convolutions, see `HybridBlock`.
        overlap_ratio: of the last block of each group, see `OverlappingBlock`.
        mlp_ratio, qkv_bias, qk_scale: of the blocks.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; officially 0.1.
        ape: learned absolute positions, which fix the size of the image to `img_size`.
        patch_norm: a LayerNorm before the first group.
        upscale, img_range, upsampler, resi_connection: see `SuperResolution`.
        grad_checkpointing: recompute each group in the backward.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 64,
        patch_size: int | tuple[int, int] = 1,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6),
        window_size: int = 7,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        conv_scale: float = 0.01,
        overlap_ratio: float = 0.5,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path_rate: float = 0.0,
        ape: bool = False,
        patch_norm: bool = True,
        upscale: int = 2,
        img_range: float = 1.0,
        upsampler: str = "pixelshuffle",
        resi_connection: str = "1conv",
        *,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        if len(depths) != len(num_heads):
            raise DeclarationError(f"HAT: {depths=} and {num_heads=} differ in length")
        resolution = patches(img_size, patch_size)
        rates = iter(linear_rates(drop_path_rate, sum(depths)))

        def group(depth: int, heads: int) -> ResidualGroup:
            blocks = [
                HybridBlock(
                    embed_dim,
                    resolution,
                    heads,
                    window_size,
                    window_size // 2 if i % 2 else 0,
                    compress_ratio,
                    squeeze_factor,
                    conv_scale,
                    mlp_ratio,
                    qkv_bias,
                    qk_scale,
                    next(rates),
                    backend=backend,
                )
                for i in range(depth)
            ]
            last = OverlappingBlock(embed_dim, window_size, overlap_ratio, heads, qkv_bias, qk_scale, mlp_ratio, backend=backend)
            return ResidualGroup(embed_dim, HybridGroup(blocks, last), resi_connection)

        super().__init__(
            [group(depth, heads) for depth, heads in zip(depths, num_heads, strict=True)],
            in_chans=in_chans,
            embed_dim=embed_dim,
            upscale=upscale,
            img_range=img_range,
            upsampler_kind=upsampler,
            resi_connection=resi_connection,
            patch_norm=patch_norm,
            tokens=resolution[0] * resolution[1] if ape else 0,
            grad_checkpointing=grad_checkpointing,
        )


# dropouts, which mean nothing in evaluation mode, and what follows from the sizes
IGNORED = (
    "drop",
    "drop_rate",
    "attn_drop",
    "attn_drop_rate",
    "act_layer",
    "norm_layer",
    "use_checkpoint",
    "rpi_sa",
    "rpi_oca",
    "attn_mask",
    "x_size",
)
INDICES = ("relative_position_index_SA", "relative_position_index_OCA")

official("hat", "HAB", ignores=IGNORED)(tokens(HybridBlock))
official("hat", "OCAB", ignores=IGNORED)(tokens(OverlappingBlock))
official("hat", "HAT", ignores=IGNORED, derived=INDICES)(HAT)
