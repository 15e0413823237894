"""timm's DaViT: windows of a block as index arithmetic, and channel attention."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import davit
from torch import Tensor

import attnc
from attnc.models.accelerate.operators import divides, padded_rows
from attnc.models.accelerate.swap import Accelerated, replaces
from attnc.models.davit import channel_operator, window_operator


@replaces(davit.SpatialBlock)
class AcceleratedSpatialBlock(Accelerated, davit.SpatialBlock):
    """softmax(q k^T / sqrt(d)) v in windows, whose last ones reach over the map's border."""

    covers = ("attn",)
    attend: attnc.Operator

    def build(self) -> tuple[attnc.Operator, ...]:
        self.attend = window_operator(tuple(self.window_size), self.num_heads, self.attnc_backend)
        return (self.attend,)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``, in channels-last memory."""
        # from the first block on, maps lie in memory as the norms, the linear layers and the convolutions like them
        x = self.cpe1(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        qkv = self.attn.qkv(self.norm1(x))
        padding: dict[str, Any] = {} if divides(self.window_size, qkv) else padded_rows(self.attn.qkv.bias, qkv, self.num_heads)
        x = x + self.drop_path1(self.attn.proj(self.attend(qkv, **padding)))
        x = self.cpe2(x.permute(0, 3, 1, 2))
        if self.mlp is not None:
            x = x.permute(0, 2, 3, 1)
            x = (x + self.drop_path2(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)
        return x


class Channels(Accelerated):
    """What both versions share."""

    attend: attnc.Operator
    qkv: Any
    proj: Any

    def build(self) -> tuple[attnc.Operator, ...]:
        self.attend = channel_operator(self.attnc_backend)
        return (self.attend,)

    def split(self, x: Tensor, groups: int) -> tuple[Tensor, ...]:
        """q, k and v ``[B, N, groups, d]``."""
        return torch.unflatten(self.qkv(x), -1, (3, groups, -1)).unbind(2)


@replaces(davit.ChannelAttention)
class AcceleratedChannelAttention(Channels, davit.ChannelAttention):
    """(softmax(k^T v / sqrt(d)) q^T)^T in each group of d channels."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        q, k, v = self.split(x, self.num_heads)
        out: Tensor = self.proj(self.attend(k, v, q, scale=self.scale).flatten(2))
        return out


@replaces(davit.ChannelAttentionV2)
class AcceleratedChannelAttentionV2(Channels, davit.ChannelAttentionV2):
    """(softmax(q^T k / sqrt(N)) v^T)^T in each group of d channels; d in the place of N without `dynamic_scale`."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        q, k, v = self.split(x, self.groups)
        scale = (x.shape[1] if self.dynamic_scale else self.head_dim) ** -0.5
        out: Tensor = self.proj(self.attend(q, k, v, scale=scale).flatten(2))
        return out
