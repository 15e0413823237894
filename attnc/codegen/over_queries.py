"""The meaning of softmax over queries: weights[i, j] = exp(score[i, j] - lse[j]), lse[j] over the queries that see key j.

Streamed over chunks of queries, each against every key: once for lse, once for the output; the backward differentiates both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnc.codegen import products
from attnc.codegen.blocks import Pairs, Tile, Tiles, compute_dtype, flat, float_tables, gather, pairs_of
from attnc.runtime.call import Call, empty_like_order

INF = float("inf")


def _column_lse(x: Pairs) -> Tensor:
    """[B, H, m]: over the block's queries; -inf for a key that none of them sees."""
    masked = torch.where(x.allowed, x.score, -INF)
    some = x.allowed.any(-2, keepdim=True)
    found = torch.logsumexp(torch.where(some, masked, 0.0), -2)  # keys without queries: keep every derivative finite
    return torch.where(some[..., 0, :], found, -INF)[:, :, 0]


def _weighted(x: Pairs, lse: Tensor) -> Tensor:
    """[B, H, 1, n, Dv]: the block's output, from the lse [B, H, m] of all queries."""
    lse = lse[:, :, None, None]
    weight = torch.where(x.allowed, torch.exp(torch.where(x.allowed, x.score - torch.where(lse != -INF, lse, 0.0), 0.0)), 0.0)
    return x.output(weight)


class _Walk:
    """One call's rows in what sums are kept in, and its blocks: each has some of the queries and all keys, virtual ones too."""

    def __init__(self, call: Call, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, *others: Tensor) -> None:
        dtype, self.finite = compute_dtype(q), products.finite(call.tables, q, k, v, *others)
        self.call, self.dtype, self.group = call, dtype, q.shape[1] // k.shape[1]
        self.rows = [flat(t) for t in (q, k, v)]
        self.tables = float_tables(call, dtype)
        self.tiles = list(tiles(call, q.device, q.shape[0] * q.shape[1]))
        self.keys = self.tiles[0].keys[0] if self.tiles else torch.empty(0, dtype=torch.long, device=q.device)

    def gathered(self, tile: Tile) -> list[Tensor]:
        """q, k and v of a block."""
        tokens = (tile.queries, tile.keys, tile.keys)
        return [gather(t, i).to(self.dtype) for t, i in zip(self.rows, tokens, strict=True)]

    def pairs(self, tile: Tile, rows: Iterable[Tensor], learned: dict[str, Tensor] | None = None) -> Pairs:
        """The statement on a block."""
        q, k, v = rows
        return pairs_of(self.call, tile, q, k, v, {**self.tables, **(learned or {})}, self.group, self.finite)

    def sink(self) -> Tensor | None:
        """The sink's logit [1, H or 1, 1]."""
        name = self.call.attend.normalizer.sink
        return None if name is None else self.tables[name].view(1, -1, 1)

    def lse(self) -> Tensor:
        """[B, H, m] of all queries, and of the sink."""
        q = self.rows[0]
        total = torch.full((*q.shape[:2], len(self.keys)), -INF, dtype=self.dtype, device=q.device)
        for tile in self.tiles:
            total = torch.logaddexp(total, _column_lse(self.pairs(tile, self.gathered(tile))))
        sink = self.sink()
        return total if sink is None else torch.logaddexp(total, sink)


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """out as q with Dv channels, and lse [B, H, Nk] of the real keys."""
    walk = _Walk(call, q, k, v, tiles)
    lse, out = walk.lse(), empty_like_order(q, v.shape[-1])
    rows = torch.empty((*walk.rows[0].shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    for tile in walk.tiles:
        rows[:, :, tile.queries[0]] = _weighted(walk.pairs(tile, walk.gathered(tile)), lse)[:, :, 0].to(q.dtype)
    out.copy_(rows.view(out.shape))
    real = walk.keys >= 0
    found = lse.new_empty((*lse.shape[:2], walk.rows[1].shape[2]))
    found[:, :, walk.keys[real]] = lse[:, :, real]
    return out, found


def backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor | None, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Gradients of q, k, v and of every floating-point table: first with the lse held fixed, then through it."""
    walk = _Walk(call, q, k, v, tiles, grad_out)
    lse, flat_g = walk.lse(), flat(grad_out)
    grad_of_lse, real = torch.zeros_like(lse), walk.keys >= 0
    if grad_lse is not None:
        grad_of_lse[:, :, real] += torch.where(lse[:, :, real] != -INF, grad_lse[:, :, walk.keys[real]].to(walk.dtype), 0.0)
    learned = {n: t for n, t in walk.tables.items() if t.is_floating_point()}
    sums = [torch.zeros(t.shape, dtype=walk.dtype, device=q.device) for t in walk.rows]
    table_sums = {n: torch.zeros_like(t) for n, t in learned.items()}

    def add(tile: Tile, parts: list[Any], tables: dict[str, Tensor]) -> None:
        for total, part, tokens in zip(sums, parts, (tile.queries[0], walk.keys, walk.keys), strict=True):
            total.index_add_(2, tokens[tokens >= 0], part[:, :, 0, tokens >= 0])
        for n, part in tables.items():
            table_sums[n] += part

    for tile in walk.tiles:

        def output(qb: Tensor, kb: Tensor, vb: Tensor, t: dict[str, Tensor], at: Tensor, tile: Tile = tile) -> Tensor:
            return _weighted(walk.pairs(tile, (qb, kb, vb), t), at)

        _, vjp, *_ = torch.func.vjp(output, *walk.gathered(tile), learned, lse)
        *parts, tables, at = vjp(gather(flat_g, tile.queries).to(walk.dtype))
        add(tile, parts, tables)
        grad_of_lse += at
    for tile in walk.tiles:

        def column(qb: Tensor, kb: Tensor, vb: Tensor, t: dict[str, Tensor], tile: Tile = tile) -> Tensor:
            return _column_lse(walk.pairs(tile, (qb, kb, vb), t))

        mine, vjp, *_ = torch.func.vjp(column, *walk.gathered(tile), learned)
        share = torch.where(mine != -INF, torch.exp(mine - lse), 0.0)
        *parts, tables = vjp(grad_of_lse * share)
        add(tile, parts, tables)
    sink, name = walk.sink(), call.attend.normalizer.sink
    if sink is not None and name is not None:
        share = torch.where(lse != -INF, torch.exp(sink - lse), 0.0)
        table_sums[name] += (grad_of_lse * share).sum((0, 2)).sum_to_size(sink.numel())
    shaped = [t.view(x.shape).to(x.dtype) for t, x in zip(sums, (q, k, v), strict=True)]
    return shaped[0], shaped[1], shaped[2], {n: t.to(call.tables[n].dtype) for n, t in table_sums.items()}
