"""Images as maps of non-overlapping patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from attnc.errors import DeclarationError
from attnc.models.blocks.conv import conv_map, pad_to_multiple


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a size that is one number or both."""
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or not all(isinstance(n, int) for n in both):
        raise DeclarationError(f"the size {size!r}: an int, or (rows, columns)")
    return both[0], both[1]


class PatchEmbed(nn.Module):
    """A linear map of each patch, then LayerNorm if `norm`.

    Args:
        in_chans: channels of the image.
        dim: channels C.
        patch: rows and columns of a patch.
        norm: whether there is a norm.
        pad: whether the image is zero-padded on the bottom and right to whole patches; else a rest is left out.
    """

    def __init__(self, in_chans: int, dim: int, patch: tuple[int, int], *, norm: bool, pad: bool) -> None:
        super().__init__()
        self.patch = patch
        self.pad = pad
        self.proj = nn.Conv2d(in_chans, dim, patch, patch)
        self.norm = nn.LayerNorm(dim) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, H / rows, W / columns, C]``."""
        x = x.permute(0, 2, 3, 1)
        x = conv_map(self.proj, pad_to_multiple(x, *self.patch) if self.pad else x)
        return x if self.norm is None else cast(Tensor, self.norm(x))
