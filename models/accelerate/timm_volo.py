"""timm's VOLO: the blocks of `attnc.models.volo` read its modules, whose names are the official ones."""

from __future__ import annotations

from timm.models import volo
from torch import Tensor

import attnc
from attnc.models import volo as ours
from attnc.models.accelerate.operators import project
from attnc.models.accelerate.swap import Accelerated, dropout_remark, drops, replaces
from attnc.models.blocks.tokens import cross_operator


@replaces(volo.OutlookAttention)
class AcceleratedOutlookAttention(Accelerated, volo.OutlookAttention):
    """Weights that the mean of some tokens generates for a window, mixed and added up."""

    mix: attnc.Operator

    def build(self) -> tuple[attnc.Operator, ...]:
        self.mix = ours.outlook_operator(self.kernel_size, self.stride, self.padding, self.attnc_backend)
        return (self.mix,)

    def remark(self) -> str:
        return dropout_remark(self.attn_drop.p)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        if drops(self.attn_drop):
            out: Tensor = super().forward(x)
            return out
        return ours.OutlookAttention.forward(self, x)


@replaces(volo.Attention)
class AcceleratedAttention(Accelerated, volo.Attention):
    """softmax(q k^T / sqrt(d)) v among all tokens of a map."""

    attend: attnc.Operator

    def build(self) -> tuple[attnc.Operator, ...]:
        self.attend = ours.full_operator(self.num_heads, self.attnc_backend)
        return (self.attend,)

    def remark(self) -> str:
        return dropout_remark(self.attn_drop.p)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        if drops(self.attn_drop):
            out: Tensor = super().forward(x)
            return out
        return project(self, self.attend(self.qkv(x), scale=self.scale))


@replaces(volo.ClassAttention)
class AcceleratedClassAttention(Accelerated, volo.ClassAttention):
    """softmax(q k^T / sqrt(d)) v of the first token."""

    attend: attnc.Operator

    def build(self) -> tuple[attnc.Operator, ...]:
        self.attend = cross_operator(self.attnc_backend)
        return (self.attend,)

    def remark(self) -> str:
        return dropout_remark(self.attn_drop.p)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 1 + N, C] -> [B, 1, C]``."""
        if drops(self.attn_drop):
            out: Tensor = super().forward(x)
            return out
        return ours.ClassAttention.forward(self, x)
