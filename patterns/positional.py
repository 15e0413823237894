"""Positional attention without content, the second softmax of ConViT's gate (d'Ascoli et al. 2021)."""

from __future__ import annotations

from dataclasses import replace

from attnc.lang.functions import HEAD, Statement
from attnc.lang.pattern import Pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym, Table
from attnc.patterns.relation import rescored


@recorded
def positional(of: Pattern | None = None) -> Pattern:
    """softmax of weight[h] . (dx, dy, ..., dx^2 + dy^2 + ...), key minus query, fastest axis first: no product of q and k is made.

    A table `weight` [H or 1, rank + 1]. ConViT mixes it with content by a gate per head: `torch.lerp(content, position, gate)` on
    the outputs of two operators over the same values.
    """
    weight = Table("weight")

    def change(q: Point, k: Point, s: Statement) -> Statement:
        steps = [b - a for a, b in zip(q, k, strict=True)]
        square = steps[0] * steps[0]
        for d in steps[1:]:
            square = square + d * d
        score: Sym = weight[HEAD, len(steps)] * square
        for i, d in enumerate(reversed(steps)):
            score = score + weight[HEAD, i] * d
        return replace(s, score=score.expr)

    return rescored("positional", of, change)
