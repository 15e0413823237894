"""DaViT: Dual Attention Vision Transformers (Ding et al., ECCV 2022, arXiv:2204.03645).

Two attentions alternate. *Spatial*: plain attention among the tokens of a w x w window. *Channel*: attention
between the channels of a group, over all tokens at once, so that it is global and linear in their number.
Parameter names are those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn

import attnc
from attnc.models.blocks.attention import QkvAttention
from attnc.models.blocks.conv import ConvPositionalEncoding, conv_map, pad_to_multiple
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.init import init_vit, init_vit_conv
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.staged import Staged
from attnc.models.official import official, on_tokens
from attnc.models.registry import variants
from attnc.models.timm_names import timm_names


@cache  # layers share operators
def window_operator(size: tuple[int, int], heads: int, backend: str) -> attnc.Operator:
    """Attention inside windows, on packed ``[B, H, W, 3C]``; the last windows reach over the map's border."""
    return attnc.compile(attnc.patterns.window(size), pad="multiple", layout="b y x (three h d)", heads=heads, backend=backend)


@cache
def channel_operator(backend: str) -> attnc.Operator:
    """Attention between the channels of a head, on q, k and v ``[B, N, heads, d]``."""
    return attnc.compile(attnc.patterns.channel(), layout="b x h d", backend=backend)


class WindowAttention(QkvAttention):
    """Spatial window attention: softmax(q k^T / sqrt(d)) v among the tokens of a window, no position bias.

    The map is zero-padded to whole windows *before* ``qkv``, without a mask: padded tokens are keys whose k
    and v are the biases of ``qkv``. They are `pad_k` and `pad_v` of the operator, never rows of a tensor.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        rows, columns = (window_size, window_size) if isinstance(window_size, int) else window_size
        self.window_size = (rows, columns)
        self.attend = window_operator(self.window_size, num_heads, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        qkv = self.qkv(x)
        out: Tensor = self.proj(self.attend(qkv, **self._padding(qkv)))
        return out

    def _padding(self, qkv: Tensor) -> dict[str, Any]:
        """k and v of padded tokens, ``[heads, d]``; none where windows fit or there is no bias (zeros)."""
        fits = all(n % w == 0 for n, w in zip(qkv.shape[1:3], self.window_size, strict=True))
        return {} if fits else self.padded_rows(qkv)


class ChannelAttention(QkvAttention):
    """Channel group attention: out = (softmax(k^T v / sqrt(d)) q^T)^T in each group of d channels.

    In the operator's terms the channels of k ask, those of v answer, and q is what gets mixed. The scale is
    that of the head width although the sum runs over the N tokens, as in the official code.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, *, backend: str = "auto") -> None:
        super().__init__(dim, num_heads, qkv_bias)
        self.attend = channel_operator(backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ..., C] -> [B, ..., C]``; all dimensions between are tokens."""
        q, k, v = self.qkv(x.flatten(1, -2)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        out: Tensor = self.proj(self.attend(k, v, q).flatten(2))
        return out.view(x.shape)


class Block(nn.Module):
    """Pre-norm block around either attention, a positional encoding before it and another one before the MLP.

    Args:
        dim: channels C.
        attn: the attention, on ``[B, H, W, C]``.
        mlp_ratio: hidden width of the MLP over C.
        drop_path: probability of dropping a branch, see `DropPath`.
        ffn: whether there is an MLP at all.
    """

    def __init__(self, dim: int, attn: nn.Module, *, mlp_ratio: float = 4.0, drop_path: float = 0.0, ffn: bool = True) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([ConvPositionalEncoding(dim), ConvPositionalEncoding(dim)])
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim) if ffn else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio)) if ffn else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe[1](x)
        if self.norm2 is not None and self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class PatchEmbed(nn.Module):
    """Strided convolution with its LayerNorm: after it in the stem, before it between stages.

    The map is zero-padded on the bottom and right to a multiple of the stride.
    """

    def __init__(self, in_chans: int, dim: int, *, kernel: int, stride: int, padding: int, norm_first: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(in_chans if norm_first else dim)
        self.stride = stride
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), C']``."""
        if self.norm_first:
            x = self.norm(x)
        x = conv_map(self.proj, pad_to_multiple(x, self.stride, self.stride))
        return x if self.norm_first else cast(Tensor, self.norm(x))


def _variant(dim: int, depths: tuple[int, ...], overlapped_patch: bool = False) -> dict[str, Any]:
    """Four stages that double the channels, heads of 32 channels."""
    embed_dims = tuple(dim << stage for stage in range(4))
    heads = tuple(width // 32 for width in embed_dims)
    return {
        "embed_dims": embed_dims,
        "num_heads": heads,
        "depths": depths,
        "overlapped_patch": overlapped_patch,
    }


@variants(
    davit_tiny=_variant(96, (1, 1, 3, 1)),
    davit_small=_variant(96, (1, 1, 9, 1)),
    davit_base=_variant(128, (1, 1, 9, 1)),
    davit_large=_variant(192, (1, 1, 9, 1)),
    davit_huge=_variant(256, (1, 1, 9, 1), overlapped_patch=True),
    davit_giant=_variant(384, (1, 1, 12, 3), overlapped_patch=True),
)
class DaViT(Staged):
    """Image classifier or backbone for images ``[B, in_chans, H, W]`` of any size.

    Args:
        in_chans: channels of the image.
        num_classes: logits; 0 leaves the pooled, normalised features.
        depths: layers per stage; a layer is one block for each of `attention_types`.
        patch_size: stride of the stem; 4.
        embed_dims, num_heads: channels, and heads or channel groups, per stage.
        window_size: rows and columns of a window; 7 at 224, the paper uses 12 at 384.
        mlp_ratio, qkv_bias, ffn: of the blocks.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; officially 0.1.
        attention_types: the blocks of a layer, "spatial" or "channel".
        overlapped_patch: 3x3 instead of 2x2 convolutions between stages.
        weight_init: "conv" also draws convolutions from a normal of std 0.02.
        features_only, out_indices, grad_checkpointing: see `Staged`.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or the stages differ in number.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (1, 1, 3, 1),
        patch_size: int = 4,
        embed_dims: Sequence[int] = (64, 128, 192, 256),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attention_types: Sequence[str] = ("spatial", "channel"),
        ffn: bool = True,
        overlapped_patch: bool = False,
        weight_init: str = "",
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        self.check(len(depths) == len(num_heads) == len(embed_dims), f"{depths=}, {embed_dims=} and {num_heads=} differ in length")
        self.check(all(depth > 0 for depth in depths), f"{depths=}: every stage needs at least one layer")
        self.check(patch_size == 4, f"{patch_size=}: the stem has stride 4")
        self.check(set(attention_types) <= {"spatial", "channel"}, f"{attention_types=}: 'spatial' and 'channel' exist")
        super().__init__(
            embed_dims,
            [patch_size << i for i in range(len(embed_dims))],
            "main_blocks",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        kernel, padding = (3, 1) if overlapped_patch else (2, 0)
        self.patch_embeds = nn.ModuleList(
            [PatchEmbed(in_chans, embed_dims[0], kernel=7, stride=patch_size, padding=3, norm_first=False)]
        )
        for before, after in pairwise(embed_dims):
            self.patch_embeds.append(PatchEmbed(before, after, kernel=kernel, stride=2, padding=padding, norm_first=True))

        rates = iter(linear_rates(drop_path_rate, sum(depths) * len(attention_types)))

        def block(kind: str, dim: int, heads: int) -> Block:
            attn: nn.Module
            if kind == "spatial":
                attn = WindowAttention(dim, window_size, heads, qkv_bias, backend=backend)
            else:
                attn = ChannelAttention(dim, heads, qkv_bias, backend=backend)
            return Block(dim, attn, mlp_ratio=mlp_ratio, drop_path=next(rates), ffn=ffn)

        self.main_blocks = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*(block(kind, dim, heads) for kind in attention_types)) for _ in range(depth))
            for dim, heads, depth in zip(embed_dims, num_heads, depths, strict=True)
        )
        if not features_only:
            self.norms = nn.LayerNorm(self.num_features)
            self.drop = nn.Dropout(drop_rate)
            self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(init_vit_conv if weight_init == "conv" else init_vit)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all stages, ``[B, C, H', W']`` (views of channels-last memory)."""
        maps = []
        x = x.permute(0, 2, 3, 1)
        for embed, layers in zip(self.patch_embeds, self.main_blocks, strict=True):
            x = embed(x)
            for layer in cast(nn.ModuleList, layers):
                for block in cast(nn.Sequential, layer):
                    x = self.run(block, x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the tokens of ``[B, C, H', W']``, LayerNorm, and the classifier unless `pre_logits`."""
        x = self.norms(x.mean((2, 3)))
        return x if pre_logits else cast(Tensor, self.head(self.drop(x)))


timm_names(
    "davit",
    (r"^stem\.conv\.", "patch_embeds.0.proj."),
    (r"^stem\.norm\.", "patch_embeds.0.norm."),
    (r"^stages\.(\d+)\.downsample\.conv\.", r"patch_embeds.\1.proj."),
    (r"^stages\.(\d+)\.downsample\.norm\.", r"patch_embeds.\1.norm."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.(\d+)\.", r"main_blocks.\1.\2.\3."),
    (r"\.cpe1\.", ".cpe.0."),
    (r"\.cpe2\.", ".cpe.1."),
    (r"^head\.norm\.", "norms."),
    (r"^head\.fc\.", "head."),
)


@official("davit", "WindowAttention")
def _window_attention(
    dim: int,
    window_size: int | Sequence[int],
    num_heads: int,
    qkv_bias: bool = True,
    *,
    backend: str = "auto",
) -> nn.Module:
    """Tokens of whole windows, ``[B * windows, w * w, C]``: each window is a map of its own."""
    rows, columns = (window_size, window_size) if isinstance(window_size, int) else window_size
    return on_tokens(WindowAttention(dim, (rows, columns), num_heads, qkv_bias, backend=backend), (rows, columns))


official("davit", "ChannelAttention")(ChannelAttention)


@official("davit", "SpatialBlock")
def _spatial_block(
    size: tuple[int, int],
    dim: int,
    num_heads: int,
    window_size: int = 7,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    drop_path: float = 0.0,
    ffn: bool = True,
    *,
    backend: str = "auto",
) -> nn.Module:
    attn = WindowAttention(dim, window_size, num_heads, qkv_bias, backend=backend)
    return on_tokens(Block(dim, attn, mlp_ratio=mlp_ratio, drop_path=drop_path, ffn=ffn), size)


@official("davit", "ChannelBlock", ignores=("window_size",))
def _channel_block(
    size: tuple[int, int],
    dim: int,
    num_heads: int,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = False,
    drop_path: float = 0.0,
    ffn: bool = True,
    *,
    backend: str = "auto",
) -> nn.Module:
    attn = ChannelAttention(dim, num_heads, qkv_bias, backend=backend)
    return on_tokens(Block(dim, attn, mlp_ratio=mlp_ratio, drop_path=drop_path, ffn=ffn), size)


official("davit", "DaViT", ignores=("img_size", "attn_drop_rate"))(DaViT)
