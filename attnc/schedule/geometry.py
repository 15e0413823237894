"""The geometry of a statement at concrete sizes: per axis, the two interval ends as small integer tables, and what follows
from them.

Coordinates are those of the *extended* grid: where `pad` adds virtual rows, a real token at position p has coordinate p +
before. On an axis, coordinate c = split * j + r; `lo[r, j] .. hi[r, j]` are the key indices i (coordinate split * i + r) that
query j sees, and `inverse_lo[r, i] .. inverse_hi[r, i]` the queries that see key i. Everything here is O(axis length), never
O(N^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc import ir
from attnc.analysis.axis import AxisForm
from attnc.analysis.evaluate import evaluate
from attnc.analysis.structure import Blocks, Structure, analyse
from attnc.errors import ShapeError

Ints = NDArray[np.int32]
LONGEST_TABLE = 4096  # beyond it an axis whose ends resist a closed form is taken as full, with its predicate evaluated in tiles


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis at concrete lengths. Lengths are extended ones; `real_*` and `before_*` say where the real tokens lie in them."""

    queries: int
    keys: int
    real_queries: int
    real_keys: int
    before_queries: int
    before_keys: int
    split: int
    lo: Ints  # [split, ceil(queries / split)]
    hi: Ints
    block: int  # tokens (of a residue class) per block where the ends are piecewise constant, 0 elsewhere
    shift: int  # blocks start at j = shift (mod block)
    gap_lo: Ints | None = None  # as lo and hi: the run of keys between them that the axis's conditions leave out (none: hi < lo);
    gap_hi: Ints | None = None  # None where they leave out nothing, or what is no one run
    exact: bool = True  # the interval without the gap is all that the axis's conditions allow
    others: Blocks | None = None  # a query sees every key but those of its own block, where that is all of the residual
    proved: Axis | None = None  # with the ends of its form, which GPU kernels compute; None: lo and hi are these

    @property
    def classes(self) -> int:
        """Number of residue classes that hold a token."""
        return min(self.split, max(self.queries, self.keys))

    def count(self, length: int, r: int) -> int:
        """Tokens of residue r on an axis of this length."""
        return (length - r + self.split - 1) // self.split if r < length else 0

    @cached_property
    def inverse_lo(self) -> Ints:
        """Least query index that sees key i: [split, ceil(keys / split)]."""
        return self._inverse()[0]

    @cached_property
    def inverse_hi(self) -> Ints:
        """Greatest query index that sees key i."""
        return self._inverse()[1]

    def _inverse(self) -> tuple[Ints, Ints]:
        per = -(-self.keys // self.split)
        first, last = np.zeros((self.split, per), np.int32), np.full((self.split, per), -1, np.int32)
        i = np.arange(per)
        for r in range(self.classes):
            n = self.count(self.queries, r)
            first[r] = np.searchsorted(self.hi[r, :n], i, "left")
            last[r] = np.searchsorted(self.lo[r, :n], i, "right") - 1
        return first, last

    def pairs(self, gaps: bool = False) -> int:
        """(query, key) pairs of the axis's intervals, over real queries and all (also virtual) keys. gaps: those in gaps not."""
        ends = [(1, self.lo, self.hi)]
        if gaps and self.gap_lo is not None and self.gap_hi is not None:
            ends.append((-1, self.gap_lo, self.gap_hi))
        total = 0
        for r in range(self.classes):
            j = np.arange(self.count(self.queries, r))
            position = j * self.split + r - self.before_queries
            real = (position >= 0) & (position < self.real_queries)
            for sign, lo, hi in ends:
                total += sign * int(np.maximum(hi[r, : len(j)] - lo[r, : len(j)] + 1, 0)[real].sum(dtype=np.int64))
        return total


@dataclass(frozen=True, eq=False)
class Geometry:
    """A program at concrete sizes. In flat geometry a grid of any rank is one axis, and coordinates follow by // and %."""

    structure: Structure
    attend: ir.Attend
    axes: tuple[Axis, ...]
    q_grid: tuple[int, ...]  # real sizes, as the user's grid
    k_grid: tuple[int, ...]
    q_prefix: int
    k_prefix: int

    @property
    def n_queries(self) -> int:
        """Query tokens, prefix included."""
        return self.q_prefix + int(np.prod(self.q_grid))

    @property
    def n_keys(self) -> int:
        """Real key tokens, prefix included."""
        return self.k_prefix + int(np.prod(self.k_grid))

    @property
    def padded(self) -> bool:
        """Some keys are virtual."""
        return any(a.keys != a.real_keys for a in self.axes)

    @property
    def gaps(self) -> bool:
        """Intervals and gaps of the axes say all that the relation does."""
        return self.structure.by_axis and all(a.exact for a in self.axes)

    @cached_property
    def sizes(self) -> dict[ir.Expr, int]:
        """Values of the size leaves that expressions of this program may mention (extended lengths)."""
        out = {}
        for i in range(self.attend.rank):
            for role, grid in (("q", self.q_grid), ("k", self.k_grid)):
                n = grid[i]
                if not self.structure.flat:
                    n = self.axes[i].queries if role == "q" else self.axes[i].keys
                out[ir.size(role, i)] = n  # type: ignore[arg-type]
        return out

    def allowed(self, heads: int = 1) -> int:
        """Score elements the statement allows, over `heads` heads: grid pairs, and pairs with a prefix token."""
        total = heads * int(np.prod([a.pairs() for a in self.axes], dtype=object))
        if self.structure.residual != ir.TRUE:
            total = self._count_residual(heads)
        nq, nk = self.n_queries - self.q_prefix, self.n_keys
        return total + heads * (self.q_prefix * nk + nq * self.k_prefix)

    def _count_residual(self, heads: int) -> int:
        """Count by evaluating the predicate one query tile at a time on the keys of its box."""
        total = 0
        for q, k in self.query_rows():
            total += int(self.mask(q, k, heads).sum())
        return total

    def query_rows(self) -> Any:
        """(query coordinates [rank, n], key coordinates [rank, m]) row by row of the slowest axis; for counting and drawing."""
        first, rest = self.axes[0], self.axes[1:]
        others_q = np.meshgrid(*[np.arange(a.real_queries) + a.before_queries for a in rest], indexing="ij") if rest else []
        others_k = np.meshgrid(*[np.arange(a.keys) for a in rest], indexing="ij") if rest else []
        step = 1 if rest else 64
        for p in range(0, first.real_queries, step):
            c = np.arange(p, min(p + step, first.real_queries)) + first.before_queries
            r, j = c % first.split, c // first.split
            low, high = first.lo[r, j].min(), first.hi[r, j].max()
            span = np.arange(low, high + 1)
            keys = np.unique((span[:, None] * first.split + np.unique(r)[None, :]).ravel())
            keys = keys[keys < first.keys]
            if rest:
                q = np.stack([np.full(others_q[0].size, c[0]), *[o.ravel() for o in others_q]])
                k0 = np.repeat(keys, others_k[0].size)
                k = np.stack([k0, *[np.tile(o.ravel(), len(keys)) for o in others_k]])
            else:
                q, k = c[None], keys[None]
            yield q, k

    def mask(self, q: Any, k: Any, heads: int, batch: int | None = None) -> NDArray[np.bool_]:
        """bool [heads, n, m]: the whole relation for extended query coordinates q [rank, n] and key coordinates k [rank, m].

        With batch, [batch, heads, n, m] where it differs from item to item.
        """
        out = np.ones((q.shape[1], k.shape[1]), bool)
        for a, cq, ck in zip(self.axes, q, k, strict=True):
            lo, hi = a.lo[cq % a.split, cq // a.split], a.hi[cq % a.split, cq // a.split]
            i = ck // a.split
            out &= (cq[:, None] % a.split == ck[None] % a.split) & (lo[:, None] <= i[None]) & (i[None] <= hi[:, None])
        residual = self.structure.residual
        if residual == ir.TRUE:
            return np.broadcast_to(out, (heads, *out.shape))
        leaves: dict[ir.Expr, Any] = dict(self.sizes)
        leaves |= {ir.coord("q", i): c[:, None] for i, c in enumerate(q)}
        leaves |= {ir.coord("k", i): c[None, :] for i, c in enumerate(k)}
        leaves[ir.HEAD], leaves[ir.HEADS] = np.arange(heads)[:, None, None], heads
        ops = {n.op for n in ir.walk(residual)}
        if "batch" in ops and batch is not None and "load" not in ops:
            leaves[ir.BATCH] = np.arange(batch)[:, None, None, None]
            return np.broadcast_to(out & evaluate(residual, leaves, np), (batch, heads, *out.shape))
        if ops & {"load", "batch"}:
            raise ShapeError(
                f"pattern {self.attend.name}: its relation reads runtime tables, so its keys are known only when it runs"
            )
        return np.broadcast_to(out & evaluate(residual, leaves, np), (heads, *out.shape))


def extension(tokens: ir.Tokens, grid: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(before, after) virtual rows per axis that `pad=` adds to a grid."""
    if tokens.pad is not None:
        return tokens.pad
    if tokens.pad_multiple is not None:
        return tuple((0, -n % m) for n, m in zip(grid, tokens.pad_multiple, strict=True))
    return tuple((0, 0) for _ in grid)


def _ends(form: AxisForm, n_q: int, n_k: int, sizes: dict[ir.Expr, int]) -> tuple[int, Ints, Ints]:
    leaves: dict[ir.Expr, Any] = dict(sizes)
    # a split longer than the axis puts each token into a class of its own, as one of the axis's length does
    split = min(int(evaluate(form.split, leaves, np)), max(n_q, n_k, LONGEST_TABLE))
    per = -(-n_q // split)
    leaves[ir.var("j")] = np.arange(per)[None, :]
    leaves[ir.var("r")] = np.arange(split)[:, None]
    lo, hi = (np.broadcast_to(evaluate(e, leaves, np), (split, per)) for e in (form.lo, form.hi))
    last = -(-n_k // split)  # cut before narrowing: ends far outside the axis would wrap around into it
    return split, np.clip(lo, 0, last).astype(np.int32), np.clip(hi, -1, last - 1).astype(np.int32)


def _tightened(
    s: Structure, axis: int, n_q: int, n_k: int, split: int, lo: Ints, hi: Ints, sizes: dict[ir.Expr, int]
) -> tuple[Ints, Ints, Ints, Ints, bool]:
    """Ends of an axis some conjuncts of which no rule knew: the hull of the keys they allow, evaluated on this axis alone; the run
    of keys in it that they do not allow, and whether that is all of them.

    The ends are made monotone (which only widens them); the conjuncts stay in the residual, so the relation is exact.
    """
    lo, hi = lo.copy(), hi.copy()
    gap_lo, gap_hi, exact = np.zeros_like(lo), np.full_like(hi, -1), True
    for r in range(min(split, n_q)):
        q, k = np.arange(r, n_q, split), np.arange(r, n_k, split)
        if not len(k):  # no key in this class: the ends are empty already
            continue
        leaves: dict[ir.Expr, Any] = {
            **sizes,
            ir.coord("q", axis): q[:, None],
            ir.coord("k", axis): k[None, :],
        }
        ok = np.ones((len(q), len(k)), bool)
        for c in s.unknown[axis]:
            ok &= evaluate(c, leaves, np)
        i = np.arange(len(k))[None, :]
        ok &= (lo[r, : len(q), None] <= i) & (i <= hi[r, : len(q), None])
        some = ok.any(1)
        first = np.where(some, ok.argmax(1), len(k))
        last = np.where(some, len(k) - 1 - ok[:, ::-1].argmax(1), -1)
        lo[r, : len(q)] = np.minimum.accumulate(first[::-1])[::-1]
        hi[r, : len(q)] = np.maximum.accumulate(last)
        left_out = (lo[r, : len(q), None] <= i) & (i <= hi[r, : len(q), None]) & ~ok
        gap_lo[r, : len(q)] = left_out.argmax(1)
        gap_hi[r, : len(q)] = gap_lo[r, : len(q)] + left_out.sum(1) - 1
        exact &= bool((left_out == ((gap_lo[r, : len(q), None] <= i) & (i <= gap_hi[r, : len(q), None]))).all())
    return lo, hi, gap_lo, gap_hi, exact


@lru_cache(maxsize=512)
def geometry(program: ir.Program, q_grid: tuple[int, ...], k_grid: tuple[int, ...]) -> Geometry:
    """The geometry of a program on concrete grids. Raises ShapeError where the grid does not have the program's rank."""
    a = program.attend
    assert isinstance(a, ir.Attend)
    if len(q_grid) != a.rank or len(k_grid) != a.rank:
        raise ShapeError(f"pattern {a.name}: grid {q_grid} has {len(q_grid)} axes, the pattern was traced on {a.rank}")
    same = program.same_grid
    padded = program.keys.pad is not None or program.keys.pad_multiple is not None
    s = analyse(a, same, padded)
    if s.flat:
        n = int(np.prod(q_grid))
        pads: tuple[tuple[tuple[int, int], ...], ...] = (((0, 0),), ((0, 0),))
        spans = [(n, n)]
    else:
        pads = (extension(program.queries, q_grid), extension(program.keys, k_grid))
        spans = list(zip(q_grid, k_grid, strict=True))
    sizes: dict[ir.Expr, int] = {}
    for i, (rq, rk) in enumerate(spans):
        sizes[ir.size("q", i)] = rq + sum(pads[0][i])
        if not same:
            sizes[ir.size("k", i)] = rk + sum(pads[1][i])
    axes = []
    for i, ((rq, rk), form) in enumerate(zip(spans, s.axes, strict=True)):
        (bq, aq), (bk, ak) = pads[0][i], pads[1][i]
        n_q, n_k = rq + bq + aq, rk + bk + ak
        split, lo, hi = _ends(form, n_q, n_k, sizes)
        others, proved = s.others[i] if same and not padded else None, None
        block = 0 if form.block is None else int(evaluate(form.block, sizes, np))
        shift = int(evaluate(form.shift, sizes, np)) % block if block else 0
        gap: tuple[Ints | None, Ints | None, bool] = None, None, not s.unknown[i]
        if s.unknown[i] and max(n_q, n_k) <= LONGEST_TABLE:
            proved = Axis(n_q, n_k, rq, rk, bq, bk, split, lo, hi, block, shift, others=others)
            lo, hi, gap_lo, gap_hi, exact = _tightened(s, i, n_q, n_k, split, lo, hi, sizes)
            some = exact and bool((gap_lo <= gap_hi).any())
            gap = gap_lo if some else None, gap_hi if some else None, exact
        axes.append(Axis(n_q, n_k, rq, rk, bq, bk, split, lo, hi, block, shift, *gap, others, proved))
    return Geometry(s, a, tuple(axes), q_grid, k_grid, program.queries.prefix, program.keys.prefix)
