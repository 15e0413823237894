"""What surrounds the kernels of a statement, as differentiable torch: row maps before them, a sink after them; and dropout's seed.

They are O(N D) and the same for every backend, so no kernel knows of them. The runtime imports this file; stand-alone modules
contain the text of its functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnc import ir
from attnc.analysis.dropout import last_kept_word
from attnc.errors import UnsupportedError


def core(a: ir.Attend) -> ir.Attend:
    """The statement that kernels are printed for: without row maps, and without a sink beside keys. (A sink of softmax over queries
    enters each weight, so it stays.)"""
    norm = replace(a.normalizer, sink=None) if a.normalizer.over == "keys" else a.normalizer
    return replace(a, normalizer=norm, q_map=None, k_map=None)


def within(a: ir.Attend) -> bool:
    """C++ kernels do all that surrounds the statement's core: only rows of unit length, and softmax over keys."""
    maps = [m for m in (a.q_map, a.k_map) if m is not None]
    return a.normalizer.sink is None and a.normalizer.over == "keys" and all(m.kind == "l2norm" for m in maps)


def core_program(p: ir.Program) -> ir.Program:
    """The program of the core of its statement."""
    return replace(p, attend=core(p.attend)) if isinstance(p.attend, ir.Attend) else p


def unit_rows(rows: Tensor, eps: float) -> Tensor:
    """rows / max(|row|_2, eps) over the last dimension, in float32 or wider; a row of zeros stays one, with a zero gradient."""
    # a copy: rows that lie apart in memory take ten times as long to measure
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / length.clamp_min(eps)).to(rows.dtype)


def unit_rows_gradient(rows: Tensor, eps: float, gradient: Tensor) -> Tensor:
    """Of `rows`, from that of unit_rows(rows, eps)."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    unit, g = wide / length.clamp_min(eps), gradient.to(wide.dtype)
    along = torch.where(length < eps, 0.0, (unit * g).sum(-1, keepdim=True))
    return ((g - unit * along) / length.clamp_min(eps)).to(gradient.dtype)


def turned_channels(rows: Tensor, places: list[Tensor], base: float, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al., "RoFormer", 2021), each axis in channels of its own: rows [..., D] whose tokens lie at places
    [...] per axis. A pair (a, b) of channels becomes (a cos - b sin, a sin + b cos).

    An axis has w = 2 * (D // (2 * axes)) channels, the first axis the first ones; what is left stays. Pair number i of an axis
    turns by place * base ** (-2 i / w). Pairs are (2 i, 2 i + 1) where they are interleaved, else (i, i + w / 2). Angles are
    computed in float64, the rest in float32 or wider.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    width = rows.shape[-1] // (2 * len(places)) * 2
    exact = torch.float32 if rows.device.type == "mps" else torch.float64
    steps = base ** (-torch.arange(0, width, 2, dtype=exact, device=rows.device) / width)
    parts = []
    for axis, place in enumerate(places):
        angle = place.to(exact)[..., None] * steps
        cos, sin = angle.cos().to(wide.dtype), angle.sin().to(wide.dtype)
        mine = wide[..., axis * width : (axis + 1) * width]
        a, b = (mine[..., 0::2], mine[..., 1::2]) if interleaved else mine.chunk(2, -1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        parts.append(torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1))
    return torch.cat([*parts, wide[..., len(places) * width :]], -1).to(rows.dtype)


def rotated_rows(
    rows: Tensor, grid: tuple[int, ...], first: tuple[int, ...], prefix: int, base: float, interleaved: bool
) -> Tensor:
    """turned_channels of [B, H, prefix + N, D] or [B, H, *grid, D]; the grid's first token lies at `first`, prefix tokens stay."""
    tokens = rows[:, :, prefix:] if prefix else rows
    tokens = tokens.reshape(*rows.shape[:2], *grid, rows.shape[-1]) if rows.dim() == 4 else tokens
    ends = zip(first, grid, strict=True)
    places = [torch.arange(a, a + n, device=rows.device).view(-1, *[1] * (len(grid) - 1 - i)) for i, (a, n) in enumerate(ends)]
    out = turned_channels(tokens, places, base, interleaved)
    out = out.flatten(2, -2) if rows.dim() == 4 else out
    return torch.cat([rows[:, :, :prefix], out], 2) if prefix else out


def join_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, H, ..., Dv] and lse [B, H, N] of a softmax whose sum gets exp(sink) more, sink [H] or [1]. Rows without keys: 0."""
    extra = sink.to(lse.dtype).view(1, -1, 1)
    seen = lse > -float("inf")
    there = torch.where(seen, lse, 0.0)  # a derivative of -inf must not meet the zero of `where`
    share = torch.where(seen, torch.sigmoid(there - extra), 0.0)
    share = torch.where(lse.isnan(), lse, share).view(*out.shape[:-1], 1)
    joined = torch.where(seen, torch.logaddexp(there, extra), torch.where(lse.isnan(), lse, extra))
    return (out * share).to(out.dtype), joined


def seed_table(p: float, seed: int | None, device: torch.device) -> Tensor:
    """What dropout reads at run time (see attnc.analysis.dropout): int64 [3], each a signed 32-bit number."""
    last = torch.tensor([last_kept_word(p)], device=device)
    if seed is None:
        return torch.cat((torch.randint(-(2**31), 2**31, (2,), device=device), last))
    halves = [(seed // 2 ** (32 * i) + 2**31) % 2**32 - 2**31 for i in range(2)]
    return torch.cat((torch.tensor(halves, device=device), last))


def first_places(tokens: ir.Tokens) -> tuple[int, ...]:
    """Coordinates of the grid's first token: behind the virtual rows that pad it."""
    return tuple(before for before, _ in tokens.pad) if tokens.pad is not None else (0,) * len(tokens.grid)


def _mapped(rows: Tensor, m: ir.RowMap, tokens: ir.Tokens, grid: tuple[int, ...], places: list[Tensor] | None) -> Tensor:
    if m.kind == "l2norm":
        return unit_rows(rows, m.eps)
    if places is not None:
        return turned_channels(rows, places, m.base, m.interleaved)
    return rotated_rows(rows, grid, first_places(tokens), tokens.prefix, m.base, m.interleaved)


def surround(
    p: ir.Program,
    grids: tuple[tuple[int, ...], tuple[int, ...]],
    rows: tuple[Tensor, Tensor, Tensor],
    tables: dict[str, Tensor],
    run: Callable[[tuple[Tensor, ...], dict[str, Tensor]], tuple[Tensor, Tensor]],
    there: tuple[Tensor, ...] | None = None,
    places: tuple[list[Tensor], ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse of the statement. run: those of its core, from q, k, v and the tables by name.

    there: bool [B, N], queries and keys that exist, where not all do; the others may hold anything. places: coordinates int [N] of
    queries and of keys, one for each axis, where they do not follow from the grids (images are packed).
    """
    q, k, v = rows
    if there is not None:
        q, k = (torch.where(x.view(len(x), 1, *t.shape[2:-1], 1), t, 0.0) for x, t in zip(there, (q, k), strict=True))
    a = p.attend
    assert isinstance(a, ir.Attend)
    q_places, k_places = places or (None, None)
    if a.q_map is not None:
        q = _mapped(q, a.q_map, p.queries, grids[0], q_places)
    if a.k_map is not None:
        k = _mapped(k, a.k_map, p.keys, grids[1], k_places)
    if a.k_map is not None and a.k_map.kind == "l2norm" and "pad_k" in tables:  # virtual keys are keys (rotary ones: zeros)
        tables = {**tables, "pad_k": unit_rows(tables["pad_k"], a.k_map.eps)}
    out, lse = run((q, k, v), tables)
    sink = a.normalizer.sink if a.normalizer.over == "keys" else None
    if sink is None:
        return out, lse
    out, joined = join_sink(out, lse, tables[sink])
    return out, joined if there is None else torch.where(there[0][:, None], joined, -float("inf"))


MAPS: dict[str, tuple[Callable[..., Tensor], ...]] = {"l2norm": (unit_rows,), "rotary": (turned_channels, rotated_rows)}


def described(a: ir.Attend) -> list[str]:
    """How scores become weights, in words, where that is not plain softmax over keys."""
    n = a.normalizer
    softmax = f"softmax with the sink {n.sink}" if n.sink else ""
    words = {"softmax": softmax, "sigmoid": "sigmoid", "relu": f"relu to the power {n.power}"}
    rows = [f"{what} through {m.kind}" for what, m in (("queries", a.q_map), ("keys", a.k_map)) if m is not None]
    dropped = "dropped out by a seed" if a.dropout is not None else ""
    found = ", ".join(x for x in (words[n.kind], *rows, dropped) if x)
    return [found] if found else []


def texts(a: ir.Attend) -> list[str]:
    """The functions of this file that a stand-alone module of the statement needs."""
    kinds = {m.kind for m in (a.q_map, a.k_map) if m is not None}
    wanted = [f for kind, functions in MAPS.items() if kind in kinds for f in functions]
    sink = (join_sink,) if a.normalizer.sink is not None else ()
    seed = (last_kept_word, seed_table) if a.dropout is not None else ()
    return [inspect.getsource(f) for f in (*wanted, *sink, *seed)]


def lines(p: ir.Program, a: ir.Attend, grids: tuple[tuple[int, ...], tuple[int, ...]] | None, call: str, table: str) -> list[str]:
    """Lines that end a module's `attention`: the row maps, the kernels (`call` gives out, or out and lse for a sink), the sink.

    p: the kernels' program; a: the whole statement; table: how a table is spelt, "{}" standing for its name.
    """
    padded = p.keys.pad is not None or p.keys.pad_multiple is not None
    out = []
    for i, (name, m, tokens) in enumerate(zip("qk", (a.q_map, a.k_map), (p.queries, p.keys), strict=True)):
        if m is None:
            continue
        if m.kind == "l2norm":
            names = (name, *((table.format("pad_k"),) if padded and name == "k" else ()))  # virtual keys are keys
            out += [f"{n} = unit_rows({n}, {m.eps!r})" for n in names]
            continue
        if padded and name == "k":
            raise UnsupportedError(
                "a stand-alone module of rotary keys together with pad=: each virtual key turns by its own place"
            )
        assert grids is not None
        where = f"{grids[i]!r}, {first_places(tokens)!r}, {tokens.prefix}"
        out.append(f"{name} = rotated_rows({name}, {where}, {m.base!r}, {m.interleaved!r})")
    sink = a.normalizer.sink
    return [*out, f"return {call}" if sink is None else f"return join_sink(*{call}, {table.format(sink)})[0]"]
