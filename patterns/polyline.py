"""Polyline path mask (PPMA, Zhao et al. 2025): decays along the path from query to key, one leg per axis, from prefix sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from attnc.errors import DeclarationError
from attnc.lang.functions import BATCH, HEAD, Statement
from attnc.lang.pattern import Pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point, Sym, Table
from attnc.patterns.relation import rescored

TABLES = ("across", "down", "through")  # for the axes x, y and t


@recorded
def polyline(of: Pattern | None = None, *, corner: Literal["key column", "key row"] = "key column") -> Pattern:
    """score - |across[q.y, q.x] - across[q.y, k.x]| - |down[q.y, k.x] - down[k.y, k.x]|: along the query's row to the key's column,
    then along that column; with corner="key row" along the query's column first.

    Tables `across`, `down` [B or 1, H or 1, Y, X]: the sums of step costs along each row and down each column, made from the
    image. PPMA averages the outputs of both corners; its cheap form is `polyline(axial("x"))`, then `polyline(axial("y"))`. On a
    line there is `across` [.., X] alone; on a video `through` [.., T, Y, X], too, whose leg is the last one ("key row": the first).
    """
    if corner not in ("key column", "key row"):
        raise DeclarationError(f"polyline(corner={corner!r}): 'key column' or 'key row'")
    tables = [Table(name) for name in TABLES]

    def change(q: Point, k: Point, s: Statement) -> Statement:
        rank, score = len(q.axes), Sym(s.score)
        if rank > len(tables):
            raise DeclarationError(f"polyline on {rank} axes: it has the tables {', '.join(TABLES)}, for up to {len(tables)}")
        for axis in reversed(range(rank)):
            # the axes that the path has gone along before this leg
            done = range(axis + 1, rank) if corner == "key column" else range(axis)
            start = [b if i in done else a for i, (a, b) in enumerate(zip(q, k, strict=True))]
            end = [k[i] if i == axis else c for i, c in enumerate(start)]
            sums = tables[rank - 1 - axis]
            score = score - abs(sums[(BATCH, HEAD, *start)] - sums[(BATCH, HEAD, *end)])
        return replace(s, score=score.expr)

    return rescored(f"polyline(corner={corner!r})" if corner != "key column" else "polyline", of, change)
