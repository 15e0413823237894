"""Attention among all tokens: the operators that several papers share, and the usual layer around one of them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import attnc
from attnc.models.blocks.attention import QkvAttention


def with_class_token(token: Tensor, x: Tensor) -> Tensor:
    """A learned token ``[1, 1, C]`` before those of each image: ``[B, N, C] -> [B, 1 + N, C]``."""
    return torch.cat([token.expand(len(x), -1, -1), x], 1)


@cache  # layers share operators
def packed_operator(heads: int, backend: str) -> attnc.Operator:
    """Attention among all tokens, on packed ``[B, N, 3C]``."""
    return attnc.compile(attnc.patterns.full(), layout="b x (three h d)", heads=heads, backend=backend)


@cache
def token_operator(backend: str) -> attnc.Operator:
    """Attention among all tokens, on q, k and v ``[B, N, heads, d]``."""
    return attnc.compile(attnc.patterns.full(), layout="b x h d", backend=backend)


@cache
def map_operator(backend: str) -> attnc.Operator:
    """Attention among all tokens of a map, on q, k and v ``[B, H, W, heads, d]``."""
    return attnc.compile(attnc.patterns.full(), layout="b y x h d", backend=backend)


@cache
def cross_operator(backend: str) -> attnc.Operator:
    """Attention of some tokens to others, on q ``[B, N, heads, d]`` and k, v ``[B, M, heads, d]``."""
    return attnc.compile(attnc.patterns.full(), grid={"x": None}, kv_grid=(None,), layout="b x h d", backend=backend)


class TokenAttention(QkvAttention):
    """softmax(q k^T / sqrt(d)) v among all tokens.

    Args: see `QkvAttention`; `backend`: of the operator.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale=qk_scale, proj_drop=proj_drop)
        self.attend = packed_operator(num_heads, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        return self.project(self.attend(self.qkv(x), scale=self.scale))
