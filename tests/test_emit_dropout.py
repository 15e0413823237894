"""Emitted modules with dropout: the mask of an operator, bit for bit; exact gradients for it; at p = 0 the plain weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from strategies import weighted

import attnc
from attnc import patterns
from attnc.compiler import has_compiler
from attnc.errors import UnsupportedError

CASES: dict[str, tuple[attnc.Pattern, dict[str, Any]]] = {
    "window": (patterns.window(3, bias="relative"), {}),
    "pad": (patterns.window(3), {"prefix": 1, "pad": "multiple"}),
    "union": (patterns.axial("y") | patterns.axial("x"), {"grid": (5, 5)}),
    "sink": (weighted(patterns.neighborhood(3), "sink", post=True), {"prefix": 1}),
}
SCRIPT = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
import torch
import attnc
import test_emit_dropout as t

for name in sys.argv[3].split(","):
    p, options = t.CASES[name]
    options = {"grid": (3, 4), **options}
    text = attnc.emit(p, **options, heads=2, head_dim=16, dtype="float32", target=sys.argv[2], dropout=True)
    assert "import attnc" not in text
    path = sys.argv[4] + f"/{name}.py"
    open(path, "w").write(text)
    spec = importlib.util.spec_from_file_location("module_" + name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["module_" + name] = module
    spec.loader.exec_module(module)
    op = attnc.compile(p, **options, backend="torch")
    n = torch.Size(options["grid"]).numel() + options.get("prefix", 0)
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 2, n, 16)] * 3 + [{"bias": (2, 5, 5), "sink": (2,)}[x] for x in op.program(2).attend.tables]
    names = op.program(2).attend.tables
    values = [torch.randn(s, generator=g) for s in shapes]
    for how in ({"dropout_p": 0.4, "seed": -(2**40) - 7}, {}):
        found = []
        for f in (module.attention, op):
            x = [v.clone().requires_grad_() for v in values]
            out = f(*x[:3], **dict(zip(names, x[3:])), **how)
            found.append([out, *torch.autograd.grad(out.sin().sum(), x)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=2e-5)
    q = torch.zeros(1, 2, n, 16)
    v = torch.eye(n, 16).expand(1, 2, -1, -1)
    more = dict(zip(names, values[3:]))
    masks = [f(q, q, v, **more, dropout_p=0.5, seed=11) > 0 for f in (module.attention, op)]
    assert torch.equal(*masks) and 0.0 < masks[0].float().mean() < 1.0
    torch.manual_seed(5)
    drawn = module.attention(q, q, v, **more, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(drawn, module.attention(q, q, v, **more, dropout_p=0.5))
    for wrong in (1.0, -0.1):
        try:
            module.attention(q, q, v, **more, dropout_p=wrong)
        except ValueError as e:
            assert "wants a number from 0 to less than 1" in str(e)
        else:
            raise AssertionError(wrong)
print("held")
"""


def run(target: str, names: str, folder: Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(Path(__file__).parent), target, names, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("held\n")


@pytest.mark.interpret
def test_triton_modules(tmp_path: Path) -> None:
    run("cuda:90", ",".join(CASES), tmp_path, TRITON_INTERPRET="1")


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
def test_cpu_modules(tmp_path: Path) -> None:
    run("cpu", "pad", tmp_path)


def test_modules_without_it_know_nothing_of_it() -> None:
    for target in ("cuda:90", "cpu"):
        text = attnc.emit(patterns.window(3), grid=(6, 6), heads=2, head_dim=16, dtype="float32", target=target)
        assert "dropout" not in text and "philox" not in text


def test_a_module_says_that_it_drops_out() -> None:
    text = attnc.emit(patterns.window(3), grid=(6, 6), heads=2, head_dim=16, dropout=True)
    assert "weights:  dropped out by a seed" in text


def test_mechanisms_have_none() -> None:
    with pytest.raises(UnsupportedError, match=r"mechanism channel\(\): dropout=True belongs to patterns"):
        attnc.emit(patterns.channel(), heads=2, head_dim=16, dropout=True)
