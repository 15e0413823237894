"""Checkpoints of the training examples: one file, written whole or not at all, read without unpickling anything but tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save(path: Path, **state: Any) -> None:
    """Write tensors, state dicts, numbers and lists of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote; an empty dict where there is nothing yet."""
    return torch.load(path, weights_only=True) if path.exists() else {}
