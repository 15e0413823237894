"""Reading of the golden files: outputs and gradients of official modules for fixed weights and inputs.

A pair NAME.json, NAME.safetensors in ``goldens/SLUG`` holds ``in.*`` (inputs and cotangents), ``param.*``
(official state dict), ``out.*`` (outputs in evaluation mode), ``grad.*`` (gradients of sum(out * cotangent)).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from attnc.models import load_official

ROOT = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Golden:
    """One golden; every dictionary is keyed by the name without its prefix."""

    slug: str
    meta: dict[str, Any]
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def build(self, backend: str = "auto") -> nn.Module:
        """Our module with the golden's weights, in their dtype."""
        config = self.meta["config"]
        return load_official(self.slug, self.meta["module"], config, self.params, backend=backend)

    @property
    def rounding(self) -> float:
        """How far the reference's own float32 outputs are from its float64 ones (absolute)."""
        keys = ("f32_vs_f64_max_abs", "max_abs_diff_fp32_vs_fp64", "fp32_vs_fp64_max_abs_diff")
        error = next((self.meta[key] for key in keys if key in self.meta), 0.0)
        return float(max(error.values(), default=0.0) if isinstance(error, dict) else error)


def names() -> list[str]:
    """All goldens as ``slug/name``."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in ROOT.glob("*/*.json"))


def load(name: str, dtype: torch.dtype) -> Golden:
    """Read a golden; weights, inputs and cotangents in `dtype`, expected values in float64."""
    path = ROOT / name
    tensors = load_file(path.with_suffix(".safetensors"))

    def group(prefix: str, to: torch.dtype) -> dict[str, Tensor]:
        found = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        return {key: t.to(to) if t.is_floating_point() else t for key, t in found.items()}

    given, outputs = group("in.", dtype), group("out.", torch.float64)
    cotangents = {key: t for key, t in given.items() if key.startswith("cotangent")}
    inputs = {key: t for key, t in given.items() if key not in cotangents}
    # "cotangent" alone belongs to the only output, "cotangent.y" or "cotangent_y" to output y
    only = next(iter(outputs))
    cotangents = {key.removeprefix("cotangent")[1:] or only: t for key, t in cotangents.items()}
    meta = json.loads(path.with_suffix(".json").read_text())
    return Golden(
        path.parent.name,
        meta,
        group("param.", dtype),
        inputs,
        cotangents,
        outputs,
        group("grad.", torch.float64),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    scale = expected.abs().max().clamp_min(1e-30)
    return float((found.detach().double() - expected).abs().max() / scale)
