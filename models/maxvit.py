"""MaxViT: Multi-Axis Vision Transformer (Tu et al., ECCV 2022, arXiv:2204.01697).

A block is an inverted bottleneck convolution, attention inside windows (*block*), and attention among P x P tokens
spread evenly over the whole map (*grid*). Parameter names are those of timm's port, which loads the official weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.attention import QkvAttention
from attnc.models.blocks.drop import DropPath
from attnc.models.blocks.patches import pair
from attnc.models.blocks.prenorm import PreNormBlock
from attnc.models.blocks.squeeze import SqueezeExcite
from attnc.models.blocks.staged import Staged
from attnc.models.official import official
from attnc.models.registry import variants
from attnc.models.timm_names import timm_names

PARTITIONS = {"block": attnc.patterns.window, "grid": attnc.patterns.grid}
GELUS = {"gelu_tanh": "tanh", "gelu": "none"}  # timm's names, torch's


@cache  # layers share operators
def partition_operator(
    kind: str, size: tuple[int, int], biased: bool, interleaved: bool, heads: int, backend: str
) -> attnc.Operator:
    """Attention inside windows ("block") or among evenly spaced tokens ("grid"), on packed ``[B, H, W, 3C]``.

    The channels are q, k and v, each in heads, or heads, each of q, k and v (`interleaved`).
    """
    pattern = PARTITIONS[kind](size, bias="relative" if biased else None)
    layout = "b y x (h three d)" if interleaved else "b y x (three h d)"
    return attnc.compile(pattern, layout=layout, heads=heads, backend=backend)


class RelativePositions(nn.Module):
    """The table ``[heads, 2 rows - 1, 2 columns - 1]`` of a partition, at key minus query."""

    def __init__(self, size: tuple[int, int], heads: int) -> None:
        super().__init__()
        shape = (heads, *(2 * s - 1 for s in size))
        self.relative_position_bias_table = nn.Parameter(nn.init.normal_(torch.empty(shape), std=0.02))


class PartitionAttention(QkvAttention):
    """softmax(q k^T / sqrt(d) + bias) v among the tokens of a partition.

    Args:
        dim: channels C.
        kind: "block", windows of `size`; "grid", `size` tokens spread evenly over the map.
        size: rows and columns of a partition.
        dim_head: channels of a head.
        biased: whether scores add a learned table of relative positions.
        interleaved: whether ``qkv`` gives heads of q, k, v instead of q, k, v of heads.
        proj_drop: dropout after ``proj``.
        backend: of the operator.

    Raises:
        DeclarationError: the kind is unknown, or `dim_head` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        kind: str,
        size: tuple[int, int],
        dim_head: int = 32,
        *,
        biased: bool = True,
        interleaved: bool = False,
        proj_drop: float = 0.0,
        backend: str = "auto",
    ) -> None:
        if kind not in PARTITIONS:
            raise DeclarationError(f"the partition is {kind!r}; 'block' and 'grid' exist")
        if dim % dim_head:
            raise DeclarationError(f"dim_head is {dim_head}, which does not divide dim = {dim}")
        super().__init__(dim, dim // dim_head, proj_drop=proj_drop)
        self.size = size
        self.rel_pos = RelativePositions(size, self.num_heads) if biased else None
        self.attend = partition_operator(kind, size, biased, interleaved, self.num_heads, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``; ShapeError unless the size divides the map."""
        rows, columns = self.size
        if x.shape[1] % rows or x.shape[2] % columns:
            raise ShapeError(
                f"a map of {x.shape[1]}x{x.shape[2]} has no partitions of {rows}x{columns}: choose an image size whose maps "
                "they divide, or another window"
            )
        # the operator's table is indexed by query minus key
        tables: dict[str, Any] = {}
        if self.rel_pos is not None:
            tables["bias"] = self.rel_pos.relative_position_bias_table.flip(1, 2)
        return self.project(self.attend(self.qkv(x), scale=self.scale, **tables))


def same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` with TensorFlow's padding: ceil(n / stride) outputs, the odd row or column of zeros at the bottom or right."""
    margins = []
    for n, size, stride in zip(x.shape[:-3:-1], conv.kernel_size[::-1], conv.stride[::-1], strict=True):
        total = max((-(-n // stride) - 1) * stride + size - n, 0)
        margins += [total // 2, total - total // 2]
    out: Tensor = conv(F.pad(x, margins) if any(margins) else x)
    return out


class Shortcut(nn.Module):
    """Mean of 2x2 pixels (of those that exist, at an odd border), then a 1x1 convolution where the channels change."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', ceil(H / 2), ceil(W / 2)]``."""
        out: Tensor = self.expand(F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False))
        return out


class MBConv(nn.Module):
    """Pre-norm inverted bottleneck: 1x1 to `ratio` times the output's width, depthwise 3x3, squeeze and excite, 1x1.

    Args:
        before, after: channels in and out.
        stride: 1 or 2, of the depthwise convolution; with 1 the channels stay.
        ratio: hidden channels over `after`, rounded to a multiple of 8.
        squeeze: squeezed channels over `after`.
        eps: of the norms.
        gelu: "tanh" or "none".
        drop_path: probability of dropping the branch.

    Raises:
        DeclarationError: the stride is neither 1 nor 2, or the channels change without one.
    """

    def __init__(
        self,
        before: int,
        after: int,
        stride: int = 1,
        *,
        ratio: float = 4.0,
        squeeze: float = 0.25,
        eps: float = 1e-3,
        gelu: str = "tanh",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if stride not in (1, 2) or (stride == 1 and before != after):
            raise DeclarationError(f"MBConv from {before} to {after} channels has stride {stride}: 2, or 1 with equal channels")
        wide = max(8, int(after * ratio + 4) // 8 * 8)
        self.gelu = gelu
        self.shortcut = Shortcut(before, after) if stride == 2 else nn.Identity()
        self.pre_norm = nn.BatchNorm2d(before, eps, momentum=0.01)
        self.conv1_1x1 = nn.Conv2d(before, wide, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide, eps, momentum=0.01)
        self.conv2_kxk = nn.Conv2d(wide, wide, 3, stride, groups=wide, bias=False)
        self.norm2 = nn.BatchNorm2d(wide, eps, momentum=0.01)
        self.se = SqueezeExcite(wide, int(after * squeeze))
        self.conv3_1x1 = nn.Conv2d(wide, after, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', ceil(H / stride), ceil(W / stride)]``."""
        y = F.gelu(self.norm1(self.conv1_1x1(self.pre_norm(x))), approximate=self.gelu)
        y = self.se(F.gelu(self.norm2(same(y, self.conv2_kxk)), approximate=self.gelu))
        out: Tensor = self.shortcut(x) + self.drop_path(self.conv3_1x1(y))
        return out


class Block(nn.Module):
    """MBConv, block attention with its MLP, grid attention with its MLP."""

    def __init__(self, conv: nn.Module, attn_block: nn.Module, attn_grid: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.attn_block = attn_block
        self.attn_grid = attn_grid

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', H', W']``, in channels-last memory."""
        x = self.conv(x).permute(0, 2, 3, 1)
        out: Tensor = self.attn_grid(self.attn_block(x))
        return out.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """The blocks of one resolution; the first one halves it."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class Stem(nn.Module):
    """Two 3x3 convolutions, the first with stride 2, norm and GELU between them."""

    def __init__(self, in_chans: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 2)
        self.norm1 = nn.BatchNorm2d(widths[0], 1e-3, momentum=0.01)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]``."""
        x = x.contiguous(memory_format=torch.channels_last)
        return same(F.gelu(self.norm1(same(x, self.conv1)), approximate="tanh"), self.conv2)


class PreLogits(nn.Module):
    """Linear C -> C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)


class Head(nn.Module):
    """Mean over the map, LayerNorm, Linear, tanh, dropout, Linear."""

    def __init__(self, dim: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pre_logits = PreLogits(dim)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool) -> Tensor:
        """``[B, C, H, W] -> [B, num_classes]``; `pre_logits` leaves out the last layer."""
        x = self.pre_logits.fc(self.norm(x.mean((2, 3)))).tanh()
        return x if pre_logits else cast(Tensor, self.fc(self.drop(x)))


def init_maxvit(module: nn.Module) -> None:
    """Convolutions: normal with variance 2 / fan-out. Linear layers: Xavier's uniform. Biases zero."""
    if isinstance(module, nn.Conv2d):
        fan_out = prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _variants() -> dict[str, dict[str, Any]]:
    """By size and image: partitions have 7, 12 and 16 tokens a side at 224, 384 and 512 pixels."""
    sizes = {
        "tiny": (64, 64, (2, 2, 5, 2), 0.2),
        "small": (64, 96, (2, 2, 5, 2), 0.3),
        "base": (64, 96, (2, 6, 14, 2), 0.4),
        "large": (128, 128, (2, 6, 14, 2), 0.6),
        "xlarge": (192, 192, (2, 6, 14, 2), 0.6),
    }
    return {
        f"maxvit_{name}{suffix}": {
            "stem_width": (stem, stem),
            "embed_dim": tuple(dim << stage for stage in range(4)),
            "depths": depths,
            "drop_path_rate": drop_path_rate,
            "window_size": window,
        }
        for name, (stem, dim, depths, drop_path_rate) in sizes.items()
        for suffix, window in (("", 7), ("_384", 12), ("_512", 16))
    }


@variants(**_variants())
class MaxViT(Staged):
    """Image classifier or backbone for images ``[B, in_chans, H, W]`` whose maps the partitions divide.

    Every stage halves the map, so that H and W are multiples of 2^(stages + 1) * `window_size` (except for rounding up).

    Args:
        in_chans: channels of the image.
        num_classes: logits; 0 leaves what the last layer reads.
        stem_width: channels of the stem's two convolutions.
        embed_dim, depths: channels and blocks per stage.
        dim_head: channels of a head.
        window_size: rows and columns of windows, and number of tokens per axis of grids.
        mlp_ratio: hidden width of the MLPs over C.
        drop_rate: dropout before the last layer.
        drop_path_rate: of block b of n it is `drop_path_rate` * b / n.
        features_only, out_indices, grad_checkpointing: see `Staged`.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or the stages differ in number.
    """

    classifier = "head.fc"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem_width: tuple[int, int] = (64, 64),
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        dim_head: int = 32,
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            embed_dim,
            [4 << i for i in range(len(embed_dim))],
            "stages",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.check(len(depths) == len(embed_dim), f"{depths=} and {embed_dim=} differ in length")
        self.check(all(depth > 0 for depth in depths), f"{depths=}: every stage needs a block, which halves the map")
        size = pair(window_size)
        self.stem = Stem(in_chans, (stem_width[0], stem_width[1]))
        rates = iter([drop_path_rate * b / sum(depths) for b in range(sum(depths))])

        def attention(dim: int, kind: str, rate: float) -> nn.Module:
            attn = PartitionAttention(dim, kind, size, dim_head, backend=backend)
            return PreNormBlock(dim, attn, mlp_ratio=mlp_ratio, drop_path=rate, gelu="tanh")

        def block(before: int, dim: int, stride: int) -> nn.Module:
            rate = next(rates)
            conv = MBConv(before, dim, stride, drop_path=rate)
            return Block(conv, attention(dim, "block", rate), attention(dim, "grid", rate))

        before = (stem_width[1], *embed_dim[:-1])
        self.stages = nn.ModuleList(
            Stage([block(first, dim, 2), *(block(dim, dim, 1) for _ in range(depth - 1))])
            for first, dim, depth in zip(before, embed_dim, depths, strict=True)
        )
        if not features_only:
            self.head = Head(self.num_features, num_classes, drop_rate)
        self.apply(init_maxvit)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all stages, ``[B, C, H', W']`` (views of channels-last memory)."""
        maps = []
        x = self.stem(x)
        for stage in self.stages:
            for block in cast(Stage, stage).blocks:
                x = self.run(block, x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The head on ``[B, C, H', W']``; `pre_logits` leaves out its last layer."""
        out: Tensor = self.head(x, pre_logits)
        return out


timm_names("maxvit")  # the same names


@official("maxvit", "PartitionAttentionCl")
def _partition(
    dim: int,
    partition_type: str = "block",
    partition_size: int | Sequence[int] = 7,
    dim_head: int = 32,
    head_first: bool = True,
    rel_pos_type: str | None = "bias_tf",
    norm_eps: float = 1e-6,
    act_layer: str = "gelu",
    expand_ratio: float = 4.0,
    *,
    backend: str = "auto",
) -> nn.Module:
    if rel_pos_type not in (None, "bias_tf"):
        raise DeclarationError(f"rel_pos_type is {rel_pos_type!r}; MaxViT's is 'bias_tf', and None has no bias")
    attn = PartitionAttention(
        dim,
        partition_type,
        pair(partition_size),
        dim_head,
        biased=rel_pos_type is not None,
        interleaved=head_first,
        backend=backend,
    )
    return PreNormBlock(dim, attn, mlp_ratio=expand_ratio, eps=norm_eps, gelu=_gelu(act_layer))


@official("maxvit", "MbConvBlock", derived=("*.num_batches_tracked",))
def _mbconv(
    in_chs: int,
    out_chs: int,
    stride: int = 1,
    expand_ratio: float = 4.0,
    se_ratio: float = 0.25,
    norm_eps: float = 1e-3,
    act_layer: str = "gelu_tanh",
    padding: str = "same",
) -> nn.Module:
    if padding != "same":
        raise DeclarationError(f"padding is {padding!r}; MaxViT's convolutions pad as TensorFlow's, 'same'")
    return MBConv(in_chs, out_chs, stride, ratio=expand_ratio, squeeze=se_ratio, eps=norm_eps, gelu=_gelu(act_layer))


@official("maxvit", "MaxxVit", ignores=("img_size", "drop_rate", "drop_path_rate"), derived=("*.num_batches_tracked",))
def _maxxvit(
    embed_dim: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 5, 2),
    stem_width: tuple[int, int] = (64, 64),
    dim_head: int = 32,
    ws: int | Sequence[int] = 7,
    er: float = 4.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    *,
    backend: str = "auto",
) -> nn.Module:
    return MaxViT(in_chans, num_classes, stem_width, embed_dim, depths, dim_head, ws, er, backend=backend)


def _gelu(name: str) -> str:
    if name not in GELUS:
        raise DeclarationError(f"act_layer is {name!r}; {' and '.join(GELUS)} exist")
    return GELUS[name]
