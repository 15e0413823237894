"""timm's SHViT: one head attends on a part of the channels."""

from __future__ import annotations

import torch
from timm.models import shvit
from torch import Tensor

import attnc
from attnc.models.accelerate.operators import channels_first
from attnc.models.accelerate.swap import Accelerated, replaces


@replaces(shvit.SHSA)
class AcceleratedSHSA(Accelerated, shvit.SHSA):
    """softmax(q k^T / sqrt(d)) v on the first channels; the others pass by."""

    attend: attnc.Operator

    def build(self) -> tuple[attnc.Operator, ...]:
        self.attend = channels_first(None, self.attnc_backend)
        return (self.attend,)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        first, rest = torch.split(x, [self.pdim, self.dim - self.pdim], 1)
        rows = self.qkv(self.pre_norm(first))
        q, k, v = (t.flatten(2)[:, None] for t in rows.split([self.qk_dim, self.qk_dim, self.pdim], 1))
        mixed = self.attend(q, k, v, scale=self.scale)
        out: Tensor = self.proj(torch.cat([mixed.view(first.shape), rest], 1))
        return out
