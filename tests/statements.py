"""The statements that the suite draws: relations and scores of the library and of users, their algebra, and other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from hypothesis import strategies as st

import attnc
from attnc import ir
from attnc.lang.symbols import Table, as_expr
from attnc.patterns import (
    axial,
    band,
    causal,
    cross,
    dilated_blocks,
    full,
    grid,
    neighborhood,
    per_head,
    strip,
    window,
)
from attnc.patterns.relation import rescored


@attnc.pattern
def lookup(q: Any, k: Any, *, table: attnc.Table) -> Any:
    """A score read at places that wrap around, so it is in range for every pair."""
    return attnc.SCORE + table[attnc.HEAD, q[0] % 3, k[len(k) - 1] % 4]


@attnc.pattern
def decay(q: Any, k: Any, *, rate: attnc.Table) -> Any:
    """A slope per head times the distance (ALiBi, RMT)."""
    distance = sum(abs(a - b) for a, b in zip(q, k, strict=True))
    return attnc.SCORE - attnc.exp(rate[attnc.HEAD]) * distance


@attnc.pattern
def capped(q: Any, k: Any, *, cap: float) -> Any:
    """A soft cap."""
    return cap * attnc.tanh(attnc.SCORE / cap)


@attnc.pattern
def per_item(q: Any, k: Any, *, item: attnc.Table) -> Any:
    """A table with a batch dimension."""
    return attnc.SCORE * item[attnc.BATCH, attnc.HEAD]


@attnc.pattern
def documents(q: Any, k: Any, *, document: attnc.Table) -> Any:
    """Tokens of one document see each other: the relation reads an integer table."""
    return document[q.index % 5] == document[k.index % 5]


def shapes(pattern: attnc.Pattern, rank: int, reach: int, heads: int, batch: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tables a drawn pattern reads. `reach` bounds every library bias index."""
    known = {
        "table": (heads, 3, 4),
        "rate": (heads,),
        "item": (batch, heads),
        "document": (5,),
        "sink": (heads,),
        "bias": (heads, *(reach,) * rank),
        "absolute": (heads, reach, reach),
    }
    return {name: known[name] for name in pattern.trace(ir.AXES[rank]).tables}


@cache  # hypothesis checks each new strategy anew
def relations(rank: int) -> st.SearchStrategy[attnc.Pattern]:
    """Relations of the library and of users, without tables."""
    size, axes = st.integers(1, 4), ir.AXES[rank]
    each = [
        st.builds(window, size, st.integers(-2, 3)),
        st.builds(neighborhood, st.integers(2, 4), st.integers(1, 3), st.integers(1, 2), st.booleans()),
        st.builds(band, st.integers(0, 3), st.integers(0, 3)),
        st.builds(dilated_blocks, size, st.integers(1, 3)),
        st.builds(grid, size),
        st.builds(axial, st.sampled_from(axes)),
        st.builds(strip, st.sampled_from(axes), size),
        st.just(full()),
        st.just(causal()),
        *([st.builds(cross, size)] if rank == 2 else []),
        user_relations(rank),
    ]
    return st.one_of(each)


@cache
def user_relations(rank: int) -> st.SearchStrategy[attnc.Pattern]:
    """Conjunctions of comparisons between small integer expressions: whatever a user may write."""

    def declare(terms: list[Callable[[Any, Any], Any]]) -> attnc.Pattern:
        @attnc.pattern
        def user(q: Any, k: Any) -> Any:
            out = terms[0](q, k)
            for t in terms[1:]:
                out = out & t(q, k)
            return out

        return user()

    return st.lists(conditions(rank), min_size=1, max_size=3).map(declare)


@cache
def conditions(rank: int) -> st.SearchStrategy[Callable[[Any, Any], Any]]:
    """One comparison of one axis, sometimes of two."""

    def make(axis: int, other: int, kind: int, s: int, t: int, negate: bool) -> Callable[[Any, Any], Any]:
        def condition(q: Any, k: Any) -> Any:
            a, b = q[axis], k[axis]
            made = (
                lambda: (a + t) // s == (b + t) // s,
                lambda: abs(a - b) <= s,
                lambda: (a - b) % s == 0,
                lambda: b >= a // s * s + t,
                lambda: b <= attnc.max(attnc.min(a + t, q.size[axis] - s), 0) + s,
                lambda: a % s == b % s,
                lambda: (a - b) % s != t,
                lambda: b == q.size[axis] - 1 - a,
                lambda: a * b <= s * t,
                lambda: attnc.where(a > t, b < a, b >= a),
                lambda: a + q[other] >= b + k[other] - t,
                lambda: attnc.HEAD + a >= b,
                lambda: q.index >= k.index - t,
            )[kind]()
            return ~made if negate else made

        return condition

    axes = st.integers(0, rank - 1)
    return st.builds(make, axes, axes, st.integers(0, 12), st.integers(1, 4), st.integers(-3, 3), st.booleans())


@cache
def scored(rank: int) -> st.SearchStrategy[attnc.Pattern]:
    """Patterns with a score of their own."""
    return st.one_of(
        st.builds(window, st.integers(2, 3), st.integers(0, 1), bias=st.just("relative")),
        st.builds(neighborhood, st.integers(2, 3), st.integers(1, 2), bias=st.just("relative")),
        st.builds(dilated_blocks, st.integers(1, 3), st.integers(1, 2), bias=st.just("relative")),
        st.just(lookup()),
        st.just(decay()),
        st.just(capped(cap=2.0)),
        st.just(per_item()),
    )


@cache
def patterns(rank: int) -> st.SearchStrategy[attnc.Pattern]:
    """The algebra over relations, at most one part with a score of its own (so that every join is defined)."""

    def grow(inner: st.SearchStrategy[attnc.Pattern]) -> st.SearchStrategy[attnc.Pattern]:
        return st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
            st.builds(lambda a, n: a.shift(n), inner, st.integers(-2, 3)),
            st.builds(lambda a, n: a.dilate(n), inner, st.integers(1, 3)),
            st.builds(lambda a, b: a.heads([0]) | b.heads([1, 2, 3]), inner, inner),
            st.builds(lambda a, b: per_head([a, b]), inner, inner),
            st.builds(lambda a, axis: a.on(axis) if rank == 1 else a, inner, st.sampled_from(ir.AXES[rank])),
        )

    plain = st.recursive(relations(rank), grow, max_leaves=3)
    return st.one_of(
        plain,
        scored(rank),
        st.builds(lambda a, b: a & b, scored(rank), relations(rank)),
        st.builds(lambda a, b: a | b, scored(rank), relations(rank)),
        st.builds(lambda a, n: a.shift(n), scored(rank), st.integers(-1, 2)),
        st.builds(lambda a: a & documents(), plain),
    )


NORMALIZERS: dict[str, Callable[[Any], ir.Normalizer]] = {
    "sink": lambda sink: attnc.softmax(sink=sink),
    "sigmoid": lambda sink: attnc.sigmoid(),
    "relu": lambda sink: attnc.relu(),
    "relu cubed": lambda sink: attnc.relu(3),
    "queries": lambda sink: attnc.softmax(over="queries"),
    "queries with a sink": lambda sink: attnc.softmax(over="queries", sink=sink),
}


def weighted(of: attnc.Pattern, kind: str, *, post: bool = False, maps: bool | str = False) -> attnc.Pattern:
    """A pattern with other weights: a normaliser of NORMALIZERS (its table: `sink`), a post-factor, maps of the rows ("rotary", or
    l2norm where it is True)."""
    sink = Table("sink")

    def change(q: Any, k: Any, s: Any) -> Any:
        changes: dict[str, Any] = {"normalizer": NORMALIZERS[kind](sink)} if kind != "softmax" else {}
        if post:
            changes["post"] = as_expr(1 + abs(q[0] - k[0]) % 3)
        if maps == "rotary":
            changes |= {"q_map": attnc.rotary(50.0), "k_map": attnc.rotary(50.0)}
        elif maps == "interleaved":
            changes |= {n: attnc.rotary(interleaved=True) for n in ("q_map", "k_map")}
        elif maps:
            changes |= {"q_map": attnc.l2norm(), "k_map": attnc.l2norm(1e-3)}
        return replace(s, **changes)

    return rescored(kind, of, change)


MAPS = (False, False, True, "rotary", "interleaved")


@cache
def weights(rank: int) -> st.SearchStrategy[attnc.Pattern]:
    """Relations, scores and unions with every other normaliser, post-factors and row maps."""
    plain, own, kinds = relations(rank), scored(rank), st.sampled_from(("softmax", *NORMALIZERS))
    of = st.one_of(plain, own, st.builds(lambda a, b: a | b, plain, plain), st.builds(lambda a, b: a & b, own, plain))
    return st.builds(
        lambda p, kind, post, maps: weighted(p, kind, post=post, maps=maps), of, kinds, st.booleans(), st.sampled_from(MAPS)
    )


__all__ = [
    "MAPS", "NORMALIZERS", "capped", "conditions", "decay", "documents", "lookup", "patterns", "per_item", "relations", "scored",
    "shapes", "user_relations", "weighted", "weights",
]  # fmt: skip
