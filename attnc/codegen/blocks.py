"""Attention of blocks in plain PyTorch, forward and backward: the arithmetic that the eager meaning and the portable backend
share.

A block is a set of tiles [T], each with n queries and m keys. `Tile` says which tokens they are; the drivers gather rows,
evaluate the statement on coordinates and put rows back. The two backends differ only in the tiles they hand over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.codegen import products
from attnc.codegen.around import turned_channels
from attnc.runtime.call import Call, empty_like_order, lse_like


@dataclass(frozen=True)
class Tile:
    """Tokens of T tiles. Token numbers count the prefix; -1 is no query (n side), -1 a virtual key and -2 no key (m side).

    Coordinates are extended ones, one [T, n] or [T, m] tensor per axis of the statement; prefix tokens have coordinate -1 on
    all.
    """

    queries: Tensor  # [T, n]
    keys: Tensor  # [T, m]
    q_coords: tuple[Tensor, ...]
    k_coords: tuple[Tensor, ...]


Tiles = Callable[[Call, torch.device, int], Iterable[Tile]]


def flat(t: Tensor) -> Tensor:
    """[B, H, N, D] from [B, H, *grid, D]."""
    return t if t.dim() == 4 else t.flatten(2, -2)


@dataclass(frozen=True)
class Pairs:
    """What a block's statement comes to: [B, H, T, n, m] scores, pairs allowed, factors of weights; v [B, H, T, m, Dv]."""

    score: Tensor
    allowed: Tensor
    factor: Tensor | None
    v: Tensor
    finite: bool

    def output(self, weight: Tensor) -> Tensor:
        """[B, H, T, n, Dv] of weights that are 0 for pairs that are not allowed, before their factors."""
        weight = weight if self.factor is None else weight * self.factor
        return products.values(weight, self.v, None if self.finite else self.allowed)


def pairs_of(call: Call, tile: Tile, q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor], group: int, finite: bool) -> Pairs:
    """The statement on gathered rows q [B, H, T, n, D], k [B, Hkv, T, m, D], v [B, Hkv, T, m, Dv].

    finite: all rows, and the output's gradients, are; what is not allowed adds nothing even where they are not.
    """
    a = call.attend
    virtual, absent = (tile.keys == -1), (tile.keys == -2)
    if "pad_k" in tables:
        pick = virtual[..., None]
        k = torch.where(pick, tables["pad_k"][:, None, None, :], k)
        v = torch.where(pick, tables["pad_v"][:, None, None, :], v)
    q, k = (_mapped(rows, m, coords) for rows, m, coords in ((q, a.q_map, tile.q_coords), (k, a.k_map, tile.k_coords)))
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    inside: list[Tensor] = []  # the pairs whose score counts, once known; others read 0: an infinite slope must not meet 0

    def load(name: str, indices: tuple[Tensor | int, ...]) -> Tensor:
        t = tables[name]
        at = []
        for d, i in enumerate(indices):  # pairs outside the relation may index anything: their value is not used
            index = torch.as_tensor(i, device=t.device)
            at.append(index.clamp(0, t.shape[d] - 1))
        found = t[tuple(at)]
        zero = 0.0 if found.is_floating_point() else 0
        return torch.where(inside[-1], found, zero) if inside else found

    leaves: dict[ir.Expr, object] = {**call.geometry.sizes}
    for i, (cq, ck) in enumerate(zip(tile.q_coords, tile.k_coords, strict=True)):  # a prefix token's -1 may make a divisor 0
        leaves[ir.coord("q", i)], leaves[ir.coord("k", i)] = cq.clamp_min(0)[:, :, None], ck.clamp_min(0)[:, None, :]
    leaves[ir.HEAD] = torch.arange(q.shape[1], device=q.device).view(-1, 1, 1, 1)
    leaves[ir.HEADS] = q.shape[1]
    leaves[ir.BATCH] = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1, 1)
    same = call.program.same_grid

    def value(e: ir.Expr) -> Tensor:
        found = evaluate(ir.flatten_index(e, a.rank, same), leaves, torch, load, lambda x: x.to(q.dtype))
        return torch.as_tensor(found, device=q.device)

    allowed = value(a.relation)
    g = call.geometry
    beside = (tile.q_coords[0] < 0)[:, :, None] | (tile.k_coords[0] < 0)[:, None, :]
    # prefix tokens attend to tokens: virtual keys belong to the relation
    unseen = absent[:, None, :] | ((tile.q_coords[0] < 0)[:, :, None] & virtual[:, None, :])
    inside.append(allowed & ~beside & ~unseen)
    if g.q_prefix or g.k_prefix:
        allowed = allowed | beside
    allowed = (allowed & ~unseen).expand(*q.shape[:-1], k.shape[-2])
    raw = products.scores(q, k, None if finite else allowed) * call.scale  # [B, H, T, n, m]
    score = raw
    if a.score != ir.SCORE:
        leaves[ir.SCORE] = torch.where(inside[0], raw, 0.0)
        score = value(a.score).to(raw.dtype).expand(raw.shape)
        if g.q_prefix or g.k_prefix:
            score = torch.where(beside, raw, score)
    factor = None
    if a.post is not None:
        factor = value(a.post).to(raw.dtype)
        if g.q_prefix or g.k_prefix:
            factor = torch.where(beside, 1.0, factor)
    if a.dropout is not None:
        leaves |= {ir.index("q"): _numbers(call, tile, "q")[:, :, None], ir.index("k"): _numbers(call, tile, "k")[:, None, :]}
        kept: Tensor = evaluate(a.dropout, leaves, torch, lambda name, at: tables[name][at], lambda x: x.to(raw.dtype))
        factor = kept if factor is None else factor * kept
    return Pairs(score, allowed, factor, v, finite)


def _mapped(rows: Tensor, m: ir.RowMap | None, coords: tuple[Tensor, ...]) -> Tensor:
    """Rows [B, H, T, n, D] through a row map. A prefix token lies at 0, where nothing turns."""
    if m is None:
        return rows
    if m.kind == "l2norm":
        norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return rows / norm.clamp_min(m.eps)
    return turned_channels(rows, [c.clamp_min(0) for c in coords], m.base, m.interleaved)


def _numbers(call: Call, tile: Tile, role: ir.Role) -> Tensor:
    """[T, n] or [T, m]: `index` of each token, of virtual ones on the extended grid; of prefix tokens negative."""
    g, queries = call.geometry, role == "q"
    coords, tokens, prefix = (tile.q_coords, tile.queries, g.q_prefix) if queries else (tile.k_coords, tile.keys, g.k_prefix)
    leaves: dict[ir.Expr, object] = {**g.sizes, **{ir.coord(role, i): c for i, c in enumerate(coords)}}
    on_grid: Tensor = evaluate(ir.flatten_index(ir.index(role), call.attend.rank, call.program.same_grid), leaves, torch)
    return torch.where(coords[0] < 0, tokens - prefix, on_grid)


def attend_block(
    call: Call, tile: Tile, q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor], group: int, finite: bool
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, n, Dv] and lse [B, H, T, n] of gathered rows q [B, H, T, n, D], k [B, Hkv, T, m, D], v [B, Hkv, T, m, Dv]."""
    norm, x = call.attend.normalizer, pairs_of(call, tile, q, k, v, tables, group, finite)
    score, allowed = x.score, x.allowed
    lse = torch.full(score.shape[:-1], float("-inf"), dtype=score.dtype, device=q.device)
    match norm.kind:
        case "softmax":
            masked = torch.where(allowed, score, float("-inf"))
            if norm.sink is not None:
                sink = tables[norm.sink].view(-1, 1, 1, 1).expand(q.shape[0], q.shape[1], *score.shape[2:4], 1)
                masked = torch.cat([masked, sink], -1)
            some = (masked != float("-inf")).any(-1, keepdim=True)  # (a NaN is a key, and shows)
            known = torch.where(some, masked, 0.0)  # rows without keys: keep every derivative finite
            lse = torch.where(some[..., 0], torch.logsumexp(known, -1), float("-inf"))
            weight = torch.where(allowed, torch.softmax(known, -1)[..., : score.shape[-1]], 0.0)
        case "sigmoid":
            weight = torch.where(allowed, torch.sigmoid(torch.where(allowed, score, 0.0)), 0.0)
        case "relu":
            weight = torch.relu(torch.where(allowed, score, 0.0)) ** norm.power
    return x.output(weight), lse


def compute_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def gather(t: Tensor, tokens: Tensor) -> Tensor:
    """[B, H, T, n, D]; absent and virtual tokens read token 0, which is then replaced or masked."""
    if t.shape[2] == 0:
        return t.new_zeros(*t.shape[:2], *tokens.shape, t.shape[3])
    return t[:, :, tokens.clamp_min(0)]


def float_tables(call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in call.tables.items()}


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Run every tile. Returns out (q's shape with Dv channels) and lse."""
    out, lse = empty_like_order(q, v.shape[-1]), lse_like(q)
    dtype, flat_q, flat_k, flat_v = compute_dtype(q), flat(q), flat(k), flat(v)
    group = q.shape[1] // k.shape[1]
    tables = float_tables(call, dtype)
    rows, finite = (
        torch.empty((*flat_q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device),
        products.finite(call.tables, q, k, v),
    )
    for tile in tiles(call, q.device, q.shape[0] * q.shape[1]):
        rows_of = ((flat_q, tile.queries), (flat_k, tile.keys), (flat_v, tile.keys))
        qb, kb, vb = (gather(t, i).to(dtype) for t, i in rows_of)
        o, s = attend_block(call, tile, qb, kb, vb, tables, group, finite)
        real = tile.queries >= 0
        rows[:, :, tile.queries[real]] = o[:, :, real].to(q.dtype)
        lse[:, :, tile.queries[real]] = s[:, :, real].to(lse.dtype)
    out.copy_(rows.view(out.shape))
    return out, lse


def backward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tiles: Tiles,
    whole: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Gradients of q, k, v and of every floating-point table: each tile is evaluated again and differentiated.

    whole: out and lse of the softmax that this call's keys are a part of. The part adds exp(lse_part - lse) out_part to out; as
    the whole's lse moves with every score too, the share exp(lse_part - lse) has the cotangent grad_lse - sum(out * grad_out).
    """
    dtype, flat_q, flat_k, flat_v, flat_g = compute_dtype(q), flat(q), flat(k), flat(v), flat(grad_out)
    group, finite = q.shape[1] // k.shape[1], products.finite(call.tables, q, k, v, grad_out)
    tables = float_tables(call, dtype)
    learned = {n: t for n, t in tables.items() if t.is_floating_point()}
    sums = [torch.zeros(t.shape, dtype=dtype, device=q.device) for t in (flat_q, flat_k, flat_v)]
    table_sums = {n: torch.zeros_like(t) for n, t in learned.items()}
    for tile in tiles(call, q.device, q.shape[0] * q.shape[1]):
        rows = [gather(t, i).to(dtype) for t, i in ((flat_q, tile.queries), (flat_k, tile.keys), (flat_v, tile.keys))]
        real, present = tile.queries >= 0, tile.keys >= 0

        def block(qb: Tensor, kb: Tensor, vb: Tensor, t: dict[str, Tensor], tile: Tile = tile) -> tuple[Tensor, Tensor]:
            o, s = attend_block(call, tile, qb, kb, vb, {**tables, **t}, group, finite)
            if whole is None:
                return o, s
            at = whole[1][:, :, tile.queries.clamp_min(0)].to(dtype)  # of another query, where the tile's is virtual
            some = (s != float("-inf")) & (tile.queries >= 0)
            share = torch.where(some, torch.exp(torch.where(some, s - at, 0.0)), 0.0)
            return o * share[..., None], share

        (_, s), vjp, *_ = torch.func.vjp(block, *rows, learned)
        g = torch.where(real[..., None], gather(flat_g, tile.queries).to(dtype), 0.0)
        gl = torch.zeros_like(s)
        if grad_lse is not None:
            gl = torch.where(real & (s != float("-inf")), grad_lse[:, :, tile.queries.clamp_min(0)].to(dtype), 0.0)
        if whole is not None:
            gl = gl - (gather(flat(whole[0]), tile.queries).to(dtype) * g).sum(-1)
        *parts, table_parts = vjp((g, gl))
        for total, part, tokens, keep in zip(
            sums, parts, (tile.queries, tile.keys, tile.keys), (real, present, present), strict=True
        ):
            if total.shape[2]:
                total.index_add_(2, tokens[keep], part[:, :, keep])
        for n, part in table_parts.items():
            table_sums[n] += part
    shaped = [t.view(x.shape).to(x.dtype) for t, x in zip(sums, (q, k, v), strict=True)]
    return shaped[0], shaped[1], shaped[2], {n: t.to(call.tables[n].dtype) for n, t in table_sums.items()}
