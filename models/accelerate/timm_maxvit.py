"""timm's MaxViT and its many relatives: attention in windows and among spread tokens as index arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RelPosBias, RelPosBiasTf
from timm.models import maxxvit
from torch import Tensor

import attnc
from attnc.models.accelerate.operators import divides, partition, project
from attnc.models.accelerate.swap import Accelerated, dropout_remark, drops, replaces
from attnc.models.blocks.relative_window import relative_table
from attnc.patterns.relation import Bias


def bias_kind(positions: Any) -> Bias:
    """How the operator reads these relative positions."""
    if positions is None:
        return None
    return "relative" if type(positions) in (RelPosBias, RelPosBiasTf) else "absolute"


def bias_table(positions: Any) -> dict[str, Any]:
    """The operator's table, by query minus key, or by query and key where a network makes it."""
    if positions is None:
        return {}
    table = positions.relative_position_bias_table if bias_kind(positions) == "relative" else positions.get_bias()[0]
    if isinstance(positions, RelPosBiasTf):  # [heads, ...] by key minus query
        table = table.flip(1, 2)
    elif isinstance(positions, RelPosBias):
        rows, columns = (2 * n - 1 for n in positions.window_size)
        table = relative_table(table, rows, columns)
    return {"bias": table}


class Partition(Accelerated):
    """What the blocks share; `kinds` names each attention with its partition."""

    operators: dict[str, attnc.Operator]
    partition_size: tuple[int, int]

    def kinds(self) -> dict[str, str]:
        """The attentions, by name, and whether they look into windows ("block") or are spread ("grid")."""
        return {"attn": "block" if self.partition_block else "grid"}  # type: ignore[attr-defined]

    def build(self) -> tuple[attnc.Operator, ...]:
        self.operators = {}
        for name, kind in self.kinds().items():
            a: Any = getattr(self, name)
            made = partition(kind, tuple(self.partition_size), bias_kind(a.rel_pos), a.head_first, a.num_heads, self.attnc_backend)
            self.operators[name] = made
        return tuple(self.operators.values())

    def remark(self) -> str:
        return dropout_remark(max(getattr(self, name).attn_drop.p for name in self.kinds()))

    def set_partition_size(self, partition_size: tuple[int, int]) -> None:
        """As the original's; partitions change, and so do the operators."""
        super().set_partition_size(partition_size)  # type: ignore[misc]
        self.build()

    def takes(self, x: Tensor) -> bool:
        """Whether attnc computes this call, on ``[B, H, W, C]``; the original refuses maps that partitions do not divide."""
        return divides(self.partition_size, x) and not any(drops(getattr(self, name).attn_drop) for name in self.kinds())

    def mix(self, name: str, qkv: Tensor) -> Tensor:
        """The attention `name`, from ``[B, H, W, 3C]`` to ``[B, H, W, C]``."""
        a: Any = getattr(self, name)
        out: Tensor = self.operators[name](qkv, scale=a.scale, **bias_table(a.rel_pos))
        return out


@replaces(maxxvit.PartitionAttentionCl)
class AcceleratedPartitionAttentionCl(Partition, maxxvit.PartitionAttentionCl):
    """softmax(q k^T / sqrt(d) + bias) v among the tokens of a partition, on ``[B, H, W, C]``."""

    covers = ("attn",)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``; timm hands over a view of ``[B, C, H, W]``, which every layer would copy."""
        out: Tensor = super().forward(x.contiguous() if self.takes(x) else x)
        return out

    def _partition_attn(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            out: Tensor = super()._partition_attn(x)
            return out
        return project(self.attn, self.mix("attn", self.attn.qkv(x)))


@replaces(maxxvit.PartitionAttention2d)
class AcceleratedPartitionAttention2d(Partition, maxxvit.PartitionAttention2d):
    """softmax(q k^T / sqrt(d) + bias) v among the tokens of a partition, on ``[B, C, H, W]``."""

    covers = ("attn",)

    def _partition_attn(self, x: Tensor) -> Tensor:
        if not self.takes(x.permute(0, 2, 3, 1)):
            out: Tensor = super()._partition_attn(x)
            return out
        mixed = self.mix("attn", self.attn.qkv(x).permute(0, 2, 3, 1))
        return project(self.attn, mixed.permute(0, 3, 1, 2))


@replaces(maxxvit.ParallelPartitionAttention)
class AcceleratedParallelPartitionAttention(Partition, maxxvit.ParallelPartitionAttention):
    """Both partitions of one map, beside each other in the channels."""

    covers = ("attn_block", "attn_grid")

    def kinds(self) -> dict[str, str]:
        return {"attn_block": "block", "attn_grid": "grid"}

    def _partition_attn(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            out: Tensor = super()._partition_attn(x)
            return out
        both = ((name, getattr(self, name)) for name in self.kinds())
        return torch.cat([project(a, self.mix(name, a.qkv(x))) for name, a in both], -1)
