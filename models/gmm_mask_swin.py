"""Swin under Gaussian-mixture masks, a host of the paper of `gmm_mask` (Li et al. 2023, arXiv:2309.05375), for small images.

Swin (Liu et al. 2021) attends in windows; its relative bias is added after the mask has multiplied the scores. Names
are those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.conv import conv_map
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.relative_window import check_heads, check_multiple, fitted_window, relative_table
from attnc.models.blocks.staged import Staged
from attnc.models.gmm_mask import BASE, GaussianMixtureMask, base_mask
from attnc.models.official import official
from attnc.models.registry import variants


@cache  # layers share operators
def masked_window_operator(window: int, shift: int, kernels: int, heads: int, backend: str) -> attnc.Operator:
    """Attention inside windows under a mixture of `kernels` and a relative bias, on packed ``[B, H, W, 3C]``."""
    inside = attnc.patterns.window(window, bias="relative").shift(shift)
    pattern = attnc.patterns.gaussian_mixture(kernels, inside) if kernels else inside
    return attnc.compile(pattern, layout="b y x (three h d)", heads=heads, backend=backend)


class MaskedWindows(nn.Module):
    """softmax(mask * q k^T / sqrt(d) + table[query - key]) v in windows whose borders lie at `shift`.

    Args:
        dim, num_heads: channels and heads.
        window_size: side of a window, of which the map must be a multiple.
        shift: where the windows' borders lie.
        num_kernals: Gaussians of the mask; 0 for none.
        backend: of the attnc operator.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shift: int, num_kernals: int, *, backend: str = "auto") -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.mask = GaussianMixtureMask(num_heads, num_kernals) if num_kernals else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attend = masked_window_operator(window_size, shift, num_kernals, num_heads, backend)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``. Raises ShapeError where H or W is no multiple of the window."""
        check_multiple(x, self.window_size, "masked window attention")
        span = 2 * self.window_size - 1
        tables: dict[str, Any] = {"bias": relative_table(self.relative_position_bias_table, span, span)}
        if self.mask is not None:
            tables |= self.mask.tables()
        mixed = self.attend(self.qkv(x), **tables)
        return cast(Tensor, self.proj(mixed))


class SwinBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, dim: int, attention: MaskedWindows, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + cast(Tensor, self.drop_path(self.mlp(self.norm2(x))))


class PatchMerging(nn.Module):
    """Between Swin's stages: four neighbours side by side, LayerNorm, a linear layer to twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H / 2, W / 2, 2C]``."""
        b, height, width, c = x.shape
        x = x.view(b, height // 2, 2, width // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)  # columns slower than rows
        return cast(Tensor, self.reduction(self.norm(x)))


class PatchEmbed(nn.Module):
    """A convolution to patches, and a LayerNorm."""

    def __init__(self, in_chans: int, dim: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, size, size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, c, H, W] -> [B, H / size, W / size, C]``."""
        return cast(Tensor, self.norm(conv_map(self.proj, x.permute(0, 2, 3, 1))))


class SwinStage(nn.Module):
    """Blocks, and what leads to the next stage (nothing after the last one)."""

    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample


SWIN: dict[str, Any] = {"img_size": 32, "patch_size": 2, "num_kernals": 5}


@variants(
    gmm_mask_swin={**SWIN, "num_classes": 10},
    gmm_mask_swin_cifar100={**SWIN, "num_classes": 100},
    gmm_mask_swin_tiny_imagenet={"img_size": 64, "patch_size": 4, "num_classes": 200, "num_kernals": 5},
)
class SwinTransformer(Staged):
    """Image classifier for images ``[B, in_chans, img_size, img_size]``.

    Args:
        img_size, patch_size: side of the image and of its patches.
        in_chans, num_classes: channels of the image, and logits; 0 leaves the pooled, normalised features.
        embed_dim: channels of the first stage, doubled by each merging.
        depths, num_heads: blocks and heads per stage.
        window_size: side of the windows; every second block shifts them by half of it.
        mlp_ratio: hidden width of the MLPs over their channels.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; officially 0.1.
        is_GMM, num_kernals: whether there is a mask, and its Gaussians.
        features_only, out_indices, grad_checkpointing: see `Staged`.
        backend: of the attnc operators.

    Raises:
        DeclarationError: the stages differ in number, or some stage's map is no multiple of its window.
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 6, 4),
        num_heads: Sequence[int] = (3, 6, 12),
        window_size: int = 4,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        is_GMM: bool = True,
        num_kernals: int = 3,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        if len(depths) != len(num_heads):
            raise DeclarationError(f"Swin: {depths=} and {num_heads=} differ in length")
        stages, side = len(depths), img_size // patch_size
        if img_size % patch_size or any(
            (side >> s) << s != side or (side >> s) % min(window_size, side >> s) for s in range(stages)
        ):
            raise DeclarationError(f"Swin: {img_size=} and {patch_size=}: {stages} stages in windows of {window_size} do not fit")
        super().__init__(
            [embed_dim << s for s in range(stages)],
            [patch_size << s for s in range(stages)],
            "layers",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.img_size = img_size
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, side * side, embed_dim))
        # frozen; what it says is computed from coordinates here
        self.mask = nn.Parameter(base_mask(window_size), requires_grad=False)
        rates = iter(linear_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        for s, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, blocks = embed_dim << s, []
            for i in range(depth):
                window, shift = fitted_window(window_size, window_size // 2 if i % 2 else 0, (side >> s, side >> s))
                attention = MaskedWindows(dim, heads, window, shift, num_kernals if is_GMM else 0, backend=backend)
                blocks.append(SwinBlock(dim, attention, mlp_ratio, next(rates)))
            self.layers.append(SwinStage(blocks, PatchMerging(dim) if s < stages - 1 else None))
        if not features_only:
            self.norm = nn.LayerNorm(self.num_features)
            self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(init_vit)
        nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward_stages(self, image: Tensor) -> list[Tensor]:
        """The outputs of all stages before merging, ``[B, C, H', W']`` (views). Raises ShapeError for another size of image."""
        if image.shape[2:] != (self.img_size, self.img_size):
            raise ShapeError(
                f"the image is {tuple(image.shape[2:])}; learned positions fix it to {self.img_size} x {self.img_size}"
            )
        x = self.patch_embed(image)
        x = x + self.absolute_pos_embed.view(1, *x.shape[1:])
        maps = []
        for layer in cast("list[SwinStage]", self.layers):
            for block in layer.blocks:
                x = self.run(block, x)
            maps.append(x.permute(0, 3, 1, 2))
            if layer.downsample is not None:
                x = layer.downsample(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean of the normalised tokens of ``[B, C, H', W']``, and the classifier unless `pre_logits`."""
        x = self.norm(x.permute(0, 2, 3, 1)).mean((1, 2))
        return x if pre_logits else cast(Tensor, self.head(x))


# dropouts, which mean nothing in evaluation mode, what is always so here, and what follows from the sizes
IGNORED = ("drop_rate", "attn_drop_rate", "norm_layer", "use_checkpoint")
DERIVED = (*BASE, "*.relative_position_index", "*.attn_mask")


@official("gmm-mask", "swin.SwinTransformer", ignores=IGNORED, derived=DERIVED)
def _official_swin(
    img_size: int = 224,
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int = 7,
    mlp_ratio: float = 4.0,
    drop_path_rate: float = 0.1,
    is_GMM: bool = False,
    num_kernals: int = 5,
    *,
    backend: str = "auto",
) -> nn.Module:
    """With the official defaults."""
    shape = (img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size, mlp_ratio)
    return SwinTransformer(*shape, drop_path_rate, is_GMM, num_kernals, backend=backend)
