"""timm's VOLO: outlook attention on the fine map, attention among all tokens of the coarse one, and of the class token."""

from __future__ import annotations

from timm.models import volo

import attnc
from attnc.models import volo as ours
from attnc.models.accelerate.swap import replaces
from attnc.models.accelerate.twin import Twin
from attnc.models.blocks.tokens import cross_operator


@replaces(volo.OutlookAttention)
class AcceleratedOutlookAttention(Twin, volo.OutlookAttention):
    """Weights that the mean of some tokens generates for a window, mixed and added up."""

    twin, attribute = ours.OutlookAttention, "mix"

    def operator(self) -> attnc.Operator:
        return ours.outlook_operator(self.kernel_size, self.stride, self.padding, self.attnc_backend)


@replaces(volo.Attention)
class AcceleratedAttention(Twin, volo.Attention):
    """softmax(q k^T / sqrt(d)) v among all tokens of a map."""

    twin = ours.Attention

    def operator(self) -> attnc.Operator:
        return ours.full_operator(self.num_heads, self.attnc_backend)


@replaces(volo.ClassAttention)
class AcceleratedClassAttention(Twin, volo.ClassAttention):
    """softmax(q k^T / sqrt(d)) v of the first token."""

    twin = ours.ClassAttention

    def operator(self) -> attnc.Operator:
        return cross_operator(self.attnc_backend)
