"""Style modulation of token maps, and the mapping network before it (Karras et al. 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attnc.models.blocks.equalized import EqualLinear


class PixelNorm(nn.Module):
    """z / sqrt(mean(z^2) + 1e-8) over the last axis."""

    def forward(self, z: Tensor) -> Tensor:
        """``[B, S] -> [B, S]``."""
        return z * (z.square().mean(-1, keepdim=True) + 1e-8).rsqrt()


def mapping_network(dim: int, layers: int, lr_mul: float) -> nn.Sequential:
    """From noise to style, ``[B, S] -> [B, S]``."""
    return nn.Sequential(PixelNorm(), *(EqualLinear(dim, dim, lr_mul=lr_mul, activate=True) for _ in range(layers)))


class AdaptiveInstanceNorm(nn.Module):
    """Each channel of each sample normalised over its tokens, times gamma, plus beta, both linear in a style vector."""

    def __init__(self, in_channel: int, style_dim: int) -> None:
        super().__init__()
        self.style = EqualLinear(style_dim, 2 * in_channel)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """``[B, H, W, C]`` and ``[B, S]`` to ``[B, H, W, C]``."""
        gamma, beta = self.style(style)[:, None, None].chunk(2, -1)
        normal = F.instance_norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = gamma * normal + beta
        return out
