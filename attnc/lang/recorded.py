"""Declarations that remember which call made them: they are equal by it, and pickles hold it in place of a function's body."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar


class Recorded:
    """A declaration. One that no recorded call made equals itself alone."""

    name: str
    _call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None = None

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Recorded) and self._call is not None and self._call == other._call)

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._call is None:
            return super().__reduce_ex__(protocol)
        function, positional, named = self._call
        return partial(function, **named), positional


P = ParamSpec("P")
R = TypeVar("R", bound=Recorded)


def _kept(x: object) -> object:
    """What can be read twice."""
    return list(x) if isinstance(x, Iterator) else x


def recorded(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, a function that a pickle finds by its name, such that what it gives remembers the arguments."""
    signature = inspect.signature(make)

    @wraps(make)
    def call(*positional: P.args, **named: P.kwargs) -> R:
        first, rest = (*map(_kept, positional),), {n: _kept(x) for n, x in named.items()}
        made = make(*first, **rest)  # type: ignore[arg-type]
        bound = signature.bind(*first, **rest)
        bound.apply_defaults()
        made._call = call, bound.args, bound.kwargs
        return made

    return call
