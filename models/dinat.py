"""DiNAT: Dilated Neighborhood Attention Transformer (Hassani and Shi 2022, arXiv:2209.15001), and NAT (arXiv:2204.07143).

Each token attends to the K x K tokens around it, in every second block to tokens d apart: neighbourhoods that
cover the map sparsely. NAT is the model without dilation. Parameter names are those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError
from attnc.models.blocks.attention import QkvAttention
from attnc.models.blocks.conv import conv_map
from attnc.models.blocks.drop import linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.merge import PatchMerging
from attnc.models.blocks.patches import PatchEmbed
from attnc.models.blocks.prenorm import PreNormBlock
from attnc.models.blocks.staged import Staged
from attnc.models.official import official
from attnc.models.registry import variants


@cache  # layers share operators
def neighborhood_operator(size: int, dilation: int, biased: bool, heads: int, short: bool, backend: str) -> attnc.Operator:
    """Neighbourhoods on packed ``[B, H, W, 3C]``; `short` is for maps with less than size * dilation rows or columns."""
    pattern = attnc.patterns.neighborhood(size, dilation, bias="relative" if biased else None)
    reach = size * dilation
    return attnc.compile(
        attnc.patterns.at_least(reach, pattern) if short else pattern,
        pad=((0, reach), (0, reach)) if short else None,
        layout="b y x (three h d)",
        heads=heads,
        backend=backend,
    )


class NeighborhoodAttention(QkvAttention):
    """softmax(q k^T / sqrt(d) + bias) v over the K x K tokens, `dilation` apart, around each query, kept inside the map.

    A map with less than K * dilation rows or columns is zero-padded to as many *before* ``qkv``: padded tokens are
    keys whose k and v are the biases of ``qkv``. They are `pad_k` and `pad_v` of the operator, never rows of a tensor.

    Args:
        dim, num_heads, qkv_bias, qk_scale, proj_drop: see `QkvAttention`.
        kernel_size: K, odd.
        dilation: distance of neighbours.
        rel_pos_bias: whether scores add ``rpb [h, 2K - 1, 2K - 1]`` at key minus query, in units of the dilation.
        backend: of the operators.

    Raises:
        DeclarationError: K is not an odd number above 1, or the dilation not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int | None = 1,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale=qk_scale, proj_drop=proj_drop)
        dilation = dilation or 1
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise DeclarationError(f"kernel_size is {kernel_size}; neighbourhoods have an odd size, 3 or more")
        if dilation < 1:
            raise DeclarationError(f"dilation is {dilation}; it is the distance of neighbours, 1 or more")
        self.reach = kernel_size * dilation
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, *(2 * kernel_size - 1,) * 2), std=0.02))
        self.attend, self.attend_short = (
            neighborhood_operator(kernel_size, dilation, rel_pos_bias, num_heads, short, backend) for short in (False, True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        qkv = self.qkv(x)
        # the operator's table is indexed by query minus key
        tables: dict[str, Any] = {} if self.rpb is None else {"bias": self.rpb.flip(1, 2)}
        if min(x.shape[1:3]) >= self.reach:
            return self.project(self.attend(qkv, scale=self.scale, **tables))
        return self.project(self.attend_short(qkv, scale=self.scale, **tables, **self.padded_rows(qkv)))


class ConvTokenizer(nn.Module):
    """Stem of two 3x3 convolutions with stride 2 and nothing between them, then LayerNorm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(in_chans, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, 2, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), C]``."""
        out: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return out


class ConvDownsampler(nn.Module):
    """3x3 convolution with stride 2 and without a bias, C -> 2C, then LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C]``."""
        out: Tensor = self.norm(conv_map(self.reduction, x))
        return out


class Level(nn.Module):
    """Blocks of one resolution and the downsampling after them."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


def _pairs(dilations: Sequence[int], depths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Dilations 1, d, 1, d, ... for each level's d."""
    return tuple(tuple((1, d)[i % 2] for i in range(depth)) for d, depth in zip(dilations, depths, strict=True))


def _variant(
    dim: int,
    depths: tuple[int, ...],
    mlp_ratio: float,
    drop_path_rate: float,
    dilations: tuple[int, ...] = (8, 4, 2, 1),
    **more: Any,
) -> dict[str, Any]:
    """Heads of 32 channels."""
    return {
        "embed_dim": dim,
        "mlp_ratio": mlp_ratio,
        "depths": depths,
        "num_heads": tuple((dim << i) // 32 for i in range(len(depths))),
        "dilations": _pairs(dilations, depths),
        "drop_path_rate": drop_path_rate,
        **more,
    }


_MINI, _DEEP = (3, 4, 6, 5), (3, 4, 18, 5)


@variants(
    dinat_mini=_variant(64, _MINI, 3, 0.2),
    dinat_tiny=_variant(64, _DEEP, 3, 0.2),
    dinat_small=_variant(96, _DEEP, 2, 0.3),
    dinat_base=_variant(128, _DEEP, 2, 0.5, layer_scale=1e-5),
    dinat_large=_variant(192, _DEEP, 2, 0.35),
    dinat_large_384=_variant(192, _DEEP, 2, 0.35, (13, 6, 3, 1)),
    dinat_large_384_11x11=_variant(192, _DEEP, 2, 0.35, kernel_size=11),
    dinat_nat_mini=_variant(64, _MINI, 3, 0.2, (1, 1, 1, 1)),
    dinat_nat_tiny=_variant(64, _DEEP, 3, 0.2, (1, 1, 1, 1)),
    dinat_nat_small=_variant(96, _DEEP, 2, 0.3, (1, 1, 1, 1), layer_scale=1e-5),
    dinat_nat_base=_variant(128, _DEEP, 2, 0.5, (1, 1, 1, 1), layer_scale=1e-5),
    dinat_s_tiny=_variant(96, (2, 2, 6, 2), 4, 0.2, swin=True),
    dinat_s_small=_variant(96, (2, 2, 18, 2), 4, 0.3, swin=True),
    dinat_s_base=_variant(128, (2, 2, 18, 2), 4, 0.5, swin=True),
    dinat_s_large=_variant(192, (2, 2, 18, 2), 4, 0.35, swin=True),
    dinat_s_large_384=_variant(192, (2, 2, 18, 2), 4, 0.35, (13, 6, 3, 1), swin=True),
    dinat_isotropic_small=_variant(384, (12,), 4, 0.1, (2,), swin=True, patch_size=16),
    dinat_isotropic_base=_variant(768, (12,), 4, 0.4, (2,), swin=True, patch_size=16),
)
class DiNAT(Staged):
    """Image classifier or backbone for images ``[B, in_chans, H, W]`` of any size.

    Levels double the channels; after the last one LayerNorm, mean over the tokens, classifier.

    Args:
        embed_dim: channels of the first level.
        mlp_ratio, depths, num_heads, kernel_size, qkv_bias, qk_scale, layer_scale: of the blocks.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        in_chans: channels of the image.
        dilations: one per block, in a list per level; 1 everywhere (NAT) by default.
        num_classes, features_only, out_indices, grad_checkpointing: see `Staged`.
        drop_rate: dropout after the stem, after each attention and in the MLPs.
        swin: the layout of DiNAT_s: patches of `patch_size` (with LayerNorm if `patch_norm`) and patch merging instead of
            convolutions. With one level it is the isotropic DiNAT.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or the levels differ in number.
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_ratio: float,
        depths: Sequence[int],
        num_heads: Sequence[int],
        drop_path_rate: float = 0.2,
        in_chans: int = 3,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        layer_scale: float | None = None,
        *,
        swin: bool = False,
        patch_size: int = 4,
        patch_norm: bool = True,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        widths = [embed_dim << i for i in range(len(depths))]
        super().__init__(
            widths,
            [patch_size << i for i in range(len(depths))],
            "layers" if swin else "levels",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        dilations = [(1,) * depth for depth in depths] if dilations is None else dilations
        self.check(len(num_heads) == len(depths), f"{depths=} and {num_heads=} differ in length")
        self.check(
            [len(level) for level in dilations] == list(depths),
            f"{dilations=}: one per block, in a list per level of {depths=}",
        )
        self.check(swin or patch_size == 4, f"{patch_size=}: the convolutional stem has stride 4")
        self.patch_embed: nn.Module = ConvTokenizer(in_chans, embed_dim)
        if swin:
            self.patch_embed = PatchEmbed(in_chans, embed_dim, (patch_size, patch_size), norm=patch_norm, pad=True)
        downsample = PatchMerging if swin else ConvDownsampler
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(linear_rates(drop_path_rate, sum(depths)))

        def block(dim: int, heads: int, dilation: int) -> nn.Module:
            attn = NeighborhoodAttention(dim, heads, kernel_size, dilation, qkv_bias, qk_scale, drop_rate, backend=backend)
            return PreNormBlock(dim, attn, mlp_ratio=mlp_ratio, drop=drop_rate, drop_path=next(rates), layer_scale=layer_scale)

        levels = nn.ModuleList(
            Level([block(dim, heads, d) for d in level], downsample(dim) if dim < widths[-1] else None)
            for dim, heads, level in zip(widths, num_heads, dilations, strict=True)
        )
        # the two layouts call them differently
        self.layers: nn.ModuleList | None = levels if swin else None
        self.levels: nn.ModuleList | None = None if swin else levels
        if not features_only:
            self.norm = nn.LayerNorm(self.num_features)
            self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(init_vit)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all levels before their downsampling, ``[B, C, H', W']`` (views of channels-last memory)."""
        maps = []
        x = self.pos_drop(self.patch_embed(x))
        for level in cast("list[Level]", self.levels or self.layers):
            for block in level.blocks:
                x = self.run(block, x)
            maps.append(x.permute(0, 3, 1, 2))
            if level.downsample is not None:
                x = level.downsample(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """LayerNorm and mean over the tokens of ``[B, C, H', W']``, and the classifier unless `pre_logits`."""
        x = self.norm(x.permute(0, 2, 3, 1)).mean((1, 2))
        return x if pre_logits else cast(Tensor, self.head(x))


IGNORED = ("attn_drop", "attn_drop_rate", "norm_layer")  # no effect in evaluation mode, or always LayerNorm
SWIN = partial(DiNAT, embed_dim=96, mlp_ratio=4.0, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), swin=True)

for _name in ("natten.NeighborhoodAttention2D", "NeighborhoodAttention2D", "NeighborhoodAttention"):
    official("dinat", _name, ignores=IGNORED)(NeighborhoodAttention)
for _name in ("dinat.DiNAT (= nat.NAT)", "dinat.DiNAT", "DiNAT", "nat.NAT", "NAT"):
    official("dinat", _name, ignores=IGNORED)(DiNAT)
for _name in ("dinats.DiNAT_s", "DiNAT_s"):
    official("dinat", _name, ignores=IGNORED)(SWIN)
