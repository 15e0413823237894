"""What attentions with one projection for q, k and v have in common."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from attnc.errors import DeclarationError
from attnc.models.blocks.linear import Linear


class QkvAttention(nn.Module):
    """``qkv`` (C -> [q | k | v], each in heads of C / h channels) and ``proj`` (C -> C); subclasses mix the tokens.

    Args:
        dim: channels C.
        num_heads: heads h.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor of q . k, (C / h)^-1/2 where it is None.
        proj_drop: dropout after ``proj``.
        rows: what ``qkv`` makes of a token, 3 for q, k and v, 2 where queries come from elsewhere.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        *,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        rows: int = 3,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise DeclarationError(f"num_heads is {num_heads}, which does not divide dim = {dim}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = Linear(dim, rows * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def project(self, x: Tensor) -> Tensor:
        """``proj`` and its dropout, ``[..., C] -> [..., C]``."""
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    def padded_rows(self, qkv: Tensor) -> dict[str, Any]:
        """k and v of a token that is zero before ``qkv``, as the operator's `pad_k` and `pad_v` ``[heads, d]``: the biases."""
        bias = cast("Tensor | None", self.qkv.bias)
        if bias is None:
            return {}
        # under autocast the bias is float32 and qkv is not
        *_, k, v = bias.to(qkv.dtype).view(-1, self.num_heads, self.proj.in_features // self.num_heads).unbind(0)
        return {"pad_k": k, "pad_v": v}
