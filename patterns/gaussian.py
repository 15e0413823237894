"""Masks that multiply scores: Gaussian mixtures of the distance, and the simple learned mask beside them (Li et al. 2023)."""

from __future__ import annotations

from dataclasses import replace

from attnc.errors import DeclarationError
from attnc.lang.functions import HEAD, SCORE, Statement, exp, where
from attnc.lang.pattern import Pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Table
from attnc.patterns.decay import distance
from attnc.patterns.relation import raw, rescored


@recorded
def gaussian_mixture(kernels: int, of: Pattern | None = None, *, vanish: int | None = None) -> Pattern:
    """SCORE * sum_c alpha[c, h] exp(-d^2 / (2 (sigma[c, h]^2 + 1e-5))), before any bias: d is the Euclidean distance on the grid.

    Tables `alpha`, `sigma` [kernels, H or 1], of any sign. With `vanish`, the factor is 0 where d^2 >= vanish: 104 is what
    becomes of the official code's exp(-d^2) in float32.
    """
    if not isinstance(kernels, int) or kernels < 1:
        raise DeclarationError(f"gaussian_mixture({kernels!r}): a positive number of kernels")
    alpha, sigma = Table("alpha"), Table("sigma")

    def change(q: Point, k: Point, s: Statement) -> Statement:
        far = distance(q, k, "squared")
        mask = alpha[0, HEAD] * exp(-far / (2 * (sigma[0, HEAD] ** 2 + 1e-5)))
        for c in range(1, kernels):
            mask = mask + alpha[c, HEAD] * exp(-far / (2 * (sigma[c, HEAD] ** 2 + 1e-5)))
        if vanish is not None:
            mask = where(far < vanish, mask, 0.0)
        return replace(s, score=raw(s, SCORE * mask))

    return rescored(f"gaussian_mixture({kernels})", of, change)


@recorded
def learned_mask(of: Pattern | None = None) -> Pattern:
    """SCORE * mask[q.index, k.index], before any bias: a table `mask` [queries, keys] of every pair on the grid, for all heads."""
    mask = Table("mask")

    def change(q: Point, k: Point, s: Statement) -> Statement:
        return replace(s, score=raw(s, SCORE * mask[q.index, k.index]))

    return rescored("learned_mask", of, change)
