"""Calls of C++ kernels that look like an earlier call, run again with nothing new but the addresses of their tensors.

To find again all that follows from shapes and strides takes longer than a small kernel, and several times as long after other work
has taken the caches. What a call comes to is found once and kept as the kernel's structure and the places of addresses in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc.runtime import direct, tuner

CPU = torch.device("cpu")
Given = tuple[Tensor, ...]  # what the user gives: q, k and v, or the one tensor that holds them, then tables


@dataclass(frozen=True, eq=False)
class Plan:
    """A kernel and its structure, as 64-bit words; places: which of them take the addresses of a call, in their order."""

    run: Callable[[Any], Any]
    words: Any
    filled: bytes
    places: tuple[int, ...]

    def __call__(self, addresses: list[int]) -> None:
        structure = self.words.from_buffer_copy(self.filled)
        for place, address in zip(self.places, addresses, strict=True):
            structure[place] = address
        self.run(structure)


class Replay(ABC):
    """A call, to be run again on tensors of the same shapes, strides and dtypes."""

    @abstractmethod
    def run(self, given: Given) -> tuple[Tensor, ...]:
        """out in the user's layout, and what else a backward reads."""

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
        out, *rest = self.run(given)
        return (out, rest[0]) if return_lse else out


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replay: Replay, *given: Tensor) -> Any:
        made = replay.run(given)
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


def key(tensors: tuple[Tensor, ...], *others: Any) -> tuple[Any, ...]:
    """What a call of these tensors and arguments has in common with those that are run in the same way."""
    look = [x for t in tensors for x in (t.shape, t.stride(), t.dtype, t.is_cpu)]
    return (*others, torch.get_num_threads(), tuner.version(), *look)
