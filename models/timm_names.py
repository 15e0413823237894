"""State dicts of timm's ports under the official parameter names that our models use.

A paper whose port renames things calls `timm_names` once, with regular expressions that are applied in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from attnc.errors import UnsupportedError
from attnc.models.registry import discover

Replacement = str | Callable[[re.Match[str]], str]
Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

_rules: dict[str, tuple[tuple[re.Pattern[str], Replacement], ...]] = {}
_flat: dict[str, re.Pattern[str]] = {}
_convert: dict[str, Convert] = {}


def timm_names(family: str, *rules: tuple[str, Replacement], flatten: str = "", convert: Convert = dict) -> None:
    """Register (pattern, replacement) pairs for `re.sub` that make a timm key of `family` an official one.

    Weights whose official names match `flatten` are linear layers that timm has as 1x1 convolutions. `convert` makes an official
    state dict of the renamed one where values differ too.
    """
    _rules[family] = tuple((re.compile(pattern), replacement) for pattern, replacement in rules)
    _convert[family] = convert
    if flatten:
        _flat[family] = re.compile(flatten)


def from_timm(name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a timm state dict for our model of the same name (``"davit_tiny"``); most tensors are not copied.

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
        flat = family in _flat and _flat[family].search(key)
        renamed[key] = value.flatten(1) if flat else value
    return _convert[family](renamed)
