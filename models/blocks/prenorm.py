"""The pre-norm transformer block around any attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnc.models.blocks.drop import DropPath
from attnc.models.blocks.mlp import Mlp


class PreNormBlock(nn.Module):
    """x += gamma1 * attn(LN(x)), then x += gamma2 * mlp(LN(x)), either branch with stochastic depth.

    Args:
        dim: channels C.
        attn: the attention, ``[..., C] -> [..., C]``.
        mlp_ratio: hidden width of the MLP over C.
        drop: dropout in the MLP.
        drop_path: probability of dropping a branch, see `DropPath`.
        layer_scale: initial value of gamma1 and gamma2 ``[C]``; there are none where it is None.
        eps: of the norms.
        gelu: of the MLP, "none" or "tanh".
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        eps: float = 1e-5,
        gelu: str = "none",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), gelu=gelu, drop=drop)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        """``[B, ..., C] -> [B, ..., C]``; `more` goes to the attention."""
        x = x + self.drop_path(_scaled(self.attn(self.norm1(x), **more), self.gamma1))
        out: Tensor = x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma2))
        return out


def _scaled(x: Tensor, gamma: nn.Parameter | None) -> Tensor:
    return x if gamma is None else gamma * x
