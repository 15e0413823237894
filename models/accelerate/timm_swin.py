"""timm's Swin and Swin v2: windows, cyclic shift and mask of a block as index arithmetic.

timm rolls the map before it pads it, so on a map that windows do not divide a shifted block is another function than the
paper's: there its own code runs.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor

import attnc
from attnc.models.accelerate.operators import divides, padded_rows, padded_window, project, rolled_window
from attnc.models.accelerate.swap import Accelerated, dropout_remark, drops, replaces
from attnc.models.blocks.linear import linear
from attnc.models.blocks.relative_window import relative_table


class Block(Accelerated):
    """What the blocks of both versions share."""

    covers = ("attn",)
    cosine = False
    attend: attnc.Operator
    attn: Any
    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    input_resolution: tuple[int, int]
    dynamic_mask: bool

    def build(self) -> tuple[attnc.Operator, ...]:
        size, shift = tuple(self.window_size), tuple(self.shift_size)
        made = rolled_window if any(shift) else padded_window
        self.attend = made(size, shift, self.cosine, self.attn.num_heads, self.attnc_backend)
        return (self.attend,)

    def remark(self) -> str:
        found = ["the original where windows do not divide the map, for timm rolls before it pads"] if any(self.shift_size) else []
        return "; ".join([*found, *filter(None, [dropout_remark(self.attn.attn_drop.p)])])

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As the original's; windows may change, and so does the operator."""
        super().set_input_size(*args, **kwargs)  # type: ignore[misc]
        self.build()

    def takes(self, x: Tensor) -> bool:
        """Whether attnc computes this call."""
        if drops(self.attn.attn_drop):
            return False
        if not any(self.shift_size):
            return True
        # a mask that was made beforehand belongs to one size
        masked = self.dynamic_mask or tuple(x.shape[1:3]) == tuple(self.input_resolution)
        return masked and divides(self.window_size, x)

    def padding(self, qkv: Tensor, bias: Tensor | None) -> dict[str, Any]:
        """The virtual keys where windows reach over the border."""
        return {} if divides(self.window_size, qkv) else padded_rows(bias, qkv, self.attn.num_heads)


@replaces(swin_transformer.SwinTransformerBlock)
class AcceleratedSwinBlock(Block, swin_transformer.SwinTransformerBlock):
    """softmax(q k^T / sqrt(d) + table[query - key]) v in windows."""

    def _attn(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            out: Tensor = super()._attn(x)
            return out
        attn = self.attn
        rows, columns = (2 * n - 1 for n in self.window_size)
        table = relative_table(attn.relative_position_bias_table, rows, columns)
        qkv = attn.qkv(x)
        return project(attn, self.attend(qkv, scale=attn.scale, bias=table, **self.padding(qkv, attn.qkv.bias)))


@replaces(swin_transformer_v2.SwinTransformerV2Block)
class AcceleratedSwinV2Block(Block, swin_transformer_v2.SwinTransformerV2Block):
    """softmax(cos(q, k) exp(logit_scale) + 16 sigmoid(network(query - key))) v in windows."""

    cosine = True

    def _attn(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            out: Tensor = super()._attn(x)
            return out
        attn = self.attn
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if bias is not None and not attn.qkv_bias_separate:
            qkv = linear(x, attn.qkv.weight, bias)
        else:
            qkv = attn.qkv(x)
            qkv = qkv if bias is None else qkv + bias
        table = 16 * attn.cpb_mlp(attn.relative_coords_table)[0].sigmoid().permute(2, 0, 1)
        tables = {"bias": table, "logit_scale": attn.logit_scale.flatten(), **self.padding(qkv, bias)}
        return project(attn, self.attend(qkv, scale=1.0, **tables))
