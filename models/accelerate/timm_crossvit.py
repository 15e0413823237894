"""timm's CrossViT: the class token of one branch looks at the tokens of the other."""

from __future__ import annotations

from timm.models import crossvit
from torch import Tensor

import attnc
from attnc.models.accelerate.operators import project
from attnc.models.accelerate.swap import Accelerated, dropout_remark, drops, replaces
from attnc.models.blocks.tokens import cross_operator


@replaces(crossvit.CrossAttention)
class AcceleratedCrossAttention(Accelerated, crossvit.CrossAttention):
    """softmax(q k^T / sqrt(d)) v of the first token."""

    attend: attnc.Operator

    def build(self) -> tuple[attnc.Operator, ...]:
        self.attend = cross_operator(self.attnc_backend)
        return (self.attend,)

    def remark(self) -> str:
        return dropout_remark(self.attn_drop.p)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, 1, C]``."""
        if drops(self.attn_drop):
            out: Tensor = super().forward(x)
            return out
        q, k, v = (rows.unflatten(-1, (self.num_heads, -1)) for rows in (self.wq(x[:, :1]), self.wk(x), self.wv(x)))
        return project(self, self.attend(q, k, v, scale=self.scale).flatten(2))
