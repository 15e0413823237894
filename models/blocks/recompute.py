"""Gradient checkpointing of modules whose weights are under spectral norm (Miyato et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(run: Callable[..., Any], modules: tuple[nn.Module, ...], *args: Any) -> Any:
    """run(*args), a computation of `modules` whose activations the backward computes again.

    In training each forward takes a step towards the singular vectors, and the weights follow: the second computation uses those of
    the first, takes no step, and leaves the vectors of later forwards as they are.
    """
    normed = [m for module in modules for m in module.modules() if "weight_u" in m._buffers]
    if not normed:
        return checkpoint(run, *args, use_reentrant=False)
    found: list[tuple[Tensor | None, ...]] = []
    return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (_first(normed, found), _again(normed, found)))


@contextmanager
def _first(normed: list[nn.Module], found: list[tuple[Tensor | None, ...]]) -> Iterator[None]:
    yield
    found[:] = [tuple(b if b is None else b.clone() for b in _vectors(m)) for m in normed]


@contextmanager
def _again(normed: list[nn.Module], found: list[tuple[Tensor | None, ...]]) -> Iterator[None]:
    kept = [(m.training, _vectors(m)) for m in normed]
    try:
        for m, vectors in zip(normed, found, strict=True):
            m._buffers["weight_u"], m._buffers["weight_v"] = vectors
            m.training = False
        yield
    finally:
        for m, (training, vectors) in zip(normed, kept, strict=True):
            m._buffers["weight_u"], m._buffers["weight_v"] = vectors
            m.training = training


def _vectors(m: nn.Module) -> tuple[Tensor | None, ...]:
    return m._buffers["weight_u"], m._buffers["weight_v"]
