"""Patch merging between the stages of Swin-like models (Liu et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnc.models.blocks.conv import pad_to_multiple


class PatchMerging(nn.Module):
    """2x2 tokens become one: their 4C channels, LayerNorm, Linear 4C -> 2C without a bias. Odd sides get a row of zeros.

    The four tokens are joined in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C]``."""
        x = pad_to_multiple(x, 2, 2)
        four = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        out: Tensor = self.reduction(self.norm(four))
        return out
