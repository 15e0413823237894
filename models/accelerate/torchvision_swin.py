"""torchvision's Swin and Swin v2, which pad the map before they roll it: the paper's function on maps of any size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import swin_transformer

import attnc
from attnc.models.accelerate.operators import divides, padded_rows, padded_window
from attnc.models.accelerate.swap import Accelerated, dropout_remark, replaces
from attnc.models.blocks.linear import linear
from attnc.models.blocks.relative_window import relative_table


class Windows(Accelerated):
    """What both versions share."""

    cosine = False
    attend: attnc.Operator
    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    attention_dropout: float
    dropout: float
    training: bool
    qkv: Any
    proj: Any

    def build(self) -> tuple[attnc.Operator, ...]:
        (rows, columns), (down, right) = self.window_size, self.shift_size
        self.attend = padded_window((rows, columns), (down, right), self.cosine, self.num_heads, self.attnc_backend)
        return (self.attend,)

    def remark(self) -> str:
        return dropout_remark(self.attention_dropout)

    def mix(self, qkv: Tensor, row: Tensor | None, scale: float | None, **tables: Any) -> Tensor:
        """From ``qkv`` to the output; row: what ``qkv`` is for a token of zeros."""
        rows, columns = self.window_size
        padding: dict[str, Any] = {} if divides((rows, columns), qkv) else padded_rows(row, qkv, self.num_heads)
        out: Tensor = self.proj(self.attend(qkv, scale=scale, **tables, **padding))
        return F.dropout(out, self.dropout, self.training)

    def drops(self) -> bool:
        """Whether attention weights are dropped now."""
        return self.training and self.attention_dropout > 0


@replaces(swin_transformer.ShiftedWindowAttention)
class AcceleratedShiftedWindowAttention(Windows, swin_transformer.ShiftedWindowAttention):
    """softmax(q k^T / sqrt(d) + table[query - key]) v in windows."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        if self.drops():
            out: Tensor = super().forward(x)
            return out
        rows, columns = (2 * n - 1 for n in self.window_size)
        table = relative_table(self.relative_position_bias_table, rows, columns)
        return self.mix(self.qkv(x), self.qkv.bias, None, bias=table)


@replaces(swin_transformer.ShiftedWindowAttentionV2)
class AcceleratedShiftedWindowAttentionV2(Windows, swin_transformer.ShiftedWindowAttentionV2):
    """softmax(cos(q, k) exp(logit_scale) + 16 sigmoid(network(query - key))) v in windows; keys have no bias."""

    cosine = True

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        if self.drops():
            out: Tensor = super().forward(x)
            return out
        bias = self.qkv.bias
        if bias is not None:
            q, k, v = bias.chunk(3)
            bias = torch.cat((q, torch.zeros_like(k), v))
        table = 16 * self.cpb_mlp(self.relative_coords_table)[0].sigmoid().permute(2, 0, 1)
        qkv = linear(x, self.qkv.weight, bias)
        return self.mix(qkv, bias, 1.0, bias=table, logit_scale=self.logit_scale.flatten())
