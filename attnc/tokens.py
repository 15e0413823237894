"""How an operator reads q, k and v: as rows, which lie on grids of queries and of keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnc.arguments import GridLike, call_sizes
from attnc.errors import ShapeError
from attnc.runtime import layout as layouts

Lengths = tuple[int | None, ...]  # None: open


@dataclass(frozen=True)
class Tokens:
    """What an operator was told of its tokens. axes: their names, None where the rank is open, too. kv_grid: where it is not the
    queries'. prefix: tokens before the grid."""

    name: str  # of the statement
    heads: int | None
    layout: layouts.Layout | None
    axes: tuple[str, ...] | None
    grid: Lengths | None
    kv_grid: Lengths | None
    prefix: int
    kv_prefix: int

    @property
    def same_grid(self) -> bool:
        """Keys lie where queries do."""
        return self.kv_grid is None

    def rows(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> tuple[Tensor, ...]:
        """q, k and v as rows, or the three of them in one tensor."""
        name = self.name
        if self.layout is None:
            if k is None or v is None:
                raise ShapeError(
                    f"{name}: q, k and v are three tensors; for one packed tensor give layout='b (y x) (three h d)' or alike"
                )
            for what, t in (("q", q), ("k", k), ("v", v)):
                if t.dim() != 4:
                    raise ShapeError(
                        f"{name}: {what} has shape {tuple(t.shape)}, expected [B, H, N, D]; say any other with layout="
                    )
            return q, k, v
        if self.layout.packed:
            if k is not None or v is not None:
                raise ShapeError(
                    f"{name}: the layout {self.layout.text!r} packs q, k and v in the first argument; k and v are left out"
                )
            return (layouts.to_rows(q, self.layout, self.heads, "qkv"),)
        if k is None or v is None:
            raise ShapeError(f"{name}: the layout {self.layout.text!r} has no `three`: q, k and v are three tensors")
        out: list[Tensor] = []
        for what, t in (("q", q), ("k", k), ("v", v)):
            heads = self.heads
            if heads and what != "q" and self.layout.joint:
                at = next(i for i, g in enumerate(self.layout.groups) if "h" in g)
                width = q.shape[at] // heads
                if what == "k" and t.dim() == q.dim() and width and t.shape[at] % width == 0:
                    heads = t.shape[at] // width  # grouped-query: fewer heads of the same width
                elif what == "v":
                    heads = out[1].shape[1]
            out.append(layouts.to_rows(t, self.layout, heads, what))
        return tuple(out)

    def grids(self, q: Tensor, k: Tensor, grid: GridLike, rank: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths of the axes of queries and keys. rank: of the grid, where sizes= tells."""
        name = self.name
        given = call_sizes(grid, self.axes, name)
        if q.dim() > 4 or (self.layout is not None and self.layout.separate):
            seen: tuple[int, ...] = tuple(q.shape[2:-1])
            kv_seen: tuple[int, ...] = tuple(k.shape[2:-1])
            if len(seen) == 1 and self.prefix:
                seen = (seen[0] - self.prefix,)
            if len(kv_seen) == 1 and self.kv_prefix:
                kv_seen = (kv_seen[0] - self.kv_prefix,)
            if given is not None and given != seen:
                raise ShapeError(f"{name}: grid={grid!r}, but q lies on {seen}")
            given = seen
        else:
            kv_seen = ()
        fixed = self.grid
        if given is None:
            if fixed is not None and None not in fixed:
                given = tuple(n for n in fixed if n is not None)
            elif self.axes is None or len(self.axes) == 1:
                if self.axes is None and rank != 1:
                    raise ShapeError(
                        f"{name}: compiled without a grid: pass grid=(height, width) with the call, or to attnc.compile"
                    )
                given = (q.shape[2] - self.prefix,)
            else:
                raise ShapeError(f"{name}: the lengths of ({', '.join(self.axes)}) are open: pass grid= with the call")
        elif fixed is not None and any(a is not None and a != b for a, b in zip(fixed, given, strict=False)):
            raise ShapeError(f"{name}: compiled for grid={fixed}, called on {given}")
        kv = given
        if not self.same_grid:
            fixed_kv = self.kv_grid or ()
            if None in fixed_kv and not kv_seen:
                raise ShapeError(f"{name}: kv_grid={fixed_kv} is open: use a layout with separate axes")
            kv = kv_seen or tuple(n for n in fixed_kv if n is not None)
            if any(a is not None and a != b for a, b in zip(fixed_kv, kv, strict=False)):
                raise ShapeError(f"{name}: compiled for kv_grid={fixed_kv}, called on {kv}")
        elif kv_seen and kv_seen != given:
            raise ShapeError(f"{name}: q lies on {given} and k on {kv_seen}; compile with kv_grid= where the two grids differ")
        for what, t, g, p in (("q", q, given, self.prefix), ("k", k, kv, self.kv_prefix)):
            tokens, expected = 1, 1
            for n in t.shape[2:-1]:
                tokens *= n
            for n in g:
                expected *= n
            if tokens != expected + p:
                beside = f" and {p} prefix tokens" if p else ""
                raise ShapeError(f"{name}: {what} has {tokens} tokens, the grid {g}{beside} make {expected + p}")
        return given, kv
