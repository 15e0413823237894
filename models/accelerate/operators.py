"""Operators that several families share, and the views of their tables."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

import attnc
from attnc.patterns.relation import Bias

Pair = tuple[int, int]


@cache  # layers share operators
def padded_window(size: Pair, shift: Pair, cosine: bool, heads: int, backend: str) -> attnc.Operator:
    """Windows with a relative bias on packed ``[B, H, W, 3C]``; a map that they do not divide is padded to whole ones.

    Borders lie at `shift`, but for an axis of one window, which is not shifted.
    """
    pattern = attnc.patterns.window(size, shift if any(shift) else 0, bias="relative")
    if cosine:
        pattern = attnc.patterns.cosine(pattern)
    return attnc.compile(pattern, pad="multiple", layout="b y x (three h d)", heads=heads, backend=backend)


@cache
def rolled_window(size: Pair, shift: Pair, cosine: bool, heads: int, backend: str) -> attnc.Operator:
    """Windows with a relative bias on packed ``[B, H, W, 3C]`` after a cyclic shift by -shift with its mask, on every axis."""
    pattern = attnc.patterns.window(size, bias="relative").shift(*shift)
    if cosine:
        pattern = attnc.patterns.cosine(pattern)
    return attnc.compile(pattern, layout="b y x (three h d)", heads=heads, backend=backend)


@cache
def partition(kind: str, size: Pair, bias: Bias, interleaved: bool, heads: int, backend: str) -> attnc.Operator:
    """Windows ("block") or evenly spaced tokens ("grid") on packed ``[B, H, W, 3C]``: q, k and v of heads, or the reverse."""
    pattern = attnc.patterns.window(size, bias=bias) if kind == "block" else attnc.patterns.grid(size, bias=bias)
    layout = "b y x (h three d)" if interleaved else "b y x (three h d)"
    return attnc.compile(pattern, layout=layout, heads=heads, backend=backend)


@cache
def tokens(backend: str) -> attnc.Operator:
    """Attention among all tokens, on q, k and v ``[B, N, heads, d]``."""
    return attnc.compile(attnc.patterns.full(), layout="b x h d", backend=backend)


@cache
def packed_tokens(heads: int, backend: str) -> attnc.Operator:
    """Attention among all tokens, on packed ``[B, N, 3C]``."""
    return attnc.compile(attnc.patterns.full(), layout="b x (three h d)", heads=heads, backend=backend)


@cache
def biased_tokens(backend: str) -> attnc.Operator:
    """Attention among all tokens with a bias of each pair, on q, k and v ``[B, N, heads, d]``."""
    return attnc.compile(attnc.patterns.full(bias="absolute"), layout="b x h d", backend=backend)


def divides(size: Pair, x: Tensor) -> bool:
    """Whether a map ``[B, H, W, C]`` is a whole number of windows."""
    return x.shape[1] % size[0] == 0 and x.shape[2] % size[1] == 0


def padded_rows(bias: Tensor | None, qkv: Tensor, heads: int) -> dict[str, Any]:
    """k and v of a token that is zero before ``qkv``, as `pad_k` and `pad_v` ``[heads, d]``: its bias."""
    if bias is None:
        return {}
    _, k, v = bias.to(qkv.dtype).view(3, heads, -1).unbind(0)
    return {"pad_k": k, "pad_v": v}


def project(attention: Any, mixed: Tensor) -> Tensor:
    """What ends an attention: its ``proj`` and the dropout after it."""
    out: Tensor = attention.proj_drop(attention.proj(mixed))
    return out
