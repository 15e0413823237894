"""timm's TNT: attention among the pixels of a patch, and among patches."""

from __future__ import annotations

from timm.models import tnt

import attnc
from attnc.models.accelerate.swap import replaces
from attnc.models.accelerate.twin import Twin
from attnc.models.blocks.tokens import token_operator
from attnc.models.tnt import Attention


@replaces(tnt.Attention)
class AcceleratedAttention(Twin, tnt.Attention):
    """softmax(q k^T / sqrt(d)) v among all tokens."""

    twin = Attention

    def operator(self) -> attnc.Operator:
        return token_operator(self.attnc_backend)
