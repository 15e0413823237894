"""EfficientViT with cascaded group attention (Liu et al., CVPR 2023, arXiv:2305.07027).

Each head attends with its own slice of the channels, after the output of the head before it has been added to that. One
attention layer stands between feed-forward layers. Parameter names are those of the official code.
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
from attnc.models.blocks.conv_norm import ConvNorm, FeedForward, PatchMerging, Residual, depthwise
from attnc.models.blocks.conv_stages import STRIDE, ConvStages, stage_names
from attnc.models.official import official
from attnc.models.registry import variants
from attnc.models.timm_names import timm_names


@cache  # layers share operators
def window_operator(size: int, backend: str) -> attnc.Operator:
    """Attention inside windows with a relative bias, on q, k and v ``[B, H, W, 1, d]``; a smaller map is one window."""
    return attnc.compile(attnc.patterns.window(size, bias="relative"), layout="b y x h d", backend=backend)


class CascadedGroupAttention(nn.Module):
    """Heads in sequence: f_i = softmax(q k^T / sqrt(kd) + T_i[|dy|, |dx|]) v, with q, k, v of (slice i of x) + f_(i-1).

    The output is ``proj`` of ReLU of all f_i. Queries pass a depthwise convolution, which sees zeros outside of its window.

    Args:
        dim: channels C; a slice has C / h.
        key_dim: channels kd of a head's queries and keys.
        num_heads: heads h.
        attn_ratio: channels of a head's values over `key_dim`; they are as many as a slice's.
        resolution: side w of the windows, for which the table ``attention_biases [h, w * w]`` is made.
        kernels: of the queries' convolutions, one per head.
        backend: of the operator.

    Raises:
        DeclarationError: the heads do not divide the channels, values and slices differ, or kernels are missing.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: int = 14,
        kernels: Sequence[int] = (5, 5, 5, 5),
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        value_dim = int(attn_ratio * key_dim)
        if dim % num_heads or (num_heads > 1 and value_dim != dim // num_heads):
            raise DeclarationError(
                f"CascadedGroupAttention: {num_heads=} slices of {dim=} channels, and values of {attn_ratio=} times {key_dim=} "
                "channels, which are added to a slice, so that both must be as many"
            )
        if len(kernels) < num_heads or not all(size % 2 for size in kernels[:num_heads]):
            raise DeclarationError(f"CascadedGroupAttention: {kernels=}: one odd number for each of {num_heads} heads")
        self.widths = (key_dim, key_dim, value_dim)
        self.scale = key_dim**-0.5
        self.resolution = resolution
        self.qkvs = nn.ModuleList(ConvNorm(dim // num_heads, sum(self.widths)) for _ in range(num_heads))
        self.dws = nn.ModuleList(depthwise(key_dim, size) for size in kernels[:num_heads])
        self.proj = nn.Sequential(nn.ReLU(inplace=True), ConvNorm(value_dim * num_heads, dim, gain=0.0))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution * resolution))
        self.register_buffer("steps", (torch.arange(2 * resolution - 1) - (resolution - 1)).abs(), persistent=False)
        self.attend = window_operator(resolution, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``, in windows of `resolution`; a map no larger than one is a window.

        Raises:
            ShapeError: a larger map has a rest.
        """
        side = self.resolution
        if max(x.shape[2:]) > side and (x.shape[2] % side or x.shape[3] % side):
            raise ShapeError(
                f"CascadedGroupAttention: a map of {x.shape[2]}x{x.shape[3]} has no whole windows of {side}: "
                "LocalWindowAttention pads it"
            )
        steps = cast(Tensor, self.steps)
        table = self.attention_biases.view(-1, self.resolution, self.resolution)
        bias = table[:, steps[:, None], steps]  # by query minus key
        slices = x.chunk(len(self.qkvs), 1)
        f, outputs = slices[0], []
        for i, (project, convolve) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            qkv = project(f if i == 0 else f + slices[i])
            q, k, v = qkv.permute(0, 2, 3, 1).unsqueeze(3).split(self.widths, 4)
            q = self._in_windows(convolve, qkv[:, : self.widths[0]]).permute(0, 2, 3, 1).unsqueeze(3)
            f = self.attend(q, k, v, scale=self.scale, bias=bias[i : i + 1]).squeeze(3).permute(0, 3, 1, 2)
            outputs.append(f)
        out: Tensor = self.proj(torch.cat(outputs, 1))
        return out

    def _in_windows(self, convolve: nn.Module, x: Tensor) -> Tensor:
        """`convolve` in each window of ``[B, C, H, W]`` apart."""
        height, width = x.shape[2:]
        rows, columns = -(-height // self.resolution), -(-width // self.resolution)
        if rows == columns == 1:
            return cast(Tensor, convolve(x))
        side = self.resolution
        parts = torch.unflatten(torch.unflatten(x, 3, (columns, side)), 2, (rows, side)).permute(0, 2, 4, 3, 5, 1)
        y = convolve(parts.reshape(-1, side, side, x.shape[1]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = y.unflatten(0, (-1, rows, columns)).permute(0, 1, 3, 2, 4, 5)
        return cast(Tensor, y.reshape(-1, height, width, x.shape[1])).permute(0, 3, 1, 2)


class LocalWindowAttention(nn.Module):
    """`CascadedGroupAttention` in windows; a map no larger than one is a window, others are zero-padded to whole ones.

    Padded tokens are real keys. Their k and v follow from the heads before, so that they are rows of the map here.

    Args:
        dim, key_dim, num_heads, attn_ratio, kernels, backend: see `CascadedGroupAttention`.
        resolution: side of the map that the table is made for, if it is less than a window's.
        window_resolution: side of the windows.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: int = 14,
        window_resolution: int = 7,
        kernels: Sequence[int] = (5, 5, 5, 5),
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if min(resolution, window_resolution) < 1:
            raise DeclarationError(f"EfficientViT: {resolution=} and {window_resolution=}: sides of maps and windows, 1 or more")
        side = min(window_resolution, resolution)
        self.attn = CascadedGroupAttention(dim, key_dim, num_heads, attn_ratio, side, kernels, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        height, width = x.shape[2:]
        side = self.attn.resolution
        if (height <= side and width <= side) or not (height % side or width % side):
            return cast(Tensor, self.attn(x))
        padded = F.pad(x, (0, -width % side, 0, -height % side))
        return cast(Tensor, self.attn(padded))[:, :, :height, :width]


class EfficientViTBlock(nn.Module):
    """A depthwise convolution and a feed-forward layer, attention, and both again, each added to what it was given.

    Args:
        ed, kd, nh, ar, resolution, window_resolution, kernels, backend: see `LocalWindowAttention`; ed is dim, kd key_dim, nh
            num_heads, ar attn_ratio.
        drop_path: probability of dropping a branch.
    """

    def __init__(
        self,
        ed: int,
        kd: int,
        nh: int = 8,
        ar: float = 4,
        resolution: int = 14,
        window_resolution: int = 7,
        kernels: Sequence[int] = (5, 5, 5, 5),
        drop_path: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        attention = LocalWindowAttention(ed, kd, nh, ar, resolution, window_resolution, kernels, backend=backend)
        self.dw0 = Residual(depthwise(ed, gain=0.0), drop_path)
        self.ffn0 = Residual(FeedForward(ed), drop_path)
        self.mixer = Residual(attention, drop_path)
        self.dw1 = Residual(depthwise(ed, gain=0.0), drop_path)
        self.ffn1 = Residual(FeedForward(ed), drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        out: Tensor = self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))
        return out


def _variant(
    dims: tuple[int, ...], depth: tuple[int, ...], heads: tuple[int, ...], kernels: tuple[int, ...] = (7, 5, 3, 3)
) -> dict[str, Any]:
    return {"embed_dim": dims, "depth": depth, "num_heads": heads, "kernels": kernels}


@variants(
    efficientvit_msra_m0=_variant((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    efficientvit_msra_m1=_variant((128, 144, 192), (1, 2, 3), (2, 3, 3)),
    efficientvit_msra_m2=_variant((128, 192, 224), (1, 2, 3), (4, 3, 2)),
    efficientvit_msra_m3=_variant((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    efficientvit_msra_m4=_variant((128, 256, 384), (1, 2, 3), (4, 4, 4)),
    efficientvit_msra_m5=_variant((192, 288, 384), (1, 3, 4), (3, 3, 4)),
)
class EfficientViT(ConvStages):
    """Image classifier or backbone for images ``[B, in_chans, H, W]`` of any size.

    Args:
        img_size: side of the image that biases are made for: a stage's windows are no larger than its map of such an image.
        patch_size: stride of the stem, 16.
        in_chans: channels of the image.
        num_classes, distillation, features_only, out_indices, grad_checkpointing: see `ConvStages`.
        embed_dim, key_dim, depth, num_heads, window_size: channels, channels of keys, blocks, heads and windows per stage.
        kernels: of the queries' convolutions, per head.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; officially none.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or the stages differ in number.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (64, 128, 192),
        key_dim: Sequence[int] = (16, 16, 16),
        depth: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        window_size: Sequence[int] = (7, 7, 7),
        kernels: Sequence[int] = (5, 5, 5, 5),
        drop_path_rate: float = 0.0,
        distillation: bool = False,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        lengths = {len(each) for each in (embed_dim, key_dim, depth, num_heads, window_size)}
        self.check(len(lengths) == 1, f"{embed_dim=}, {key_dim=}, {depth=}, {num_heads=} and {window_size=} differ in length")
        self.check(patch_size == STRIDE, f"{patch_size=}: the stem has stride {STRIDE}")
        self.check(img_size >= STRIDE, f"{img_size=}: at least one patch of {STRIDE}")

        def block(stage: int, rate: float) -> nn.Module:
            dim, keys, heads = embed_dim[stage], key_dim[stage], num_heads[stage]
            side = -(-(img_size // STRIDE) // 2**stage)  # halved and rounded up once per stage
            ratio = dim / (keys * heads)
            return EfficientViTBlock(dim, keys, heads, ratio, side, window_size[stage], kernels, rate, backend=backend)

        super().__init__(
            block,
            in_chans,
            embed_dim,
            depth,
            drop_path_rate,
            num_classes=num_classes,
            distillation=distillation,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )


timm_names(
    "efficientvit_msra",
    *stage_names({"res1": "0", "patchmerge": "1", "res2": "2"}),
    (r"^patch_embed\.conv(\d)\.", lambda match: f"patch_embed.{2 * int(match[1]) - 2}."),
    (r"\.conv\.", ".c."),
    (r"^head\.linear\.", "head.l."),
)

IGNORED = ("type", "stages", "down_ops", "pretrained", "input_resolution")
DERIVED = ("*num_batches_tracked", "*attention_bias_idxs")

official("efficientvit-msra", "CascadedGroupAttention", derived=DERIVED)(CascadedGroupAttention)
official("efficientvit-msra", "LocalWindowAttention", derived=DERIVED)(LocalWindowAttention)
official("efficientvit-msra", "EfficientViTBlock", ignores=IGNORED, derived=DERIVED)(EfficientViTBlock)
official("efficientvit-msra", "PatchMerging", ignores=IGNORED, derived=DERIVED)(PatchMerging)
official("efficientvit-msra", "EfficientViT", ignores=IGNORED, derived=DERIVED)(EfficientViT)
