"""TNT: Transformer in Transformer (Han et al., NeurIPS 2021, arXiv:2103.00112).

An inner transformer attends among the words (small parts) of each patch, and an outer one among the patches, to which each of
its blocks adds what the words of a patch have become. Parameter names are those of the official code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.isotropic import Isotropic
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.patches import pair
from attnc.models.blocks.tokens import token_operator, with_class_token
from attnc.models.official import official
from attnc.models.registry import variants
from attnc.models.timm_names import timm_names


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v among all tokens, q and k of ``qk`` (C -> [q | k]), v of ``v``.

    Args:
        dim: channels C.
        hidden_dim: channels of q and of k, in all heads together.
        num_heads: heads; each has d = hidden_dim / heads channels of q and k, and dim / heads of v.
        qkv_bias: whether ``qk`` and ``v`` have biases.
        proj_drop: dropout after ``proj``.
        backend: of the operator.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads or hidden_dim % num_heads:
            raise DeclarationError(f"num_heads is {num_heads}, which does not divide dim = {dim} and hidden_dim = {hidden_dim}")
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * hidden_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attend = token_operator(backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        q, k = self.qk(x).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        v = self.v(x).unflatten(2, (self.num_heads, -1))
        out: Tensor = self.proj_drop(self.proj(self.attend(q, k, v).flatten(2)))
        return out


class SE(nn.Module):
    """What tokens are scaled by: tanh(W2 ReLU(W1 LN(their mean))), with C * ratio channels between."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``, the tokens scaled."""
        return x * cast(Tensor, self.fc(x.mean(1, keepdim=True)))


class Block(nn.Module):
    """The words attend inside their patch; a projection of them is added to its token; the tokens attend to each other.

    Args:
        outer_dim, inner_dim: channels C of tokens and c of words.
        outer_num_heads, inner_num_heads: heads of either attention.
        num_words: words m per patch.
        mlp_ratio: hidden width of both MLPs over their channels.
        qkv_bias: of both attentions.
        drop: dropout after the attentions and in the MLPs.
        drop_path: probability of dropping a branch, see `DropPath`; the projection of words is none.
        se: whether a scale per channel of the outer MLP's output is learned, see `SE`.
        backend: of the operators.
    """

    def __init__(
        self,
        outer_dim: int,
        inner_dim: int,
        outer_num_heads: int,
        inner_num_heads: int,
        num_words: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        drop_path: float = 0.0,
        se: int = 0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.inner_norm1 = nn.LayerNorm(inner_dim)
        self.inner_attn = Attention(inner_dim, inner_dim, inner_num_heads, qkv_bias, drop, backend=backend)
        self.inner_norm2 = nn.LayerNorm(inner_dim)
        self.inner_mlp = Mlp(inner_dim, int(inner_dim * mlp_ratio), drop=drop)
        self.proj_norm1 = nn.LayerNorm(num_words * inner_dim)
        self.proj = nn.Linear(num_words * inner_dim, outer_dim, bias=False)
        self.proj_norm2 = nn.LayerNorm(outer_dim)
        self.outer_norm1 = nn.LayerNorm(outer_dim)
        self.outer_attn = Attention(outer_dim, outer_dim, outer_num_heads, qkv_bias, drop, backend=backend)
        self.outer_norm2 = nn.LayerNorm(outer_dim)
        self.outer_mlp = Mlp(outer_dim, int(outer_dim * mlp_ratio), drop=drop)
        self.se_layer = SE(outer_dim, 0.25) if se else None
        self.drop_path = DropPath(drop_path)

    def forward(self, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        """Words ``[B * N, m, c]`` and tokens ``[B, 1 + N, C]``, the class token first, to the same."""
        inner = inner + self.drop_path(self.inner_attn(self.inner_norm1(inner)))
        inner = inner + self.drop_path(self.inner_mlp(self.inner_norm2(inner)))
        words = inner.flatten(1).view(outer.shape[0], outer.shape[1] - 1, -1)
        patches = outer[:, 1:] + self.proj_norm2(self.proj(self.proj_norm1(words)))
        outer = torch.cat([outer[:, :1], patches], 1)
        outer = outer + self.drop_path(self.outer_attn(self.outer_norm1(outer)))
        mixed = self.outer_mlp(self.outer_norm2(outer))
        if self.se_layer is not None:
            mixed = mixed + self.se_layer(mixed)
        return inner, outer + self.drop_path(mixed)


class PatchEmbed(nn.Module):
    """The words of each patch: a 7x7 convolution of the patch alone, which sees zeros outside of it.

    Args:
        img_size, patch_size: rows and columns of image and patches.
        in_chans, inner_dim: channels of the image, and c of words.
        inner_stride: of the convolution; a patch of p rows has ceil(p / stride) rows of words.

    Raises:
        DeclarationError: patches do not divide the image.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        inner_dim: int = 24,
        inner_stride: int = 4,
    ) -> None:
        super().__init__()
        self.img_size, self.patch = pair(img_size), pair(patch_size)
        if self.img_size[0] % self.patch[0] or self.img_size[1] % self.patch[1]:
            raise DeclarationError(f"TNT: patches of {patch_size=} do not divide {img_size=}")
        self.grid = (self.img_size[0] // self.patch[0], self.img_size[1] // self.patch[1])
        self.num_words = -(-self.patch[0] // inner_stride) * -(-self.patch[1] // inner_stride)
        self.proj = nn.Conv2d(in_chans, inner_dim, 7, inner_stride, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B * N, m, c]``; ShapeError for another image size."""
        if tuple(x.shape[2:]) != self.img_size:
            raise ShapeError(
                f"TNT: the image is {x.shape[2]}x{x.shape[3]}, its position embedding is for "
                f"{self.img_size[0]}x{self.img_size[1]}: build the model with this img_size"
            )
        parts = torch.unflatten(torch.unflatten(x, 3, (self.grid[1], self.patch[1])), 2, (self.grid[0], self.patch[0]))
        patches = parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, x.shape[1], *self.patch)
        words: Tensor = self.proj(patches)
        return words.flatten(2).transpose(1, 2)


@variants(
    tnt_ti={"outer_dim": 192, "inner_dim": 12, "outer_num_heads": 3, "inner_num_heads": 2},
    tnt_s={"outer_dim": 384, "inner_dim": 24, "outer_num_heads": 6, "inner_num_heads": 4},
    tnt_b={"outer_dim": 640, "inner_dim": 40, "outer_num_heads": 10, "inner_num_heads": 4},
)
class TNT(Isotropic):
    """Image classifier or backbone for images ``[B, in_chans, *img_size]``.

    Args:
        img_size, patch_size: rows and columns of the image, which the position embedding is made for, and of its patches.
        in_chans: channels of the image.
        num_classes, features_only, out_indices, grad_checkpointing: see `Isotropic`.
        outer_dim, inner_dim, outer_num_heads, inner_num_heads, mlp_ratio, qkv_bias, se: of the blocks, see `Block`.
        depth: blocks.
        drop_rate: dropout after the position embedding, after the attentions and in the MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; officially 0.1.
        inner_stride: pixels between words.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        outer_dim: int = 768,
        inner_dim: int = 48,
        depth: int = 12,
        outer_num_heads: int = 12,
        inner_num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        inner_stride: int = 4,
        se: int = 0,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            outer_dim,
            depth,
            pair(patch_size),
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, inner_dim, inner_stride)
        count, words = self.patch_embed.grid[0] * self.patch_embed.grid[1], self.patch_embed.num_words
        self.proj_norm1 = nn.LayerNorm(words * inner_dim)
        self.proj = nn.Linear(words * inner_dim, outer_dim)
        self.proj_norm2 = nn.LayerNorm(outer_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, outer_dim))
        # neither trained nor read, but part of every official checkpoint
        self.outer_tokens = nn.Parameter(torch.zeros(1, count, outer_dim), requires_grad=False)
        self.outer_pos = nn.Parameter(torch.empty(1, 1 + count, outer_dim))
        self.inner_pos = nn.Parameter(torch.empty(1, words, inner_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        heads = (outer_num_heads, inner_num_heads)
        self.blocks = nn.ModuleList(
            Block(outer_dim, inner_dim, *heads, words, mlp_ratio, qkv_bias, drop_rate, rate, se, backend=backend)
            for rate in linear_rates(drop_path_rate, depth)
        )
        self.add_head()
        self.apply(init_vit)
        for parameter in (self.cls_token, self.outer_pos, self.inner_pos):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward_blocks(self, x: Tensor) -> Iterator[Tensor]:
        """The tokens ``[B, 1 + N, C]`` after each block, the class token first; ShapeError for another image size."""
        inner = self.patch_embed(x) + self.inner_pos
        words = inner.flatten(1).view(len(x), self.outer_pos.shape[1] - 1, -1)
        patches = self.proj_norm2(self.proj(self.proj_norm1(words)))
        outer = self.pos_drop(with_class_token(self.cls_token, patches) + self.outer_pos)
        for block in self.blocks:
            inner, outer = self.run(block, inner, outer)
            yield outer


def _official_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm keeps the words' positions as a map, and no unused tokens."""
    converted = dict(state)
    if converted["inner_pos"].dim() == 4:
        converted["inner_pos"] = converted["inner_pos"].flatten(2).transpose(1, 2)
    converted["outer_tokens"] = torch.zeros_like(converted["outer_pos"][:, 1:])
    return converted


timm_names(
    "tnt",
    (r"^patch_pos$", "outer_pos"),
    (r"^pixel_pos$", "inner_pos"),
    (r"^pixel_embed\.", "patch_embed."),
    (r"norm([12])_proj\.", r"proj_norm\1."),
    (r"\.norm_in\.", ".inner_norm1."),
    (r"\.norm_mlp_in\.", ".inner_norm2."),
    (r"\.norm_out\.", ".outer_norm1."),
    (r"\.norm_mlp\.", ".outer_norm2."),
    (r"\.(attn|mlp)_in\.", r".inner_\1."),
    (r"\.attn_out\.", ".outer_attn."),
    (r"\.mlp\.", ".outer_mlp."),
    convert=_official_state,
)

# no effect in evaluation mode, never read, or always these layers
IGNORED = ("attn_drop", "attn_drop_rate", "act_layer", "norm_layer", "qk_scale")


@official("tnt", "Block", ignores=IGNORED)
class _Block(Block):
    """With both results by name."""

    def forward(self, inner: Tensor, outer: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return dict(zip(("inner", "outer"), super().forward(inner, outer), strict=True))


official("tnt", "Attention", ignores=IGNORED)(Attention)
official("tnt", "PatchEmbed", ignores=IGNORED)(PatchEmbed)
official("tnt", "TNT", ignores=IGNORED)(TNT)
