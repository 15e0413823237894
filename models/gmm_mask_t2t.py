"""T2T-ViT under Gaussian-mixture masks, a host of the paper of `gmm_mask` (Li et al. 2023, arXiv:2309.05375), for small images.

T2T-ViT (Yuan et al. 2021) makes tokens of overlapping patches in several steps, with attention in one head between them. Names are
those of the official code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.errors import ShapeError
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.isotropic import Isotropic
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.prenorm import PreNormBlock
from attnc.models.blocks.relative_window import check_heads
from attnc.models.gmm_mask import BASE, base_mask, made_mask, masked_operator, side_of
from attnc.models.official import official
from attnc.models.registry import variants


class Attention(nn.Module):
    """proj(softmax(mask * q k^T scale) v) + v for one head, + x for several.

    The official blocks have this skip inside attention, where x is normalised, besides the one around it.

    Args:
        dim, in_dim: channels of the input, and of q, k, v and the output, which must be those of the input for several heads.
        num_heads: heads of in_dim / h channels.
        num_patches: tokens, a square grid of them.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor of q . k, (dim / h)^-1/2 where it is None (by the input's channels, as in the official code).
        is_GMM, is_SLM, num_kernals: whether there is a Gaussian mixture, or else a learned mask, and the mixture's Gaussians.
        proj_drop: dropout after ``proj``.
        backend: of the attnc operator.

    Raises:
        DeclarationError: the heads do not divide the channels.
        ShapeError: the patches are no square grid, or several heads change the number of channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        in_dim: int = 256,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        num_patches: int = 0,
        is_GMM: bool = False,
        num_kernals: int = 5,
        is_SLM: bool = False,
        proj_drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(in_dim, num_heads)
        if num_heads > 1 and dim != in_dim:
            raise ShapeError(f"T2T: {num_heads} heads add their input of {dim} channels to an output of {in_dim}: make them equal")
        self.num_heads, self.in_dim, self.side = num_heads, in_dim, side_of(num_patches)
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * in_dim, bias=qkv_bias)
        self.proj = nn.Linear(in_dim, in_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.mask, kind = made_mask(num_heads, num_patches, num_kernals, is_GMM, is_SLM)
        self.attend = masked_operator(kind, 0, num_heads, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, dim] -> [B, N, in_dim]``."""
        tables: dict[str, Any] = {} if self.mask is None else self.mask.tables()
        qkv = self.qkv(x)
        mixed = self.attend(qkv, grid=(self.side, self.side), scale=self.scale, **tables)
        out: Tensor = self.proj_drop(self.proj(mixed))
        return out + (qkv[..., 2 * self.in_dim :] if self.num_heads == 1 else x)


class TokenTransformer(nn.Module):
    """u = attention(LN x), then u + MLP(LN u), with a base mask of its own.

    Args: see `Attention`; mlp_ratio: hidden width of the MLP over `in_dim`.
    """

    def __init__(
        self,
        dim: int,
        in_dim: int,
        num_heads: int,
        mlp_ratio: float = 1.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
        num_patches: int = 0,
        is_GMM: bool = False,
        num_kernals: int = 5,
        is_SLM: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        # frozen; what it says is computed from coordinates here
        self.mask = nn.Parameter(base_mask(side_of(num_patches)), requires_grad=False)
        self.attn = Attention(
            dim, num_heads, in_dim, qkv_bias, qk_scale, num_patches, is_GMM, num_kernals, is_SLM, drop, backend=backend
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(in_dim)
        self.mlp = Mlp(in_dim, int(in_dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, dim] -> [B, N, in_dim]``."""
        x = self.attn(self.norm1(x))
        return x + cast(Tensor, self.drop_path(self.mlp(self.norm2(x))))


def soft_split(x: Tensor) -> Tensor:
    """Overlapping 3 x 3 patches, 2 apart: ``[B, C, H, W] -> [B, H / 2 * W / 2, 9 C]``, channels slowest."""
    return F.unfold(x, 3, padding=1, stride=2).transpose(1, 2)


class TokensToToken(nn.Module):
    """Soft splits with a transformer of tokens between any two, and a linear map: two of them, three for images of side 64.

    `norm` has no use, as in the official code.
    """

    def __init__(
        self, img_size: int, in_chans: int, embed_dim: int, token_dim: int, masks: dict[str, Any], *, backend: str
    ) -> None:
        super().__init__()

        def transformer(dim: int, side: int) -> TokenTransformer:
            return TokenTransformer(dim, token_dim, 1, num_patches=side**2, **masks, backend=backend)

        self.side = img_size // (8 if img_size == 64 else 4)
        self.attention1 = transformer(9 * in_chans, img_size // 2)
        self.attention2 = transformer(9 * token_dim, img_size // 4) if img_size == 64 else None
        self.norm = nn.LayerNorm(9 * token_dim)
        self.project = nn.Linear(9 * token_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, img_size, img_size] -> [B, side^2, C]``."""
        x = soft_split(x)
        for attention in (self.attention1, self.attention2):
            if attention is not None:
                x = attention(x).transpose(1, 2)
                side = side_of(x.shape[2])
                x = soft_split(torch.unflatten(x, 2, (side, side)))
        return cast(Tensor, self.project(x))


def sinusoids(count: int, dim: int) -> Tensor:
    """Positions ``[1, count, dim]``: channels 2 i and 2 i + 1 are sine and cosine of p / 10000^(2 i / dim)."""
    channel = torch.arange(dim)
    angle = torch.arange(count)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())[None]


T2T: dict[str, Any] = {"img_size": 32, "is_GMM": True}


@variants(
    gmm_mask_t2t={**T2T, "num_classes": 10},
    gmm_mask_t2t_cifar100={**T2T, "num_classes": 100},
    gmm_mask_t2t_tiny_imagenet={**T2T, "img_size": 64, "num_classes": 200},
)
class T2TViT(Isotropic):
    """Image classifier for images ``[B, in_chans, img_size, img_size]``.

    `cls_token` has no use, as in the official code: the head reads the mean of all tokens.

    Args:
        img_size: side of the image, a multiple of 4; for 64 there is one step more.
        in_chans: channels of the image.
        num_classes, features_only, out_indices, grad_checkpointing: see `Isotropic`.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, qk_scale: of the blocks.
        token_dim: channels of the tokens between the splits.
        drop_rate: dropout after the positions, after each attention and in the MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; officially 0.1.
        is_GMM, is_SLM, num_kernals: see `Attention`.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range.
    """

    reads = "mean"

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        token_dim: int = 64,
        is_GMM: bool = False,
        num_kernals: int = 5,
        is_SLM: bool = False,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        self.check(img_size > 0 and img_size % 4 == 0, f"{img_size=} is no multiple of 4")
        masks: dict[str, Any] = {"is_GMM": is_GMM, "is_SLM": is_SLM, "num_kernals": num_kernals}
        split = TokensToToken(img_size, in_chans, embed_dim, token_dim, masks, backend=backend)
        side = split.side
        super().__init__(
            embed_dim,
            depth,
            (img_size // side, img_size // side),
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.img_size = img_size
        self.tokens_to_token = split
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        # both frozen; what the mask says is computed from coordinates here
        self.pos_embed = nn.Parameter(sinusoids(side**2, embed_dim), requires_grad=False)
        self.mask = nn.Parameter(base_mask(side), requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)

        def block(rate: float) -> PreNormBlock:
            attn = Attention(
                embed_dim, num_heads, embed_dim, qkv_bias, qk_scale, side**2, proj_drop=drop_rate, **masks, backend=backend
            )
            return PreNormBlock(embed_dim, attn, mlp_ratio=mlp_ratio, drop=drop_rate, drop_path=rate)

        self.blocks = nn.ModuleList(block(rate) for rate in linear_rates(drop_path_rate, depth))
        self.add_head()
        self.apply(init_vit)

    def forward_blocks(self, x: Tensor) -> Iterator[Tensor]:
        """The tokens after each block, ``[B, N, C]``. Raises ShapeError for another size of image."""
        if x.shape[2:] != (self.img_size, self.img_size):
            raise ShapeError(f"the image is {tuple(x.shape[2:])}; its masks fix it to {self.img_size} x {self.img_size}")
        x = self.pos_drop(self.tokens_to_token(x) + self.pos_embed)
        for block in self.blocks:
            x = self.run(block, x)
            yield x


# dropout of weights, which means nothing in evaluation mode, and what is always so here
IGNORED = ("attn_drop", "attn_drop_rate", "act_layer", "norm_layer", "mask")
BASES = (*BASE, "*.mask")

official("gmm-mask", "t2t.Attention", ignores=IGNORED, derived=BASES)(Attention)
official("gmm-mask", "t2t.Token_transformer", ignores=IGNORED, derived=BASES)(TokenTransformer)
official("gmm-mask", "t2t.T2T_ViT", ignores=IGNORED, derived=BASES)(T2TViT)
