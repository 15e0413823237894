"""What surrounds the kernels of a statement, as differentiable torch: row maps before them, a sink after them.

Both are O(N D) and the same for every backend, so no kernel knows of them. The runtime imports this file; stand-alone modules
contain the text of its functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnc import ir


def core(a: ir.Attend) -> ir.Attend:
    """The statement that kernels are printed for: without row maps, and without a sink beside keys. (A sink of softmax over queries
    enters each weight, so it stays.)"""
    norm = replace(a.normalizer, sink=None) if a.normalizer.over == "keys" else a.normalizer
    return replace(a, normalizer=norm, q_map=None, k_map=None)


def core_program(p: ir.Program) -> ir.Program:
    """The program of the core of its statement."""
    return replace(p, attend=core(p.attend)) if isinstance(p.attend, ir.Attend) else p


def unit_rows(rows: Tensor, eps: float) -> Tensor:
    """rows / max(|row|_2, eps) over the last dimension, in float32 or wider; a row of zeros stays one, with a zero gradient."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / length.clamp_min(eps)).to(rows.dtype)


def join_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, H, ..., Dv] and lse [B, H, N] of a softmax whose sum gets exp(sink) more, sink [H] or [1]. Rows without keys: 0."""
    extra = sink.to(lse.dtype).view(1, -1, 1)
    seen = lse > -float("inf")
    there = torch.where(seen, lse, 0.0)  # a derivative of -inf must not meet the zero of `where`
    share = torch.where(seen, torch.sigmoid(there - extra), 0.0)
    share = torch.where(lse.isnan(), lse, share).view(*out.shape[:-1], 1)
    joined = torch.where(seen, torch.logaddexp(there, extra), torch.where(lse.isnan(), lse, extra))
    return (out * share).to(out.dtype), joined


def surround(
    a: ir.Attend,
    rows: tuple[Tensor, Tensor, Tensor],
    tables: dict[str, Tensor],
    run: Callable[[tuple[Tensor, ...], dict[str, Tensor]], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """out and lse of the statement. run: those of its core, from q, k, v and the tables by name."""
    q, k, v = rows
    if a.q_map is not None:
        q = unit_rows(q, a.q_map.eps)
    if a.k_map is not None:
        k = unit_rows(k, a.k_map.eps)
        if "pad_k" in tables:  # virtual keys are keys
            tables = {**tables, "pad_k": unit_rows(tables["pad_k"], a.k_map.eps)}
    out, lse = run((q, k, v), tables)
    sink = a.normalizer.sink if a.normalizer.over == "keys" else None
    return (out, lse) if sink is None else join_sink(out, lse, tables[sink])


def described(a: ir.Attend) -> list[str]:
    """How scores become weights, in words, where that is not plain softmax over keys."""
    n = a.normalizer
    softmax = f"softmax with the sink {n.sink}" if n.sink else ""
    words = {"softmax": softmax, "sigmoid": "sigmoid", "relu": f"relu to the power {n.power}"}
    rows = [f"{what} through {m.kind}" for what, m in (("queries", a.q_map), ("keys", a.k_map)) if m is not None]
    found = ", ".join(x for x in (words[n.kind], *rows) if x)
    return [found] if found else []


def texts(a: ir.Attend) -> list[str]:
    """The functions of this file that a stand-alone module of the statement needs."""
    maps, sink = a.q_map is not None or a.k_map is not None, a.normalizer.sink is not None
    return [inspect.getsource(f) for f, needed in ((unit_rows, maps), (join_sink, sink)) if needed]


def lines(a: ir.Attend, call: str, table: str, padded: bool) -> list[str]:
    """Lines that end a module's `attention`: the row maps, the kernels (`call` gives out, or out and lse for a sink), the sink.

    table: how a table is spelt, "{}" standing for its name.
    """
    rows = [("q", a.q_map), ("k", a.k_map), *([(table.format("pad_k"), a.k_map)] if padded else [])]  # virtual keys are keys
    out = [f"{name} = unit_rows({name}, {m.eps!r})" for name, m in rows if m is not None]
    sink = a.normalizer.sink
    return [*out, f"return {call}" if sink is None else f"return join_sink(*{call}, {table.format(sink)})[0]"]
