"""Rotary positions (Su et al. 2021): pairs of neighbouring channels turn by angles that grow with a token's place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channels 2 t, 2 t + 1 of x ``[..., d]`` by angles whose cosine and sine ``[..., d / 2]`` are given."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def grid_angles(sizes: Sequence[int], channels: Sequence[int], theta: float, device: torch.device) -> Tensor:
    """Angles ``[*sizes, sum(channels) / 2]`` in float64: of an axis's c channels, pair i turns by place * theta^(-2 i / c)."""
    parts = []
    for axis, (n, c) in enumerate(zip(sizes, channels, strict=True)):
        rate = theta ** (-torch.arange(0, c, 2, dtype=torch.float64, device=device) / max(c, 1))
        angle = torch.arange(n, dtype=torch.float64, device=device)[:, None] * rate
        place = [1] * len(sizes)
        place[axis] = n
        parts.append(angle.view(*place, -1).expand(*sizes, -1))
    return torch.cat(parts, -1)
