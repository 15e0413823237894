"""The peers, called as their documentation or their papers' code does. Rows are [B, H, N, D] unless said otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Grid = tuple[int, int]


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, as papers' code writes it."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention with an additive (or boolean) mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def window_partition(x: Tensor, size: int) -> Tensor:
    """[B, H, W, C] to [B * windows, size * size, C] (Swin)."""
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c).transpose(2, 3)
    return x.reshape(-1, size * size, c)


def window_reverse(x: Tensor, size: int, h: int, w: int) -> Tensor:
    """The inverse of window_partition."""
    b = x.shape[0] // (h // size * (w // size))
    return x.view(b, h // size, w // size, size, size, -1).transpose(2, 3).reshape(b, h, w, -1)


def swin(qkv: Tensor, heads: int, size: int, bias: Tensor, shift: int, inner: Callable[..., Tensor]) -> Tensor:
    """Swin's own road: roll, partition, attend with bias (and the shift's mask), reverse, roll back. qkv [B, H, W, 3C]."""
    _, h, w, c3 = qkv.shape
    if shift:
        qkv = torch.roll(qkv, (-shift, -shift), (1, 2))
    parts = window_partition(qkv, size)
    n = parts.shape[0]
    q, k, v = parts.view(n, size * size, 3, heads, c3 // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
    add = bias[None]
    if shift:
        add = add + swin_mask(h, w, size, shift).to(bias.dtype).repeat(n * size * size // (h * w), 1, 1)[:, None]
    out = inner(q, k, v, add).transpose(1, 2).reshape(n, size * size, c3 // 3)
    out = window_reverse(out, size, h, w)
    return torch.roll(out, (shift, shift), (1, 2)) if shift else out


@lru_cache
def swin_mask(h: int, w: int, size: int, shift: int) -> Tensor:
    """[windows, size^2, size^2] additive: -100 between tokens the roll brought together (Swin builds it once)."""
    image = torch.zeros(1, h, w, 1)
    slices = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for i, a in enumerate(slices):
        for j, b in enumerate(slices):
            image[:, a, b] = 3 * i + j
    ids = window_partition(image, size).squeeze(-1)
    return torch.where(ids[:, None] == ids[:, :, None], 0.0, -100.0)


def neighborhood_mask(grid: Grid, size: int, dilation: int) -> Tensor:
    """bool [N, N] of NATTEN's neighbourhood."""

    def axis(n: int) -> Tensor:
        i = torch.arange(n)
        j, r = i // dilation, i % dilation
        length = (n - r + dilation - 1) // dilation
        start = torch.minimum(j - size // 2, length - size).clamp_min(0)
        inside = (j[None] >= start[:, None]) & (j[None] < start[:, None] + size)
        return inside & (r[:, None] == r[None])

    y, x = axis(grid[0]), axis(grid[1])
    n = grid[0] * grid[1]
    return (y[:, None, :, None] & x[None, :, None, :]).reshape(n, n)


class Halo:
    """Neighbourhood attention composed by hand: tiles of queries, the halo of keys around each by one gather, SDPA with a mask."""

    def __init__(self, grid: Grid, size: int, dilation: int, tile: int = 8) -> None:
        index_q, index_k = [], []
        for ry in range(dilation):
            for rx in range(dilation):
                ys, xs = torch.arange(ry, grid[0], dilation), torch.arange(rx, grid[1], dilation)
                ty, tx = self._tiles(len(ys), tile, size), self._tiles(len(xs), tile, size)
                for y0, ky in ty:
                    for x0, kx in tx:
                        index_q.append((ys[y0][:, None] * grid[1] + xs[x0][None]).flatten())
                        index_k.append((ys[ky][:, None] * grid[1] + xs[kx][None]).flatten())
        self.q, self.k = torch.stack(index_q), torch.stack(index_k)
        self.mask = neighborhood_mask(grid, size, dilation)[self.q[:, :, None], self.k[:, None, :]]
        self.back = torch.empty(grid[0] * grid[1], dtype=torch.long)
        self.back[self.q.flatten()] = torch.arange(self.q.numel())

    @staticmethod
    def _tiles(n: int, tile: int, size: int) -> list[tuple[Tensor, Tensor]]:
        tile = min(tile, n)
        width = min(n, tile + size - 1)
        starts = [min(s, n - tile) for s in range(0, n, tile)]
        return [(torch.arange(s, s + tile), torch.arange(width) + max(0, min(s - size // 2, n - width))) for s in starts]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q[:, :, self.q], k[:, :, self.k], v[:, :, self.k], attn_mask=self.mask)
        return out.flatten(2, 3)[:, :, self.back]


def channel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DaViT's own road (its q, k, v): attend over channels with tokens contracted."""
    weight = ((k * k.shape[-1] ** -0.5).transpose(-1, -2) @ v).softmax(-1)
    return (weight @ q.transpose(-1, -2)).transpose(-1, -2)


def flex(mask_mod: Callable[..., Tensor], n: int) -> Attention:
    """FlexAttention, compiled, with its block mask built beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(mask_mod, None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)
