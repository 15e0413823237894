"""Attention operators that layers share: one per pattern, heads and backend, however many layers use it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

from torch import Tensor

Build = Callable[..., Callable[..., Tensor]]


@cache
def _shared(build: Build, arguments: tuple[Hashable, ...]) -> Callable[..., Tensor]:
    return build(*arguments)


class SharedOperator:
    """The operator ``build(*arguments)``, compiled once per process; copies and pickles as this recipe.

    Args:
        build: a module-level function that calls ``attnc.compile``.
        arguments: hashable arguments of `build`.
    """

    __slots__ = ("_operator", "_recipe")

    def __init__(self, build: Build, *arguments: Hashable) -> None:
        self._recipe = (build, arguments)
        self._operator = _shared(build, arguments)

    def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
        return self._operator(*tensors, **options)

    def __reduce__(self) -> tuple[type[SharedOperator], tuple[Any, ...]]:
        build, arguments = self._recipe
        return SharedOperator, (build, *arguments)

    def __repr__(self) -> str:
        build, arguments = self._recipe
        return f"{build.__name__}({', '.join(map(repr, arguments))})"
