"""Outlook attention of VOLO (Yuan et al. 2021): weights that a token generates for its whole neighbourhood."""

from __future__ import annotations

from attnc.lang.functions import BATCH, HEAD, Statement, where
from attnc.lang.pattern import Pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym, Table
from attnc.patterns.relation import every


@recorded
def outlook(size: int, stride: int = 1, padding: int = 0) -> Pattern:
    """Each anchor looks out over size x size keys, and for each of these places there is a query that sees all of them.

    On an axis anchor i stands over the keys i * stride - padding .. + size - 1, and its queries are i * size .. + size - 1: the
    grid of queries is size times that of anchors. The score, without a product of q and k, is a table `logits` [B, H, anchors
    per axis ..., size^rank, size^rank]: by anchor, the query's place, the key's place. Compile with ``pad=((padding, padding),)
    * rank`` and ``kv_grid=``, for keys outside that are zero. The outputs of overlapping windows are added by a fold.
    """
    logits = Table("logits")

    def tracer(q: Point, k: Point) -> Statement:
        terms: list[Sym] = []
        anchors: list[Sym] = []
        row: Sym | None = None
        column: Sym | None = None
        for a, b in zip(q, k, strict=True):
            # both are counted from the first padded row, in which queries do not exist
            anchor, place = (a - padding) // size, (a - padding) % size
            away = b - anchor * stride
            terms += [away >= 0, away <= size - 1]
            anchors.append(anchor)
            row = place if row is None else row * size + place
            column = away if column is None else column * size + away
        assert row is not None and column is not None
        return where(every(terms), logits[(BATCH, HEAD, *anchors, row, column)])

    return Pattern(f"outlook({size}, stride={stride}, padding={padding})", tracer)
