"""The front of attnc.emit, and the score elements that backends are said to issue."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import attnc
from attnc import patterns
from attnc.errors import AttncError, DeclarationError, ShapeError, UnsupportedError
from attnc.report.emit import TARGETS
from attnc.report.issued import issued
from attnc.report.subject import subject

SIZES: dict[str, Any] = {"grid": (8, 6), "heads": 2, "head_dim": 16}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_prints_the_same_bytes_twice(target: str) -> None:
    first, second = (attnc.emit(patterns.window(2), **SIZES, target=target, dtype=d) for d in ("float32", torch.float32))
    assert first == second
    compile(first, "module.py", "exec")
    assert "import attnc" not in first
    assert "from attnc" not in first


def test_a_cpu_module_computes_the_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "module.py"
    path.write_text(attnc.emit(patterns.neighborhood(3, bias="relative"), **SIZES, target="cpu", dtype="float32"))
    spec = importlib.util.spec_from_file_location("emitted_for_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    q, k, v = torch.randn(3, 1, 2, 48, 16)
    bias = torch.randn(2, 5, 5)
    want = attnc.reference(patterns.neighborhood(3, bias="relative"), grid=(8, 6))(q, k, v, bias=bias)
    torch.testing.assert_close(module.attention(q, k, v, bias=bias), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"target": "tpu"}, UnsupportedError, r"target='tpu' is unknown; there are cuda:80, cuda:90.* cpu"),
        ({"dtype": "float64"}, UnsupportedError, "dtype='float64' for the target cuda:90; it takes float32, float16, bfloat16"),
        ({"dtype": "int8", "target": "cpu"}, UnsupportedError, "dtype='int8' for the target cpu"),
        ({"grid": (8, None)}, ShapeError, "emit needs a grid with known lengths"),
        ({"grid": None}, ShapeError, "emit needs a grid with known lengths"),
        ({"heads": 0}, DeclarationError, "heads=0: a positive int"),
        ({"value_dim": -1}, DeclarationError, "value_dim=-1: a positive int"),
    ],
)
def test_what_cannot_be_emitted_is_refused(options: dict[str, Any], error: type[AttncError], says: str) -> None:
    with pytest.raises(error, match=says):
        attnc.emit(patterns.window(2), **{**SIZES, **options})


@pytest.mark.parametrize("p", [patterns.window(7), patterns.neighborhood(5), patterns.causal(), patterns.dilated(3, 2)], ids=str)
def test_backends_issue_what_is_allowed_and_less_than_everything(p: attnc.Pattern) -> None:
    s = subject(p, grid=(28, 21))
    assert s.geometry is not None
    allowed, everything = s.allowed(), s.dense()
    assert allowed is not None
    sizes: dict[str, Any] = {"heads": 1, "head_dim": 32, "value_dim": 32, "dtype": "float32"}
    of = {b: issued(b, s.program, s.geometry, **sizes) for b in ("cpp", "torch", "triton", "eager")}
    assert of["eager"] == everything
    assert allowed <= of["cpp"] <= everything
    assert allowed <= of["torch"] <= everything
    assert allowed <= of["triton"]
    if p.name == "window(7)":
        assert of["cpp"] == of["torch"] == allowed
