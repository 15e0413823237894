"""DRCT: saving image super-resolution away from information bottleneck (Hsu et al., CVPRW 2024, arXiv:2404.00722).

Swin blocks, each on the channels of the group's input and of all blocks before it, joined like a dense network's.
Parameter names are those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.errors import DeclarationError
from attnc.models.blocks.conv import conv_map
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.relative_window import RelativeWindowAttention, fitted_window, patches
from attnc.models.blocks.super_resolution import SuperResolution
from attnc.models.official import official, tokens
from attnc.models.registry import variants

BLOCKS = 5  # per group, whatever `depths` says
RESIDUAL = 0.2
SLOPE = 0.2


class SwinBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), in windows that may be shifted.

    Args:
        dim, num_heads: channels and heads.
        input_resolution: height and width that decide, as in the official code, whether there is more than one
            window; the forward takes any multiple of the window.
        window_size, shift_size: of the attention.
        mlp_ratio, qkv_bias, qk_scale, drop_path: as usual.

    Raises:
        DeclarationError: the heads do not divide the channels, or the shift is out of range.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: int = 7,
        shift_size: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        window, shift = fitted_window(window_size, shift_size, input_resolution)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = RelativeWindowAttention(dim, window, num_heads, shift, qkv_bias, qk_scale, backend=backend)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + cast(Tensor, self.drop_path(self.mlp(self.norm2(x))))


class DenseGroup(nn.Module):
    """RDG: x_k = lrelu(conv_k(swin_k([x, x_1, .., x_(k-1)]))) for k = 1 .. 4, x + 0.2 conv_5(swin_5([x, x_1, .., x_4])).

    The convolutions are 1 x 1, to `gc` channels and back to C at last. Block k has num_heads - width % num_heads heads, the
    second and the fourth are shifted by half a window, and the last two have MLPs of their own width.

    Raises:
        DeclarationError: those heads do not divide a block's width.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path: float | Sequence[float] = 0.0,
        gc: int = 32,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        rate = drop_path if isinstance(drop_path, int | float) else drop_path[0]  # one for all blocks, as in the official code
        widths = list(accumulate([dim] + [gc] * (BLOCKS - 1)))
        for k, width in enumerate(widths, 1):
            heads = num_heads - width % num_heads if k > 1 else num_heads
            shift = 0 if k % 2 else window_size // 2
            ratio = mlp_ratio if k <= 3 else 1.0
            block = SwinBlock(width, input_resolution, heads, window_size, shift, ratio, qkv_bias, qk_scale, rate, backend=backend)
            self.add_module(f"swin{k}", block)
            self.add_module(f"adjust{k}", nn.Conv2d(width, gc if k < BLOCKS else dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        joined = x
        for k in range(1, BLOCKS):
            joined = torch.cat([joined, F.leaky_relu(self._block(k, joined), SLOPE)], -1)
        return x + RESIDUAL * self._block(BLOCKS, joined)

    def _block(self, k: int, x: Tensor) -> Tensor:
        swin, adjust = self.get_submodule(f"swin{k}"), self.get_submodule(f"adjust{k}")
        return conv_map(cast(nn.Conv2d, adjust), swin(x))


def _variant(groups: int, upscale: int) -> dict[str, Any]:
    return {
        "embed_dim": 180,
        "depths": (6,) * groups,
        "num_heads": (6,) * groups,
        "window_size": 16,
        "mlp_ratio": 2.0,
        "upscale": upscale,
    }


@variants(
    **{f"drct_x{scale}": _variant(6, scale) for scale in (2, 3, 4)},
    **{f"drct_l_x{scale}": _variant(12, scale) for scale in (2, 3, 4)},
    drct=_variant(6, 4),
    drct_l=_variant(12, 4),
)
class DRCT(SuperResolution):
    """Super-resolution of images ``[B, in_chans, H, W]`` whose height and width are multiples of the window.

    Args:
        img_size: height and width in training; only decides whether a window is smaller than the image.
        patch_size: by which `img_size` is divided for that; images are not cut into patches.
        in_chans, embed_dim: channels of the image and of the groups.
        depths: one entry per group; a group has five blocks, which all take the first drop path rate of their share.
        num_heads: per group, from which each block's follow.
        window_size: side of the windows, officially 16.
        mlp_ratio, qkv_bias, qk_scale: of the blocks.
        drop_path_rate: stochastic depth, growing linearly from 0 over ``sum(depths)``; officially 0.1.
        ape: learned absolute positions, which fix the size of the image to `img_size`.
        patch_norm: a LayerNorm before the first group.
        upscale, img_range, upsampler, resi_connection: see `SuperResolution`.
        gc: channels that each of a group's first four blocks adds.
        grad_checkpointing: recompute each group in the backward.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 64,
        patch_size: int | tuple[int, int] = 1,
        in_chans: int = 3,
        embed_dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window_size: int = 16,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path_rate: float = 0.0,
        ape: bool = False,
        patch_norm: bool = True,
        upscale: int = 1,
        img_range: float = 1.0,
        upsampler: str = "pixelshuffle",
        resi_connection: str = "1conv",
        gc: int = 32,
        *,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        if len(depths) != len(num_heads):
            raise DeclarationError(f"DRCT: {depths=} and {num_heads=} differ in length")
        resolution = patches(img_size, patch_size)
        rates = linear_rates(drop_path_rate, sum(depths))
        groups = [
            DenseGroup(
                embed_dim,
                resolution,
                heads,
                window_size,
                mlp_ratio,
                qkv_bias,
                qk_scale,
                rates[sum(depths[:i])],
                gc,
                backend=backend,
            )
            for i, heads in enumerate(num_heads)
        ]
        super().__init__(
            groups,
            in_chans=in_chans,
            embed_dim=embed_dim,
            upscale=upscale,
            img_range=img_range,
            upsampler_kind=upsampler,
            resi_connection=resi_connection,
            patch_norm=patch_norm,
            tokens=resolution[0] * resolution[1] if ape else 0,
            grad_checkpointing=grad_checkpointing,
        )


# dropouts, which mean nothing in evaluation mode, the arguments of HAT that its config files carry, and what follows from the sizes
IGNORED = (
    *("drop", "drop_rate", "attn_drop", "attn_drop_rate", "act_layer", "norm_layer", "use_checkpoint", "x_size"),
    *("depth", "downsample", "img_size", "patch_size", "resi_connection", "compress_ratio", "squeeze_factor", "conv_scale"),
    *("overlap_ratio", "shift_size"),
)
INDICES = ("*attn_mask", "*relative_position_index")

official("drct", "SwinTransformerBlock", ignores=IGNORED, derived=INDICES)(tokens(SwinBlock))
official("drct", "RDG", ignores=IGNORED, derived=INDICES)(tokens(DenseGroup))
official("drct", "DRCT", ignores=IGNORED, derived=INDICES)(DRCT)
