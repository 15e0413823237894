"""NATTEN's own calls (neighbourhood attention, 0.21) on attnc: heads-last tensors, its windows at borders, and its refusals.

    from attnc.compat.natten import na2d

    out = na2d(query, key, value, kernel_size=7, dilation=2)        # [B, Y, X, heads, dim] each

On every axis: a query sees the `kernel_size` keys around it among those `dilation` apart, moved inwards at borders so that none
is lost; groups of `stride` queries share the window of their middle one (the later of two); a causal axis ends each window at its
query and begins `kernel_size` keys before the end of the query's group. Beyond NATTEN's: a backward on
CPUs, any dim up to 256, and `rpb`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnc.compiler import Operator, compile
from attnc.errors import DeclarationError, ShapeError
from attnc.patterns import causal as lower_triangle
from attnc.patterns import full, neighborhood
from attnc.runtime.operator import BACKENDS

__all__ = ["attention", "merge_attentions", "na1d", "na2d", "na3d"]

AXES = {1: "x", 2: "y x", 3: "t y x"}
_THEIRS = ("cutlass", "hopper", "blackwell", "flex", "reference")  # their backends, followed by -fna or -fmha


def _front(rank: int) -> Callable[..., Any]:
    """The function of one rank: NATTEN's arguments in its order."""

    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = 1,
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
        *,
        rpb: Tensor | None = None,
    ) -> Any:
        extra = additional_keys, additional_values
        return _na(rank, query, key, value, kernel_size, stride, dilation, is_causal, scale, extra, backend, return_lse, rpb)

    shape = ", ".join(AXES[rank].upper().split())
    na.__name__ = na.__qualname__ = f"na{rank}d"
    na.__doc__ = f"""Neighbourhood attention on a grid of {rank} {"axis" if rank == 1 else "axes"}.

    Args:
        query, key, value: [B, {shape}, heads, dim]; key and value may have fewer heads, value another dim. Any strides.
        kernel_size, stride, dilation, is_causal: one for all axes, or one per axis.
        scale: dim ** -0.5 where it is None (or 0, as there).
        additional_keys, additional_values: [B, M, heads, dim], seen by every query beside its window.
        backend: one of attnc's; NATTEN's names, like its tile shapes and schedules, choose nothing here.
        return_lse: also the natural log-sum-exp, float32 [B, {shape}, heads].
        rpb: relative position bias [heads, 2 kernel_size - 1, ...] at key - query + kernel_size - 1 in steps of the dilation, as
            NATTEN had it before 0.20; gets a gradient.

    Raises:
        DeclarationError: sizes that NATTEN refuses: kernel_size below 2, stride above kernel_size.
        ShapeError: kernel_size * dilation greater than the axis, or tensors that do not fit each other.
    """
    return na


na1d, na2d, na3d = _front(1), _front(2), _front(3)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Dense attention on heads-last tensors [B, N, heads, dim]; keys may be of another number. lse is [B, N, heads]."""
    for what, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4:
            raise ShapeError(f"attention: {what} has shape {tuple(t.shape)}, expected [batch, tokens, heads, dim]")
    if is_causal and query.shape[1] != key.shape[1]:
        raise ShapeError(f"attention: is_causal=True with {query.shape[1]} queries and {key.shape[1]} keys: give equally many")
    out, lse = _operator(is_causal, _ours(backend))(query, key, value, scale=scale or None, return_lse=True)
    return (out, lse.transpose(1, 2)) if return_lse else out


def merge_attentions(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint key sets: outputs [..., heads, dim] and their log-sum-exps [..., heads].

    Returns the merged output and log-sum-exp. Exact, and differentiable through both.
    """
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ShapeError(f"merge_attentions: {len(outputs)} outputs and {len(lse_tensors)} log-sum-exps: give two or more of both")
    if any(o.shape != outputs[0].shape or s.shape != outputs[0].shape[:-1] for o, s in zip(outputs, lse_tensors, strict=True)):
        shapes = ", ".join(f"{tuple(o.shape)} with {tuple(s.shape)}" for o, s in zip(outputs, lse_tensors, strict=True))
        raise ShapeError(f"merge_attentions: all outputs have one shape, and a log-sum-exp for each row; here {shapes}")
    lse = torch.stack(list(lse_tensors)).logsumexp(0)
    some = torch.isfinite(lse)
    shares = [torch.where(some, torch.exp(s - torch.where(some, lse, 0.0)), 0.0) for s in lse_tensors]
    merged = sum(o.to(lse.dtype) * w[..., None] for o, w in zip(outputs, shares, strict=True))
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), lse


# ----------------------------------------------------------------------------------------------------------------------- inside
def _per_axis(value: Any, rank: int, what: str, least: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in values):
        more = ": an axis along which a query sees itself alone is attnc.patterns.neighborhood(1)" if what == "kernel_size" else ""
        raise DeclarationError(f"na{rank}d: {what}={value!r}: an int of at least {least}, or {rank} of them{more}")
    return values


def _causal(value: Any, rank: int) -> tuple[bool, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (bool(value) if value is None else value,) * rank
    if len(values) != rank or not all(isinstance(c, bool) for c in values):
        raise DeclarationError(f"na{rank}d: is_causal={value!r}: a bool, or {rank} of them")
    return values


def _ours(backend: str | None) -> str:
    if backend is None or backend.split("-", maxsplit=1)[0] in _THEIRS:
        return "auto"
    if backend not in ("auto", *BACKENDS):
        raise DeclarationError(f"backend={backend!r}: one of auto, {', '.join(BACKENDS)} (NATTEN's own names are taken as auto)")
    return backend


class _Operators:
    """Operators by name, as attributes: Dynamo, which may be looking, reads those one by one."""


_OPERATORS = _Operators()


def _made(*settings: Any) -> str:
    """The name in _OPERATORS of the operator for these settings, made on first use.

    settings: (rank, size, stride, dilation, causal, biased, backend), or (causal, backend) for dense attention on a sequence.
    """
    name = repr(settings)
    if not hasattr(_OPERATORS, name):
        setattr(_OPERATORS, name, _dense(*settings) if len(settings) == 2 else _neighborhood(*settings))
    return name


# Dynamo calls this while it traces, and takes the name as a constant: what torch.compiler.assume_constant_result asks for, which is
# not used because it loads all of Dynamo
_made._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _operator(*settings: Any) -> Operator:
    op: Operator = getattr(_OPERATORS, _made(*settings))
    return op


def _neighborhood(
    rank: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    biased: bool,
    backend: str,
) -> Operator:
    p = neighborhood(size, dilation, stride, causal, bias="relative" if biased else None)
    return compile(p, layout=f"b {AXES[rank]} h d", backend=backend)


def _dense(causal: bool, backend: str) -> Operator:
    if causal:
        return compile(lower_triangle(), layout="b x h d", backend=backend)
    return compile(full(), grid={"x": None}, kv_grid={"x": None}, layout="b x h d", backend=backend)


def _na(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    scale: float | None,
    extra: tuple[Tensor | None, Tensor | None],
    backend: str | None,
    return_lse: bool,
    rpb: Tensor | None,
) -> Any:
    for what, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor) or t.dim() != rank + 3:
            shape = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ShapeError(f"na{rank}d: {what} is {shape}, expected [batch, {AXES[rank].replace(' ', ', ')}, heads, dim]")
    grid = tuple(query.shape[1 : 1 + rank])
    size = _per_axis(kernel_size, rank, "kernel_size", 2)
    strides = _per_axis(1 if stride is None else stride, rank, "stride", 1)
    dilations = _per_axis(1 if dilation is None else dilation, rank, "dilation", 1)
    causal, ours = _causal(is_causal, rank), _ours(backend)
    if any(s > k for s, k in zip(strides, size, strict=True)):
        raise DeclarationError(f"na{rank}d: stride={strides} is greater than kernel_size={size}: some keys would never be seen")
    if any(k * d > n for k, d, n in zip(size, dilations, grid, strict=True)):
        raise ShapeError(
            f"na{rank}d: kernel_size={size} times dilation={dilations} is greater than the grid {grid}: use smaller ones "
            "(attnc.patterns.neighborhood cuts the window to the axis instead)"
        )
    options: dict[str, Any] = {"scale": scale or None}
    if rpb is not None:
        if any(causal) or max(strides) > 1:
            raise DeclarationError(f"na{rank}d: rpb with is_causal={causal} and stride={strides}: NATTEN had it for neither")
        wanted = tuple(2 * k - 1 for k in size)
        if tuple(rpb.shape[1:]) != wanted or rpb.shape[0] not in (1, query.shape[-2]):
            raise ShapeError(f"na{rank}d: rpb has shape {tuple(rpb.shape)}, expected {(query.shape[-2], *wanted)}")
        options["bias"] = rpb.flip(tuple(range(1, rank + 1)))  # theirs is indexed key - query, ours query - key
    op = _operator(rank, size, strides, dilations, causal, rpb is not None, ours)
    add_keys, add_values = extra
    if (add_keys is None) != (add_values is None):
        raise DeclarationError(f"na{rank}d: additional_keys and additional_values: give both or neither")
    if add_keys is None or add_values is None:
        if not return_lse:
            return op(query, key, value, **options)
        out, lse = op(query, key, value, return_lse=True, **options)
        return out, _heads_last(lse, grid)
    for what, t in (("additional_keys", add_keys), ("additional_values", add_values)):
        if t.dim() != 4:
            raise ShapeError(f"na{rank}d: {what} has shape {tuple(t.shape)}, expected [batch, tokens, heads, dim]")
    if add_keys.shape[2] != key.shape[-2] or add_values.shape[-1] != value.shape[-1]:
        raise ShapeError(
            f"na{rank}d: additional_keys {tuple(add_keys.shape)} and additional_values {tuple(add_values.shape)} beside keys with "
            f"{key.shape[-2]} heads and values of {value.shape[-1]} channels: give them the same"
        )
    near, near_lse = op(query, key, value, return_lse=True, **options)
    beside, beside_lse = _operator(False, ours)(
        query.flatten(1, rank), add_keys, add_values, scale=scale or None, return_lse=True
    )  # fmt: skip
    out, lse = merge_attentions([near, beside.reshape(*near.shape)], [_heads_last(x, grid) for x in (near_lse, beside_lse)])
    return (out, lse) if return_lse else out


def _heads_last(lse: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[B, *grid, heads] from [B, heads, N]."""
    return lse.unflatten(2, grid).movedim(1, -1)  # type: ignore[no-untyped-call,no-any-return]
