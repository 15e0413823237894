"""timm's CrossViT: the class token of one branch looks at the tokens of the other."""

from __future__ import annotations

from timm.models import crossvit

import attnc
from attnc.models.accelerate.swap import replaces
from attnc.models.accelerate.twin import Twin
from attnc.models.blocks.tokens import cross_operator
from attnc.models.crossvit import CrossAttention


@replaces(crossvit.CrossAttention)
class AcceleratedCrossAttention(Twin, crossvit.CrossAttention):
    """softmax(q k^T / sqrt(d)) v of the first token."""

    twin = CrossAttention

    def operator(self) -> attnc.Operator:
        return cross_operator(self.attnc_backend)
