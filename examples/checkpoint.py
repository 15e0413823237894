"""Checkpoints of the training examples: one safetensors file, written whole or not at all. Nothing in it is ever executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def save(path: Path, **state: Any) -> None:
    """Write tensors, state dicts, numbers, and lists and dicts of them. What is no tensor stands in the file's head, as JSON."""
    tensors: dict[str, Tensor] = {}

    def packed(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().contiguous()
            return {"tensor": name}
        if isinstance(value, dict):  # keys may be numbers, which JSON would make strings
            return {"dict": [[k, packed(v, f"{name}.{k}")] for k, v in value.items()]}
        return [packed(v, f"{name}.{i}") for i, v in enumerate(value)] if isinstance(value, list | tuple) else value

    text = json.dumps(packed(state, "state"))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, {"state": text})
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote (tuples as lists); an empty dict where there is nothing yet."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:

        def unpacked(value: Any) -> Any:
            if isinstance(value, list):
                return [unpacked(v) for v in value]
            if not isinstance(value, dict):
                return value
            return file.get_tensor(value["tensor"]) if "tensor" in value else {k: unpacked(v) for k, v in value["dict"]}

        state: dict[str, Any] = unpacked(json.loads(file.metadata()["state"]))
        return state
