"""Front ends with the signatures and the meaning of other libraries: `attnc.compat.flex` and `attnc.compat.natten`."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["flex", "natten"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"attnc.compat.{name}")
    raise AttributeError(f"module 'attnc.compat' has no attribute {name!r}")
