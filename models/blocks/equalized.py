"""Layers with an equalised learning rate (Karras et al. 2018): weights are kept at unit variance and scaled when used."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
GAIN = 2**0.5


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2, times sqrt(2), so that variance is kept."""
    return F.leaky_relu(x, SLOPE) * GAIN


class BiasedLeaky(nn.Module):
    """`leaky` after adding a bias per channel, of ``[B, C, ...]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, ...] -> [B, C, ...]``."""
        return leaky(x + self.bias.view(-1, *(1,) * (x.ndim - 2)))


class EqualLinear(nn.Module):
    """x W^T lr_mul / sqrt(inputs) + b lr_mul, and `leaky` of it if `activate`; W of variance 1 / lr_mul^2 at first."""

    def __init__(self, inputs: int, outputs: int, *, lr_mul: float = 1.0, activate: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.lr_mul = lr_mul
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs] -> [..., outputs]``."""
        scale = self.lr_mul * self.weight.shape[1] ** -0.5
        out = F.linear(x, self.weight * scale, self.bias * self.lr_mul)
        return leaky(out) if self.activate else out


class EqualConv2d(nn.Module):
    """Convolution by W / sqrt(inputs * kernel^2), without a bias; W of unit variance at first."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W] -> [B, outputs, H', W']``."""
        scale = self.weight[0].numel() ** -0.5
        return F.conv2d(x, self.weight * scale, stride=self.stride, padding=self.padding)
