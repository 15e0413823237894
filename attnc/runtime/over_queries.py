"""Softmax over queries by the kernels of softmax over keys, with queries and keys exchanged.

Exchanged, the weights A[j, i] = exp(score[i, j] - lse[j]) are a plain softmax of the rows k over the rows q. What the statement
asks for, out[i] = sum_j A[j, i] v[j], is what that attention's backward gives as the gradient of its values where the gradient of
its output is v. With grad_out as its values its output is dv, and its backward, at the output gradient v again, gives dk and dq:
dS = A (dA - delta) with dA[j, i] = grad_out[i] v[j] and delta[j] = sum_i A[j, i] dA[j, i] = dv[j] v[j]. So every backend that has a
forward and a backward has this; what the forward computes in vain are the gradients of queries and keys.

Virtual keys would be rows that ask, which kernels do not have: with `pad=` the rows of q, k and v are copied to the extended grid
(O(N D)), where `pad_k` and `pad_v` are rows like any other, and the relation leaves out the queries there that do not exist. Prefix
tokens, which virtual keys are hidden from, then lie behind the last rows of the grids, and the relation says whom they see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc import ir
from attnc.runtime.call import empty_like_order
from attnc.schedule.geometry import extension

PADS = ("pad_k", "pad_v")


@lru_cache(maxsize=256)
def exchanged(p: ir.Program) -> tuple[str, tuple[str, ...]]:
    """The unpadded program with queries and keys exchanged, normalised over its keys, without a sink: as text, and its tables'
    names."""
    a = p.attend
    assert isinstance(a, ir.Attend)
    other: dict[Any, ir.Role] = {"q": "k", "k": "q"}

    def rule(n: ir.Expr) -> ir.Expr | None:
        if n.op == "coord" or (n.op == "size" and not p.same_grid):
            return ir.Expr(n.op, (other[n.args[0]], n.args[1]), n.kind)
        return ir.index(other[n.args[0]]) if n.op == "index" else None

    relation, score = ir.rewrite(a.relation, rule), ir.rewrite(a.score, rule)
    post, dropout = (None if e is None else ir.rewrite(e, rule) for e in (a.post, a.dropout))
    attend = replace(a, relation=relation, score=score, post=post, dropout=dropout, normalizer=ir.SOFTMAX)
    return ir.to_json(replace(p, attend=attend, queries=p.keys, keys=p.queries)), attend.tables


Size = tuple[int, ...]


@dataclass(frozen=True)
class _Side:
    """A grid inside of the one that padding extends it to; prefix tokens fill as many more rows of its first axis as they need."""

    grid: Size
    pads: tuple[tuple[int, int], ...]
    prefix: int

    @property
    def more(self) -> int:
        """Rows of the first axis that hold prefix tokens."""
        return -(-self.prefix // math.prod(self._padded[1:]))

    @property
    def _padded(self) -> Size:
        return tuple(n + sum(pad) for n, pad in zip(self.grid, self.pads, strict=True))

    @property
    def extended(self) -> Size:
        """Lengths with virtual rows and those of prefix tokens."""
        return (self._padded[0] + self.more, *self._padded[1:])

    def real(self, rows: Tensor) -> Tensor:
        """A view [B, H, *grid, D] of the grid's tokens among rows [B, H, N, D] of the extended grid."""
        shaped = rows.view(*rows.shape[:2], *self.extended, rows.shape[-1])
        return shaped[:, :, *(slice(a, a + n) for n, (a, _) in zip(self.grid, self.pads, strict=True))]

    def first(self, rows: Tensor) -> Tensor:
        """A view [B, H, prefix, D] of the prefix tokens among them."""
        return rows.narrow(2, math.prod(self._padded), self.prefix)

    def among(self, rows: Tensor, virtual: Tensor | None) -> Tensor:
        """[B, H, N, D] of the extended grid: `rows` [B, H, N, D] or [B, H, *grid, D] in their places, `virtual` [H or 1, D]
        elsewhere, or zeros."""
        out = rows.new_zeros(*rows.shape[:2], math.prod(self.extended), rows.shape[-1])
        if virtual is not None:
            out += virtual[:, None].to(rows.dtype)
        if self.prefix:
            self.first(out).copy_(rows[:, :, : self.prefix])
            rows = rows[:, :, self.prefix :]
        self.real(out).copy_(rows.reshape(*rows.shape[:2], *self.grid, rows.shape[-1]))
        return out

    def taken(self, rows: Tensor, like: Tensor) -> Tensor:
        """Those of the tokens, in the shape of `like` but for the channels."""
        return self.tokens(rows).reshape(*like.shape[:-1], rows.shape[-1])

    def tokens(self, rows: Tensor) -> Tensor:
        """[B, H, N, D] of the tokens."""
        found = self.real(rows).flatten(2, -2)
        return torch.cat([self.first(rows), found], 2) if self.prefix else found

    def of_virtual(self, rows: Tensor, like: Tensor) -> Tensor:
        """Summed over batch items and virtual rows, as a gradient of pad_k or pad_v."""
        rest = rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
        self.real(rest).zero_()
        self.first(rest).zero_()
        return rest.sum((0, 2)).sum_to_size(like.shape)


@lru_cache(maxsize=256)
def _extended(p: ir.Program, q_grid: Size, k_grid: Size) -> tuple[str, _Side, _Side]:
    """The program on the extended grids as grids of their own, as text, and where tokens lie in them."""
    a = p.attend
    assert isinstance(a, ir.Attend)
    queries, keys = (_Side(grid, extension(t, grid), t.prefix) for t, grid in ((p.queries, q_grid), (p.keys, k_grid)))
    if queries.prefix or keys.prefix:
        p, a = _with_prefix_rows(p, a, queries, keys)
    else:
        a = replace(a, relation=ir.make("and", a.relation, _inside(p, "q", queries)))
    alone = [ir.Tokens((None,) * a.rank) for _ in ir.ROLES]
    return ir.to_json(replace(p, attend=a, queries=alone[0], keys=alone[1])), queries, keys


def _inside(p: ir.Program, role: ir.Role, side: _Side) -> ir.Expr:
    """The place is no virtual one, and no prefix token's."""
    tokens, found = p.queries if role == "q" else p.keys, ir.TRUE
    for axis, (n, (before, after)) in enumerate(zip(side.grid, side.pads, strict=True)):
        at, more = ir.coord(role, axis), 0 if axis else side.more
        if before:
            found = ir.make("and", found, ir.make("le", ir.const(before), at))
        if (after or more) and tokens.pad is not None:  # one text for every size
            size = ir.size("q" if p.same_grid else role, axis)
            found = ir.make("and", found, ir.make("lt", at, ir.make("sub", size, ir.const(after + more))))
        elif after or more:
            found = ir.make("and", found, ir.make("lt", at, ir.const(before + n)))
    return found


def _with_prefix_rows(p: ir.Program, a: ir.Attend, queries: _Side, keys: _Side) -> tuple[ir.Program, ir.Attend]:
    """The program whose prefix tokens lie on the grids, behind all else: they see tokens and are seen by tokens, as they are."""
    sides = {"q": queries, "k": keys}
    below: dict[ir.Role, ir.Expr] = {}  # the grid without them, virtual places included
    among: dict[ir.Role, ir.Expr] = {}  # a prefix token
    number: dict[ir.Role, ir.Expr] = {}  # `index`, which is negative for them
    for role in ir.ROLES:
        side, length = sides[role], ir.size(role, 0)
        end = ir.make("sub", length, ir.const(side.more))
        below[role] = ir.make("lt", ir.coord(role, 0), end)
        place = ir.make("sub", ir.coord(role, 0), end) if side.more > 1 else ir.ZERO
        for axis in range(1, a.rank):
            place = ir.make("add", ir.make("mul", place, ir.size(role, axis)), ir.coord(role, axis))
        full = math.prod(side.extended[1:]) * side.more == side.prefix
        known = ir.TRUE if full else ir.make("lt", place, ir.const(side.prefix))
        among[role] = ir.make("and", ir.make("le", end, ir.coord(role, 0)), known) if side.prefix else ir.FALSE
        number[role] = ir.make("where", below[role], ir.index(role), ir.make("sub", place, ir.const(side.prefix)))

    def on_grid(e: ir.Expr, *, index: bool = False) -> ir.Expr:
        """A statement's expression on grids that are longer: sizes are those without prefix tokens, which read what the last row of
        the grid does."""

        def rule(n: ir.Expr) -> ir.Expr | None:
            role: ir.Role = n.args[0] if n.args else "q"
            if n.op == "size":
                return ir.make("sub", n, ir.const(sides[role].more)) if n.args[1] == 0 else n
            if n.op == "coord" and n.args[1] == 0 and sides[role].prefix:
                return ir.make("min", n, ir.make("sub", ir.size(role, 0), ir.const(sides[role].more + 1)))
            return number[role] if n.op == "index" and index else None

        return ir.rewrite(e if index else ir.flatten_index(e, a.rank, p.same_grid), rule)

    apart = replace(p, same_grid=False)
    ours = {role: _inside(apart, role, sides[role]) for role in ir.ROLES}
    seen = ir.make("or", ours["k"], among["k"])
    relation = ir.make("or", ir.all_of((ours["q"], below["k"], on_grid(a.relation))), ir.make("and", among["q"], seen))
    relation = ir.make("or", relation, ir.make("and", ours["q"], among["k"]))
    both = ir.make("and", below["q"], below["k"])
    score = a.score if a.score == ir.SCORE else ir.make("where", both, on_grid(a.score), ir.SCORE)
    post = None if a.post is None else ir.make("where", both, on_grid(a.post), ir.const(1.0))
    dropout = None if a.dropout is None else on_grid(a.dropout, index=True)
    return apart, replace(a, relation=relation, score=score, post=post, dropout=dropout)


@dataclass(frozen=True)
class Padded:
    """One call with virtual rows, by the operators (see Exchange) of the extended grids. tables: `pad_k` and `pad_v` too."""

    attend: Callable[..., tuple[Tensor, Tensor]]
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]
    program: ir.Program
    tables: dict[str, Tensor]
    scale: float
    rest: tuple[Any, ...]

    def _arguments(self) -> tuple[_Side, _Side, list[Tensor], tuple[Any, ...]]:
        q_grid, k_grid, _, *options = self.rest
        text, queries, keys = _extended(self.program, q_grid, k_grid)
        own = [t for n, t in self.tables.items() if n not in PADS]
        return queries, keys, own, (self.scale, queries.extended, keys.extended, text, *options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out as q with Dv channels, and lse [B, H, Nk] of the keys that are tokens."""
        queries, keys, tables, rest = self._arguments()
        rows = queries.among(q, None), keys.among(k, self.tables["pad_k"]), keys.among(v, self.tables["pad_v"])
        out, lse = self.attend(*rows, tables, *rest)
        found = empty_like_order(q, v.shape[-1]).copy_(queries.taken(out, q))
        return found, keys.tokens(lse[..., None])[..., 0].contiguous()

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """dq, dk, dv and the gradients of tables."""
        queries, keys, tables, rest = self._arguments()
        pad_k, pad_v = self.tables["pad_k"], self.tables["pad_v"]
        rows = queries.among(q, None), keys.among(k, pad_k), keys.among(v, pad_v)
        of_lse = None if grad_lse is None else keys.among(grad_lse[..., None], None)[..., 0]
        out, every = self.attend(*rows, tables, *rest)
        given = queries.among(grad_out, None)
        dq, dk, dv, gradients = self.attend_backward(*rows, tables, out, every, given, of_lse, *rest)
        found = dict(zip((n for n in self.tables if n not in PADS), gradients, strict=True))
        found |= {"pad_k": keys.of_virtual(dk, pad_k), "pad_v": keys.of_virtual(dv, pad_v)}
        return queries.taken(dq, q), keys.taken(dk, k), keys.taken(dv, v), found


@dataclass(frozen=True)
class Exchange:
    """One call with queries and keys exchanged. attend, attend_backward: the operators' own (see runtime.operator).

    rest: what follows scale in their arguments: grids, the program's text, the backend, tune.
    """

    attend: Callable[..., tuple[Tensor, Tensor]]
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]
    program: ir.Program
    tables: dict[str, Tensor]
    scale: float
    rest: tuple[Any, ...]

    @property
    def _sink(self) -> str | None:
        assert isinstance(self.program.attend, ir.Attend)
        return self.program.attend.normalizer.sink

    def _arguments(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        text, names = exchanged(self.program)
        q_grid, k_grid, _, *options = self.rest
        return [self.tables[n] for n in names], (self.scale, k_grid, q_grid, text, *options)

    def _with_sink(self, lse: Tensor) -> Tensor:
        return lse if self._sink is None else torch.logaddexp(lse, self.tables[self._sink].to(lse.dtype).view(1, -1, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out as q with Dv channels, and lse [B, H, Nk]."""
        k, v = _for_each_head(q, k, v)
        tables, rest = self._arguments()
        nothing = empty_like_order(q, v.shape[-1]).zero_()
        out, lse = self.attend(k, q, nothing, tables, *rest)
        lse = self._with_sink(lse)
        with _without_saved_tensor_hooks():
            _, _, found, _ = self.attend_backward(k, q, nothing, tables, out, lse, v, None, *rest)
        return found, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """dq, dk, dv and the gradients of tables."""
        kv_heads, names = k.shape[1], exchanged(self.program)[1]
        k, v = _for_each_head(q, k, v)
        tables, rest = self._arguments()
        grad_out = grad_out.to(q.dtype)
        # in half precision delta, which dA may cancel to the bit, is made of a dv that was not rounded
        exact, own = self.attend(*(t.to(lse.dtype) for t in (k, q, grad_out)), tables, *rest)
        found: dict[str, Tensor] = {}
        if self._sink is not None:
            seen = own != float("-inf")
            exact = exact * torch.where(seen, torch.exp(own - lse), 0.0).view(*exact.shape[:-1], 1)
        dv = exact.to(q.dtype)
        if dv.dtype != lse.dtype:  # the kernels' delta is dv's
            more = ((dv - exact) * v).sum(-1).view(lse.shape)
            kernels_grad_lse: Tensor | None = more if grad_lse is None else more + grad_lse.to(lse.dtype)
        else:
            kernels_grad_lse = grad_lse
        if self._sink is not None:
            delta = (exact * v.to(lse.dtype)).sum(-1).view(lse.shape)
            delta = delta if grad_lse is None else delta - grad_lse.to(lse.dtype)
            sink = self.tables[self._sink]
            weight = torch.where(lse != float("-inf"), torch.exp(sink.to(lse.dtype).view(1, -1, 1) - lse), 0.0)
            found[self._sink] = -(weight * delta).sum((0, 2)).sum_to_size(sink.shape)
        dk, dq, _, gradients = self.attend_backward(k, q, grad_out, tables, dv, lse, v, kernels_grad_lse, *rest)
        found |= dict(zip(names, gradients, strict=True))
        return dq, _for_key_heads(dk, kv_heads), _for_key_heads(dv, kv_heads), found


@contextmanager
def _without_saved_tensor_hooks() -> Iterator[None]:
    """A backward inside a forward, which checkpointing watches by hooks under which torch.func does not differentiate.

    They wait outside: nothing in here is saved for autograd.
    """
    graph: Any = torch._C._autograd
    waiting = []
    while (top := graph._top_saved_tensors_default_hooks(True)) is not None:
        waiting.append(top)
        graph._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(waiting):
            graph._push_saved_tensors_default_hooks(*pair)


def _for_each_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once per query head: as rows that ask, each has a softmax of its own."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _for_key_heads(t: Tensor, heads: int) -> Tensor:
    """Summed over the query heads that share a key head."""
    if t.shape[1] == heads:
        return t
    grouped = t.reshape(t.shape[0], heads, -1, *t.shape[2:])
    return grouped.sum(2, dtype=torch.promote_types(t.dtype, torch.float32)).to(t.dtype)
