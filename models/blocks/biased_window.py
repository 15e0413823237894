"""Window attention with Swin's table of relative positions (Liu et al. 2021), for windows of any two sides."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import attnc
from attnc.errors import ShapeError
from attnc.models.blocks.attention import QkvAttention


@cache  # layers share operators
def window_operator(size: tuple[int, int], shift: int, heads: int, backend: str) -> attnc.Operator:
    """Attention inside windows whose borders lie at `shift` modulo their sides, on packed ``[B, H, W, 3C]``."""
    pattern = attnc.patterns.window(size, shift, bias="relative")
    return attnc.compile(pattern, layout="b y x (three h d)", heads=heads, backend=backend)


class BiasedWindows(QkvAttention):
    """What such attentions have: ``relative_position_bias_table [(2 w_y - 1) (2 w_x - 1), h]`` by query minus key.

    Args:
        dim, num_heads, qkv_bias, qk_scale, proj_drop, rows: see `QkvAttention`.
        window: rows and columns of a window; they divide the map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int],
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rows: int = 3,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale=qk_scale, proj_drop=proj_drop, rows=rows)
        self.window = window
        table = torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def bias(self) -> Tensor:
        """The table as the operator's, a view ``[heads, 2 w_y - 1, 2 w_x - 1]``."""
        return self.relative_position_bias_table.view(2 * self.window[0] - 1, 2 * self.window[1] - 1, -1).permute(2, 0, 1)

    def check(self, x: Tensor) -> None:
        """ShapeError unless windows divide the map ``[B, H, W, C]``."""
        rows, columns = self.window
        if x.shape[1] % rows or x.shape[2] % columns:
            raise ShapeError(
                f"a map of {x.shape[1]}x{x.shape[2]} has no whole windows of {rows}x{columns}: choose an image size whose maps "
                "they divide, or another window size"
            )


class BiasedWindowAttention(BiasedWindows):
    """softmax(q k^T / sqrt(d) + bias) v among the tokens of a window.

    Args:
        dim, num_heads, window, qkv_bias, qk_scale, proj_drop: see `BiasedWindows`.
        shift: where windows begin, modulo their sides: what Swin's roll by -shift with its mask computes.
        backend: of the operator.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int],
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        shift: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, window, qkv_bias, qk_scale, proj_drop)
        self.attend = window_operator(window, shift, num_heads, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        self.check(x)
        return self.project(self.attend(self.qkv(x), scale=self.scale, bias=self.bias()))
