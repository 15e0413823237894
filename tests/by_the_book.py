"""Dropout's mask and rotary embedding once more, in numpy integers and complex numbers, from what the documentation says."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
M32 = np.uint64(0xFFFFFFFF)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox-4x32-10 of arrays of 32-bit numbers."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        x, y = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (y >> np.uint64(32)) ^ b ^ np.uint64(low), y & M32, (x >> np.uint64(32)) ^ d ^ np.uint64(high), x & M32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return a, b, c, d


def dropout(p: float, seed: int, batch: int, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """float64 [batch, heads, n, m] from the numbers of n queries and m keys: 0 or 1 / (1 - p), with p to 31 bits."""
    i, b, h = (x.astype(np.uint64) for x in np.meshgrid(queries.numpy(), np.arange(batch), np.arange(heads), indexing="ij"))
    first, second, *_ = philox((i, b, h, np.zeros_like(i)), (seed % 2**32, seed // 2**32 % 2**32))
    x = (first[..., None] + keys.numpy().astype(np.uint64)) & M32
    x = ((x ^ (x >> np.uint64(17))) * np.uint64(0xED5AD4BB)) & M32
    x = ((x ^ (x >> np.uint64(11)) ^ second[..., None]) * np.uint64(0xAC4C1B51)) & M32
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x31848BAB)) & M32
    word = (x ^ (x >> np.uint64(14))) >> np.uint64(1)
    few = min(max(round((1 - p) * 2**31), 1), 2**31 - 1)
    return torch.from_numpy((word < np.uint64(few)) * (2**31 / few)).permute(1, 2, 0, 3)


def rotary(rows: Tensor, places: Tensor, base: float, interleaved: bool) -> Tensor:
    """Rows [..., n, D] turned by places [axes, n], pairs of channels as complex numbers; places below 0 turn nothing."""
    axes, d = places.shape[0], rows.shape[-1]
    w = 2 * (d // (2 * axes))
    out = rows.clone()
    for axis, place in enumerate(places.clamp_min(0)):
        first = torch.arange(w // 2) * (2 if interleaved else 1) + axis * w
        second = first + (1 if interleaved else w // 2)
        angle = place[:, None].double() * torch.tensor(base, dtype=torch.float64) ** (
            -torch.arange(w // 2, dtype=torch.float64) * 2 / max(w, 1)
        )
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128 if rows.dtype == torch.float64 else torch.complex64)
        pair = torch.complex(*(rows[..., c].to(turn.real.dtype) for c in (first, second))) * turn
        out[..., first], out[..., second] = pair.real.to(rows.dtype), pair.imag.to(rows.dtype)
    return out
