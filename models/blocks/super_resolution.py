"""The shell of image restoration networks after SwinIR (Liang et al. 2021): HAT, DRCT and their like.

A convolution, groups of blocks at the input's resolution, a convolution with a skip over all groups, and pixel shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.conv import conv_map
from attnc.models.blocks.init import init_vit

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K
WIDTH = 64  # channels of the last convolutions


class PatchNorm(nn.Module):
    """Where SwinIR embeds patches: of one pixel, so that only the LayerNorm `norm` is left, if `norm` says so."""

    def __init__(self, dim: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        return cast(Tensor, self.norm(x))


def residual_conv(dim: int, kind: str) -> nn.Module:
    """What ends a group or the body: a 3x3 convolution ("1conv") or nothing ("identity")."""
    if kind not in ("1conv", "identity"):
        raise DeclarationError(f"resi_connection={kind!r}: '1conv' and 'identity' exist")
    return nn.Conv2d(dim, dim, 3, 1, 1) if kind == "1conv" else nn.Identity()


def upsampler(scale: int) -> nn.Sequential:
    """Convolution and pixel shuffle, once per factor 2, or once for a factor of 3."""
    if scale == 3:
        factors = [3]
    elif scale >= 1 and scale & (scale - 1) == 0:
        factors = [2] * (scale.bit_length() - 1)
    else:
        raise DeclarationError(f"upscale={scale}: a power of two, or 3")
    layers: list[nn.Module] = []
    for factor in factors:
        layers += [nn.Conv2d(WIDTH, factor**2 * WIDTH, 3, 1, 1), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


class SuperResolution(nn.Module):
    """From an image ``[B, in_chans, H, W]`` to one `upscale` times as high and wide.

    Args:
        layers: the groups, each on maps ``[B, H, W, C]``.
        in_chans: channels of both images; three are taken for RGB, whose mean is subtracted first.
        embed_dim: channels C of the groups.
        upscale: 1, a power of two, or 3.
        img_range: by which the image is multiplied, and the result divided.
        upsampler_kind: "pixelshuffle".
        resi_connection: "1conv" or "identity", what follows all groups before the skip.
        patch_norm: a LayerNorm before the first group.
        tokens: the number H * W of learned absolute positions; 0 for none.
        grad_checkpointing: recompute each group in the backward.

    Raises:
        DeclarationError: an argument is out of range.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        in_chans: int,
        embed_dim: int,
        upscale: int,
        img_range: float,
        upsampler_kind: str,
        resi_connection: str,
        patch_norm: bool,
        tokens: int,
        grad_checkpointing: bool,
    ) -> None:
        super().__init__()
        if upsampler_kind != "pixelshuffle":
            raise DeclarationError(f"upsampler={upsampler_kind!r}: only 'pixelshuffle' is defined for this network")
        self.img_range = img_range
        self.upscale = upscale
        self.grad_checkpointing = grad_checkpointing
        mean = RGB_MEAN if in_chans == 3 else (0.0,)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, 1, 1)
        self.patch_embed = PatchNorm(embed_dim, patch_norm)
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim)) if tokens else None
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = residual_conv(embed_dim, resi_connection)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, WIDTH, 3, 1, 1), nn.LeakyReLU())
        self.upsample = upsampler(upscale)
        self.conv_last = nn.Conv2d(WIDTH, in_chans, 3, 1, 1)
        self.apply(init_vit)
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, in_chans, upscale H, upscale W]``.

        Raises:
            ShapeError: H or W is no multiple of the window, or not what absolute positions were made for.
        """
        mean = cast(Tensor, self.mean)
        shallow = self.conv_first((x - mean) * self.img_range)
        deep = self.forward_features(shallow.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out = self.conv_before_upsample(self.conv_after_body(deep) + shallow)
        out = self.conv_last(self.upsample(out))
        return cast(Tensor, out / self.img_range + mean)

    def forward_features(self, x: Tensor) -> Tensor:
        """The groups, between two LayerNorms: ``[B, H, W, C] -> [B, H, W, C]``."""
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            if x.shape[1] * x.shape[2] != self.absolute_pos_embed.shape[1]:
                raise ShapeError(
                    f"absolute positions were made for {self.absolute_pos_embed.shape[1]} tokens, the map is "
                    f"{x.shape[1]} x {x.shape[2]}; use ape=False for images of any size"
                )
            x = x + self.absolute_pos_embed.view(1, *x.shape[1:])
        for layer in self.layers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return cast(Tensor, self.norm(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the groups' activations for computing them again in the backward."""
        self.grad_checkpointing = enable


def run_residual_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """`residual_conv` on a map ``[B, H, W, C]``."""
    return conv_map(conv, x) if isinstance(conv, nn.Conv2d) else cast(Tensor, conv(x))
