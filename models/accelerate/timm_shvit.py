"""timm's SHViT: one head attends on a part of the channels."""

from __future__ import annotations

import torch
from timm.models import shvit
from torch import Tensor

import attnc
from attnc.models.accelerate.swap import Accelerated, replaces
from attnc.models.blocks.tokens import map_operator


@replaces(shvit.SHSA)
class AcceleratedSHSA(Accelerated, shvit.SHSA):
    """softmax(q k^T / sqrt(d)) v on the first channels; the others pass by."""

    attend: attnc.Operator

    def build(self) -> tuple[attnc.Operator, ...]:
        self.attend = map_operator(self.attnc_backend)
        return (self.attend,)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        # as `AcceleratedSHViT` has it, where this module is called by itself or by `forward_intermediates`
        x = x.contiguous(memory_format=torch.channels_last)
        first, rest = torch.split(x, [self.pdim, self.dim - self.pdim], 1)
        rows = self.qkv(self.pre_norm(first)).permute(0, 2, 3, 1)
        q, k, v = rows.unsqueeze(3).split([self.qk_dim, self.qk_dim, self.pdim], 4)
        mixed = self.attend(q, k, v, scale=self.scale).squeeze(3).permute(0, 3, 1, 2)
        out: Tensor = self.proj(torch.cat([mixed, rest], 1))
        return out


@replaces(shvit.SHViT)
class AcceleratedSHViT(Accelerated, shvit.SHViT):
    """The network, its maps in memory as convolutions like them."""

    counted = "stems"

    def build(self) -> tuple[()]:
        return ()

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W] -> [B, C, H', W']``."""
        out: Tensor = super().forward_features(x.contiguous(memory_format=torch.channels_last))
        return out
