"""`@attnc.mechanism`: a small program over token sets, traced once into a graph of statements."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnc import ir
from attnc.errors import DeclarationError
from attnc.lang.recorded import Recorded


@dataclass(frozen=True)
class Rows:
    """A token set inside a mechanism: value number `n` of its graph."""

    n: int
    graph: Graph


class Graph:
    """Values 0, 1, 2 are q, k, v; each step makes the next from three earlier ones."""

    def __init__(self) -> None:
        self.steps: list[tuple[ir.Channel, tuple[int, int, int]]] = []
        self.result = 0

    def add(self, node: ir.Channel, *rows: Rows) -> Rows:
        """Append a step."""
        a, b, c = (r.n for r in rows)
        self.steps.append((node, (a, b, c)))
        return Rows(2 + len(self.steps), self)


def channel_attend(q: Rows, k: Rows, v: Rows) -> Rows:
    """S[i, j] = scale * sum_n q[n, i] k[n, j]; out[n, i] = sum_j softmax_j(S)[i, j] v[n, j]: tokens are contracted (DaViT)."""
    for r in (q, k, v):
        if not isinstance(r, Rows):
            raise DeclarationError(f"attnc.channel_attend takes token sets of a mechanism, not {type(r).__name__}")
    return q.graph.add(ir.Channel(), q, k, v)


class Mechanism(Recorded):
    """A declared mechanism with its hyper-parameters."""

    def __init__(self, name: str, body: Callable[[Rows, Rows, Rows], Rows]) -> None:
        self.name, self._body = name, body

    def __repr__(self) -> str:
        return f"<mechanism {self.name}>"

    def trace(self) -> Graph:
        """Run the declaration once on symbolic token sets."""
        graph = Graph()
        out = self._body(*(Rows(i, graph) for i in range(3)))
        if not isinstance(out, Rows):
            raise DeclarationError(
                f"mechanism {self.name}: returned {type(out).__name__}; return a token set, e.g. attnc.channel_attend(q, k, v)"
            )
        graph.result = out.n
        return graph


def mechanism(fn: Callable[..., Any]) -> Callable[..., Mechanism]:
    """Declare a mechanism: `fn(q, k, v, *, hyper...)`. Calling the result with the hyper-parameters gives a Mechanism."""
    parameters = list(inspect.signature(fn).parameters.values())
    if len(parameters) < 3 or any(p.kind is not p.KEYWORD_ONLY for p in parameters[3:]):
        raise DeclarationError(f"mechanism {fn.__name__}: write `def {fn.__name__}(q, k, v, *, ...)`")

    hypers = {p.name: p for p in parameters[3:]}

    def factory(*positional: object, **hyper: Any) -> Mechanism:
        if positional:
            raise DeclarationError(f"mechanism {fn.__name__}: hyper-parameters are given by keyword, not {positional[0]!r}")
        for name in hyper:
            if name not in hypers:
                takes = ", ".join(sorted(hypers)) or "none"
                raise DeclarationError(f"mechanism {fn.__name__}: unknown hyper-parameter {name!r} (it takes: {takes})")
        for name, p in hypers.items():
            if p.default is p.empty and name not in hyper:
                raise DeclarationError(f"mechanism {fn.__name__}: hyper-parameter {name!r} has no value")
        shown = ", ".join(f"{k}={v!r}" for k, v in hyper.items())
        return Mechanism(f"{fn.__name__}({shown})", lambda q, k, v: fn(q, k, v, **hyper))

    factory.__name__, factory.__doc__, factory.__module__ = fn.__name__, fn.__doc__, fn.__module__
    return factory
