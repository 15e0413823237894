"""Products over pairs of which some are not there: such a pair adds nothing, whatever its rows hold (0 times NaN is NaN).

Care takes its time, so where all rows are known to be finite no pairs are given, and products are plain ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def finite(tables: Mapping[str, Tensor], *rows: Tensor) -> bool:
    """Whether all of these are, and the rows of virtual keys among the tables."""
    pads = (tables[n] for n in ("pad_k", "pad_v") if n in tables)
    return all(bool(t.isfinite().all()) for t in (*rows, *pads))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. (A product with one column may add up one term after the other.)"""
    return (a * b.mT).sum(-1, keepdim=True) if b.shape[-1] == 1 else a @ b


def _weighted(weight: Tensor, rows: Tensor, allowed: Tensor) -> Tensor:
    """sum over m, where allowed[n, m], of weight[n, m] rows[m, d]. Elsewhere weights are 0."""
    finite = rows.isfinite()
    out, rest = _product(weight, torch.where(finite, rows, 0.0)), torch.where(finite, 0.0, rows)
    for m in (~finite).any(-1).flatten(0, -2).any(0).nonzero()[:, 0].tolist():
        out = out + torch.where(allowed[..., m, None], weight[..., m, None] * rest[..., m, None, :], 0.0)
    return out


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
        return q @ k.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, allowed = ctx.saved_tensors
        return _weighted(g, k, allowed), _weighted(g.mT, q, allowed.mT), None


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        return _weighted(weight, v, allowed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, v, allowed = ctx.saved_tensors
        return g @ v.mT, _weighted(weight.mT, g, allowed.mT), None


def scores(q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
    """q @ k.T, of which only what is `allowed` may get a gradient that is not 0."""
    found: Tensor = q @ k.mT if allowed is None else _Scores.apply(q, k, allowed)  # type: ignore[no-untyped-call]
    return found


def values(weight: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """weight @ v over the pairs `allowed`; other weights are 0, and whoever made them so gives them no gradient."""
    found: Tensor = _product(weight, v) if allowed is None else _Values.apply(weight, v, allowed)  # type: ignore[no-untyped-call]
    return found
