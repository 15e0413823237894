"""Squeeze and excite (Hu et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Channels scaled by sigmoid(fc2(act(fc1(mean over the map)))).

    Args:
        dim, squeezed: channels, and those between ``fc1`` and ``fc2``, which are 1x1 convolutions.
        act: between the two.
    """

    def __init__(self, dim: int, squeezed: int, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, dim, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        out: Tensor = x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        return out
