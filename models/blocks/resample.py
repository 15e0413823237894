"""Filtering at another rate with a separable blur (StyleGAN2: Karras et al. 2020), and the Haar transform made of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLUR = (1.0, 3.0, 3.0, 1.0)


def upfirdn2d(x: Tensor, kernel: Tensor, *, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Insert ``up - 1`` zeros after every sample, pad, convolve each channel with `kernel`, keep every `down`-th sample.

    Args:
        x: ``[B, C, H, W]``.
        kernel: ``[k, k]``; it is turned around, as convolution means.
        up, down: factors.
        pad: zeros before and after, on both axes; negative ones cut.
    """
    b, c, h, w = x.shape
    if up > 1:
        x = F.pad(x.reshape(b * c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(b, c, h * up, w * up)
    x = F.pad(x, (pad[0], pad[1], pad[0], pad[1]))
    weight = kernel.flip((0, 1)).to(x.dtype).expand(c, 1, -1, -1)
    return F.conv2d(x, weight, stride=down, groups=c)


class Resample(nn.Module):
    """A blur by the outer product of [1, 3, 3, 1], of mean `gain`, at another rate; see `upfirdn2d`."""

    def __init__(self, pad: tuple[int, int], *, up: int = 1, down: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        line = torch.tensor(BLUR)
        plane = torch.outer(line, line)
        self.register_buffer("kernel", plane * (gain / plane.sum()))
        self.up, self.down, self.pad = up, down, pad

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H', W']``."""
        return upfirdn2d(x, self.get_buffer("kernel"), up=self.up, down=self.down, pad=self.pad)


def upsample_twice() -> Resample:
    """To twice the height and width."""
    return Resample((2, 1), up=2, gain=4.0)


def downsample_twice() -> Resample:
    """To half the height and width."""
    return Resample((1, 1), down=2)


class Haar(nn.Module):
    """The Haar wavelets of a map: low and high along columns, of low and high along rows, each at half the size.

    `inverse` instead puts them together again.
    """

    def __init__(self, inverse: bool = False) -> None:
        super().__init__()
        low, high = torch.tensor([1.0, 1.0]) / 2**0.5, torch.tensor([-1.0, 1.0]) / 2**0.5
        sign = -1.0 if inverse else 1.0
        self.inverse = inverse
        self.register_buffer("ll", torch.outer(low, low))
        self.register_buffer("lh", torch.outer(high, low) * sign)
        self.register_buffer("hl", torch.outer(low, high) * sign)
        self.register_buffer("hh", torch.outer(high, high))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, 4C, H / 2, W / 2]``, and back by the inverse."""
        kernels = [self.get_buffer(name) for name in ("ll", "lh", "hl", "hh")]
        if not self.inverse:
            return torch.cat([upfirdn2d(x, k, down=2) for k in kernels], 1)
        parts = [upfirdn2d(t, k, up=2, pad=(1, 0)) for t, k in zip(x.chunk(4, 1), kernels, strict=True)]
        return torch.stack(parts).sum(0)
