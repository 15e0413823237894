"""CoSwin: convolution enhanced shifted window attention for small images (Khadka et al. 2025).

Swin's blocks with a branch of two dense 3x3 convolutions beside the attention, added with one learned gate per block.
Parameter names are those of the code that came with the submission.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.biased_window import BiasedWindowAttention
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.merge import PatchMerging
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.patches import PatchEmbed, pair
from attnc.models.blocks.staged import Staged
from attnc.models.official import official, on_tokens
from attnc.models.registry import variants


class ConvBranch(nn.Module):
    """3x3 convolution C -> floor(1.1 C), ReLU, 3x3 convolution back, zero padding, biases."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        wide = int(dim * 1.10)
        self.conv = nn.Sequential(nn.Conv2d(dim, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        out: Tensor = self.conv(x.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)


class Block(nn.Module):
    """x += attn(LN(x)) + sigmoid(g) conv(x), then x += mlp(LN(x)); attention in windows, shifted or not.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, qk_scale: of attention and MLP.
        input_resolution: rows and columns of the map; where a window is no smaller, it becomes the smaller of the two, unshifted.
        window_size: side w of windows, which divides the map.
        shift_size: where they begin, modulo w.
        drop: dropout after the attention and in the MLP.
        drop_path: probability of dropping either branch.
        backend: of the attnc operators.

    Raises:
        DeclarationError: the shift is not in [0, w), or the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Sequence[int],
        num_heads: int,
        window_size: int = 7,
        shift_size: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if min(input_resolution) <= window_size:
            window_size, shift_size = min(input_resolution), 0
        if not 0 <= shift_size < window_size:
            raise DeclarationError(f"shift_size is {shift_size}; it lies in [0, window_size) = [0, {window_size})")
        window = (window_size, window_size)
        self.convInfluenceWeight = nn.Parameter(torch.tensor(0.5))
        self.norm1 = nn.LayerNorm(dim)
        self.attn = BiasedWindowAttention(dim, num_heads, window, qkv_bias, qk_scale, drop, shift=shift_size, backend=backend)
        self.conv = ConvBranch(dim)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        mixed = self.attn(self.norm1(x)) + self.convInfluenceWeight.sigmoid() * self.conv(x)
        x = x + self.drop_path(mixed)
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class Level(nn.Module):
    """Blocks of one resolution and the merging of patches after them."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


_SHAPE: dict[str, Any] = {"embed_dim": 96, "depths": (2, 6, 4), "num_heads": (3, 6, 12), "window_size": 4, "mlp_ratio": 2.0}
_SMALL: dict[str, Any] = {**_SHAPE, "img_size": 32, "patch_size": 2}


@variants(
    coswin_cifar10={**_SMALL, "num_classes": 10},
    coswin_cifar100={**_SMALL, "num_classes": 100},
    coswin_mnist={**_SMALL, "num_classes": 10},
    coswin_svhn={**_SMALL, "num_classes": 10},
    coswin_tinyimagenet={**_SHAPE, "img_size": 64, "patch_size": 4, "num_classes": 200},
)
class CoSwin(Staged):
    """Image classifier or backbone for images ``[B, in_chans, H, W]`` whose maps the windows divide.

    Args:
        img_size: rows and columns of the image, from which windows and shifts follow.
        patch_size: of patches.
        in_chans: channels of the image.
        num_classes, features_only, out_indices, grad_checkpointing: see `Staged`.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths, num_heads: blocks and heads per stage; every second block is shifted by half a window.
        window_size: side of windows, where maps are larger.
        mlp_ratio, qkv_bias, qk_scale: of the blocks.
        drop_rate: dropout after the patches, after each attention and in the MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        ape: whether patches get a learned absolute position embedding, which fixes the image size.
        patch_norm: whether patches are normalised.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or the stages differ in number.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        ape: bool = False,
        patch_norm: bool = True,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        size, patch = pair(img_size), pair(patch_size)
        widths = [embed_dim << i for i in range(len(depths))]
        super().__init__(
            widths,
            [patch[0] << i for i in range(len(depths))],
            "layers",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.check(len(num_heads) == len(depths), f"{depths=} and {num_heads=} differ in length")
        self.grid = (size[0] // patch[0], size[1] // patch[1])
        last = len(depths) - 1
        self.check(min(self.grid) >> last > 0, f"{img_size=} leaves no token after {last} mergings of {patch_size=}")
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch, norm=patch_norm, pad=False)
        self.absolute_pos_embed = None
        if ape:
            embedding = torch.empty(1, self.grid[0] * self.grid[1], embed_dim)
            self.absolute_pos_embed = nn.Parameter(nn.init.trunc_normal_(embedding, std=0.02))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(linear_rates(drop_path_rate, sum(depths)))

        def block(stage: int, i: int) -> nn.Module:
            return Block(
                widths[stage],
                [side >> stage for side in self.grid],
                num_heads[stage],
                window_size,
                window_size // 2 if i % 2 else 0,
                mlp_ratio,
                qkv_bias,
                qk_scale,
                drop_rate,
                next(rates),
                backend=backend,
            )

        self.layers = nn.ModuleList(
            Level([block(s, i) for i in range(depth)], PatchMerging(widths[s]) if s < last else None)
            for s, depth in enumerate(depths)
        )
        if not features_only:
            self.norm = nn.LayerNorm(self.num_features)
            self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(init_vit)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all stages before their merging, ``[B, C, H', W']`` (views of channels-last memory).

        Raises:
            ShapeError: the image has another size than the position embedding, or a map has no whole windows or an odd side.
        """
        maps = []
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            if x.shape[1:3] != self.grid:
                rows, columns = self.grid
                raise ShapeError(
                    f"CoSwin: the image has {x.shape[1]}x{x.shape[2]} patches, the position embedding {rows}x{columns}: build the "
                    "model with this img_size, or with ape=False"
                )
            x = x + torch.unflatten(self.absolute_pos_embed, 1, self.grid)
        x = self.pos_drop(x)
        for level in cast("list[Level]", self.layers):
            for block in level.blocks:
                x = self.run(block, x)
            maps.append(x.permute(0, 3, 1, 2))
            if level.downsample is not None:
                if x.shape[1] % 2 or x.shape[2] % 2:
                    raise ShapeError(
                        f"CoSwin: a map of {x.shape[1]}x{x.shape[2]} has no whole patches of 2x2: choose another image size"
                    )
                x = level.downsample(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """LayerNorm and mean over the tokens of ``[B, C, H', W']``, and the classifier unless `pre_logits`."""
        x = self.norm(x.permute(0, 2, 3, 1)).mean((1, 2))
        return x if pre_logits else cast(Tensor, self.head(x))


IGNORED = ("attn_drop", "attn_drop_rate", "norm_layer", "act_layer", "use_checkpoint", "fused_window_process")  # nothing here
DERIVED = ("*relative_position_index", "*attn_mask")


@official("coswin", "WindowAttention", ignores=IGNORED, derived=DERIVED)
def _window_attention(
    dim: int,
    window_size: int | Sequence[int],
    num_heads: int,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    proj_drop: float = 0.0,
    *,
    backend: str = "auto",
) -> nn.Module:
    """Tokens of whole windows, ``[B * windows, rows * columns, C]``: each window is a map of its own."""
    window = pair(window_size)
    return on_tokens(BiasedWindowAttention(dim, num_heads, window, qkv_bias, qk_scale, proj_drop, backend=backend), window)


@official("coswin", "TransformerBlock", ignores=IGNORED, derived=DERIVED)
def _block(
    dim: int,
    input_resolution: Sequence[int],
    num_heads: int,
    window_size: int = 7,
    shift_size: int = 0,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    drop: float = 0.0,
    drop_path: float = 0.0,
    *,
    backend: str = "auto",
) -> nn.Module:
    made = Block(
        dim, input_resolution, num_heads, window_size, shift_size, mlp_ratio, qkv_bias, qk_scale, drop, drop_path, backend=backend
    )
    return on_tokens(made, pair(input_resolution))


@official("coswin", "PatchMerging", ignores=IGNORED)
def _merging(input_resolution: Sequence[int], dim: int) -> nn.Module:
    return on_tokens(PatchMerging(dim), pair(input_resolution))


official("coswin", "CoSwinTransformer", ignores=IGNORED, derived=DERIVED)(CoSwin)
