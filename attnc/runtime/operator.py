"""The torch.library operators. A program travels as JSON text, so a traced or exported graph is complete in itself.

attnc::attend and attnc::channel have fake kernels and autograd; their backwards are operators too, so torch.compile sees all
of it. attnc::attend_packed takes q, k and v stacked in one tensor and gives one gradient, which nobody has to put together.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attnc.analysis.structure import keep_proofs
from attnc.errors import UnsupportedError
from attnc.runtime import over_queries, proofs, regions, tuner
from attnc.runtime.call import Call, empty_like_order, in_order, lse_like
from attnc.runtime.parts import Part, going_on, program_of, rows_of, rows_of_part, sized, softmax_over_queries, table_names
from attnc.schedule import bounds

BACKENDS = {
    "triton": "attnc.runtime.triton",
    "cpp": "attnc.runtime.cpp",
    "torch": "attnc.codegen.torch",
    "eager": "attnc.codegen.eager",
}

Alone = Callable[[tuple[Tensor, ...]], bool] | None

keep_proofs(proofs.kept)

_library: Any = torch.library.Library("attnc", "DEF")  # type: ignore[no-untyped-call]
_ROWS, _PACKED = "Tensor q, Tensor k, Tensor v", "Tensor qkv"
_SAVED = "Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse"
_REST = "float scale, SymInt[] q_grid, SymInt[] k_grid, str program, str backend, bool tune, Tensor? sizes"
_library.define(f"attend({_ROWS}, Tensor[] tables, {_REST}) -> (Tensor, Tensor)")
_library.define(f"attend_packed({_PACKED}, Tensor[] tables, {_REST}) -> (Tensor, Tensor)")
_library.define(f"attend_backward({_ROWS}, Tensor[] tables, {_SAVED}, {_REST}) -> (Tensor, Tensor, Tensor, Tensor[])")
_library.define(f"attend_packed_backward({_PACKED}, Tensor[] tables, {_SAVED}, {_REST}) -> (Tensor, Tensor[])")
_library.define("channel(Tensor q, Tensor k, Tensor v, float scale, str backend) -> Tensor")
_library.define(
    "channel_backward(Tensor q, Tensor k, Tensor v, Tensor grad_out, float scale, str backend) -> (Tensor, Tensor, Tensor)"
)


def backend_module(name: str) -> ModuleType:
    """The module of a backend; triton and the compiler are needed only once one is used."""
    path = BACKENDS[name]
    return sys.modules.get(path) or importlib.import_module(path)


def _like(t: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the memory order that the fake kernel promised."""
    if in_order(t, gradient) and gradient.dtype == t.dtype:
        return gradient
    return empty_like_order(t, t.shape[-1]).copy_(gradient)


def _exchange(
    q: Tensor, k: Tensor, tables: list[Tensor], scale: float, q_grid: Any, k_grid: Any, program: str, backend: str, tune: bool
) -> over_queries.Exchange | over_queries.Padded | None:
    """Where the softmax is over queries: the call with queries and keys exchanged (`eager` is the meaning, which does without)."""
    if backend == "eager" or not softmax_over_queries(program):
        return None
    p = program_of(program)
    named = dict(zip(table_names(p), tables, strict=True))
    shapes = tuple((n, tuple(t.shape)) for n, t in named.items())
    grids = tuple(map(int, q_grid)), tuple(map(int, k_grid))
    bounds.check(p, *grids, q.shape[1], q.shape[0], shapes, backend == "torch")
    padded = any(n in named for n in over_queries.PADS)
    kind = over_queries.Padded if padded else over_queries.Exchange
    return kind(_attend, _opaque(_attend_backward), p, named, scale, (*grids, program, backend, tune))


def _by_size(tables: list[Tensor], scale: float, q_grid: Any, k_grid: Any, program: str, *rest: Any) -> regions.BySize:
    *options, sizes = rest
    p, after = program_of(program), (q_grid, k_grid, program, *options)
    return regions.BySize(_attend, _attend_backward, p, table_names(p), tables, scale, after, sizes)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    scale: float,
    q_grid: Any,
    k_grid: Any,
    program: str,
    backend: str,
    tune: bool = False,
    sizes: Tensor | None = None,
    *,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    if sizes is not None:
        return _by_size(tables, scale, q_grid, k_grid, program, backend, tune, sizes).forward(q, k, v)
    exchange = _exchange(q, k, tables, scale, q_grid, k_grid, program, backend, tune)
    if exchange is not None:
        return exchange.forward(q, k, v)
    module = backend_module(backend)
    named, parts = sized(q, k, tables, q_grid, k_grid, program, backend)
    if len(parts) == 1:
        return _run(module, parts[0].calls(named, scale), (q, k, v), into, tune)
    out, lse = into or (empty_like_order(q, v.shape[-1]), lse_like(q))
    for p in parts:
        mine = out[:, p.heads], lse[:, p.heads]
        made = _run(module, p.calls(named, scale), (q[:, p.heads], k[:, p.key_heads], v[:, p.key_heads]), mine, tune)
        for place, found in zip(mine, made, strict=True):
            if found is not place:
                place.copy_(found)
    return out, lse


def _run(
    module: ModuleType, calls: list[Call], rows: tuple[Tensor, Tensor, Tensor], into: tuple[Tensor, Tensor] | None, tune: bool
) -> tuple[Tensor, Tensor]:
    """The calls of a run of heads one after the other, each going on from the last where the backend can, else merged. `into` two
    tensors, where the backend can, or new ones."""
    for call in calls if tune else ():
        tuner.settle(module, call, rows)
    if not calls:  # queries without keys
        q, _, v = rows
        return empty_like_order(q, v.shape[-1]).zero_(), lse_like(q).fill_(float("-inf"))
    if len(calls) > 1 and not getattr(module, "CONTINUES", ()):
        merge = _merge if calls[0].attend.normalizer.kind == "softmax" else _add
        return merge([module.forward(call, *rows) for call in calls])
    calls[0].into = into
    found: tuple[Tensor, Tensor] = module.forward(calls[0], *rows)
    for call in calls[1:]:
        call.into, call.continues = found, True
        found = module.forward(call, *rows)
    return found


def _merge(partial: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over a union of disjoint key sets from the attention over each: one weighted mean after the other."""
    out, lse = partial[0]
    dtype = out.dtype
    for o, s in partial[1:]:
        weight = torch.where(s > float("-inf"), torch.sigmoid(s - lse), 0.0)  # of `o`: exp(s) of exp(s) + exp(lse)
        weight = torch.where(s.isnan(), s, weight).view(*o.shape[:-1], 1)
        out = torch.lerp(out.to(lse.dtype), o.to(lse.dtype), weight)
        lse = torch.logaddexp(lse, s)
    return out.to(dtype), lse


def _add(partial: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sum over a union of disjoint key sets of weighted values, from the sum over each."""
    out, lse = partial[0]
    total = out.to(lse.dtype)
    for o, _ in partial[1:]:
        total = total + o
    return total.to(out.dtype), lse


def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], scale: float, q_grid: Any, k_grid: Any, program: str, *rest: Any
) -> tuple[Tensor, Tensor]:
    return empty_like_order(q, v.shape[-1]), lse_like(q, k if softmax_over_queries(program) else q)


def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    q_grid: Any,
    k_grid: Any,
    program: str,
    backend: str,
    tune: bool = False,
    sizes: Tensor | None = None,
    *,
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    exchange = None if sizes is not None else _exchange(q, k, tables, scale, q_grid, k_grid, program, backend, tune)
    if sizes is not None:
        images = _by_size(tables, scale, q_grid, k_grid, program, backend, tune, sizes)
        named = dict(zip(images.names, tables, strict=True))
        dq, dk, dv, sums = images.backward(q, k, v, out, lse, grad_out, grad_lse, into)
    elif exchange is None:
        module = backend_module(backend)
        named, parts = sized(q, k, tables, q_grid, k_grid, program, backend)
        runs = [(p, p.calls(named, scale)) for p in parts]
        rows = (q, k, v, out, lse, grad_out, grad_lse)
        for p, calls in runs if tune else ():
            for call in calls:
                tuner.settle(module, call, *rows_of_part(p, rows))
        if len(runs) == 1 and len(runs[0][1]) == 1:
            call = runs[0][1][0]
            call.into = into
            dq, dk, dv, sums = module.backward(call, *rows)
        else:
            dq, dk, dv, sums = _in_turn(module, runs, rows, named, into) or _sum_of_parts(module, runs, rows, named)
    else:
        named = exchange.tables
        dq, dk, dv, sums = exchange.backward(q, k, v, lse, grad_out, grad_lse)
    gradients = [
        sums[n].to(t.dtype).contiguous() if t.is_floating_point() else t.new_empty(0, dtype=torch.float32) for n, t in named.items()
    ]
    if into is None:
        return _like(q, dq), _like(k, dk), _like(v, dv), gradients
    for place, found in zip(into, (dq, dk, dv), strict=True):
        if found is not place:
            place.copy_(found)
    dq, dk, dv = into
    return dq, dk, dv, gradients


def _attend_packed(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(0)
    return _attend(q, k, v, *rest)


def _attend_packed_fake(qkv: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    return empty_like_order(qkv[0], qkv.shape[-1]), lse_like(qkv[0])  # keys are as many as queries


def _attend_packed_backward(qkv: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    gradient = empty_like_order(qkv, qkv.shape[-1])
    rows: list[Any] = [*qkv.unbind(0), *rest]
    *_, parts = _attend_backward(*rows, into=gradient.unbind(0))
    return gradient, parts


def _attend_packed_backward_fake(qkv: Tensor, tables: list[Tensor], *rest: Any, **named: Any) -> tuple[Tensor, list[Tensor]]:
    return empty_like_order(qkv, qkv.shape[-1]), _table_gradients_fake(tables)


def _in_turn(
    module: ModuleType, runs: list[tuple[Part, list[Call]]], rows: tuple[Any, ...], tables: dict[str, Tensor], into: Any
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]] | None:
    """Gradients of several calls, each written in its place, or added to what earlier ones left there. None where the backend does
    no such thing."""
    q, k, v, _, lse, *_ = rows
    found = list(going_on(runs, backward=True))
    apart = not any(call.continues for _, call in found)
    adds = getattr(module, "CONTINUES", ())
    if not adds or not (apart or q.dtype in adds):
        return None
    if any(call.attend.q_map is not None or call.attend.k_map is not None for _, call in found):
        return None
    dq, dk, dv = into or (empty_like_order(t, t.shape[-1]) for t in (q, k, v))
    for p, calls in runs:
        for t in (dq[:, p.heads], dk[:, p.key_heads], dv[:, p.key_heads]) if not calls else ():
            t.zero_()  # heads without keys (whose key heads other runs may write later)
    sums = {n: torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for n, t in tables.items() if t.is_floating_point()}
    for p, call in found:
        mine, rest = rows_of_part(p, rows)
        call.into = dq[:, p.heads], dk[:, p.key_heads], dv[:, p.key_heads]
        for n, g in module.backward(call, *mine, *rest)[3].items():
            rows_of(sums[n], p.cuts.get(n)).add_(g)
    return dq, dk, dv, sums


def _sum_of_parts(
    module: ModuleType, runs: list[tuple[Part, list[Call]]], rows: tuple[Any, ...], tables: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Gradients summed over parts and their statements, in float32 or wider."""
    q, k, v, _, lse, *_ = rows
    dq, dk, dv = (torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (q, k, v))
    sums = {n: torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for n, t in tables.items() if t.is_floating_point()}
    for p, calls in runs:
        mine, rest = rows_of_part(p, rows)
        for call in calls:
            found = module.backward(call, *mine, *rest)
            for total, gradient, heads in zip((dq, dk, dv), found, (p.heads, p.key_heads, p.key_heads), strict=False):
                total[:, heads] += gradient
            for n, g in found[3].items():
                rows_of(sums[n], p.cuts.get(n)).add_(g)
    return dq, dk, dv, sums


def _attend_backward_fake(
    q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], *rest: Any, **named: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dq, dk, dv = (empty_like_order(t, t.shape[-1]) for t in (q, k, v))
    return dq, dk, dv, _table_gradients_fake(tables)


def _table_gradients_fake(tables: list[Tensor]) -> list[Tensor]:
    return [t.new_empty(t.shape) if t.is_floating_point() else t.new_empty(0, dtype=torch.float32) for t in tables]


def attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What a backward needs, kept."""
    *rows, tables, scale, q_grid, k_grid, program, backend, tune, sizes = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *rows, *tables, sizes)
    ctx.count, ctx.rest = len(rows), (scale, q_grid, k_grid, program, backend, tune)


def attend_gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *, alone: Alone = None) -> tuple[Any, ...]:
    """Gradients in the order of the operator's arguments. alone: whether tensors may be taken past the dispatcher."""
    out, lse, *saved, sizes = ctx.saved_tensors
    rows, tables = saved[: ctx.count], saved[ctx.count :]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    backward: Any = BACKWARD[ctx.count]
    if alone is None or not alone(tuple(t for t in (out, lse, *saved, grad_out, grad_lse, sizes) if t is not None)):
        backward = torch.ops.attnc.attend_backward if ctx.count == 3 else torch.ops.attnc.attend_packed_backward
    *gradients, parts = backward(*rows, tables, out, lse, grad_out, grad_lse, *ctx.rest, sizes)
    learned = [g if t.is_floating_point() else None for g, t in zip(parts, tables, strict=True)]
    return *gradients, learned, *(None for _ in ctx.rest), None


def channel(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    """The operator's kernel."""
    out: Tensor = backend_module(backend).channel_forward(q, k, v, scale)
    return _like(q, out)


def _channel_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    return empty_like_order(q, q.shape[-1])


def _channel_backward(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = backend_module(backend).channel_backward(q, k, v, scale, grad_out)
    return _like(q, dq), _like(k, dk), _like(v, dv)


def _channel_backward_fake(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (empty_like_order(t, t.shape[-1]) for t in (q, k, v))
    return dq, dk, dv


def channel_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What a backward needs, kept."""
    q, k, v, scale, backend = inputs
    ctx.save_for_backward(q, k, v)
    ctx.rest = (scale, backend)


def channel_gradient(ctx: Any, grad_out: Tensor, *, alone: Alone = None) -> tuple[Any, ...]:
    """Gradients in the order of the operator's arguments. alone: whether tensors may be taken past the dispatcher."""
    q, k, v = ctx.saved_tensors
    past = alone is not None and alone((q, k, v, grad_out))
    backward = _channel_backward if past else torch.ops.attnc.channel_backward
    return (*backward(q, k, v, grad_out, *ctx.rest), None, None)


FORWARD: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {
    3: _attend,
    1: _attend_packed,
}  # by the number of tensors that hold q, k and v
BACKWARD: dict[int, Callable[..., Any]] = {3: _attend_backward, 1: _attend_packed_backward}
_plain_dispatch = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


def _opaque(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel whose inside no dispatch mode sees (a flop counter, opcheck's): they call it with torch.func's keys shut off."""

    @wraps(kernel)
    def hidden(*args: Any) -> Any:
        with _disable_current_modes(), torch._C._ForceDispatchKeyGuard(*_plain_dispatch), torch.no_grad():
            return kernel(*args)

    return hidden


for _name, _kernel, _fake in (
    ("attend", _attend, _attend_fake),
    ("attend_backward", _attend_backward, _attend_backward_fake),
    ("attend_packed", _attend_packed, _attend_packed_fake),
    ("attend_packed_backward", _attend_packed_backward, _attend_packed_backward_fake),
    ("channel", channel, _channel_fake),
    ("channel_backward", _channel_backward, _channel_backward_fake),
):
    _library.impl(_name, _opaque(_kernel) if _name.endswith("backward") else _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnc::{_name}", _fake, lib=_library)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise UnsupportedError(
        f"second derivatives of attention are not lowered by the {ctx.backend} backend (nor by another one yet): leave out "
        "create_graph=True, or write the attention in plain PyTorch where a gradient penalty needs it"
    )


def _keep_backend(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.backend = next(x for x in reversed(inputs) if isinstance(x, str))


for _name in ("attend_backward", "attend_packed_backward", "channel_backward"):
    torch.library.register_autograd(f"attnc::{_name}", _no_second_derivative, setup_context=_keep_backend, lib=_library)
for _name in ("attend", "attend_packed"):
    torch.library.register_autograd(f"attnc::{_name}", attend_gradient, setup_context=attend_setup, lib=_library)
torch.library.register_autograd("attnc::channel", channel_gradient, setup_context=channel_setup, lib=_library)
