"""What networks of convolutions with folded norms are made of: LeViT's blocks (Graham et al. 2021), and what follows it.

Each convolution is followed by a BatchNorm, without a bias of its own, and `fuse_norms` makes one convolution of the two for
evaluation. All maps are ``[B, C, H, W]``, in channels-last memory where `stem` begins.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.errors import DeclarationError
from attnc.models.blocks.drop import DropPath
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.squeeze import SqueezeExcite


class ConvNorm(nn.Sequential):
    """A convolution ``c``, padded to keep the size (over the stride, rounded up), and its BatchNorm ``bn``.

    Args:
        before, after: channels in and out.
        kernel, stride, groups: of the convolution; the kernel is odd.
        gain: initial weight of the norm, 0 where it ends a residual branch.
    """

    def __init__(self, before: int, after: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        self.c = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(after)
        nn.init.constant_(self.bn.weight, gain)

    def fuse(self) -> nn.Module:
        """The same map in evaluation mode, as one convolution with a bias."""
        factor, shift = _affine(self.bn)
        conv = self.c
        size, stride = cast("tuple[int, int]", conv.kernel_size), cast("tuple[int, int]", conv.stride)
        fused = nn.Conv2d(conv.in_channels, conv.out_channels, size, stride, size[0] // 2, groups=conv.groups).to(conv.weight)
        fused.weight.copy_(conv.weight * factor.view(-1, 1, 1, 1))
        cast(Tensor, fused.bias).copy_(shift)
        return fused


def depthwise(dim: int, kernel: int = 3, stride: int = 1, *, gain: float = 1.0) -> ConvNorm:
    """A convolution of each channel with its norm."""
    return ConvNorm(dim, dim, kernel, stride, groups=dim, gain=gain)


class NormLinear(nn.Sequential):
    """BatchNorm ``bn`` and a linear layer ``l``, which is an identity for 0 classes: ``[B, C] -> [B, classes]``."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.l = nn.Linear(dim, classes) if classes else nn.Identity()
        self.l.apply(init_vit)

    def fuse(self) -> nn.Module:
        """The same map in evaluation mode, as one linear layer (itself without classes)."""
        if not isinstance(self.l, nn.Linear):
            return self
        factor, shift = _affine(self.bn)
        fused = nn.Linear(self.l.in_features, self.l.out_features).to(self.l.weight)
        fused.weight.copy_(self.l.weight * factor)
        fused.bias.copy_(self.l.bias + self.l.weight @ shift)
        return fused


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What `norm` multiplies channels by and adds to them in evaluation mode."""
    factor = norm.weight / (cast(Tensor, norm.running_var) + norm.eps).sqrt()
    return factor, norm.bias - cast(Tensor, norm.running_mean) * factor


class Residual(nn.Module):
    """x + m(x), with stochastic depth `drop_path`."""

    def __init__(self, m: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.m = m
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        return x + cast(Tensor, self.drop_path(self.m(x)))

    def fuse(self) -> nn.Module:
        """Around a depthwise convolution that convolution, whose middle takes the identity; else itself."""
        if not isinstance(self.m, ConvNorm):
            return self
        fused = cast(nn.Conv2d, self.m.fuse())
        rows, columns = fused.weight.shape[2:]
        fused.weight[:, :, rows // 2, columns // 2] += 1
        return fused


class FeedForward(nn.Module):
    """1x1 convolutions to twice the channels and back, ``pw1`` and ``pw2``, ReLU between them."""

    def __init__(self, dim: int, gain: float = 0.0) -> None:
        super().__init__()
        self.pw1 = ConvNorm(dim, 2 * dim)
        self.pw2 = ConvNorm(2 * dim, dim, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        out: Tensor = self.pw2(F.relu(self.pw1(x), inplace=True))
        return out


class PatchMerging(nn.Module):
    """To half the size: 1x1 to four times the channels, depthwise 3x3 of stride 2, squeeze and excite, 1x1; ReLU between."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        wide = 4 * dim
        self.conv1 = ConvNorm(dim, wide)
        self.conv2 = depthwise(wide, stride=2)
        self.se = SqueezeExcite(wide, max(8, int(wide * 0.25 + 4) // 8 * 8), F.relu)
        self.conv3 = ConvNorm(wide, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', ceil(H / 2), ceil(W / 2)]``."""
        x = F.relu(self.conv2(F.relu(self.conv1(x), inplace=True)), inplace=True)
        out: Tensor = self.conv3(self.se(x))
        return out


def downsampling(dim: int, out_dim: int) -> list[nn.Module]:
    """What leads to the next stage: `PatchMerging` between depthwise convolutions and feed-forward layers."""

    def refine(channels: int) -> nn.Module:
        return nn.Sequential(Residual(depthwise(channels)), Residual(FeedForward(channels)))

    return [refine(dim), PatchMerging(dim, out_dim), refine(out_dim)]


def stem(in_chans: int, dim: int) -> nn.Sequential:
    """Four 3x3 convolutions of stride 2, ReLU between them; the places of the official list."""
    if dim % 8:
        raise DeclarationError(f"the first stage has {dim} channels; the stem begins with an eighth of them")
    widths = (in_chans, dim // 8, dim // 4, dim // 2, dim)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [ConvNorm(before, after, 3, 2), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def fuse_norms(module: nn.Module) -> None:
    """Replace everything below `module` that can `fuse` by what it gives, in place."""
    for name, child in module.named_children():
        if isinstance(child, ConvNorm | NormLinear | Residual):
            fused = child.fuse()
            setattr(module, name, fused)
            child = fused
        fuse_norms(child)
