"""Statements made of expressions, and the token sets they are about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from attnc.ir.expr import HEAD, SCORE, TRUE, Expr, load, walk


@dataclass(frozen=True, slots=True)
class Normalizer:
    """How scores become weights. softmax: over "keys" or "queries", `sink` names a table of one extra logit per head."""

    kind: Literal["softmax", "sigmoid", "relu"] = "softmax"
    over: Literal["keys", "queries"] = "keys"
    sink: str | None = None
    power: int = 1


SOFTMAX = Normalizer()


@dataclass(frozen=True, slots=True)
class RowMap:
    """A map applied to each row of q or k before the product: "l2norm" (y = x / max(|x|, eps)), or "rotary" (see
    codegen.around.rotated_rows), by powers of `base`, of neighbouring channels where they are interleaved."""

    kind: Literal["l2norm", "rotary"] = "l2norm"
    eps: float = 1e-12
    base: float = 10000.0
    interleaved: bool = False


@dataclass(frozen=True)
class Attend:
    """out[i] = sum over keys j with relation(i, j) of normalizer(score(i, j)) * post(i, j) * v[j].

    dropout is one more factor, which prefix tokens have, too (see analysis.dropout).
    """

    name: str
    rank: int
    relation: Expr = TRUE
    score: Expr = SCORE
    normalizer: Normalizer = SOFTMAX
    post: Expr | None = None
    q_map: RowMap | None = None
    k_map: RowMap | None = None
    dropout: Expr | None = None

    @cached_property
    def loads(self) -> dict[str, Expr]:
        """The runtime tables in order of first use, each with one of its elements as the statement reads it."""
        found: dict[str, Expr] = {}
        for e in (self.relation, self.score, self.post, self.dropout):
            for n in walk(e) if e is not None else ():
                if n.op == "load":
                    found.setdefault(n.args[0], n)
        if self.normalizer.sink:
            found.setdefault(self.normalizer.sink, load(self.normalizer.sink, (HEAD,)))
        return found

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """Names of the runtime tables, in order of first use."""
        return tuple(self.loads)

    @cached_property
    def int_tables(self) -> tuple[str, ...]:
        """Tables that the relation or dropout reads: integers, without a gradient."""
        return tuple(name for name, e in self.loads.items() if e.kind == "int")

    def table_rank(self, name: str) -> int:
        """Number of dimensions of a table."""
        return len(self.loads[name].children)


@dataclass(frozen=True, slots=True)
class Channel:
    """Tokens are contracted: S[i, j] = scale * sum_n q[n, i] k[n, j]; out[n, i] = sum_j softmax_j(S)[i, j] v[n, j] (DaViT)."""

    name: str = "channel"


@dataclass(frozen=True, slots=True)
class Tokens:
    """An ordered token set: `prefix` tokens, then a row-major grid. None is a length known only when the operator runs.

    `pad` extends each axis by (before, after) virtual rows; "multiple" was resolved to `pad_multiple` per axis (1: none). The
    relation alone gives virtual keys to queries: prefix tokens, which it does not tell of, see the keys that are tokens.
    """

    grid: tuple[int | None, ...]
    prefix: int = 0
    pad: tuple[tuple[int, int], ...] | None = None
    pad_multiple: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """A statement over a query token set and a key token set: all that a backend needs to know besides tensors.

    same_grid: keys lie on the queries' grid, and the statement's sizes are the query's; otherwise each grid has its own.
    """

    attend: Attend | Channel
    queries: Tokens
    keys: Tokens
    same_grid: bool = True
