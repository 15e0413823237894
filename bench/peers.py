"""The peers, called as their documentation or their papers' code does.

Every runner takes the packed projection `qkv` [B, *grid, 3 C] of a model's linear layer, then tables, and gives [B, *grid, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[..., Tensor]  # q, k, v [B, H, N, D] and perhaps a bias that broadcasts to [B, H, N, N]
Runner = Callable[..., Tensor]
Grid = tuple[int, ...]


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, as papers' code writes it."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention with an additive (or boolean) mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own causal attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3 C] to q, k and v [B, H, N, D], as views."""
    b, n, c3 = qkv.shape
    q, k, v = qkv.view(b, n, 3, heads, c3 // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def merge(out: Tensor) -> Tensor:
    """[B, H, N, D] to [B, N, C]."""
    b, h, n, d = out.shape
    return out.transpose(1, 2).reshape(b, n, h * d)


def rows(inner: Attention, heads: int) -> Runner:
    """Attention among all tokens of the grid."""

    def run(qkv: Tensor) -> Tensor:
        return merge(inner(*split(qkv.flatten(1, -2), heads))).view(*qkv.shape[:-1], -1)

    return run


# ------------------------------------------------------------------------------------------------------- groups of tokens
class Windows:
    """Groups of size x size neighbours (Swin's window_partition and window_reverse), or of strips height x width."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def part(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [groups, tokens, C]."""
        b, h, w, c = x.shape
        x = x.view(b, h // self.height, self.height, w // self.width, self.width, c)
        return x.transpose(2, 3).reshape(-1, self.height * self.width, c)

    def back(self, x: Tensor, h: int, w: int) -> Tensor:
        """The inverse."""
        x = x.view(-1, h // self.height, w // self.width, self.height, self.width, x.shape[-1])
        return x.transpose(2, 3).reshape(-1, h, w, x.shape[-1])


class Spread(Windows):
    """Groups of height x width tokens spaced evenly over the grid (MaxViT's grid_partition)."""

    def part(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [groups, tokens, C]."""
        b, h, w, c = x.shape
        x = x.view(b, self.height, h // self.height, self.width, w // self.width, c)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.height * self.width, c)

    def back(self, x: Tensor, h: int, w: int) -> Tensor:
        """The inverse."""
        x = x.view(-1, h // self.height, w // self.width, self.height, self.width, x.shape[-1])
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, h, w, x.shape[-1])


def relative_index(size: int) -> Tensor:
    """[size^2, size^2]: where the pair's entry lies in a relative table (Swin)."""
    coords = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    delta = coords[:, :, None] - coords[:, None, :] + size - 1
    return delta[0] * (2 * size - 1) + delta[1]


@lru_cache
def swin_mask(h: int, w: int, size: int, shift: int) -> Tensor:
    """[windows, size^2, size^2] additive: -100 between tokens the roll brought together (Swin builds it once)."""
    image = torch.zeros(1, h, w, 1)
    slices = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for i, a in enumerate(slices):
        for j, b in enumerate(slices):
            image[:, a, b] = 3 * i + j
    ids = Windows(size, size).part(image).squeeze(-1)
    return torch.where(ids[:, None] == ids[:, :, None], 0.0, -100.0)


def grouped(inner: Attention, heads: int, groups: Windows, *, relative: int = 0, shift: int = 0) -> Runner:
    """The papers' own road: roll, partition, attend within groups (with a relative bias), reverse, roll back."""
    index = relative_index(relative) if relative else None

    def run(qkv: Tensor, *tables: Tensor) -> Tensor:
        _, h, w, _ = qkv.shape
        if shift:
            qkv = torch.roll(qkv, (-shift, -shift), (1, 2))
        parts = groups.part(qkv)
        add = None if index is None else tables[0].flatten(1)[:, index][None]
        if shift and add is not None:
            mask = swin_mask(h, w, relative, shift).to(qkv.dtype)
            add = add + mask.repeat(len(parts) // len(mask), 1, 1)[:, None]
        out = groups.back(merge(inner(*split(parts, heads), *([] if add is None else [add]))), h, w)
        return torch.roll(out, (shift, shift), (1, 2)) if shift else out

    return run


def crossed(heads: int, width: int) -> Runner:
    """Both strips through a query in one softmax, each key once (as criss-cross attention's code: two products, joined scores)."""
    strips = (lambda n: Windows(n, width)), (lambda n: Windows(width, n))

    def run(qkv: Tensor) -> Tensor:
        b, h, w, c3 = qkv.shape
        d = c3 // 3 // heads
        tall, wide = strips[0](h), strips[1](w)
        (qt, kt, vt), (qw, kw, vw) = split(tall.part(qkv), heads), split(wide.part(qkv), heads)
        first = (qt * d**-0.5) @ kt.transpose(-2, -1)  # [B * w / width, H, h * width, h * width]
        second = (qw * d**-0.5) @ kw.transpose(-2, -1)
        # scores of the wide strip in the order of the tall one; its keys in the query's own tall strip were counted there
        of_wide = second.view(b, h // width, heads, width, w // width, width, w * width).permute(0, 4, 2, 1, 3, 5, 6)
        of_wide = of_wide.reshape(first.shape[0], heads, h * width, w * width)
        column = torch.arange(w).repeat(width) // width
        seen = (column[None] == torch.arange(w // width)[:, None])[:, None, None]  # [strips, 1, 1, width * w]
        of_wide = of_wide.view(b, w // width, *of_wide.shape[1:]).masked_fill(seen, float("-inf")).flatten(0, 1)
        weight = torch.cat([first, of_wide], -1).softmax(-1)
        a, b2 = weight.split([h * width, w * width], -1)
        out = tall.back(merge(a @ vt), h, w)
        back = b2.reshape(b, w // width, heads, h // width, width, width, w * width).permute(0, 3, 2, 4, 1, 5, 6)
        other = back.reshape(b * (h // width), heads, width * w, w * width) @ vw
        return out + wide.back(merge(other), h, w)

    return run


def by_halves(inner: Attention, heads: int, first: Windows, second: Windows) -> Runner:
    """CSWin: the first half of the heads attends within one grouping, the other half within another."""

    def run(qkv: Tensor) -> Tensor:
        _, h, w, c3 = qkv.shape
        halves = qkv.view(*qkv.shape[:-1], 3, 2, c3 // 6)
        outs = []
        for i, groups in enumerate((first, second)):
            part = groups.part(halves[..., i, :].flatten(-2))
            outs.append(groups.back(merge(inner(*split(part, heads // 2))), h, w))
        return torch.cat(outs, -1)

    return run


# ----------------------------------------------------------------------------------------------------------- neighbourhoods
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


def flex(grid: Grid, size: int, dilation: int = 1) -> Attention:
    """FlexAttention, compiled, with its block mask built beforehand, in a (dilated) neighbourhood."""
    side, far = grid[1], dilation

    def near(q: Tensor, k: Tensor, n: int) -> Tensor:
        groups = (n - q % far + far - 1) // far  # tokens of the query's residue class
        start = torch.minimum(q // far - size // 2, groups - size).clamp_min(0)
        return (q % far == k % far) & (k // far >= start) & (k // far < start + size)

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return near(q // side, k // side, grid[0]) & near(q % side, k % side, side)

    return _flex(mod, math.prod(grid))


def causal_flex(n: int) -> Attention:
    """FlexAttention, compiled, causal."""
    return _flex(lambda b, h, q, k: q >= k, n)


def _flex(mod: Callable[..., Tensor], n: int) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(mod, None, None, n, n, device=str(torch.get_default_device()))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def flash(heads: int, *, causal: bool = False) -> Runner | None:
    """FlashAttention's own package, on a GPU and where it is installed."""
    if not torch.cuda.is_available():
        return None
    try:
        from flash_attn import flash_attn_qkvpacked_func
    except ImportError:
        return None

    def run(qkv: Tensor) -> Tensor:
        out: Tensor = flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, heads, -1)), causal=causal)
        return out.flatten(-2)

    return run


def natten(heads: int, size: int, dilation: int) -> Runner | None:
    """NATTEN's own call, where it is installed (its CPU kernels ended with 0.20)."""
    try:
        from natten import na2d
    except ImportError:
        return None

    def run(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
        out: Tensor = na2d(q, k, v, kernel_size=size, dilation=dilation)
        return out.flatten(-2)

    return run


# --------------------------------------------------------------------------------------------------------- timm's modules
class Given(nn.Module):
    """In place of a module's qkv projection: gives the projection that the runner was handed."""

    qkv: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv


def _bare(module: Any) -> tuple[Any, Given]:
    given = Given()
    module.qkv, module.proj = given, nn.Identity()
    return module.eval(), given


def _call(module: Any, given: Given, qkv: Tensor, **more: Any) -> Tensor:
    """The module on tokens [B, N, C] whose projection is `qkv` (the tokens themselves are not read)."""
    given.qkv = qkv
    out: Tensor = module(qkv[..., : qkv.shape[-1] // 3], **more)
    return out


def timm_window(heads: int, size: int, shift: int) -> Runner:
    """timm's Swin WindowAttention between its own partition and reverse, without the two linear layers."""
    from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse

    module, given = _bare(WindowAttention(32 * heads, heads, window_size=size))
    del module.relative_position_bias_table

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        _, h, w, c3 = qkv.shape
        module.relative_position_bias_table = table.flatten(1).t()
        if shift:
            qkv = torch.roll(qkv, (-shift, -shift), (1, 2))
        parts = window_partition(qkv, (size, size)).view(-1, size * size, c3)
        mask = swin_mask(h, w, size, shift).to(qkv.dtype) if shift else None
        out = window_reverse(_call(module, given, parts, mask=mask).view(-1, size, size, c3 // 3), (size, size), h, w)
        return torch.roll(out, (shift, shift), (1, 2)) if shift else out

    return run


def timm_grid(heads: int, size: int) -> Runner:
    """timm's MaxViT grid attention, without the two linear layers."""
    from functools import partial

    from timm.layers import RelPosBias
    from timm.models.maxxvit import AttentionCl, grid_partition, grid_reverse

    bias = partial(RelPosBias, window_size=(size, size))
    module, given = _bare(AttentionCl(32 * heads, dim_head=32, head_first=False, rel_pos_cls=bias))
    del module.rel_pos.relative_position_bias_table

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        module.rel_pos.relative_position_bias_table = table.flatten(1).t()
        parts = grid_partition(qkv, (size, size))
        return grid_reverse(_call(module, given, parts), (size, size), qkv.shape[1:3])

    return run


def timm_rows(heads: int, dim: int) -> Runner:
    """timm's ViT attention, without the two linear layers."""
    from timm.models.vision_transformer import Attention

    module, given = _bare(Attention(dim, num_heads=heads))
    return lambda qkv: _call(module, given, qkv)


def timm_channel(heads: int, dim: int) -> Runner:
    """timm's DaViT channel attention, without the two linear layers."""
    from timm.models.davit import ChannelAttention

    module, given = _bare(ChannelAttention(dim, num_heads=heads))
    return lambda qkv: _call(module, given, qkv)


def channel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DaViT's own road (its q, k, v): attend over channels with tokens contracted."""
    weight = ((k * k.shape[-1] ** -0.5).transpose(-1, -2) @ v).softmax(-1)
    return (weight @ q.transpose(-1, -2)).transpose(-1, -2)
