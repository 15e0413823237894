"""Channel attention in C++ held to its meaning: cases of sizes, dtypes and layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.runtime import cpp


def tensors(kind, batch, heads, tokens, dim, dtype, grid=None) -> Tensor:
    """A random [B, H, N, D] tensor in one of the layouts that people use."""
    if kind == "channels_first":
        return torch.randn(batch, heads, dim, tokens).to(dtype).transpose(2, 3)
    if kind == "heads_last":
        return torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
    if kind == "expanded":
        return torch.randn(1, heads, tokens, dim).to(dtype).expand(batch, -1, -1, -1)
    return torch.randn(batch, heads, tokens, dim).to(dtype)


# tokens, channels of q, of k and v, dtype, layouts of q, k, v and the gradient, and the scale where it is not tokens^-0.5
CHANNELS = {
    "narrow": (100, 8, 8, torch.float32, "heads_last channels_first plain expanded"),
    "long": (2500, 24, 33, torch.float32, "heads_last channels_first plain expanded"),
    "one of all": (1, 1, 1, torch.float32, "plain plain plain plain"),
    "packed": (1037, 32, 32, torch.float32, "packed packed packed heads_last"),
    "a window's tokens": (49, 48, 48, torch.float32, "packed packed packed heads_last"),
    "wide": (196, 80, 128, torch.float32, "heads_last heads_last heads_last heads_last"),
    "more keys": (70, 3, 256, torch.float32, "plain plain plain plain"),
    "more queries": (70, 130, 5, torch.float32, "plain plain plain plain"),
    "channels first": (333, 40, 33, torch.float32, "channels_first channels_first channels_first channels_first"),
    "negative scale": (90, 16, 16, torch.float32, "heads_last heads_last heads_last heads_last", -0.2),
    "scale 0": (90, 16, 16, torch.float32, "heads_last heads_last heads_last heads_last", 0.0),
    "float64": (300, 32, 20, torch.float64, "heads_last channels_first plain plain"),
    "bfloat16": (1500, 16, 16, torch.bfloat16, "heads_last channels_first plain expanded"),
    "bfloat16 packed": (1200, 32, 32, torch.bfloat16, "packed packed packed heads_last"),
    "float16": (260, 33, 24, torch.float16, "heads_last heads_last channels_first heads_last"),
}


def channel_tensors(name, heads=3, batch=2):
    tokens, dim, key_dim, dtype, kinds, *scale = CHANNELS[name]
    torch.manual_seed(0)
    if kinds.startswith("packed"):
        q, k, v = torch.randn(batch, tokens, 3, heads, dim).to(dtype).permute(2, 0, 3, 1, 4)
        grad = tensors(kinds.split()[-1], batch, heads, tokens, dim, dtype)
    else:
        widths = (dim, key_dim, key_dim, dim)
        q, k, v, grad = (tensors(kind, batch, heads, tokens, w, dtype) for kind, w in zip(kinds.split(), widths, strict=True))
    return q, k, v, grad, scale[0] if scale else tokens**-0.5


def check_channel(name):
    q, k, v, grad, scale = channel_tensors(name)

    def meaning_of(wide):
        leaf = [t.to(wide).detach().clone().requires_grad_() for t in (q, k, v)]
        out = leaf[2] @ torch.softmax(scale * (leaf[0].transpose(-1, -2) @ leaf[1]), -1).transpose(-1, -2)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(wide))]

    got = [cpp.channel_forward(q, k, v, scale), *cpp.channel_backward(q, k, v, scale, grad)]
    eps = torch.finfo(q.dtype).eps
    for what, x, true, eager in zip(("out", "q", "k", "v"), got, meaning_of(torch.float64), meaning_of(q.dtype), strict=True):
        error, plain = (x.double() - true).abs().max().item(), (eager.double() - true).abs().max().item()
        rounding = (5 if q.dtype == torch.float64 else 1) * eps * true.abs().max().item()
        assert error <= (2 if what == "out" else 3) * max(plain, rounding), what
