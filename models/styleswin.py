"""StyleSwin: a transformer-based GAN for high-resolution images (Zhang et al., CVPR 2022, arXiv:2112.10762).

*Double attention*: in one layer half of the heads attend in windows, the other half in windows shifted by half of
one. A style vector modulates the normalisation before it. The discriminator is convolutional, on wavelets.
Parameter names are those of the official code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.equalized import BiasedLeaky, EqualConv2d, EqualLinear
from attnc.models.blocks.linear import Linear
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.recompute import recomputed
from attnc.models.blocks.relative_window import check_heads, check_multiple, fitted_window, relative_table
from attnc.models.blocks.resample import Haar, Resample, downsample_twice, upsample_twice
from attnc.models.blocks.style import AdaptiveInstanceNorm, mapping_network
from attnc.models.official import official, tokens
from attnc.models.registry import variants


@cache  # layers share operators
def double_operator(window: int, shift: int, heads: int, backend: str) -> attnc.Operator:
    """Windows for the first half of the heads, windows shifted by `shift` for the other, on packed ``[B, H, W, 3C]``."""
    plain = attnc.patterns.window(window, bias="relative")
    both = attnc.patterns.per_head([plain, plain.shift(shift)]) if shift else plain
    return attnc.compile(both, layout="b y x (three h d)", heads=heads, backend=backend)


class BiasTable(nn.Module):
    """The relative position biases of one half of the heads, ``[(2w - 1)^2, h / 2]``."""

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)


class StyleBlock(nn.Module):
    """x + double attention(AdaIN(x, s)), then x + MLP(AdaIN(x, s)).

    Args:
        dim: channels C.
        input_resolution: height and width that decide whether there is more than one window: if not, nothing is
            shifted. The forward takes any multiple of the window.
        num_heads: an even number.
        window_size: side of the windows, shifted by half of it.
        mlp_ratio, qkv_bias, qk_scale: as usual.
        style_dim: length S of the style vector.

    Raises:
        DeclarationError: the heads are odd, or do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        style_dim: int = 512,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if num_heads % 2:
            raise DeclarationError(f"num_heads is {num_heads}; it must be even, as each half has windows of its own")
        self.window_size, shift = fitted_window(window_size, window_size // 2, input_resolution)
        self.scale = qk_scale or None
        self.norm1 = AdaptiveInstanceNorm(dim, style_dim)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.attn = nn.ModuleList(BiasTable(self.window_size, num_heads // 2) for _ in range(2))
        self.norm2 = AdaptiveInstanceNorm(dim, style_dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.attend = double_operator(self.window_size, shift, num_heads, backend)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """``[B, H, W, C]`` and ``[B, S]`` to ``[B, H, W, C]``.

        Raises:
            ShapeError: H or W is no multiple of the window.
        """
        check_multiple(x, self.window_size, "double attention")
        span = 2 * self.window_size - 1
        table = torch.cat([half.get_parameter("relative_position_bias_table") for half in self.attn], 1)
        mixed = self.attend(self.qkv(self.norm1(x, style)), scale=self.scale, bias=relative_table(table, span, span))
        x = x + self.proj(mixed)
        return x + cast(Tensor, self.mlp(self.norm2(x, style)))


def sinusoids(length: int, channels: int, like: Tensor) -> Tensor:
    """sin and cos of the positions 1 .. length at channels / 2 frequencies from 1 to 1 / 10000: ``[length, channels]``."""
    count = channels // 2
    frequency = torch.exp(torch.arange(count, device=like.device, dtype=like.dtype) * (-math.log(10000) / (count - 1)))
    angle = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class BilinearUpsample(nn.Module):
    """Twice the height and width, LayerNorm, a linear layer, plus alpha times sinusoids of column and row."""

    def __init__(self, dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        out_dim = out_dim or dim
        if out_dim % 4 or out_dim < 8:
            raise DeclarationError(f"out_dim is {out_dim}; positions need a multiple of 4, at least 8")
        self.norm = nn.LayerNorm(dim)
        self.reduction = nn.Linear(dim, out_dim, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, 2H, 2W, C']``."""
        x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        x = self.reduction(self.norm(x))
        _, height, width, channels = x.shape
        columns = sinusoids(width, channels // 2, self.alpha).expand(height, -1, -1)
        rows = sinusoids(height, channels // 2, self.alpha)[:, None].expand(-1, width, -1)
        return x + self.alpha * torch.cat([columns, rows], -1)


class StyleLayer(nn.Module):
    """Two style blocks at one resolution, and what leads to the next (nothing after the last one)."""

    def __init__(self, blocks: Sequence[StyleBlock], upsample: BilinearUpsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """``[B, H, W, C]`` and the blocks' styles ``[B, 2, S]`` to ``[B, 2H, 2W, C']``, or to the input's shape."""
        for block, s in zip(self.blocks, style.unbind(1), strict=True):
            x = block(x, s)
        return x if self.upsample is None else cast(Tensor, self.upsample(x))


class ToRGB(nn.Module):
    """A 1x1 convolution to an image, plus the image so far, which is enlarged except at the last resolution."""

    def __init__(self, dim: int, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample_twice() if upsample else None
        self.conv = nn.Conv2d(dim, 3, 1)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """``[B, H, W, C]`` and ``[B, 3, ...]`` to ``[B, 3, H, W]``."""
        out: Tensor = self.conv(x.permute(0, 3, 1, 2)) + self.bias
        if skip is None:
            return out
        return out + (skip if self.upsample is None else cast(Tensor, self.upsample(skip)))


class ConstantInput(nn.Module):
    """A learned map, the same for every sample."""

    def __init__(self, dim: int, size: int = 4) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, dim, size, size))

    def forward(self, batch: int) -> Tensor:
        """A batch size to ``[B, size, size, C]``."""
        return self.input.permute(0, 2, 3, 1).expand(batch, -1, -1, -1)


def _resolutions(size: int) -> list[int]:
    if size < 8 or size & (size - 1):
        raise DeclarationError(f"StyleSwin: size={size}: a power of two, at least 8")
    return [1 << i for i in range(2, size.bit_length())]


def _channels(resolution: int, multiplier: int) -> int:
    return 512 if resolution <= 32 else 16384 * multiplier // resolution


@variants(
    styleswin_256={"size": 256, "channel_multiplier": 2},
    styleswin_512={"size": 512, "channel_multiplier": 1},
    styleswin_512_m2={"size": 512, "channel_multiplier": 2},
    styleswin_1024={"size": 1024, "channel_multiplier": 1},
    styleswin_1024_m2={"size": 1024, "channel_multiplier": 2},
)
class Generator(nn.Module):
    """From noise ``[B, style_dim]`` to images ``[B, 3, size, size]``.

    Args:
        size: of the images, a power of two.
        style_dim: length of noise and style.
        n_mlp: layers of the mapping network.
        channel_multiplier: of the channels from a resolution of 64 on.
        lr_mlp: rate of the mapping network's learning.
        enable_full_resolution: up to this resolution one window covers the map; above it windows are 8 x 8.
        mlp_ratio, qkv_bias, qk_scale: of the blocks.
        channels, num_heads: per resolution from 4 on, instead of the official ones: 512 up to 32 and less above, with
            heads of 32 channels but at least 4.
        grad_checkpointing: recompute each resolution's blocks in the backward.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range.
    """

    def __init__(
        self,
        size: int,
        style_dim: int = 512,
        n_mlp: int = 8,
        channel_multiplier: int = 2,
        lr_mlp: float = 0.01,
        enable_full_resolution: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        channels: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        *,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        resolutions = _resolutions(size)
        widths = [_channels(r, channel_multiplier) for r in resolutions] if channels is None else list(channels)
        heads = [max(c // 32, 4) for c in widths] if num_heads is None else list(num_heads)
        if not len(widths) == len(heads) == len(resolutions):
            raise DeclarationError(f"StyleSwin: {channels=} and {num_heads=}: one each for {resolutions}")
        self.size, self.style_dim = size, style_dim
        self.grad_checkpointing = grad_checkpointing
        self.style = mapping_network(style_dim, n_mlp, lr_mlp)
        self.input = ConstantInput(widths[0])
        self.layers, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for i, (resolution, dim, h) in enumerate(zip(resolutions, widths, heads, strict=True)):
            window = resolution if resolution <= enable_full_resolution else 8
            blocks = [
                StyleBlock(dim, (resolution, resolution), h, window, mlp_ratio, qkv_bias, qk_scale, style_dim, backend=backend)
                for _ in range(2)
            ]
            last = resolution == size
            after = dim if last else widths[i + 1]
            self.layers.append(StyleLayer(blocks, None if last else BilinearUpsample(dim, after)))
            self.to_rgbs.append(ToRGB(after, upsample=not last))
        self.apply(_init_generator)

    def forward(self, noise: Tensor, truncation: float = 1.0, truncation_latent: Tensor | None = None) -> Tensor:
        """``[B, style_dim] -> [B, 3, size, size]``, with styles drawn towards `truncation_latent` if `truncation` < 1.

        Raises:
            ShapeError: there is a truncation and nothing to draw styles to.
        """
        style = self.style(noise)
        if truncation < 1.0:
            if truncation_latent is None:
                raise ShapeError(f"{truncation=} needs truncation_latent, the mean style: give self.mean_latent(4096)")
            style = truncation_latent + truncation * (style - truncation_latent)
        return self.synthesis(style[:, None].expand(-1, 2 * len(self.layers), -1))

    def synthesis(self, styles: Tensor) -> Tensor:
        """From a style for each block, ``[B, blocks, style_dim]``, to images ``[B, 3, size, size]``."""
        pairs = styles.reshape(styles.shape[0], -1, 2, styles.shape[-1])
        x, image = self.input(styles.shape[0]), None
        for layer, to_rgb, s in zip(self.layers, self.to_rgbs, pairs.unbind(1), strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, s, use_reentrant=False)
            else:
                x = layer(x, s)
            image = to_rgb(x, image)
        return cast(Tensor, image)

    def mean_latent(self, samples: int) -> Tensor:
        """The mean style of random noise, ``[1, style_dim]``."""
        noise = torch.randn(samples, self.style_dim, device=self.input.input.device, dtype=self.input.input.dtype)
        return cast(Tensor, self.style(noise).mean(0, keepdim=True))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the layers' activations for computing them again in the backward."""
        self.grad_checkpointing = enable


def _init_generator(module: nn.Module) -> None:
    """Linear and 1x1 convolutions: Glorot's normal (of gain 0.02 for images) and zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_normal_(module.weight, gain=0.02 if isinstance(module, nn.Conv2d) else 1.0)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _conv(before: int, after: int, kernel: int, *, down: bool = False, sn: bool) -> nn.Sequential:
    """Convolution and leaky ReLU, at half the size after a blur if `down`."""
    layers: list[nn.Module] = [Resample((2, 2))] if down else []
    stride, padding = (2, 0) if down else (1, kernel // 2)
    if sn:
        layers.append(nn.utils.spectral_norm(nn.Conv2d(before, after, kernel, stride, padding, bias=False)))
    else:
        layers.append(EqualConv2d(before, after, kernel, stride, padding))
    return nn.Sequential(*layers, BiasedLeaky(after))


class FromRGB(nn.Module):
    """Features of the wavelets of an image, at half its size after the first one, added to the features so far."""

    def __init__(self, dim: int, *, down: bool, sn: bool) -> None:
        super().__init__()
        if down:
            self.iwt, self.downsample, self.dwt = Haar(inverse=True), downsample_twice(), Haar()
        self.down = down
        self.conv = _conv(12, dim, 1, sn=sn)

    def forward(self, wavelets: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[B, 12, H, W]`` and the features to the wavelets of this size and the features ``[B, C, H', W']``."""
        if self.down:
            wavelets = self.dwt(self.downsample(self.iwt(wavelets)))
        out = cast(Tensor, self.conv(wavelets))
        return wavelets, out if skip is None else out + skip


class ConvBlock(nn.Module):
    """Two convolutions, the second to half the size."""

    def __init__(self, before: int, after: int, *, sn: bool) -> None:
        super().__init__()
        self.conv1 = _conv(before, before, 3, sn=sn)
        self.conv2 = _conv(before, after, 3, down=True, sn=sn)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', H / 2, W / 2]``."""
        return cast(Tensor, self.conv2(self.conv1(x)))


@variants(
    styleswin_discriminator_256={"size": 256},
    styleswin_discriminator_512={"size": 512},
    styleswin_discriminator_1024={"size": 1024},
)
class Discriminator(nn.Module):
    """From images ``[B, 3, size, size]`` to ``[B, 1]``: high where an image seems real.

    Args:
        size: of the images, a power of two.
        channel_multiplier: of the channels from a resolution of 64 on.
        sn: spectral norm on ordinary layers, as in the released trainings, instead of equalised learning rates.
        channels: by resolution, for 4 .. size / 4 and `size`, instead of the official ones.
        grad_checkpointing: recompute each resolution's convolutions in the backward.

    Raises:
        DeclarationError: the size is no power of two, or a resolution has no channels.
    """

    def __init__(
        self,
        size: int,
        channel_multiplier: int = 2,
        sn: bool = False,
        channels: Mapping[Any, int] | None = None,
        *,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        resolutions = _resolutions(size)
        if size < 16:
            raise DeclarationError(f"StyleSwin: size={size}: the discriminator needs at least 16")
        official_widths = {r: _channels(r, channel_multiplier) for r in resolutions}
        widths = official_widths if channels is None else {int(r): c for r, c in channels.items()}
        needed = [*resolutions[:-2], size]
        if not set(needed) <= set(widths):
            raise DeclarationError(f"StyleSwin: {channels=}: one each for {needed}")
        self.dwt = Haar()
        self.from_rgbs, self.convs = nn.ModuleList(), nn.ModuleList()
        # wavelets are half as large as their image: its own channels first, then those of each size from a quarter on
        dims = [widths[size], *(widths[r] for r in reversed(resolutions[:-2]))]
        for before, after in pairwise(dims):
            self.from_rgbs.append(FromRGB(before, down=len(self.convs) > 0, sn=sn))
            self.convs.append(ConvBlock(before, after, sn=sn))
        dim = widths[4]
        self.from_rgbs.append(FromRGB(dim, down=True, sn=sn))
        self.final_conv = _conv(dim + 1, dim, 3, sn=sn)
        if sn:
            norm = nn.utils.spectral_norm
            self.final_linear = nn.Sequential(norm(nn.Linear(16 * dim, dim)), BiasedLeaky(dim), norm(nn.Linear(dim, 1)))
        else:
            self.final_linear = nn.Sequential(EqualLinear(16 * dim, dim, activate=True), EqualLinear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, size, size] -> [B, 1]``. Raises ShapeError where B is more than 4 and no multiple of it."""
        if x.shape[0] > 4 and x.shape[0] % 4:
            raise ShapeError(f"a batch of {x.shape[0]} has no groups of 4, over which deviations are taken; give a multiple")
        wavelets, features = self.dwt(x), None
        for from_rgb, conv in zip(self.from_rgbs, self.convs, strict=False):
            if self.grad_checkpointing and torch.is_grad_enabled():
                wavelets, features = recomputed(_resolution, (from_rgb, conv), from_rgb, conv, wavelets, features)
            else:
                wavelets, features = _resolution(from_rgb, conv, wavelets, features)
        _, features = self.from_rgbs[-1](wavelets, features)
        out = self.final_conv(torch.cat([features, _deviation(features)], 1))
        return cast(Tensor, self.final_linear(out.flatten(1)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the resolutions' activations for computing them again in the backward."""
        self.grad_checkpointing = enable


def _resolution(from_rgb: nn.Module, conv: nn.Module, wavelets: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
    """The wavelets at this resolution, and the features at half of it."""
    wavelets, features = from_rgb(wavelets, features)
    return wavelets, conv(features)


def _deviation(x: Tensor) -> Tensor:
    """Mean standard deviation over groups of 4 samples, as a channel ``[B, 1, H, W]`` (Karras et al. 2018)."""
    group = min(x.shape[0], 4)
    spread = (x.view(group, -1, *x.shape[1:]).var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    return spread.repeat(group).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])


# dropouts, which mean nothing in evaluation mode, and what is fixed here or follows from the sizes
IGNORED = ("drop", "drop_rate", "attn_drop", "attn_drop_rate", "act_layer", "norm_layer", "use_checkpoint")
DERIVED = ("*relative_position_index", "*attn_mask[12]", "*_float_tensor", "*.kernel", "*wt.[lh][lh]")


class _OnSequences(AdaptiveInstanceNorm):
    """The norm on ``[B, C, L]``."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """``[B, C, L]`` and ``[B, S]`` to ``[B, C, L]``."""
        return super().forward(x.transpose(1, 2)[:, None], style).squeeze(1).transpose(1, 2)


official("styleswin", "AdaptiveInstanceNorm")(_OnSequences)
official("styleswin", "StyleSwinTransformerBlock", ignores=IGNORED, derived=DERIVED)(tokens(StyleBlock))
official("styleswin", "BilinearUpsample", ignores=(*IGNORED, "out_resolution"), derived=DERIVED)(tokens(BilinearUpsample))
official("styleswin", "Generator", ignores=IGNORED, derived=DERIVED)(Generator)
official("styleswin", "Discriminator", ignores=("blur_kernel", "ssd"), derived=DERIVED)(Discriminator)
