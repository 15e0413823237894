"""Every official module in tests/goldens: outputs and all gradients, in float32 and float64 (C++ kernels in float32)."""

from __future__ import annotations

import golden_files
import pytest
import torch

from attnc.compiler import has_compiler

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
RUNS = [
    *(pytest.param(dtype, backend, id=f"{dtype}-{backend}") for dtype in ("float32", "float64") for backend in ("eager", "torch")),
    pytest.param("float32", "cpp", id="float32-cpp", marks=needs_compiler),
]


@pytest.mark.parametrize("kind, backend", RUNS)
@pytest.mark.parametrize("name", golden_files.names())
def test_golden(name: str, kind: str, backend: str) -> None:
    dtype = getattr(torch, kind)
    golden = golden_files.load(name, dtype)
    module = golden.build(backend)
    inputs = {key: t.requires_grad_(f"in.{key}" in golden.gradients) for key, t in golden.inputs.items()}
    result = module(**inputs)
    outputs = result if isinstance(result, dict) else dict.fromkeys(golden.outputs, result)

    for key, expected in golden.outputs.items():
        allowed = max(1e-5, 2 * golden.rounding / float(expected.abs().max()))
        assert outputs[key].shape == expected.shape
        assert golden_files.relative_error(outputs[key], expected) <= allowed, f"out.{key}"

    if not golden.gradients:
        return
    torch.stack([(outputs[key] * t).sum() for key, t in golden.cotangents.items()]).sum().backward()
    leaves = {f"in.{key}": t for key, t in inputs.items()}
    leaves |= {f"param.{key}": t for key, t in module.named_parameters()}
    # the files' gradients are float32: one that is left where larger ones cancel carries the rounding of those
    largest = max(float(expected.abs().max()) for expected in golden.gradients.values())
    for key, expected in golden.gradients.items():
        found = leaves[key].grad
        assert found is not None, f"grad.{key} is missing"
        allowed = 1e-4 * max(1.0, 1e-2 * largest / max(float(expected.abs().max()), 1e-30))
        assert golden_files.relative_error(found, expected) <= allowed, f"grad.{key}"


@pytest.mark.parametrize("name", golden_files.names())
def test_official_parameter_names(name: str) -> None:
    golden = golden_files.load(name, torch.float32)
    own = {key for key, _ in golden.build().named_parameters()}
    assert own <= set(golden.params)
