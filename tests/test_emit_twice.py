"""Second derivatives of stand-alone modules are refused, where they would silently be zero."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import attnc
from attnc import patterns

compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
STATEMENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "window": (patterns.window(4, bias="relative"), {"bias": (2, 7, 7)}),
    "channel": (patterns.channel(), {}),
}


@compiler
@pytest.mark.parametrize("name", STATEMENTS)
def test_cpu_modules_refuse_second_derivatives(name: str, tmp_path: Path) -> None:
    pattern, tables = STATEMENTS[name]
    file = tmp_path / "emitted.py"
    file.write_text(attnc.emit(pattern, grid=(8, 8), heads=2, head_dim=16, dtype="float32", target="cpu"))
    attention = runpy.run_path(str(file))["attention"]
    rows = [torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3)]
    named = {n: torch.randn(shape, requires_grad=True) for n, shape in tables.items()}
    leaves = [*rows, *named.values()]
    out = attention(*rows, **named).square().sum()
    with pytest.raises(RuntimeError, match="no second derivatives: leave out create_graph=True"):
        torch.autograd.grad(out, leaves, create_graph=True, retain_graph=True)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out, leaves))


@pytest.mark.parametrize("name", STATEMENTS)
def test_gpu_modules_say_the_same(name: str) -> None:
    pattern, _ = STATEMENTS[name]
    text = attnc.emit(pattern, grid=(8, 8), heads=2, head_dim=16, dtype="float16", target="cuda:90")
    assert text.count("this module has no second derivatives") == 1
