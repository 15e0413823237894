"""Convolutions on channels-last maps. ``permute`` makes what torch calls channels_last: nothing is copied."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv_map(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 2-D convolution to a map: ``[B, H, W, C] -> [B, H', W', C']``."""
    out: Tensor = conv(x.permute(0, 3, 1, 2))
    return out.permute(0, 2, 3, 1)


def pad_to_multiple(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad ``[B, H, W, C]`` on the bottom and right to multiples of `height` and `width`."""
    bottom, right = -x.shape[1] % height, -x.shape[2] % width
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


class ConvPositionalEncoding(nn.Module):
    """Conditional positional encoding (Chu et al. 2021): ``x + DWConv3x3(x)``, zero padding 1, bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        return x + conv_map(self.proj, x)
