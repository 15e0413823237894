"""timm's ConViT: the blocks of `attnc.models.convit` read its modules, whose names are the official ones."""

from __future__ import annotations

from math import isqrt

import torch
from timm.models import convit
from torch import Tensor

import attnc
from attnc.models.accelerate.operators import packed_tokens, project
from attnc.models.accelerate.swap import Accelerated, dropout_remark, drops, replaces
from attnc.models.blocks.tokens import map_operator
from attnc.models.convit import GPSA, position_operator


@replaces(convit.GPSA)
class AcceleratedGPSA(Accelerated, convit.GPSA):
    """Content and position as two operators over the same values, mixed by each head's gate."""

    content: attnc.Operator
    position: attnc.Operator
    rel_indices: Tensor

    def build(self) -> tuple[attnc.Operator, ...]:
        self.content, self.position = map_operator(self.attnc_backend), position_operator(self.attnc_backend)
        return self.content, self.position

    def remark(self) -> str:
        return dropout_remark(self.attn_drop.p)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``; N is a square."""
        side = isqrt(x.shape[1])
        if side * side != x.shape[1] or drops(self.attn_drop):
            out: Tensor = super().forward(x)
            return out
        return GPSA.forward(self, torch.unflatten(x, 1, (side, side))).flatten(1, 2)

    def get_attention(self, x: Tensor) -> Tensor:
        """The weights themselves, ``[B, heads, N, N]``, for who asks for them."""
        if self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = self.get_rel_indices(x.shape[1])
        out: Tensor = super().get_attention(x)
        return out


@replaces(convit.MHSA)
class AcceleratedMHSA(Accelerated, convit.MHSA):
    """softmax(q k^T / sqrt(d)) v among all tokens."""

    attend: attnc.Operator

    def build(self) -> tuple[attnc.Operator, ...]:
        self.attend = packed_tokens(self.num_heads, self.attnc_backend)
        return (self.attend,)

    def remark(self) -> str:
        return dropout_remark(self.attn_drop.p)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        if drops(self.attn_drop):
            out: Tensor = super().forward(x)
            return out
        return project(self, self.attend(self.qkv(x), scale=self.scale))
