"""Cosine attention with a learned temperature (Swin v2, Liu et al. 2022), and a temperature alone."""

from __future__ import annotations

import math
from dataclasses import replace

from attnc.lang.functions import HEAD, SCORE, Statement, exp, l2norm, minimum
from attnc.lang.pattern import Pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Table
from attnc.patterns.relation import raw, rescored


@recorded
def cosine(of: Pattern | None = None, *, most: float = 100.0) -> Pattern:
    """cos(q, k) * min(exp(logit_scale[h]), most), then the bias of `of`: a table `logit_scale` [H or 1]. Call with scale=1.0."""
    table = Table("logit_scale")

    def change(q: Point, k: Point, s: Statement) -> Statement:
        score = raw(s, SCORE * exp(minimum(table[HEAD], math.log(most))))
        return replace(s, score=score, q_map=l2norm(), k_map=l2norm())

    return rescored("cosine", of, change)


@recorded
def head_scale(of: Pattern | None = None) -> Pattern:
    """SCORE * temperature[h] before any bias: a table `temperature` [H or 1], learned (XCiT, PVT's and CaiT's successors)."""
    table = Table("temperature")
    return rescored("head_scale", of, lambda q, k, s: replace(s, score=raw(s, SCORE * table[HEAD])))
