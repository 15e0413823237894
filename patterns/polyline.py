"""Polyline path mask (PPMA, Zhao et al. 2025): decays along the two-legged path from query to key, from prefix sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from attnc.errors import DeclarationError
from attnc.lang.functions import BATCH, HEAD, Statement
from attnc.lang.pattern import Pattern
from attnc.lang.symbols import Point, Sym, Table
from attnc.patterns.relation import rescored


def polyline(of: Pattern | None = None, *, corner: Literal["key column", "key row"] = "key column") -> Pattern:
    """score - |across[q.y, q.x] - across[q.y, k.x]| - |down[q.y, k.x] - down[k.y, k.x]|: along the query's row to the key's column,
    then along that column; with corner="key row" along the query's column first.

    Tables `across`, `down` [B or 1, H or 1, Y, X]: the sums of step costs along each row and down each column, made from the
    image. PPMA averages the outputs of both corners; its cheap form is `polyline(axial("x"))`, then `polyline(axial("y"))`.
    """
    if corner not in ("key column", "key row"):
        raise DeclarationError(f"polyline(corner={corner!r}): 'key column' or 'key row'")
    across, down = Table("across"), Table("down")

    def change(q: Point, k: Point, s: Statement) -> Statement:
        def at(table: Table, y: Sym, x: Sym) -> Sym:
            return table[BATCH, HEAD, y, x]

        # the corner, and whose row and whose column the path runs along
        y, x, row, column = (q.y, k.x, q, k) if corner == "key column" else (k.y, q.x, k, q)
        horizontal = abs(at(across, row.y, row.x) - at(across, y, x))
        vertical = abs(at(down, column.y, column.x) - at(down, y, x))
        return replace(s, score=(Sym(s.score) - horizontal - vertical).expr)

    return rescored(f"polyline(corner={corner!r})" if corner != "key column" else "polyline", of, change)
