"""GCViT: Global Context Vision Transformers (Hatamizadeh et al., ICML 2023, arXiv:2206.09959).

Two window attentions alternate: one with its own queries, and one whose queries are computed once per stage from the
whole map and shared by all windows. Parameter names are those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.biased_window import BiasedWindowAttention, BiasedWindows
from attnc.models.blocks.conv import conv_map
from attnc.models.blocks.drop import linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.prenorm import PreNormBlock
from attnc.models.blocks.staged import Staged
from attnc.models.official import official, on_tokens
from attnc.models.registry import variants
from attnc.models.timm_names import timm_names


@attnc.pattern
def same_window(q: Any, k: Any, *, size: int, bias: attnc.Table) -> Any:
    """A window on a grid (rows of windows, rows in a window, columns of windows, columns in a window).

    Said so, queries that all windows share are a view with stride 0 along i and j.
    """
    table = bias[attnc.HEAD, q.y - k.y + size - 1, q.x - k.x + size - 1]
    return attnc.where((q.i == k.i) & (q.j == k.j), attnc.SCORE + table)


@cache  # layers share operators
def global_operator(size: int, backend: str) -> attnc.Operator:
    """Attention inside windows, on q, k and v ``[B, H / w, w, W / w, w, heads, d]``."""
    return attnc.compile(same_window(size=size), layout="b i y j x h d", backend=backend)


class GlobalWindowAttention(BiasedWindows):
    """Window attention whose ``qkv`` (C -> [k | v]) gives keys and values: all windows of an image share their queries.

    Args:
        dim, num_heads, qkv_bias, qk_scale, proj_drop: see `BiasedWindows`.
        window_size: side w of a window.
        backend: of the operator.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, (window_size, window_size), qkv_bias, qk_scale, proj_drop, rows=2)
        self.attend = global_operator(window_size, backend)

    def forward(self, x: Tensor, q_global: Tensor) -> Tensor:
        """x ``[B, H, W, C]``, q_global ``[B, w, w, C]`` -> ``[B, H, W, C]``; ShapeError where they do not fit."""
        self.check(x)
        w, heads = self.window[0], self.num_heads
        if q_global.shape != (x.shape[0], w, w, x.shape[3]):
            raise ShapeError(
                f"global queries of shape {list(q_global.shape)} for windows of {w}x{w} and a map {list(x.shape)}: the image has "
                "another size than the windows and query generators were made for"
            )
        kv = self.qkv(x).unflatten(3, (2, heads, -1)).unflatten(2, (-1, w)).unflatten(1, (-1, w))
        k, v = kv.unbind(5)
        q = torch.unflatten(q_global, 3, (heads, -1))[:, None, :, None].expand(k.shape)  # a view: every window reads the same rows
        return self.project(self.attend(q, k, v, scale=self.scale, bias=self.bias()).reshape(x.shape))


class SqueezeExcite(nn.Module):
    """Channels scaled by sigmoid(W2 GELU(W1 mean over the map)), C -> C / 4 -> C, no biases."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, int(dim * 0.25), bias=False), nn.GELU(), nn.Linear(int(dim * 0.25), dim, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        out: Tensor = x * self.fc(x.mean((2, 3)))[..., None, None]
        return out


def fused_mbconv(dim: int) -> nn.Sequential:
    """Depthwise 3x3, GELU, squeeze and excite, 1x1, on ``[B, C, H, W]``; no biases."""
    depthwise = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, bias=False)
    return nn.Sequential(depthwise, nn.GELU(), SqueezeExcite(dim), nn.Conv2d(dim, dim, 1, bias=False))


class FeatExtract(nn.Module):
    """x + conv(x), then a 3x3 maximum with stride 2 if `halve`, on ``[B, C, H, W]``."""

    def __init__(self, dim: int, halve: bool) -> None:
        super().__init__()
        self.conv = fused_mbconv(dim)
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same, or to ``[B, C, ceil(H / 2), ceil(W / 2)]``."""
        x = x + self.conv(x)
        return F.max_pool2d(x, 3, 2, 1) if self.halve else x


class GlobalQueries(nn.Module):
    """A stage's shared queries: its map, halved until it has the size of a window.

    Args:
        dim: channels C.
        resolution, window_size: rows (and columns) of the map and of a window.

    Raises:
        DeclarationError: halving the map never gives a window.
    """

    def __init__(self, dim: int, resolution: int, window_size: int) -> None:
        super().__init__()
        halvings, side = 0, resolution
        while side > window_size:
            halvings, side = halvings + 1, -(-side // 2)
        if side != window_size:
            raise DeclarationError(
                f"a map of {resolution}x{resolution} halved {halvings} times has {side}x{side} tokens, a window {window_size}x"
                f"{window_size}: choose window_size = resolution / 2^n"
            )
        self.to_q_global = nn.Sequential(*(FeatExtract(dim, halvings > 0) for _ in range(max(halvings, 1))))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, w, w, C]``."""
        out: Tensor = self.to_q_global(x.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)


class ReduceSize(nn.Module):
    """LayerNorm, z + conv(z), 3x3 convolution with stride 2 and without a bias, LayerNorm.

    Args:
        dim: channels C.
        keep_dim: whether the channels stay; otherwise they double.
    """

    def __init__(self, dim: int, keep_dim: bool = False) -> None:
        super().__init__()
        after = dim if keep_dim else 2 * dim
        self.conv = fused_mbconv(dim)
        self.reduction = nn.Conv2d(dim, after, 3, 2, 1, bias=False)
        self.norm2 = nn.LayerNorm(after)
        self.norm1 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C']``."""
        z = self.norm1(x).permute(0, 3, 1, 2)
        z = self.reduction(z + self.conv(z))
        out: Tensor = self.norm2(z.permute(0, 2, 3, 1))
        return out


class PatchEmbed(nn.Module):
    """3x3 convolution with stride 2, then `ReduceSize` to a quarter of the image's size."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 3, 2, 1)
        self.conv_down = ReduceSize(dim, keep_dim=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), C]``."""
        out: Tensor = self.conv_down(conv_map(self.proj, x.permute(0, 2, 3, 1)))
        return out


class Level(nn.Module):
    """The blocks of one resolution, local and global in turns, the queries they share, and what halves the map after them.

    Args:
        dim, depth, num_heads, window_size, mlp_ratio, qkv_bias, qk_scale, drop, layer_scale: of the blocks.
        input_resolution: rows (and columns) of the map.
        downsample: whether the map is halved afterwards.
        drop_path: one rate for all blocks or one each.
        backend: of the attnc operators.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        input_resolution: int,
        num_heads: int,
        window_size: int,
        downsample: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        layer_scale: float | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        rates = [drop_path] * depth if isinstance(drop_path, int | float) else list(drop_path)

        def block(i: int) -> nn.Module:
            attn: nn.Module
            if i % 2:
                attn = GlobalWindowAttention(dim, num_heads, window_size, qkv_bias, qk_scale, drop, backend=backend)
            else:
                window = (window_size, window_size)
                attn = BiasedWindowAttention(dim, num_heads, window, qkv_bias, qk_scale, drop, backend=backend)
            return PreNormBlock(dim, attn, mlp_ratio=mlp_ratio, drop=drop, drop_path=rates[i], layer_scale=layer_scale)

        self.blocks = nn.ModuleList(block(i) for i in range(depth))
        self.downsample = ReduceSize(dim) if downsample else None
        self.q_global_gen = GlobalQueries(dim, input_resolution, window_size)

    def calls(self, x: Tensor) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        """The blocks for the stage's input ``[B, H, W, C]``, with what each takes beside its own."""
        if len(self.blocks) < 2:  # a lone block is local
            return [(block, {}) for block in self.blocks]
        queries = {"q_global": self.q_global_gen(x)}
        return [(block, queries if i % 2 else {}) for i, block in enumerate(self.blocks)]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``, or ``[B, ceil(H / 2), ceil(W / 2), 2C]``."""
        for block, more in self.calls(x):
            x = block(x, **more)
        return x if self.downsample is None else self.downsample(x)


def _variant(
    dim: int,
    depths: tuple[int, ...],
    mlp_ratio: float,
    drop_path_rate: float,
    layer_scale: float | None = None,
    resolution: int = 224,
) -> dict[str, Any]:
    """Heads of 32 channels; windows are an eighth of the first two maps, the whole of the last two."""
    return {
        "dim": dim,
        "depths": depths,
        "num_heads": tuple((dim << i) // 32 for i in range(4)),
        "window_size": tuple(resolution // r for r in (32, 32, 16, 32)),
        "resolution": resolution,
        "mlp_ratio": mlp_ratio,
        "drop_path_rate": drop_path_rate,
        "layer_scale": layer_scale,
    }


@variants(
    gcvit_xxtiny=_variant(64, (2, 2, 6, 2), 3, 0.2),
    gcvit_xtiny=_variant(64, (3, 4, 6, 5), 3, 0.2),
    gcvit_tiny=_variant(64, (3, 4, 19, 5), 3, 0.2),
    gcvit_tiny2=_variant(64, (3, 4, 29, 5), 3, 0.2),
    gcvit_small=_variant(96, (3, 4, 19, 5), 2, 0.3, 1e-5),
    gcvit_small2=_variant(96, (3, 4, 23, 5), 3, 0.35, 1e-5),
    gcvit_base=_variant(128, (3, 4, 19, 5), 2, 0.5, 1e-5),
    gcvit_large=_variant(192, (3, 4, 19, 5), 2, 0.5, 1e-5),
    gcvit_large_384=_variant(192, (3, 4, 19, 5), 2, 0.5, 1e-5, 384),
    gcvit_large_512=_variant(192, (3, 4, 19, 5), 2, 0.5, 1e-5, 512),
)
class GCViT(Staged):
    """Image classifier or backbone for square images ``[B, in_chans, resolution, resolution]``.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths, window_size, num_heads: blocks, side of windows and heads per stage.
        mlp_ratio, qkv_bias, qk_scale, layer_scale: of the blocks.
        resolution: rows and columns of the image; global queries have the size of a window at this resolution only.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        in_chans: channels of the image.
        num_classes, features_only, out_indices, grad_checkpointing: see `Staged`.
        drop_rate: dropout after the stem, after each attention and in the MLPs.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or the stages differ in number.
    """

    def __init__(
        self,
        dim: int,
        depths: Sequence[int],
        window_size: Sequence[int],
        mlp_ratio: float,
        num_heads: Sequence[int],
        resolution: int = 224,
        drop_path_rate: float = 0.2,
        in_chans: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        layer_scale: float | None = None,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        stages = len(depths)
        super().__init__(
            [dim << i for i in range(stages)],
            [4 << i for i in range(stages)],
            "levels",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.check(len(window_size) == len(num_heads) == stages, f"{depths=}, {window_size=} and {num_heads=} differ in length")
        self.patch_embed = PatchEmbed(in_chans, dim)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = linear_rates(drop_path_rate, sum(depths))
        self.levels = nn.ModuleList(
            Level(
                dim << i,
                depths[i],
                resolution >> (i + 2),
                num_heads[i],
                window_size[i],
                i < stages - 1,
                mlp_ratio,
                qkv_bias,
                qk_scale,
                drop_rate,
                rates[sum(depths[:i]) : sum(depths[: i + 1])],
                layer_scale,
                backend=backend,
            )
            for i in range(stages)
        )
        if not features_only:
            self.norm = nn.LayerNorm(self.num_features)
            self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(init_vit)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all stages before they are halved, ``[B, C, H', W']`` (views of channels-last memory)."""
        maps = []
        x = self.pos_drop(self.patch_embed(x))
        for level in cast("list[Level]", self.levels):
            for block, more in level.calls(x):
                x = self.run(block, x, **more)
            maps.append(x.permute(0, 3, 1, 2))
            if level.downsample is not None:
                x = level.downsample(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """LayerNorm and mean over the tokens of ``[B, C, H', W']``, and the classifier unless `pre_logits`."""
        x = self.norm(x.permute(0, 2, 3, 1)).mean((1, 2))
        return x if pre_logits else cast(Tensor, self.head(x))


timm_names(
    "gcvit",
    (r"^stem\.conv1\.", "patch_embed.proj."),
    (r"^stem\.down\.", "patch_embed.conv_down."),
    *((rf"^stages\.{i + 1}\.downsample\.", f"levels.{i}.downsample.") for i in range(8)),  # ours end a stage, theirs begin one
    *((rf"\.global_block\.blocks\.conv{i + 1}\.", f".q_global_gen.to_q_global.{i}.conv.") for i in range(8)),
    (r"^stages\.\d+\.norm\.", "norm."),
    (r"^stages\.", "levels."),
    (r"\.conv_block\.", ".conv."),
    (r"\.conv_dw\.", ".0."),
    (r"\.se\.fc1\.", ".2.fc.0."),
    (r"\.se\.fc2\.", ".2.fc.2."),
    (r"\.conv_pw\.", ".3."),
    (r"\.rel_pos\.", "."),
    (r"\.ls(\d)\.gamma$", r".gamma\1"),
    (r"^head\.fc\.", "head."),
    flatten=r"\.2\.fc\.\d\.weight$",  # their squeeze and excite has 1x1 convolutions
)

IGNORED = ("attn_drop", "attn_drop_rate", "norm_layer")  # no effect in evaluation mode, or always LayerNorm
DERIVED = ("*relative_position_index",)


@official("gcvit", "WindowAttention", ignores=IGNORED, derived=DERIVED)
def _window_attention(
    dim: int,
    num_heads: int,
    window_size: int,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    *,
    backend: str = "auto",
) -> nn.Module:
    """Tokens of whole windows, ``[B * windows, w * w, C]``: each window is a map of its own."""
    window = (window_size, window_size)
    return on_tokens(BiasedWindowAttention(dim, num_heads, window, qkv_bias, qk_scale, backend=backend), window)


@official("gcvit", "WindowAttentionGlobal", ignores=(*IGNORED, "batch", "windows_per_image"), derived=DERIVED)
class _OnWindows(GlobalWindowAttention):
    """Tokens of whole windows, ``[B * windows, w * w, C]``, an image's windows one below the other."""

    def forward(self, x: Tensor, q_global: Tensor) -> Tensor:
        """q_global ``[B, 1, heads, w * w, d]``."""
        w = self.window[0]
        queries = torch.unflatten(q_global[:, 0].permute(0, 2, 1, 3).flatten(2), 1, (w, w))
        return super().forward(x.reshape(len(q_global), -1, w, x.shape[-1]), queries).view(x.shape)


official("gcvit", "GCViTLayer", ignores=(*IGNORED, "image_resolution"), derived=DERIVED)(Level)
official("gcvit", "GCViT", ignores=IGNORED, derived=DERIVED)(GCViT)
