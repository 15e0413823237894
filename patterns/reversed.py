"""Reversed attention of DependencyViT (Ding et al. 2023): children choose their parents, who add up what is sent to them."""

from __future__ import annotations

from dataclasses import replace

from attnc.lang.functions import Statement, softmax
from attnc.lang.pattern import Pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point
from attnc.patterns.relation import rescored


@recorded
def reversed_attention(of: Pattern | None = None) -> Pattern:
    """A[j, i] = exp(score[j, i]) / the sum of exp(score[., i]) over the receivers; y[j] = sum_i A[j, i] v[i]. Rows do not sum to 1.

    Receivers j are the operator's queries, senders i its keys. In the paper's names A is softmax(q k^T / sqrt(d)) transposed, so a
    call is ``op(k, q, gates * v)``: gates p[i, h] m[i] of a sender scale its whole column, and so its value.
    """

    def change(q: Point, k: Point, s: Statement) -> Statement:
        return replace(s, normalizer=softmax(over="queries"))

    return rescored("reversed_attention", of, change)
