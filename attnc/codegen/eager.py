"""The meaning: every query against every key, the relation evaluated as the user wrote it. Streamed over query chunks,
float64-capable.

Every other backend is held to this one. It reads the statement and the sizes, and no proof.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attnc.codegen import blocks, over_queries
from attnc.codegen.blocks import Tile
from attnc.runtime.call import Call
from attnc.schedule.geometry import Geometry

EXTRA_BYTES = 160 << 20  # of intermediate scores at a time, so that all there is stays under 256 MiB
PER_SCORE = 128  # bytes of intermediates per score element, backward included, float64


def _grid_tokens(
    shape: tuple[int, ...], before: tuple[int, ...], real: tuple[int, ...], prefix: int, device: torch.device
) -> Tensor:
    """[1 + rank, N] over the extended grid in row-major order: token number (-1: virtual), then coordinates."""
    coords = torch.stack(torch.meshgrid(*[torch.arange(n, device=device) for n in shape], indexing="ij")).flatten(1)
    token, inside = torch.zeros_like(coords[0]), torch.ones_like(coords[0], dtype=torch.bool)
    for c, b, n in zip(coords, before, real, strict=True):
        token = token * n + (c - b)
        inside &= (c >= b) & (c < b + n)
    return torch.cat([torch.where(inside, token + prefix, -1)[None], coords])


def token_sets(g: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """[1 + rank, n] queries and [1 + rank, m] keys of a problem, prefix tokens (coordinates -1) first, virtual keys included."""
    sets = []
    for side in ("q", "k"):
        grid, prefix = (g.q_grid, g.q_prefix) if side == "q" else (g.k_grid, g.k_prefix)
        if g.structure.flat:
            shape, before = grid, (0,) * len(grid)
        else:
            shape = tuple(a.queries if side == "q" else a.keys for a in g.axes)
            before = tuple(a.before_queries if side == "q" else a.before_keys for a in g.axes)
        tokens = _grid_tokens(shape, before, grid, prefix, device)
        if side == "q":
            tokens = tokens[:, tokens[0] >= 0]
        head = torch.full((tokens.shape[0], prefix), -1, device=device)
        head[0] = torch.arange(prefix, device=device)
        sets.append(torch.cat([head, tokens], 1))
    return sets[0], sets[1]


def _tiles(call: Call, device: torch.device, batch_heads: int) -> Iterable[Tile]:
    queries, keys = token_sets(call.geometry, device)
    step = max(1, EXTRA_BYTES // (PER_SCORE * max(1, batch_heads * keys.shape[1])))
    for at in range(0, queries.shape[1], step):
        q = queries[:, None, at : at + step]
        k = keys[:, None]
        yield Tile(q[0], k[0], tuple(q[1:]), tuple(k[1:]))


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See runtime.call.Call."""
    if call.attend.normalizer.over == "queries":
        return over_queries.forward(call, q, k, v, _tiles)
    return blocks.forward(call, q, k, v, _tiles)


def backward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """See runtime.call.Call; out and lse are not needed."""
    if call.attend.normalizer.over == "queries":
        return over_queries.backward(call, q, k, v, grad_out, grad_lse, _tiles)
    return blocks.backward(call, q, k, v, grad_out, grad_lse, _tiles)


def channel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """out[n, i] = sum_j softmax_j(scale * sum_n q[n, i] k[n, j]) v[n, j], tokens contracted; in float32 or wider."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    qf, kf, vf = (t.flatten(2, -2).to(dtype) for t in (q, k, v))
    weight = torch.softmax(scale * (qf.transpose(-1, -2) @ kf), -1)
    return (vf @ weight.transpose(-1, -2)).to(q.dtype).view(q.shape)


def channel_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Channel attention (DaViT): q [B, H, N, D], k and v alike."""
    return channel(q, k, v, scale)


def channel_backward(q: Tensor, k: Tensor, v: Tensor, scale: float, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of channel attention."""
    _, vjp, *_ = torch.func.vjp(lambda a, b, c: channel(a, b, c, scale), q, k, v)
    dq, dk, dv = vjp(grad_out)
    return dq, dk, dv
