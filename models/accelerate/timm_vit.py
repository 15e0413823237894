"""timm's plain attention, of ViT, DeiT, CrossViT and many more."""

from __future__ import annotations

from timm.models import vision_transformer
from torch import Tensor, nn

import attnc
from attnc.models.accelerate.operators import packed_tokens, project, tokens
from attnc.models.accelerate.swap import Accelerated, dropout_remark, drops, replaces


@replaces(vision_transformer.Attention)
class AcceleratedAttention(Accelerated, vision_transformer.Attention):
    """softmax(q k^T / sqrt(d)) v among all tokens, with the norms and the gate that some models have around it."""

    attend: attnc.Operator
    split: bool

    def build(self) -> tuple[attnc.Operator, ...]:
        self.split = not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity))
        self.attend = tokens(self.attnc_backend) if self.split else packed_tokens(self.num_heads, self.attnc_backend)
        return (self.attend,)

    def remark(self) -> str:
        return "; ".join(filter(None, ["the original where a call masks tokens", dropout_remark(self.attn_drop.p)]))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``[B, N, C] -> [B, N, C']``."""
        if attn_mask is not None or is_causal or drops(self.attn_drop):
            given = {"attn_mask": attn_mask} if attn_mask is not None else {}
            out: Tensor = super().forward(x, **given, **({"is_causal": True} if is_causal else {}))
            return out
        qkv = self.qkv(x)
        if self.split:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
            mixed = self.attend(self.q_norm(q), self.k_norm(k), v, scale=self.scale).flatten(2)
        else:
            mixed = self.attend(qkv, scale=self.scale)
        mixed = self.norm(mixed) if hasattr(self, "norm") else mixed
        gate = getattr(self, "gate", None)
        return project(self, mixed if gate is None else mixed * gate(x).sigmoid())
