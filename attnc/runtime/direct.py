"""The operators called past PyTorch's dispatcher, which takes longer than a small kernel, where nobody listens on the way.

A mode, a transform, a tracer, a profiler or a tensor subclass sees the operators of `attnc.runtime.operator` as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnc.runtime import operator

_Key: Any = torch._C.DispatchKey
_KEYS = torch._C.DispatchKeySet(_Key.BackendSelect)
_ALONE = frozenset((_KEYS.raw_repr(), _KEYS.add(_Key.ADInplaceOrView).raw_repr()))  # in inference mode, and out of it
_OWN = (Tensor, torch.nn.Parameter)


def alone(tensors: Iterable[Tensor]) -> bool:
    """Nothing but autograd would see an operator that is called on these tensors now."""
    if torch.compiler.is_dynamo_compiling():  # (an export that is not Dynamo's has tensors of its own class)
        return False
    for t in tensors:
        if type(t) not in _OWN or t.is_neg():  # (the dispatcher makes a negative view of it what it stands for)
            return False
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() in _ALONE
        and not torch._C._len_torch_function_stack()
        and not torch._C._autograd._profiler_enabled()
        and forward_ad._current_level < 0
    )


def attend(past: bool, rows: tuple[Tensor, ...], tables: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    """out and lse. past: these tensors are `alone`; rows: q, k and v, or the three in one tensor; rest: from the scale on, as the
    operators take them."""
    if not past:
        called = torch.ops.attnc.attend if len(rows) == 3 else torch.ops.attnc.attend_packed
        return called(*rows, tables, *rest)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*rows, *tables)):
        apply: Callable[..., tuple[Tensor, Tensor]] = _Attend.apply  # torch's releases differ in whether they type it
        return apply(len(rows), rest, *rows, *tables)
    return operator.FORWARD[len(rows)](*rows, tables, *rest)


def channel(past: bool, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    """Channel attention of [B, H, N, channels]. past: these tensors are `alone`."""
    if not past:
        return torch.ops.attnc.channel(q, k, v, scale, backend)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        apply: Callable[..., Tensor] = _Channel.apply
        return apply(q, k, v, scale, backend)
    return operator.channel(q, k, v, scale, backend)


def _alone_once(tensors: Iterable[Tensor]) -> bool:
    """In a backward: `alone`, and nobody wants to differentiate again."""
    return not torch.is_grad_enabled() and alone(tensors)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, rest: tuple[Any, ...], *tensors: Tensor) -> Any:
        rows, tables = tensors[:count], list(tensors[count:])
        found = operator.FORWARD[count](*rows, tables, *rest)
        operator.attend_setup(ctx, (*rows, tables, *rest), found)
        return found

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        *rows, tables, _, _, _, _, _, _, _ = operator.attend_gradient(ctx, grad_out, grad_lse, alone=_alone_once)
        return None, None, *rows, *tables


class _Channel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Any:
        found = operator.channel(q, k, v, scale, backend)
        operator.channel_setup(ctx, (q, k, v, scale, backend), found)
        return found

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        return operator.channel_gradient(ctx, grad_out, alone=_alone_once)
