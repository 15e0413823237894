"""Every error attnc raises. Each message names the pattern, the construct or argument, the value found, and the way out."""

from __future__ import annotations


class AttncError(Exception):
    """Base of all errors of this package."""


class DeclarationError(AttncError):
    """The statement itself is wrong: it branches on a symbol, its relation is not boolean, an axis is unknown, ..."""


class UnsupportedError(AttncError):
    """The statement is legal but the chosen backend cannot lower it; the message says which backend can."""


class ShapeError(AttncError):
    """Tensors, grids or heads do not fit the declaration."""


class BuildError(AttncError):
    """A toolchain failed; the message shows its output and where the source was kept."""


class CacheError(AttncError):
    """The build cache cannot be used safely (wrong owner, writable by others, ...)."""
