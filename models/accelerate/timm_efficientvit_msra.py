"""timm's EfficientViT of MSRA: each head of a cascade attends with a bias of its own.

Windows are still cut out by the block: the convolution on a head's queries ends at their borders.
"""

from __future__ import annotations

import torch
from timm.models import efficientvit_msra
from torch import Tensor

import attnc
from attnc.models.accelerate.operators import biased_tokens
from attnc.models.accelerate.swap import Accelerated, replaces


@replaces(efficientvit_msra.CascadedGroupAttention)
class AcceleratedCascadedGroupAttention(Accelerated, efficientvit_msra.CascadedGroupAttention):
    """Head after head: softmax(conv(q) k^T / sqrt(d) + bias) v of its own channels plus the head before it."""

    attend: attnc.Operator

    def build(self) -> tuple[attnc.Operator, ...]:
        self.attend = biased_tokens(self.attnc_backend)
        return (self.attend,)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        # as the stem has it, where this module is called by itself
        x = x.contiguous(memory_format=torch.channels_last)
        biases = self.attention_biases[:, self.attention_bias_idxs]
        heads: list[Tensor] = []
        for i, (part, qkv, conv) in enumerate(zip(x.chunk(self.num_heads, 1), self.qkvs, self.dws, strict=True)):
            rows = qkv(part + heads[-1] if heads else part)
            q, k, v = rows.split([self.key_dim, self.key_dim, self.val_dim], 1)
            q, k, v = (t.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(2) for t in (conv(q), k, v))
            mixed = self.attend(q, k, v, scale=self.scale, bias=biases[i : i + 1])
            heads.append(torch.unflatten(mixed.squeeze(2), 1, x.shape[2:]).permute(0, 3, 1, 2))
        out: Tensor = self.proj(torch.cat(heads, 1))
        return out


@replaces(efficientvit_msra.PatchEmbedding)
class AcceleratedPatchEmbedding(Accelerated, efficientvit_msra.PatchEmbedding):
    """The stem, its maps and all that follow in memory as convolutions like them."""

    counted = "stems"

    def build(self) -> tuple[()]:
        return ()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W] -> [B, C, H / 16, W / 16]``."""
        out: Tensor = super().forward(x.contiguous(memory_format=torch.channels_last))
        return out
