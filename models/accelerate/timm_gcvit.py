"""timm's GCViT: windows as index arithmetic; global queries are a view that all windows share."""

from __future__ import annotations

import torch
from timm.models import gcvit
from torch import Tensor

import attnc
from attnc.models.accelerate.operators import divides, partition, project
from attnc.models.accelerate.swap import Accelerated, dropout_remark, drops, replaces
from attnc.models.blocks.relative_window import relative_table
from attnc.models.gcvit import global_operator


@replaces(gcvit.GlobalContextVitBlock)
class AcceleratedGlobalContextVitBlock(Accelerated, gcvit.GlobalContextVitBlock):
    """softmax(q k^T / sqrt(d) + bias) v in windows, where q belongs to the window or to the whole map."""

    covers = ("attn",)
    attend: attnc.Operator

    def refuse(self) -> str:
        if type(self.attn) is not gcvit.WindowAttentionGlobal:
            return f"its attention is a {type(self.attn).__name__}"
        if self.attn.use_global and len(set(self.window_size)) > 1:
            return f"its global queries belong to windows of {self.window_size}, and only square ones are known"
        return ""

    def build(self) -> tuple[attnc.Operator, ...]:
        heads, backend = self.attn.num_heads, self.attnc_backend
        if self.attn.use_global:
            self.attend = global_operator(self.window_size[0], backend)
        else:
            self.attend = partition("block", tuple(self.window_size), "relative", False, heads, backend)
        return (self.attend,)

    def remark(self) -> str:
        return dropout_remark(self.attn.attn_drop.p)

    def _window_attn(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        attn, (rows, columns) = self.attn, self.window_size
        fits = divides(self.window_size, x) and not drops(attn.attn_drop)
        if attn.use_global:
            fits = fits and q_global is not None and q_global.shape == (x.shape[0], rows, columns, x.shape[3])
        if not fits:
            out: Tensor = super()._window_attn(x, q_global)
            return out
        qkv = attn.qkv(x)
        table = relative_table(attn.rel_pos.relative_position_bias_table, 2 * rows - 1, 2 * columns - 1)
        if attn.use_global and q_global is not None:
            k, v = qkv.unflatten(3, (2, attn.num_heads, -1)).unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).unbind(5)
            q = torch.unflatten(q_global, 3, (attn.num_heads, -1))[:, None, :, None].expand(k.shape)
            mixed = self.attend(q, k, v, scale=attn.scale, bias=table).reshape(x.shape)
        else:
            mixed = self.attend(qkv, scale=attn.scale, bias=table)
        return project(attn, mixed)
