"""The library against the papers' own code: rolls, masks, partitions and reshapes, written here as their authors write them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc import patterns

DOUBLE = torch.float64
close = torch.testing.assert_close


def rows(n: int, heads: int = 2, d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, heads, n, d, generator=g, dtype=DOUBLE) for _ in range(3))
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias, -1) @ v


def run(p: attnc.Pattern, grid: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, **tables: Tensor) -> Tensor:
    return attnc.compile(p, grid=grid, backend="torch")(q, k, v, **tables)


def parts(t: Tensor, grid: tuple[int, int], s: int) -> Tensor:
    """[B, H, windows, s * s, D]: Swin's window_partition."""
    b, h, _, d = t.shape
    y, x = grid
    return t.view(b, h, y // s, s, x // s, s, d).transpose(3, 4).reshape(b, h, -1, s * s, d)


def whole(t: Tensor, grid: tuple[int, int], s: int) -> Tensor:
    b, h, _, _, d = t.shape
    y, x = grid
    return t.view(b, h, y // s, x // s, s, s, d).transpose(3, 4).reshape(b, h, y * x, d)


def relative_position_index(s: int) -> Tensor:
    """As in Swin's WindowAttention.__init__."""
    coords = torch.stack(torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")).flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
    relative[:, :, 0] += s - 1
    relative[:, :, 1] += s - 1
    relative[:, :, 0] *= 2 * s - 1
    return relative.sum(-1)


def swin_mask(grid: tuple[int, int], s: int, t: int) -> Tensor:
    """As in SwinTransformerBlock.__init__: [windows, s * s, s * s] of 0 and -inf (there -100)."""
    image = torch.zeros(1, 1, *grid, 1)
    count = 0
    for rows_ in (slice(0, -s), slice(-s, -t), slice(-t, None)):
        for columns in (slice(0, -s), slice(-s, -t), slice(-t, None)):
            image[:, :, rows_, columns] = count
            count += 1
    ids = parts(image.flatten(2, 3), grid, s)[0, 0, :, :, 0]
    return torch.where(ids[:, None] == ids[:, :, None], 0.0, float("-inf")).to(DOUBLE)


@pytest.mark.parametrize(("grid", "s", "t"), [((8, 12), 4, 2), ((8, 12), 4, 1), ((9, 6), 3, 1), ((14, 14), 7, 3)])
def test_a_shifted_window_is_swins_roll_and_mask(grid: tuple[int, int], s: int, t: int) -> None:
    q, k, v = rows(grid[0] * grid[1])
    table = torch.randn((2 * s - 1) ** 2, 2, dtype=DOUBLE)
    bias = table[relative_position_index(s).view(-1)].view(s * s, s * s, 2).permute(2, 0, 1)

    def rolled(x: Tensor, by: int) -> Tensor:
        return torch.roll(x.unflatten(2, grid), (by, by), (2, 3)).flatten(2, 3)

    windows = [parts(rolled(x, -t), grid, s) for x in (q, k, v)]
    out = plain(*windows, bias[None, :, None] + swin_mask(grid, s, t)[None, None])
    expected = rolled(whole(out, grid, s), t)
    relative = table.T.reshape(2, 2 * s - 1, 2 * s - 1)
    close(run(patterns.window(s, shift=t, bias="relative"), grid, q, k, v, bias=relative), expected)
    close(run(patterns.window(s, shift=t, bias="absolute"), grid, q, k, v, bias=bias), expected)


def test_windows_are_swins_partition_with_its_bias() -> None:
    grid, s = (8, 12), 4
    q, k, v = rows(96)
    table = torch.randn(49, 2, dtype=DOUBLE)
    bias = table[relative_position_index(s).view(-1)].view(16, 16, 2).permute(2, 0, 1)
    expected = whole(plain(*(parts(x, grid, s) for x in (q, k, v)), bias[None, :, None]), grid, s)
    close(run(patterns.window(s, bias="relative"), grid, q, k, v, bias=table.T.reshape(2, 7, 7)), expected)
    close(run(patterns.window(s, bias="absolute"), grid, q, k, v, bias=bias), expected)


@pytest.mark.parametrize("grid", [(8, 12), (7, 9), (3, 13)])
def test_padding_to_windows_makes_virtual_keys(grid: tuple[int, int]) -> None:
    """Official DaViT: zero tokens are appended before the projection, so their keys and values are the biases."""
    s = 4
    padded = tuple(-(-n // s) * s for n in grid)
    q, k, v = rows(grid[0] * grid[1])
    pad_k, pad_v = torch.randn(2, 4, dtype=DOUBLE), torch.randn(2, 4, dtype=DOUBLE)

    def extend(t: Tensor, row: Tensor) -> Tensor:
        room = row[None, :, None, None].expand(2, 2, *padded, 4).clone()
        room[:, :, : grid[0], : grid[1]] = t.unflatten(2, grid)
        return room.flatten(2, 3)

    windows = [parts(extend(t, r), padded, s) for t, r in ((q, pad_k), (k, pad_k), (v, pad_v))]
    expected = whole(plain(*windows), padded, s).unflatten(2, padded)[:, :, : grid[0], : grid[1]].flatten(2, 3)
    for pad in ("multiple", tuple((0, p - n) for n, p in zip(grid, padded, strict=True))):
        op = attnc.compile(patterns.window(s), grid=grid, pad=pad, backend="torch")
        close(op(q, k, v, pad_k=pad_k, pad_v=pad_v), expected)


def natten(i: int, n: int, s: int, d: int, stride: int, causal: bool) -> set[int]:
    """One axis of NATTEN's definition: the window of the leader of the query's stride group, kept inside its residue group."""
    group = [m for m in range(n) if m % d == i % d]
    j, m = group.index(i), len(group)
    s = min(s, m)
    if causal:
        leader = min(j // stride * stride + stride - 1, m - 1)
        return {group[a] for a in range(max(0, leader - s + 1), j + 1)}
    leader = min(j // stride * stride + stride // 2, m - 1)
    left = s // 2
    right = s // 2 - (s % 2 == 0)
    start = max(leader - left, 0)
    if leader + right >= m:
        start = m - s
    return {group[a] for a in range(start, start + s)}


@pytest.mark.parametrize(
    ("n", "s", "d", "stride", "causal"),
    [
        (n, s, d, stride, causal)
        for n, s, d, stride, causal in product((1, 4, 7, 12, 17), (2, 3, 5, 6), (1, 2, 3), (1, 2, 3), (False, True))
        if stride <= s and (s <= -(-n // d) or not causal)  # NATTEN refuses a causal window longer than the axis
    ],
)
def test_neighborhoods_are_nattens(n: int, s: int, d: int, stride: int, causal: bool) -> None:
    mask = attnc.mask(patterns.neighborhood(s, d, stride, causal), grid=(n,))[0]
    for i in range(n):
        assert set(mask[i].nonzero().flatten().tolist()) == natten(i, n, s, d, stride, causal), i


def test_neighborhoods_of_corners_in_two_dimensions() -> None:
    mask = attnc.mask(patterns.neighborhood((3, 5)), grid=(6, 7))[0].view(6, 7, 6, 7)
    assert mask.sum((2, 3)).eq(15).all()  # every query has all its keys, in the corners too
    assert mask[0, 0, :3, :5].all()
    assert mask[5, 6, 3:, 2:].all()
    assert mask[2, 3, 1:4, 1:6].all()


def test_neighborhood_bias_is_indexed_by_the_difference_in_steps_of_the_dilation() -> None:
    """NAT and DiNAT's rpb [heads, 2s - 1, 2s - 1]; ours at query - key, theirs at key - query."""
    grid, s, d = (7, 6), 3, 2
    q, k, v = rows(42)
    rpb = torch.randn(2, 5, 5, dtype=DOUBLE)
    y, x = (c.flatten() for c in torch.meshgrid(torch.arange(7), torch.arange(6), indexing="ij"))
    theirs = [(b[None] // d - b[:, None] // d + s - 1).clamp(0, 4) for b in (y, x)]
    mask = attnc.mask(patterns.neighborhood(s, d), grid=grid)[0]
    expected = plain(q, k, v, torch.where(mask, rpb[:, theirs[0], theirs[1]], float("-inf")))
    close(run(patterns.neighborhood(s, d, bias="relative"), grid, q, k, v, bias=rpb.flip(1, 2)), expected)


def test_grid_is_maxvits_reshape() -> None:
    y, x, s = 8, 12, 4
    q, k, v = rows(96)

    def partition(t: Tensor) -> Tensor:  # grid_partition: s x s tokens, y/s and x/s apart
        return t.view(2, 2, s, y // s, s, x // s, 4).permute(0, 1, 3, 5, 2, 4, 6).reshape(2, 2, -1, s * s, 4)

    out = plain(*(partition(t) for t in (q, k, v)))
    expected = out.view(2, 2, y // s, x // s, s, s, 4).permute(0, 1, 4, 2, 5, 3, 6).reshape(2, 2, 96, 4)
    close(run(patterns.grid(s), (y, x), q, k, v), expected)


def test_dilated_blocks_are_crossformers_long_distance_groups() -> None:
    y, x, s, i = 12, 6, 3, 2  # groups of s tokens, i apart, in blocks of s * i
    q, k, v = rows(72)

    def partition(t: Tensor) -> Tensor:
        t = t.view(2, 2, y // (s * i), s, i, x // (s * i), s, i, 4)
        return t.permute(0, 1, 2, 5, 4, 7, 3, 6, 8).reshape(2, 2, -1, s * s, 4)

    out = plain(*(partition(t) for t in (q, k, v)))
    out = out.view(2, 2, y // (s * i), x // (s * i), i, i, s, s, 4).permute(0, 1, 2, 6, 4, 3, 7, 5, 8)
    close(run(patterns.dilated_blocks(s, i), (y, x), q, k, v), out.reshape(2, 2, 72, 4))


def test_axial_strip_and_cross() -> None:
    grid = (6, 8)
    q, k, v = rows(48)
    lines = [t.unflatten(2, grid) for t in (q, k, v)]
    close(run(patterns.axial("x"), grid, q, k, v), plain(*lines).flatten(2, 3))
    columns = plain(*(t.transpose(2, 3) for t in lines)).transpose(2, 3).flatten(2, 3)
    close(run(patterns.axial("y"), grid, q, k, v), columns)
    wide = [t.reshape(2, 2, 3, 16, 4) for t in lines]
    close(run(patterns.strip("x", 2), grid, q, k, v), plain(*wide).reshape(2, 2, 48, 4))
    mask = attnc.mask(patterns.cross(2), grid=grid)[0].view(6, 8, 6, 8)
    assert mask.sum((2, 3)).eq(2 * 8 + 2 * 6 - 4).all()  # the square where they meet counts once


def test_per_head_is_cswin() -> None:
    """Half the heads attend in horizontal stripes, half in vertical ones."""
    grid = (4, 6)
    q, k, v = rows(24, heads=4)
    out = run(patterns.per_head([patterns.strip("x", 2), patterns.strip("y", 3)]), grid, q, k, v)
    close(out[:, :2], run(patterns.strip("x", 2), grid, *(t[:, :2] for t in (q, k, v))))
    close(out[:, 2:], run(patterns.strip("y", 3), grid, *(t[:, 2:] for t in (q, k, v))))


@pytest.mark.parametrize("shape", [(20,), (4, 5)])
def test_channel_attention_is_davits(shape: tuple[int, ...]) -> None:
    """ChannelAttention.forward: k scaled, k^T v softmaxed over its last axis, times q^T."""
    q, k, v = rows(20)
    attention = ((k * 4**-0.5).transpose(-1, -2) @ v).softmax(-1)
    expected = (attention @ q.transpose(-1, -2)).transpose(-1, -2)
    op = attnc.compile(patterns.channel(), backend="torch")
    close(op(k, v, q), expected)
    weight = torch.softmax(torch.einsum("bhni,bhnj->bhij", q, k) * 0.7, -1)
    close(op(q, k, v, scale=0.7), torch.einsum("bhij,bhnj->bhni", weight, v))


def test_band_and_its_bias() -> None:
    q, k, v = rows(9)
    bias = torch.randn(2, 7, dtype=DOUBLE)
    i, j = torch.arange(9)[:, None], torch.arange(9)[None]
    allowed = (j >= i - 3) & (j <= i + 1)
    full = torch.where(allowed, bias[:, (i - j + 3).clamp(0, 6)], float("-inf"))
    close(run(patterns.band(3, 1, bias="relative"), (9,), q, k, v, bias=bias), plain(q, k, v, full))


def test_names_tell_what_was_asked_for() -> None:
    made: dict[str, Any] = {
        "window(7)": patterns.window(7),
        "window(7, shift=3)": patterns.window(7, 3),
        "neighborhood(7, dilation=2, causal=True)": patterns.neighborhood(7, 2, causal=True),
        "per_head([window(2), full()])": patterns.per_head([patterns.window(2), patterns.full()]),
        "(window(2) | causal())": patterns.window(2) | patterns.causal(),
        "window(2).shift(1, 2)": patterns.window(2).shift(1, 2),
        "channel()": patterns.channel(),
        "blocks(4)": patterns.blocks(4),
    }
    assert {name: p.name for name, p in made.items()} == {name: name for name in made}
