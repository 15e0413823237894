"""TiC: transformer in convolution (Zhang et al. 2023, arXiv:2310.04134).

Multi-head attention over the taps of a convolution (*MSA-Conv*): what lies outside the image are zeros that take their share of
the softmax, so that the layer is as free of the image's size as a convolution is. The layer is the released one and has its
names. The network around it was not released: its shape, its shifts and its pooled keys follow the paper's description.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError
from attnc.models.blocks.attention import QkvAttention
from attnc.models.blocks.drop import linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.patches import PatchEmbed, pair
from attnc.models.blocks.prenorm import PreNormBlock
from attnc.models.blocks.relative_window import check_heads
from attnc.models.blocks.staged import Staged
from attnc.models.official import official
from attnc.models.registry import variants
from attnc.patterns.sliding import reach

Pair = tuple[int, int]


def _around(kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Rows and columns of zeros around the image, on either side."""
    rows, columns = map(reach, kernel, dilation)
    return (rows, rows), (columns, columns)


@cache  # layers share operators
def window_operator(kernel: Pair, dilation: Pair, backend: str) -> attnc.Operator:
    """Attention over the taps of a convolution, on q, k and v ``[B, H, W, h, d]``; keys and values outside are zeros."""
    pattern = attnc.patterns.sliding_window(kernel, dilation)
    return attnc.compile(pattern, pad=_around(kernel, dilation), layout="b y x h d", backend=backend)


@cache
def pooled_operator(kernel: Pair, backend: str) -> attnc.Operator:
    """The same over a map of keys of half the size, around the key above the query."""
    return attnc.compile(
        attnc.patterns.sliding_window(kernel, pooled=2),
        grid={"y": None, "x": None},
        kv_grid=(None, None),
        pad=_around(kernel, (1, 1)),
        layout="b y x h d",
        backend=backend,
    )


@cache
def taps_operator(kernel: Pair, dilation: Pair, backend: str) -> attnc.Operator:
    """One tap for each head, whose lse is the score there; on q ``[B, H, W, taps, d]`` and keys of one head."""
    pattern = attnc.patterns.taps(kernel, dilation)
    return attnc.compile(pattern, pad=_around(kernel, dilation), layout="b y x h d", backend=backend)


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax over the keys of several operators, from their outputs ``[B, H, W, h, d]`` and lse ``[B, h, H W]``."""
    total = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    out: Tensor | None = None
    for part, lse in parts:
        share = torch.unflatten((lse - total).exp(), 2, part.shape[1:3]).permute(0, 2, 3, 1)[..., None].to(part.dtype)
        out = part * share if out is None else out + part * share
    assert out is not None
    return out


class MSAConv(nn.Module):
    """The released layer: relu(conv(x + attention(x))), attention over a window of the convolution's size.

    softmax over the window's taps m of q_i . k_(i + m) / sqrt(d), times v_(i + m), with q, k and v by a 1x1 convolution. Rows
    outside the image are zeros, not masked. The convolution at the end has the kernel, but not the dilation.

    Args:
        input_channel, output_channel: channels C of the input, and of the output.
        kernel_size: of the window and of the convolution, odd; one number, or rows and columns.
        stride, padding, bias: of the convolution at the end.
        dilation: of the window, like its size.
        num_heads: heads of C / h channels; one in the released layer, C in the paper's depthwise flavour.
        backend: of the attnc operator.

    Raises:
        DeclarationError: the kernel is even, or the heads do not divide the channels.
    """

    def __init__(
        self,
        input_channel: int,
        output_channel: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 1,
        bias: bool = False,
        *,
        num_heads: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(input_channel, num_heads)
        kernel = pair(kernel_size)
        self.num_heads = num_heads
        self.qkv_conv = nn.Conv2d(input_channel, 3 * input_channel, 1)
        self.attend = window_operator(kernel, pair(dilation), backend)
        self.mlp = nn.Conv2d(input_channel, output_channel, kernel, pair(stride), pair(padding), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, output_channel, H', W']``, the size by the convolution's stride and padding."""
        qkv = self.qkv_conv(x)
        qkv = qkv.to(torch.promote_types(qkv.dtype, x.dtype))  # under autocast attention keeps the precision of x
        q, k, v = qkv.permute(0, 2, 3, 1).unflatten(3, (3, self.num_heads, -1)).unbind(3)
        mixed = self.attend(q, k, v).flatten(3).permute(0, 3, 1, 2)
        return F.relu(self.mlp(mixed + x))


class WindowScores(nn.Module):
    """The bare operation: scores by tap, unscaled, and the values under their softmax. It has no parameters.

    Args:
        kernel_size, dilation: of the window.
        backend: of the attnc operators.

    Raises:
        DeclarationError: the kernel is even.
    """

    def __init__(self, kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1, *, backend: str = "auto") -> None:
        super().__init__()
        kernel = pair(kernel_size)
        self.taps = kernel[0] * kernel[1]
        self.score = taps_operator(kernel, pair(dilation), backend)
        self.attend = window_operator(kernel, pair(dilation), backend)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """All ``[B, C, H, W]`` to `dots` ``[B, taps, H, W]``, row by row of the window, and `out` ``[B, C, H, W]``."""
        q, k, v = (t.permute(0, 2, 3, 1)[:, :, :, None] for t in (q, k, v))
        nothing = v[..., :1].detach()
        _, dots = self.score(q.expand(-1, -1, -1, self.taps, -1), k, nothing, scale=1.0, return_lse=True)
        out = self.attend(q, k, v, scale=1.0)[:, :, :, 0].permute(0, 3, 1, 2)
        return {"dots": torch.unflatten(dots, 2, out.shape[2:]), "out": out}


class WindowAttention(QkvAttention):
    """MSA-Conv's attention with several heads and a projection, in the network's blocks.

    Args:
        dim, num_heads, qkv_bias: see `QkvAttention`.
        kernel_size, dilation: of the window.
        direction: of the cyclic shift, (1, 1), (1, -1), ..., or (0, 0) for none. Keys and values move by direction * (H // 4) along
            both axes, round the image's border, so that a query's window lies elsewhere.
        pooled: whether queries also see the window on the map of keys averaged over 2 x 2 tokens, which is not shifted.
        backend: of the operators.

    Raises:
        DeclarationError: the kernel is even, or the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        direction: Pair = (0, 0),
        pooled: bool = False,
        qkv_bias: bool = True,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        kernel = pair(kernel_size)
        self.direction = direction
        self.near = window_operator(kernel, pair(dilation), backend)
        self.far = pooled_operator(kernel, backend) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        q, k, v = self.qkv(x).unflatten(3, (3, self.num_heads, -1)).unbind(3)
        step = x.shape[1] // 4
        near_k, near_v = k, v
        if step and self.direction != (0, 0):
            near_k, near_v = (t.roll([step * way for way in self.direction], (1, 2)) for t in (k, v))
        if self.far is None:
            return self.project(self.near(q, near_k, near_v).flatten(3))
        near = self.near(q, near_k, near_v, return_lse=True)
        far = self.far(q, _halved(k), _halved(v), return_lse=True)
        return self.project(merged([near, far]).flatten(3))


def _halved(x: Tensor) -> Tensor:
    """Means of 2 x 2 tokens, ``[B, H, W, h, d] -> [B, ceil(H / 2), ceil(W / 2), h, d]``; at the border, of those that exist."""
    pooled = F.avg_pool2d(x.flatten(3).permute(0, 3, 1, 2), 2, ceil_mode=True)
    return torch.unflatten(pooled.permute(0, 2, 3, 1), 3, x.shape[3:])


DIRECTIONS: tuple[Pair, ...] = ((1, 1), (1, -1), (-1, 1), (-1, -1))  # of the blocks of a stage, in turn


class Stage(nn.Module):
    """A patch embedding (the stem, or 2 x 2 tokens to one) with a norm, and blocks."""

    def __init__(self, embed: PatchEmbed, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)


@variants(
    tic_tiny={"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "num_heads": (2, 4, 8, 16), "kernel_size": 7},
)
class TiC(Staged):
    """Image classifier for images ``[B, in_chans, H, W]`` of 32 pixels or more: no positions are embedded.

    Args:
        in_chans: channels of the image.
        dims, depths, num_heads: channels, blocks and heads per stage.
        kernel_size, dilation: of the windows.
        mlp_ratio: hidden width of the MLPs over their channels.
        shifted: whether all blocks of a stage but the first shift keys and values, each in the next of four directions.
        pooled: see `WindowAttention`.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        num_classes, features_only, out_indices, grad_checkpointing: see `Staged`.
        backend: of the attnc operators.

    Raises:
        DeclarationError: the stages differ in number, or an argument is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        mlp_ratio: float = 4.0,
        shifted: bool = True,
        pooled: bool = False,
        drop_path_rate: float = 0.0,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        if len({len(dims), len(depths), len(num_heads)}) != 1:
            raise DeclarationError(f"TiC: {dims=}, {depths=} and {num_heads=} differ in length")
        super().__init__(
            dims,
            [4 << i for i in range(len(dims))],
            "stages",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        rates = iter(linear_rates(drop_path_rate, sum(depths)))

        def block(i: int, dim: int, heads: int) -> PreNormBlock:
            way = DIRECTIONS[i % 4] if shifted and i else (0, 0)
            attn = WindowAttention(dim, heads, kernel_size, dilation, way, pooled, backend=backend)
            return PreNormBlock(dim, attn, mlp_ratio=mlp_ratio, drop_path=next(rates))

        self.stages = nn.ModuleList()
        before, patch = in_chans, (4, 4)
        for dim, depth, heads in zip(dims, depths, num_heads, strict=True):
            embed = PatchEmbed(before, dim, patch, norm=True, pad=False)
            self.stages.append(Stage(embed, [block(i, dim, heads) for i in range(depth)]))
            before, patch = dim, (2, 2)
        if not features_only:
            self.norm = nn.LayerNorm(dims[-1])
            self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(init_vit)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all stages, ``[B, C, H', W']``."""
        maps = []
        for stage in cast("list[Any]", self.stages):
            x = stage.embed(x)
            for block in stage.blocks:
                x = self.run(block, x)
            x = x.permute(0, 3, 1, 2)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The normalised mean of ``[B, C, H', W']``, and the classifier unless `pre_logits`."""
        pooled = self.norm(x.mean((2, 3)))
        return cast(Tensor, pooled if pre_logits else self.head(pooled))


IGNORED = ("dropout", "dropout_rate", "attn_drop", "drop")  # which mean nothing in evaluation mode

official("tic", "MSA_Conv_2d", ignores=IGNORED)(MSAConv)
official("tic", "MSA_Conv2d_v1 + MSA_Conv2d_1_v1", ignores=IGNORED)(WindowScores)
