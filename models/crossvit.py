"""CrossViT: Cross-Attention Multi-Scale Vision Transformer (Chen et al., ICCV 2021, arXiv:2103.14899).

Two transformers see the image in small and in large patches. After some blocks each class token is carried over to the other
one's width, attends to its patches, and is carried back. Parameter names are those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.errors import DeclarationError
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.isotropic import tokens_to_map
from attnc.models.blocks.linear import Linear
from attnc.models.blocks.patches import pair
from attnc.models.blocks.prenorm import PreNormBlock
from attnc.models.blocks.staged import Staged
from attnc.models.blocks.tokens import TokenAttention, cross_operator, with_class_token
from attnc.models.official import official
from attnc.models.registry import variants
from attnc.models.timm_names import timm_names

EPS = 1e-6  # of the norms in every released model
# strides, kernels and paddings of three convolutions instead of one, by the patch that they make
CONVOLUTIONS = {12: ((4, 7, 3), (3, 3, 0), (1, 3, 1)), 16: ((4, 7, 3), (2, 3, 1), (2, 3, 1))}


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v of the first token, the class's, to all tokens.

    Args:
        dim: channels C.
        num_heads: heads h of d = C / h channels.
        qkv_bias: whether ``wq``, ``wk`` and ``wv`` have biases.
        qk_scale: factor of q . k, d^-1/2 where it is None.
        proj_drop: dropout after ``proj``.
        backend: of the operator.

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
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise DeclarationError(f"num_heads is {num_heads}, which does not divide dim = {dim}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.wq, self.wk, self.wv = (Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attend = cross_operator(backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, 1, C]``."""
        q, k, v = (w(t).unflatten(2, (self.num_heads, -1)) for w, t in ((self.wq, x[:, :1]), (self.wk, x), (self.wv, x)))
        out: Tensor = self.proj_drop(self.proj(self.attend(q, k, v, scale=self.scale).flatten(2)))
        return out


class CrossAttentionBlock(nn.Module):
    """The class token plus what it reads, ``[B, N, C] -> [B, 1, C]``; no MLP. Args: see `CrossAttention`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        ln_eps: float = EPS,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, ln_eps)
        self.attn = CrossAttention(dim, num_heads, qkv_bias, qk_scale, proj_drop, backend=backend)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, 1, C]``."""
        return x[:, :1] + cast(Tensor, self.drop_path(self.attn(self.norm1(x))))


class MultiScaleBlock(nn.Module):
    """Blocks of both branches, then the exchange of class tokens.

    Args:
        dim: channels of the branches, C0 and C1.
        depth: blocks of either branch, at least one, and cross-attention blocks after them, of which 0 means one without a list.
        num_heads: heads of the branches.
        mlp_ratio: hidden width of the MLPs over their channels, per branch.
        qkv_bias, qk_scale: of all attentions.
        drop: dropout after the attentions and in the MLPs.
        drop_path: probabilities of dropping a branch, by block; the last one is that of the cross attentions.
        ln_eps: of the norms.
        backend: of the operators.

    Raises:
        DeclarationError: there are not two branches, or one of them has no block.
    """

    def __init__(
        self,
        dim: Sequence[int],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: Sequence[float],
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        drop_path: Sequence[float] | None = None,
        ln_eps: float = EPS,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not (len(dim) == len(num_heads) == 2 and len(depth) == 3 and len(mlp_ratio) >= 2):
            raise DeclarationError(f"CrossViT: {dim=}, {num_heads=}, {depth=}, {mlp_ratio=}: there are two branches")
        if min(depth[:2]) < 1:
            raise DeclarationError(f"CrossViT: {depth=}: either branch needs a block")
        crossings = depth[2]
        rates = [0.0] * (max(depth[:2]) + crossings) if drop_path is None else drop_path

        def block(branch: int, i: int) -> nn.Module:
            width = dim[branch]
            attn = TokenAttention(width, num_heads[branch], qkv_bias, qk_scale, drop, backend=backend)
            return PreNormBlock(width, attn, mlp_ratio=mlp_ratio[branch], drop=drop, drop_path=rates[i], eps=ln_eps)

        def carry(before: int, after: int) -> nn.Module:
            return nn.Sequential(nn.LayerNorm(before, ln_eps), nn.GELU(), nn.Linear(before, after))

        def crossing(branch: int) -> nn.Module:
            arguments = (dim[1 - branch], num_heads[1 - branch], qkv_bias, qk_scale, drop, rates[-1], ln_eps)
            blocks = [CrossAttentionBlock(*arguments, backend=backend) for _ in range(max(crossings, 1))]
            return nn.Sequential(*blocks) if crossings else blocks[0]

        self.blocks = nn.ModuleList(nn.Sequential(*(block(b, i) for i in range(depth[b]))) for b in (0, 1))
        self.projs = nn.ModuleList(carry(dim[b], dim[1 - b]) for b in (0, 1))
        self.fusion = nn.ModuleList(crossing(b) for b in (0, 1))
        self.revert_projs = nn.ModuleList(carry(dim[1 - b], dim[b]) for b in (0, 1))

    def forward(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 1 + N0, C0]`` and ``[B, 1 + N1, C1]``, the class tokens first, to the same."""
        y = [self.blocks[0](x0), self.blocks[1](x1)]

        def exchanged(branch: int) -> Tensor:
            token = self.projs[branch](y[branch][:, :1])
            token = self.fusion[branch](torch.cat([token, y[1 - branch][:, 1:]], 1))
            return torch.cat([self.revert_projs[branch](token), y[branch][:, 1:]], 1)

        return exchanged(0), exchanged(1)


class PatchEmbed(nn.Module):
    """Patches of an image of `img_size`, by one convolution or (`multi_conv`) three with ReLU between them."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, dim: int, multi_conv: bool) -> None:
        super().__init__()
        if multi_conv and patch_size not in CONVOLUTIONS:
            raise DeclarationError(
                f"CrossViT: multi_conv with patches of {patch_size}: {' and '.join(map(str, CONVOLUTIONS))} exist"
            )
        if min(img_size) < patch_size:
            raise DeclarationError(f"CrossViT: an image of {img_size[0]}x{img_size[1]} is less than a patch of {patch_size}")
        self.img_size = img_size
        self.grid = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.proj: nn.Module = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        if multi_conv:
            widths = (in_chans, dim // 4, dim // 2, dim)
            layers: list[nn.Module] = []
            for i, (stride, kernel, padding) in enumerate(CONVOLUTIONS[patch_size]):
                layers += [nn.Conv2d(widths[i], widths[i + 1], kernel, stride, padding), nn.ReLU(inplace=True)]
            self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` of any size, resized by bicubic interpolation to `img_size`, to ``[B, N, C]``."""
        if tuple(x.shape[2:]) != self.img_size:
            x = F.interpolate(x, self.img_size, mode="bicubic", align_corners=False)
        y: Tensor = self.proj(x)
        return y.flatten(2).transpose(1, 2)


DEPTHS = {"9": 3, "15": 5, "18": 6}  # of the second branch, by name; of others it is 4
SIZES: dict[str, tuple[tuple[int, int], int, float]] = {  # channels, heads, MLP ratio
    "tiny": ((96, 192), 3, 4.0),
    "small": ((192, 384), 6, 4.0),
    "base": ((384, 768), 12, 4.0),
    "9": ((128, 256), 4, 3.0),
    "15": ((192, 384), 6, 3.0),
    "18": ((224, 448), 7, 3.0),
}


def _variants() -> dict[str, dict[str, Any]]:
    """By size, "dagger" for three convolutions per patch, and the image where it has not 240 pixels."""
    found: dict[str, dict[str, Any]] = {}
    for name, (dim, heads, ratio) in SIZES.items():
        config = {
            "embed_dim": dim,
            "depth": ((1, DEPTHS.get(name, 4), 0),) * 3,
            "num_heads": (heads, heads),
            "mlp_ratio": (ratio, ratio, 1.0),
        }
        found[f"crossvit_{name}"] = config
        if name in DEPTHS:
            found[f"crossvit_{name}_dagger"] = {**config, "multi_conv": True}
        if name in ("15", "18"):
            found[f"crossvit_{name}_dagger_408"] = {**config, "multi_conv": True, "img_size": (408, 384)}
    return found


@variants(**_variants())
class CrossViT(Staged):
    """Image classifier or backbone for images ``[B, in_chans, H, W]`` of any size, which each branch resizes to its own.

    As a backbone, stage b K + i is the map of branch b after the i-th of K multi-scale blocks; by default the last of each.

    Args:
        img_size: side, or rows and columns, of each branch's image.
        patch_size: of the branches.
        in_chans: channels of the image.
        num_classes, features_only, out_indices, grad_checkpointing: see `Staged`; the logits are the mean of both branches'.
        embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, ln_eps: of the blocks, see `MultiScaleBlock`.
        depth: of each multi-scale block.
        drop_rate: dropout after the position embeddings, after the attentions and in the MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; officially 0.1.
        multi_conv: three convolutions per patch.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or there are not two branches.
    """

    def __init__(
        self,
        img_size: Sequence[int | Sequence[int]] = (240, 224),
        patch_size: Sequence[int] = (12, 16),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (192, 384),
        depth: Sequence[Sequence[int]] = ((1, 3, 1), (1, 3, 1), (1, 3, 1)),
        num_heads: Sequence[int] = (6, 12),
        mlp_ratio: Sequence[float] = (2.0, 2.0, 4.0),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        multi_conv: bool = False,
        ln_eps: float = EPS,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        self.check(len(img_size) == len(patch_size) == len(embed_dim) == 2, f"{img_size=}, {patch_size=}, {embed_dim=}: two each")
        sizes = [pair(size) for size in img_size]
        count = len(depth)
        super().__init__(
            [dim for dim in embed_dim for _ in depth],
            [round(patch * sizes[0][0] / size[0]) for patch, size in zip(patch_size, sizes, strict=True) for _ in depth],
            "blocks",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=(count - 1, 2 * count - 1) if out_indices is None else out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        for info, i in zip(self.feature_info, self.out_indices, strict=True):
            info["module"] = f"blocks.{i % count}"
        self.num_features = sum(embed_dim)
        self.embed_dim = tuple(embed_dim)
        of_branches = list(zip(sizes, patch_size, embed_dim, strict=True))
        self.patch_embed = nn.ModuleList(PatchEmbed(size, patch, in_chans, dim, multi_conv) for size, patch, dim in of_branches)
        grids = [cast(PatchEmbed, embed).grid for embed in self.patch_embed]
        self.pos_embed = nn.ParameterList(torch.empty(1, 1 + g[0] * g[1], dim) for g, dim in zip(grids, embed_dim, strict=True))
        self.cls_token = nn.ParameterList(torch.empty(1, 1, dim) for dim in embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)
        lengths = [max(d[:2]) + d[2] for d in depth]
        rates = linear_rates(drop_path_rate, sum(lengths))
        starts = [sum(lengths[:i]) for i in range(count)]
        self.blocks = nn.ModuleList(
            MultiScaleBlock(
                embed_dim, d, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, rates[at : at + n], ln_eps, backend=backend
            )
            for d, at, n in zip(depth, starts, lengths, strict=True)
        )
        if not features_only:
            self.norm = nn.ModuleList(nn.LayerNorm(dim, ln_eps) for dim in embed_dim)
            self.reset_classifier(num_classes)
        self.apply(init_vit)
        for parameter in (*self.pos_embed, *self.cls_token):
            nn.init.trunc_normal_(parameter, std=0.02)

    def _embed(self, x: Tensor, branch: int) -> Tensor:
        tokens = with_class_token(self.cls_token[branch], self.patch_embed[branch](x))
        return cast(Tensor, self.pos_drop(tokens + self.pos_embed[branch]))

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The patches ``[B, C, H', W']`` of the first branch after each block, then those of the second (views)."""
        maps: tuple[list[Tensor], list[Tensor]] = ([], [])
        y = self._embed(x, 0), self._embed(x, 1)
        for block in self.blocks:
            y = self.run(block, *y)
            for found, tokens, embed in zip(maps, y, self.patch_embed, strict=True):
                found.append(tokens_to_map(tokens, cast(PatchEmbed, embed).grid))
        return maps[0] + maps[1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Both class tokens after the last norms, side by side, ``[B, C0 + C1]``."""
        y = self._embed(x, 0), self._embed(x, 1)
        for block in self.blocks:
            y = self.run(block, *y)
        return torch.cat([norm(tokens[:, 0]) for norm, tokens in zip(self.norm, y, strict=True)], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean of both classifiers' logits for ``[B, C0 + C1]``, which `pre_logits` leaves as it is."""
        if pre_logits or not self.num_classes:
            return x
        return torch.stack([head(t) for head, t in zip(self.head, torch.split(x, list(self.embed_dim), 1), strict=True)]).mean(0)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both classifiers by fresh ones; 0 classes leave the class tokens."""
        self.num_classes = num_classes
        heads = [nn.Linear(dim, num_classes) if num_classes else nn.Identity() for dim in self.embed_dim]
        self.head = nn.ModuleList(heads).apply(init_vit).to(self.cls_token[0])


timm_names("crossvit", (r"^(pos_embed|cls_token)_(\d)$", r"\1.\2"))

# no effect in evaluation mode, follows from the rest, or always these layers
IGNORED = ("attn_drop", "attn_drop_rate", "act_layer", "norm_layer", "patches", "has_mlp", "hybrid_backbone")


@official("crossvit", "MultiScaleBlock", ignores=IGNORED)
class _Block(MultiScaleBlock):
    """With both results by name."""

    def forward(self, x0: Tensor, x1: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return dict(zip(("y0", "y1"), super().forward(x0, x1), strict=True))


official("crossvit", "CrossAttention", ignores=IGNORED)(CrossAttention)
official("crossvit", "CrossAttentionBlock", ignores=(*IGNORED, "mlp_ratio"))(CrossAttentionBlock)
official("crossvit", "VisionTransformer", ignores=IGNORED)(CrossViT)
