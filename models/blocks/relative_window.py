"""Window attention with a learned relative position bias (Swin: Liu et al. 2021), shared by HAT, DRCT and their like."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.linear import Linear


@cache  # layers share operators
def shifted_window_operator(window: int, shift: int, heads: int, backend: str) -> attnc.Operator:
    """Attention inside windows whose borders lie at `shift` modulo `window`, on packed ``[B, H, W, 3C]``.

    This is Swin's cyclic shift by -shift with its mask, also on an axis of one window: that one is cut in two.
    """
    pattern = attnc.patterns.window(window, bias="relative").shift(shift)
    return attnc.compile(pattern, layout="b y x (three h d)", heads=heads, backend=backend)


def relative_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """An official ``[rows * columns, h]`` table, row-major in query minus key, as ``[h, rows, columns]`` (a view)."""
    return table.view(rows, columns, -1).permute(2, 0, 1)


def check_heads(dim: int, num_heads: int) -> None:
    """Raise DeclarationError where the heads do not divide the channels."""
    if num_heads < 1 or dim % num_heads:
        raise DeclarationError(f"num_heads is {num_heads}, which does not divide dim = {dim}")


def fitted_window(window: int, shift: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """Window and shift at a configured resolution: one that does not exceed the window is one window, unshifted.

    Raises:
        DeclarationError: the shift is not in [0, window).
    """
    if min(resolution) <= window:
        return min(resolution), 0
    if not 0 <= shift < window:
        raise DeclarationError(f"shift_size is {shift}; it must lie in [0, window_size) = [0, {window})")
    return window, shift


def patches(img_size: int | Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches in an image; either size is an int or a pair."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    rows, columns = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    return height // rows, width // columns


def check_multiple(x: Tensor, window: int, what: str) -> None:
    """Raise ShapeError where a map ``[B, H, W, C]`` is no whole number of windows."""
    if x.shape[1] % window or x.shape[2] % window:
        raise ShapeError(
            f"{what}: the map is {x.shape[1]} x {x.shape[2]}, which is no multiple of the window {window} on both axes; "
            "pad the input (the paper reflects it at the bottom and right) and crop the output"
        )


class RelativeWindowAttention(nn.Module):
    """softmax(q k^T scale + table[query - key]) v among the tokens of a window, with `qkv` and `proj` around it.

    Args:
        dim: channels C.
        window_size: side w of a window; the map must be a multiple of it.
        num_heads: heads h of C / h channels.
        shift: where the windows' borders lie, modulo w.
        qkv_bias: whether `qkv` has a bias.
        qk_scale: instead of (C / h) ** -0.5.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        shift: int = 0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.window_size = window_size
        self.scale = qk_scale or None
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.attend = shifted_window_operator(window_size, shift, num_heads, backend)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``. Raises ShapeError where H or W is no multiple of the window."""
        check_multiple(x, self.window_size, "window attention")
        span = 2 * self.window_size - 1
        table = relative_table(self.relative_position_bias_table, span, span)
        out: Tensor = self.proj(self.attend(self.qkv(x), scale=self.scale, bias=table))
        return out
