"""CrossFormer: cross-scale embeddings and long-short distance attention (Wang et al., ICLR 2022, arXiv:2108.00154).

Blocks alternate between attention among neighbours (windows) and among tokens at a fixed interval, under a position
bias that a small network makes from offsets. CrossFormer++ (2023, arXiv:2303.06908) cools amplitudes by a convolution
in some blocks. Parameter names are those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.conv import conv_map
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.relative_window import check_heads, relative_table
from attnc.models.blocks.staged import Staged
from attnc.models.official import official, on_tokens, tokens
from attnc.models.registry import variants


class Groups(NamedTuple):
    """How a map is cut: groups of `size` tokens per axis, `interval` apart, the first block beginning at -`before`."""

    size: tuple[int, int]
    interval: int = 1
    before: tuple[int, int] = (0, 0)


@cache  # layers share operators
def group_operator(groups: Groups, biased: bool, heads: int, backend: str) -> attnc.Operator:
    """Attention inside groups, on packed ``[B, H, W, 3C]``; a group may be cut off by the border of the map."""
    up, left = groups.before
    pattern = attnc.patterns.dilated_blocks(groups.size, groups.interval, bias="relative" if biased else None).shift(-up, -left)
    return attnc.compile(pattern, layout="b y x (three h d)", heads=heads, backend=backend)


class OffsetNetwork(nn.Module):
    """Dynamic position bias: a network of `width` channels from the offset (dy, dx), query minus key, to a bias per head."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.pos_proj = nn.Linear(2, width)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)) for out in (width, width, num_heads)
        )

    def forward(self, size: tuple[int, int]) -> Tensor:
        """The biases ``[h, 2 size_y - 1, 2 size_x - 1]`` of groups of `size` tokens, at query - key + size - 1."""
        like = self.pos_proj.weight
        rows, columns = (torch.arange(1 - s, s, dtype=like.dtype, device=like.device) for s in size)
        offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        biases = self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))
        return relative_table(biases, len(rows), len(columns))


class GroupAttention(nn.Module):
    """softmax(q k^T scale + bias(query - key)) v among the tokens of a group, with `qkv` and `proj` around it.

    Args:
        dim: channels C.
        num_heads: heads of C / h channels.
        qkv_bias: whether `qkv` has a bias.
        qk_scale: instead of (C / h) ** -0.5.
        position_bias: whether there is a bias; its network is C // 16 wide.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        position_bias: bool = True,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if position_bias and dim < 16:
            raise DeclarationError(f"dim is {dim}; the network of position biases is dim // 16 wide: use 16 or more")
        self.num_heads = num_heads
        self.scale = qk_scale or None
        self.backend = backend
        self.pos = OffsetNetwork(dim // 16, num_heads) if position_bias else None
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def operator(self, groups: Groups) -> attnc.Operator:
        """What attends inside these groups."""
        return group_operator(groups, self.pos is not None, self.num_heads, self.backend)

    def forward(self, x: Tensor, attend: attnc.Operator, size: tuple[int, int]) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]`` by the operator of groups of `size`."""
        bias = {} if self.pos is None else {"bias": self.pos(size)}
        out: Tensor = self.proj(attend(self.qkv(x), scale=self.scale, **bias))
        return out


class OneGroup(GroupAttention):
    """The attention alone, on maps that are one group ``[B * groups, Gh, Gw, C]``."""

    def __init__(self, dim: int, group_size: Sequence[int], num_heads: int, *args: Any, **options: Any) -> None:
        super().__init__(dim, num_heads, *args, **options)
        self.size = (group_size[0], group_size[1])
        self.attend = self.operator(Groups(self.size))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, Gh, Gw, C] -> [B, Gh, Gw, C]``."""
        return super().forward(x, self.attend, self.size)


class Block(nn.Module):
    """x + attention(LN x), x + MLP(LN x), and perhaps LN(DWConv3x3(x)), which replaces x.

    The map is cut into groups after it was padded, officially, to whole groups, at the bottom and right or on all sides;
    what was padded is masked, so that here groups are cut off instead. On a map that does not exceed the group on both
    axes, groups are windows as large as its shorter side, whatever `lsda_flag` says.

    Args:
        dim, num_heads: channels and heads.
        input_resolution: height and width to build operators for ahead; the forward takes others too.
        group_size: tokens of a group per axis.
        interval: between the tokens of a group where `lsda_flag` is 1.
        lsda_flag: 0 for neighbours, 1 for tokens at an interval.
        mlp_ratio, qkv_bias, qk_scale, drop_path: as usual.
        use_extra_conv: the amplitude cooling layer of CrossFormer++.
        pad_type: 0 where groups begin at the map's corner, 1 where they lie evenly on it.

    Raises:
        DeclarationError: an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        group_size: int = 7,
        interval: int = 8,
        lsda_flag: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path: float = 0.0,
        use_extra_conv: bool = False,
        pad_type: int = 0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check(group_size > 0 and interval > 0, f"{group_size=} and {interval=} must be positive")
        _check(lsda_flag in (0, 1) and pad_type in (0, 1), f"{lsda_flag=} and {pad_type=} are 0 or 1")
        self.group_size = group_size
        self.interval = interval if lsda_flag else 1
        self.pad_type = pad_type
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GroupAttention(dim, num_heads, qkv_bias, qk_scale, backend=backend)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if use_extra_conv else None
        self.ex_ln = nn.LayerNorm(dim) if use_extra_conv else None
        # attnc.compile is no code that torch.compile should trace: what is expected to be needed is built here
        large = Groups((group_size, group_size), self.interval)
        self._operators = {g: self.attn.operator(g) for g in {self.groups(*input_resolution), large}}

    def groups(self, height: int, width: int) -> Groups:
        """How a map of this size is cut."""
        size, interval = self.group_size, self.interval
        if min(height, width) <= size:
            size, interval = min(height, width), 1
        if self.pad_type == 0:
            return Groups((size, size), interval)
        up, left = (-n % (size * interval) // 2 for n in (height, width))
        return Groups((size, size), interval, (up, left))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        groups = self.groups(x.shape[1], x.shape[2])
        if groups not in self._operators:
            self._operators[groups] = self.attn.operator(groups)
        x = x + self.drop_path(self.attn(self.norm1(x), self._operators[groups], groups.size))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.ex_conv is not None and self.ex_ln is not None:
            x = self.ex_ln(conv_map(self.ex_conv, x))
        return x


def shares(width: int, kernels: int) -> list[int]:
    """Channels of each of `kernels` convolutions: half of all, a quarter, ..., and the last as many as the one before."""
    return [width >> min(i + 1, kernels - 1) for i in range(kernels)]


class CrossScale(nn.ModuleList):
    """Convolutions of several kernels and one stride, the least kernel, whose outputs are joined."""

    def __init__(self, before: int, after: int, kernels: Sequence[int]) -> None:
        stride = kernels[0]
        _check(all(k >= stride and (k - stride) % 2 == 0 for k in kernels), f"kernels {list(kernels)}: the first plus even numbers")
        widths = shares(after, len(kernels))
        _check(sum(widths) == after, f"{after} channels cannot be shared among {len(kernels)} kernels by halves")
        super().__init__(nn.Conv2d(before, n, k, stride, (k - stride) // 2) for n, k in zip(widths, kernels, strict=True))

    def join(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H // stride, W // stride, C']``."""
        return torch.cat([conv_map(cast(nn.Conv2d, conv), x) for conv in self], -1)


class PatchEmbed(nn.Module):
    """Cross-scale embedding of an image, and perhaps a LayerNorm."""

    def __init__(self, in_chans: int, dim: int, kernels: Sequence[int], norm: bool) -> None:
        super().__init__()
        self.projs = CrossScale(in_chans, dim, kernels)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, in_chans] -> [B, H // stride, W // stride, C]``."""
        return cast(Tensor, self.norm(self.projs.join(x)))


class PatchMerging(nn.Module):
    """Between stages: LayerNorm, then the cross-scale embedding to twice the channels."""

    def __init__(self, dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reductions = CrossScale(dim, 2 * dim, kernels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H // 2, W // 2, 2C]``."""
        return self.reductions.join(self.norm(x))


class Stage(nn.Module):
    """Blocks, and what leads to the next stage (nothing after the last one)."""

    def __init__(self, blocks: Sequence[Block], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


def _variant(dim: int, depths: tuple[int, ...], plus: bool = False) -> dict[str, Any]:
    return {
        "patch_size": (4, 8, 16, 32),
        "embed_dim": dim,
        "depths": depths,
        "num_heads": tuple((dim << stage) // 32 for stage in range(4)),
        "group_size": (4, 4, 14, 7) if plus else (7, 7, 7, 7),
        "crs_interval": (4, 2, 1, 1) if plus else (8, 4, 2, 1),
        "merge_size": ((2, 4),) * 3,
        "use_acl": plus,
    }


@variants(
    crossformer_tiny=_variant(64, (1, 1, 8, 6)),
    crossformer_small=_variant(96, (2, 2, 6, 2)),
    crossformer_base=_variant(96, (2, 2, 18, 2)),
    crossformer_large=_variant(128, (2, 2, 18, 2)),
    crossformer_pp_small=_variant(64, (2, 2, 18, 2), plus=True),
    crossformer_pp_base=_variant(96, (2, 2, 18, 2), plus=True),
    crossformer_pp_large=_variant(128, (2, 2, 18, 2), plus=True),
    crossformer_pp_huge=_variant(128, (6, 6, 18, 2), plus=True),
)
class CrossFormer(Staged):
    """Image classifier or backbone for images ``[B, in_chans, H, W]`` of any size that leaves each stage a token.

    Args:
        img_size: height and width that operators are built for ahead.
        patch_size: kernels of the embedding, the first of which is the stride.
        in_chans: channels of the image.
        num_classes: logits; 0 leaves the pooled, normalised features.
        embed_dim: channels of the first stage, doubled by each merging.
        depths, num_heads, group_size, crs_interval: blocks, heads, group and interval per stage (the last two may be one
            number for all); odd blocks of a stage attend at the interval.
        mlp_ratio: of the blocks, one for all stages or one per stage.
        qkv_bias, qk_scale: of the blocks.
        drop_rate: dropout after the embedding.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; officially 0.1 (tiny) to 0.5.
        ape: learned absolute positions, which fix the size of the image to `img_size`.
        patch_norm: a LayerNorm after the embedding.
        merge_size: kernels of each merging, beginning with 2.
        use_acl: CrossFormer++: cool amplitudes after every third block of a stage, but not after its last one.
        pad_type: see `Block`.
        features_only, out_indices, grad_checkpointing: see `Staged`; the maps are those before merging.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or the stages differ in number.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: Sequence[int] = (4,),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        group_size: int | Sequence[int] = 7,
        crs_interval: int | Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        ape: bool = False,
        patch_norm: bool = True,
        merge_size: Sequence[Sequence[int]] = ((2,), (2,), (2,)),
        use_acl: bool = False,
        pad_type: int = 0,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        stages = len(depths)
        sizes = per_stage(group_size, stages, "group_size")
        intervals = per_stage(crs_interval, stages, "crs_interval")
        ratios = per_stage(mlp_ratio, stages, "mlp_ratio")
        heads = per_stage(num_heads, stages, "num_heads")
        merges = list(merge_size)[: stages - 1]  # a list too long is cut, as in the official code
        _check(len(merges) == stages - 1, f"{merge_size=}: one list of kernels after each of the {stages} stages but the last")
        _check(all(m[0] == 2 for m in merges), f"{merge_size=}: the first kernel is the stride, 2")
        super().__init__(
            [embed_dim << i for i in range(stages)],
            [patch_size[0] << i for i in range(stages)],
            "layers",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        rows, columns = height // patch_size[0], width // patch_size[0]
        self.stride = patch_size[0]
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, patch_norm)
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, rows * columns, embed_dim)) if ape else None
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(linear_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        for s, depth in enumerate(depths):
            resolution = (rows >> s, columns >> s)
            blocks = [
                Block(
                    embed_dim << s,
                    resolution,
                    heads[s],
                    sizes[s],
                    intervals[s],
                    i % 2,
                    ratios[s],
                    qkv_bias,
                    qk_scale,
                    next(rates),
                    use_acl and (i + 1) % 3 == 0 and i < depth - 1,
                    pad_type,
                    backend=backend,
                )
                for i in range(depth)
            ]
            self.layers.append(Stage(blocks, PatchMerging(embed_dim << s, merges[s]) if s < stages - 1 else None))
        if not features_only:
            self.norm = nn.LayerNorm(self.num_features)
            self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(init_vit)
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all stages, ``[B, C, H', W']`` (views of channels-last memory).

        Raises:
            ShapeError: the image is too small for a stage, or not what absolute positions were made for.
        """
        least = self.stride << (len(self.layers) - 1)
        if min(x.shape[2:]) < least:
            raise ShapeError(f"CrossFormer: the image is {x.shape[2]} x {x.shape[3]}; its stages need at least {least} x {least}")
        maps = []
        x = self.patch_embed(x.permute(0, 2, 3, 1))
        if self.absolute_pos_embed is not None:
            if x.shape[1] * x.shape[2] != self.absolute_pos_embed.shape[1]:
                raise ShapeError(
                    f"CrossFormer: absolute positions were made for {self.absolute_pos_embed.shape[1]} tokens, the map is "
                    f"{x.shape[1]} x {x.shape[2]}; use ape=False for images of any size"
                )
            x = x + self.absolute_pos_embed.view(1, *x.shape[1:])
        x = self.pos_drop(x)
        for stage in self.layers:
            for block in cast(nn.ModuleList, stage.blocks):
                x = self.run(block, x)
            maps.append(x.permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = cast(PatchMerging, stage.downsample)(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """LayerNorm, mean over the tokens of ``[B, C, H', W']``, and the classifier unless `pre_logits`."""
        x = self.norm(x.permute(0, 2, 3, 1)).mean((1, 2))
        return x if pre_logits else cast(Tensor, self.head(x))


def per_stage(value: Any, stages: int, what: str) -> list[Any]:
    """One number for all stages, or one each."""
    values = [value] * stages if isinstance(value, int | float) else list(value)
    _check(len(values) == stages, f"{what}={value!r}: there are {stages} stages")
    return values


def _check(holds: bool, complaint: str) -> None:
    if not holds:
        raise DeclarationError(f"CrossFormer: {complaint}")


# dropouts, which mean nothing in evaluation mode, and what follows from the sizes
IGNORED = (
    *("drop", "attn_drop", "proj_drop", "attn_drop_rate", "act_layer", "norm_layer", "use_checkpoint", "mask"),
    *("num_patch_size", "impl_type"),
)


@official("crossformer", "Attention", ignores=IGNORED)
def _attention(
    dim: int,
    group_size: Sequence[int],
    num_heads: int,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    position_bias: bool = True,
    *,
    backend: str = "auto",
) -> nn.Module:
    """Tokens of groups, ``[B * groups, Gh * Gw, C]``: each group is a map of its own."""
    attention = OneGroup(dim, group_size, num_heads, qkv_bias, qk_scale, position_bias, backend=backend)
    return on_tokens(attention, attention.size)


official("crossformer", "CrossFormerBlock", ignores=IGNORED)(tokens(Block))
official("crossformer", "CrossFormer", ignores=IGNORED)(CrossFormer)
