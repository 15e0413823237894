"""ConViT: soft convolutional inductive biases (d'Ascoli et al., ICML 2021, arXiv:2103.10697).

The first blocks mix two attentions by a learned gate per head: one by content, one by relative position alone, which
starts out as a convolution. Then a class token joins, and the last blocks are plain. Names are those of the official code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from math import isqrt

import torch
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.drop import linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.isotropic import Isotropic
from attnc.models.blocks.linear import Linear
from attnc.models.blocks.patches import PatchEmbed, pair
from attnc.models.blocks.prenorm import PreNormBlock
from attnc.models.blocks.tokens import TokenAttention, map_operator, with_class_token
from attnc.models.official import official
from attnc.models.registry import variants
from attnc.models.timm_names import timm_names


@cache  # layers share operators
def position_operator(backend: str) -> attnc.Operator:
    """Attention by relative position, on q, k and v ``[B, H, W, heads, d]``."""
    return attnc.compile(attnc.patterns.positional(), layout="b y x h d", backend=backend)


class GPSA(nn.Module):
    """Gated positional self-attention: (1 - g) softmax(q k^T / sqrt(d)) v + g softmax(W_pos (dx, dy, dx^2 + dy^2)) v.

    g = sigmoid(gating_param) per head; dx and dy are key minus query in patches, dx along the rows.

    Args:
        dim: channels C.
        num_heads: heads h of d = C / h channels.
        qkv_bias: whether ``qk`` and ``v`` have biases.
        qk_scale: factor of q . k, d^-1/2 where it is None.
        proj_drop: dropout after ``proj``.
        locality_strength: how sharply positional attention starts out, see `local_init`.
        use_local_init: whether it starts out as a convolution at all.
        backend: of the operators.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        use_local_init: bool = True,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise DeclarationError(f"num_heads is {num_heads}, which does not divide dim = {dim}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qk = Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.content, self.position = map_operator(backend), position_operator(backend)
        self.apply(init_vit)
        if use_local_init:
            self.local_init(locality_strength)

    @torch.no_grad()
    def local_init(self, strength: float = 1.0) -> None:
        """Values as they are, and head a + K b of K x K looks at the key (b - m, a - m) away, m the middle of 0 .. K - 1.

        K = floor(sqrt(h)), and for odd K as for even ones m = (K - 1) / 2. `strength` scales the positional scores.
        """
        nn.init.eye_(self.v.weight)
        side = isqrt(self.num_heads)
        steps = 2.0 * torch.arange(side) - (side - 1)
        dx, dy = steps.repeat_interleave(side), steps.repeat(side)
        self.pos_proj.weight[: side * side] = torch.stack([dx, dy, torch.full_like(dx, -1.0)], 1)
        self.pos_proj.weight *= strength

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        q, k = self.qk(x).unflatten(3, (2, self.num_heads, -1)).unbind(3)
        v = self.v(x).unflatten(3, (self.num_heads, -1))
        content = self.content(q, k, v, scale=self.scale)
        # A softmax over keys does not see the bias, whose gradient is zero. Nor does this one read q and k: any will do.
        weight = self.pos_proj.weight + 0 * self.pos_proj.bias[:, None]
        position = self.position(q[..., :1].detach(), k[..., :1].detach(), v, weight=weight)
        gate = self.gating_param.sigmoid()[:, None].to(content.dtype)
        out: Tensor = self.proj_drop(self.proj(torch.lerp(content, position, gate).flatten(3)))
        return out


@variants(
    convit_tiny={"embed_dim": 192, "num_heads": 4},
    convit_tiny_plus={"embed_dim": 256, "num_heads": 4},
    convit_small={"embed_dim": 432, "num_heads": 9},
    convit_small_plus={"embed_dim": 576, "num_heads": 9},
    convit_base={"embed_dim": 768, "num_heads": 16},
    convit_base_plus={"embed_dim": 1024, "num_heads": 16},
)
class ConViT(Isotropic):
    """Image classifier or backbone for images ``[B, in_chans, *img_size]``, of any size if there is no position embedding.

    Args:
        img_size: rows and columns of the image; the position embedding is made for them.
        patch_size: of patches; an int, or rows and columns.
        in_chans: channels of the image.
        num_classes, features_only, out_indices, grad_checkpointing: see `Isotropic`.
        embed_dim: channels C of all heads together.
        depth, num_heads, mlp_ratio, qkv_bias, qk_scale: of the blocks.
        drop_rate: dropout after the position embedding, after each attention and in the MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        local_up_to_layer: that many blocks are gated; then the class token joins. If all are, the first patch takes its place.
        locality_strength: see `GPSA`.
        use_pos_embed: whether patches get a learned position embedding.
        ln_eps: of the norms.
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
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        use_pos_embed: bool = True,
        ln_eps: float = 1e-6,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        patch = pair(patch_size)
        super().__init__(
            embed_dim,
            depth,
            patch,
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.grid = self.grid_of(img_size)
        self.check(local_up_to_layer >= 0, f"{local_up_to_layer=}: the number of gated blocks, 0 or more")
        self.local_up_to_layer = local_up_to_layer
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch, norm=False, pad=False)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.pos_embed = None
        if use_pos_embed:
            embedding = torch.empty(1, self.grid[0] * self.grid[1], embed_dim)
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(embedding, std=0.02))
        self.pos_drop = nn.Dropout(drop_rate)

        def block(i: int, rate: float) -> nn.Module:
            attn: nn.Module
            if i < local_up_to_layer:
                attn = GPSA(embed_dim, num_heads, qkv_bias, qk_scale, drop_rate, locality_strength, backend=backend)
            else:
                attn = TokenAttention(embed_dim, num_heads, qkv_bias, qk_scale, drop_rate, backend=backend).apply(init_vit)
            made = PreNormBlock(embed_dim, attn, mlp_ratio=mlp_ratio, drop=drop_rate, drop_path=rate, eps=ln_eps)
            made.mlp.apply(init_vit)
            return made

        self.blocks = nn.ModuleList(block(i, rate) for i, rate in enumerate(linear_rates(drop_path_rate, depth)))
        self.add_head(ln_eps)
        if not features_only:
            self.head.apply(init_vit)

    def forward_blocks(self, x: Tensor) -> Iterator[Tensor]:
        """After gated blocks maps ``[B, H, W, C]``, then tokens ``[B, 1 + N, C]``, the class token first.

        Raises:
            ShapeError: the image has another size than the position embedding.
        """
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            self.check_grid(x, self.grid, ", or with use_pos_embed=False for any")
            x = x + torch.unflatten(self.pos_embed, 1, self.grid)
        x = self.pos_drop(x)
        for i, block in enumerate(self.blocks):
            if i == self.local_up_to_layer:
                x = with_class_token(self.cls_token, x.flatten(1, 2))
            x = self.run(block, x)
            yield x


timm_names("convit")  # the same names

IGNORED = ("attn_drop", "attn_drop_rate", "norm_layer")  # no effect in evaluation mode, or always LayerNorm


@official("convit", "GPSA", ignores=IGNORED)
class _OnTokens(GPSA):
    """On tokens ``[B, N, C]``: of a square map, unless `grid` says otherwise."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        use_local_init: bool = True,
        grid: tuple[int, int] | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale, proj_drop, locality_strength, use_local_init, backend=backend)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        grid = self.grid or (isqrt(x.shape[1]),) * 2
        if grid[0] * grid[1] != x.shape[1]:
            raise ShapeError(f"GPSA: {x.shape[1]} tokens are not a map of {grid[0]}x{grid[1]}")
        return super().forward(torch.unflatten(x, 1, tuple(grid))).flatten(1, 2)


official("convit", "MHSA", ignores=IGNORED)(TokenAttention)
official("convit", "VisionTransformer", ignores=(*IGNORED, "global_pool"))(ConViT)
