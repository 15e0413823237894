"""Calls of C++ kernels that look like an earlier call, run again with nothing new but the addresses of their tensors.

To find again all that follows from shapes and strides takes longer than a small kernel, and several times as long after other work
has taken the caches. What a call comes to is found once and kept as the kernel's structure and the places of addresses in it.
"""

from __future__ import annotations

import ctypes
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnc.runtime import direct, tuner

CPU = torch.device("cpu")
Again = Callable[[int, int, bytes], bool]  # see `attnc.runtime.cpp.AGAIN`
Given = tuple[Tensor, ...]  # what the user gives: q, k and v, or the one tensor that holds them, then tables


class Plan:
    """A kernel and its structure as an earlier call filled it.

    moves: for each address in the structure that differs from call to call, where it stands (bytes from the beginning), which of a
    call's tensors it points into, and how far behind that one's beginning. kept: what the other addresses point to.
    """

    def __init__(self, again: Again, filled: bytes, moves: list[tuple[int, int, int]], tensors: int, kept: Any = None) -> None:
        numbers = [len(moves), *(n for at, tensor, move in moves for n in (at // 8, tensor, move))]
        self._again, self._kept = again, kept
        self._filled, self._numbers = ctypes.create_string_buffer(filled, len(filled)), (ctypes.c_int64 * len(numbers))(*numbers)
        self._like, self._moves = ctypes.addressof(self._filled), ctypes.addressof(self._numbers)
        self._pack = struct.Struct(f"{tensors}q").pack

    def __call__(self, addresses: list[int]) -> None:
        """addresses: of the call's tensors."""
        self._again(self._like, self._moves, self._pack(*addresses))


def places(first: int, tensors: Given, rows: tuple[Tensor, ...]) -> list[tuple[int, int]]:
    """Where q, k and v (or their gradients) are: in which tensor of a call, of the three or the one from number `first` on, and how
    many bytes behind its beginning."""
    one = len(tensors) == 1
    return [(first + (0 if one else i), t.data_ptr() - tensors[0 if one else i].data_ptr()) for i, t in enumerate(rows)]


class Replay(ABC):
    """A call, to be run again on tensors of the same shapes, strides and dtypes."""

    @abstractmethod
    def run(self, given: Given, more: bool) -> tuple[Tensor, ...]:
        """out in the user's layout; more: and what else a backward reads."""

    @abstractmethod
    def gradients(self, given: Given, made: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
        """Of what is given. made: what `run` made."""

    @abstractmethod
    def gradients_seen(self, given: Given, made: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
        """The same by the operators that PyTorch's dispatcher knows: somebody listens, or differentiates again."""

    def differentiable(self, return_lse: bool) -> bool:
        """`gradients` gives all that a backward may be asked for."""
        return not return_lse

    def __call__(self, given: Given, return_lse: bool) -> Tensor | tuple[Tensor, Tensor] | None:
        """out, with lse if asked for. None: gradients are wanted that only the operators give."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            if not self.differentiable(return_lse):
                return None
            apply: Callable[..., Tensor] = _Replayed.apply
            return apply(self, *given)
        made = self.run(given, return_lse)
        return (made[0], made[1]) if return_lse else made[0]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replay: Replay, *given: Tensor) -> Any:
        made = replay.run(given, True)
        ctx.save_for_backward(*made, *given)
        ctx.replay, ctx.count = replay, len(made)
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        replay: Replay = ctx.replay
        seen = torch.is_grad_enabled() or not direct.alone((*saved, grad_out))
        gradients = replay.gradients_seen if seen else replay.gradients
        return None, *gradients(saved[ctx.count :], saved[: ctx.count], grad_out)


def key(tensors: tuple[Tensor, ...], *others: Any) -> tuple[Any, ...] | None:
    """What a call of these tensors and arguments has in common with those that are run in the same way."""
    try:
        look = [x for t in tensors for x in (t.shape, t.stride(), t.dtype, t.is_cpu)]
    except RuntimeError:  # a sparse or nested tensor, which the operator refuses
        return None
    return (*others, torch.get_num_threads(), tuner.version(), *look)
