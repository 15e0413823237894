"""timm's TNT: attention among the pixels of a patch, and among patches."""

from __future__ import annotations

from timm.models import tnt
from torch import Tensor

import attnc
from attnc.models.accelerate.operators import project, tokens
from attnc.models.accelerate.swap import Accelerated, dropout_remark, drops, replaces


@replaces(tnt.Attention)
class AcceleratedAttention(Accelerated, tnt.Attention):
    """softmax(q k^T / sqrt(d)) v among all tokens."""

    attend: attnc.Operator

    def build(self) -> tuple[attnc.Operator, ...]:
        self.attend = tokens(self.attnc_backend)
        return (self.attend,)

    def remark(self) -> str:
        return dropout_remark(self.attn_drop.p)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        if drops(self.attn_drop):
            out: Tensor = super().forward(x)
            return out
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        v = self.v(x).unflatten(-1, (self.num_heads, -1))
        return project(self, self.attend(q, k, v, scale=self.scale).flatten(2))
