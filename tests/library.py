"""The whole library at small sizes that no tile divides: every name of `attnc.patterns`, once or more, with its tables' shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import attnc
from attnc import patterns as p


@dataclass(frozen=True)
class Small:
    """A pattern or mechanism, its sizes, and the shapes of its tables; kwargs of `compile` and `emit` beside the sizes."""

    pattern: Any
    grid: tuple[int, ...] = (6, 7)
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict)
    heads: int = 2
    batch: int = 1
    scale: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[int, ...]:
        """The keys' grid."""
        found: tuple[int, ...] = self.options.get("kv_grid", self.grid)
        return found


BIAS = {"bias": (2, 5, 5)}
ONE = ((1, 1), (1, 1))
LIBRARY: dict[str, Small] = {
    "alibi": Small(p.alibi(p.causal())),
    "at_least": Small(p.at_least(3, p.neighborhood(3)), (2, 5), options={"pad": ((0, 3), (0, 3))}),
    "axial": Small(p.axial("x"), (3, 19)),
    "axial, union": Small(p.axial("y") | p.axial("x"), (5, 6)),
    "band": Small(p.band(2, 5)),
    "blocks": Small(p.blocks((2, 3))),
    "causal": Small(p.causal()),
    "causal, one axis": Small(p.causal(), (70,)),
    "causal, whole chunks": Small(p.causal(), (128,)),
    "channel": Small(p.channel()),
    "cosine": Small(p.cosine(p.window(3, bias="relative")), tables={"logit_scale": (2,), **BIAS}, scale=1.0),
    "cross": Small(p.cross(2), (6, 8)),
    "cross_scale": Small(p.cross_scale(2), options={"kv_grid": (3, 4)}),
    "decay": Small(p.decay(), (4, 6), {"slopes": (2,)}),
    "decay after the softmax": Small(p.decay(p.axial("x"), after=True), (4, 6), {"slopes": (2,)}),
    "dilated": Small(p.dilated(3, 2), (7, 9)),
    "dilated_blocks": Small(p.dilated_blocks(3, 2), (7, 6)),
    "full": Small(p.full(), (5, 9)),
    "full, one axis": Small(p.full(), (70,)),
    "gaussian_mixture": Small(p.gaussian_mixture(2, p.window(3)), tables={"alpha": (2, 2), "sigma": (2, 2)}),
    "grid": Small(p.grid(2), (5, 6)),
    "head_scale": Small(p.head_scale(p.axial("y")), tables={"temperature": (2,)}),
    "inward_window": Small(p.inward_window(1)),
    "learned_mask": Small(p.learned_mask(), (3, 6), {"mask": (18, 18)}),
    "neighborhood": Small(p.neighborhood(3), (7, 11)),
    "neighborhood, bias": Small(p.neighborhood(3, bias="relative"), tables=BIAS),
    "neighborhood, causal": Small(p.neighborhood(3, causal=True), (7, 11)),
    "neighborhood, dilated": Small(p.neighborhood(3, dilation=2), (7, 9)),
    "neighborhood, stride": Small(p.neighborhood(3, stride=2), (7, 9)),
    "neighborhood, volume": Small(p.neighborhood(3), (3, 4, 5)),
    "outlook": Small(p.outlook(3, padding=1), (9, 9), {"logits": (1, 2, 3, 3, 9, 9)}, options={"kv_grid": (3, 3), "pad": ONE}),
    "overlapping_window": Small(p.overlapping_window(4, 6), (8, 8)),
    "per_head": Small(p.per_head([p.window(3), p.grid(2)])),
    "per_head, a union": Small(p.per_head([p.axial("x"), p.cross(2)]), (6, 8), heads=4),
    "polyline": Small(p.polyline(), (4, 5), {"across": (1, 2, 4, 5), "down": (1, 2, 4, 5)}),
    "positional": Small(p.positional(p.window(3)), tables={"weight": (2, 3)}),
    "reversed_attention": Small(p.reversed_attention(p.window(3))),
    "sliding_window": Small(p.sliding_window(3), (4, 5), options={"pad": ONE}),
    "soft_cap": Small(p.soft_cap(1.5, p.neighborhood(3, bias="relative")), tables=BIAS),
    "strip": Small(p.strip("y", 2), (9, 4)),
    "taps": Small(p.taps(3), (2, 3), heads=9, options={"pad": ONE}),
    "window": Small(p.window(3)),
    "window, bias": Small(p.window(3, bias="relative"), tables=BIAS, batch=2),
    "window, absolute bias": Small(p.window(3, bias="absolute"), tables={"bias": (2, 9, 9)}),
    "window, shifted": Small(p.window(3, shift=1)),
    "window, shifted with bias": Small(p.window(3, shift=1, bias="relative"), (6, 6), BIAS),
}
# what `emit` refuses, and with what words
REFUSED = {"reversed_attention": "softmax over queries in a kernel; an operator"}
EMITTED = {name: s for name, s in LIBRARY.items() if name not in REFUSED}


def rows(s: Small, dim: int, generator: torch.Generator) -> dict[str, Tensor]:
    """q, k, v, tables (and rows of virtual keys) and the output's cotangent, float32, of a statement."""

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    nq, nk = math.prod(s.grid), math.prod(s.keys)
    out = {"q": some(s.batch, s.heads, nq, dim), "k": some(s.batch, s.heads, nk, dim), "v": some(s.batch, s.heads, nk, dim)}
    out |= {name: some(*shape) * 0.5 for name, shape in s.tables.items()}
    if "pad" in s.options:
        out |= {"pad_k": some(s.heads, dim), "pad_v": some(s.heads, dim)}
    return out | {"cotangent": some(s.batch, s.heads, nq, dim)}


def meaning(s: Small, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradient of every row and table, in float64."""
    leaves = {n: t.double().requires_grad_() for n, t in given.items() if n != "cotangent"}
    q, k, v, *_ = leaves.values()
    named: dict[str, Any] = {n: t for n, t in leaves.items() if n not in "qkv"}
    op = attnc.reference(s.pattern, grid=s.grid, **s.options)
    out = op(q, k, v, scale=s.scale, **named)
    found = torch.autograd.grad(out, list(leaves.values()), given["cotangent"].double(), allow_unused=True)
    grads = {f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}
    return {"out": out.detach(), **grads}
