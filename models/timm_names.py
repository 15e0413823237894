"""State dicts of timm's ports under the official parameter names that our models use.

A paper whose port renames things calls `timm_names` once, with regular expressions that are applied in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from attnc.errors import UnsupportedError
from attnc.models.registry import discover

_rules: dict[str, tuple[tuple[re.Pattern[str], str], ...]] = {}


def timm_names(family: str, *rules: tuple[str, str]) -> None:
    """Register (pattern, replacement) pairs for `re.sub` that make a timm key of `family` an official one."""
    _rules[family] = tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


def from_timm(name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a timm state dict for our model of the same name (``"davit_tiny"``); the tensors are not copied.

    Raises:
        UnsupportedError: no renaming is known for this family.
    """
    discover(name)
    family = next((f for f in _rules if f"{name}_".startswith(f"{f}_")), None)
    if family is None:
        discover()
        raise UnsupportedError(f"no timm names are known for {name!r}; they are for {', '.join(sorted(_rules))}")
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in _rules[family]:
            key = pattern.sub(replacement, key)
        renamed[key] = value
    return renamed
