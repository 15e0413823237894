"""Variants by name. Each file of this folder is one paper and registers itself: to add one, add its file.

A paper's file puts ``@variants(davit_tiny={"depths": (1, 1, 3, 1), ...}, davit_small={...})`` on its model.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

from attnc.errors import DeclarationError

if TYPE_CHECKING:
    from torch import nn

PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Variant:
    """A named configuration of an architecture: `build(**config)` makes the module."""

    build: Callable[..., nn.Module]
    config: Mapping[str, Any]


_variants: dict[str, Variant] = {}
Model = TypeVar("Model", bound="Callable[..., nn.Module]")


def variants(**configs: Mapping[str, Any]) -> Callable[[Model], Model]:
    """Register the decorated class or builder once per keyword: ``family_variant`` = its arguments."""

    def register(build: Model) -> Model:
        for name, config in configs.items():
            if name in _variants:
                raise DeclarationError(f"model {name!r} is registered twice; rename one of the two")
            _variants[name] = Variant(build, dict(config))
        return build

    return register


def discover(name: str | None = None) -> None:
    """Import all papers, or only the files whose name begins `name` (``davit_tiny``: ``davit.py``)."""
    for info in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__):
        if not info.ispkg and (name is None or f"{name}_".startswith(f"{info.name}_")):
            importlib.import_module(f"{PACKAGE}.{info.name}")


def list_models() -> list[str]:
    """All names that `create_model` takes, sorted."""
    discover()
    return sorted(_variants)


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build a variant with random weights, in training mode.

    Args:
        name: one of `list_models()`, e.g. ``"davit_tiny"``.
        overrides: constructor arguments that replace the variant's (``num_classes=10``, ``backend="eager"``).

    Raises:
        DeclarationError: the name is unknown, or the architecture does not take an override.
    """
    discover(name)
    if name not in _variants:
        close = get_close_matches(name, list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "attnc.models.list_models() has all names"
        raise DeclarationError(f"no model is called {name!r}; {hint}")
    variant = _variants[name]
    return call(variant.build, {**variant.config, **overrides}, f"model {name!r}")


def call(build: Callable[..., nn.Module], arguments: Mapping[str, Any], what: str) -> nn.Module:
    """``build(**arguments)``; arguments that do not fit become a DeclarationError about `what`."""
    signature = inspect.signature(build)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise DeclarationError(f"{what}: {error}; it takes {', '.join(signature.parameters)}") from error
    return build(**arguments)
