"""Unions and heads that differ run as parts: every backend against the meaning of the whole, forward and backward.

`python tests/test_parts.py triton` runs the same cases in one process, which is how the interpreter (chosen before Triton is
imported) gets them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import strategies
import torch

import attnc
from attnc.compiler import has_compiler
from attnc.patterns import axial, cross, dilated, full, neighborhood, per_head, window
from attnc.schedule import split as splitting
from attnc.schedule.split import split

GRID = (5, 6)
RELATIVE = window(3, bias="relative")
CASES: dict[str, tuple[attnc.Pattern, dict[str, Any]]] = {
    "cross": (cross(1), {}),
    "overlapping union": (window(3) | dilated(3, 3), {}),
    "three parts": (axial("x") | axial("y") | window(2), {}),
    "heads by rows and columns": (per_head([window(3), axial("y")]), {"heads": 4}),
    "a table cut by heads": (per_head([RELATIVE, cross(1)]), {"heads": 4, "kv_heads": 2, "tables": {"bias": (4, 5, 5)}}),
    "runs inside one key head": (
        per_head([RELATIVE, window(3, 1, bias="relative")]),
        {"heads": 4, "kv_heads": 1, "tables": {"bias": (4, 5, 5)}},
    ),
    "heads without a key": (window(3).heads([1]), {}),
    "pads of some heads": (
        per_head([window(3), window(4)]),
        {"pad": ((0, 1), (1, 1)), "tables": {"pad_k": (2, 8), "pad_v": (1, 5)}},
    ),
    "prefix on a flat grid": (full(), {"prefix": 3, "kv_heads": 1}),
    "a union beside prefix tokens": (neighborhood(3) | axial("x"), {"prefix": 2}),
}


def check(name: str, backend: str, dtype: torch.dtype) -> None:
    """Outputs, LSE and every gradient of one case against the eager evaluation of the whole statement in float64."""
    pattern, options = CASES[name]
    options = {**options}
    heads, kv_heads = options.pop("heads", 2), options.pop("kv_heads", None)
    shapes = options.pop("tables", {})
    generator = torch.Generator().manual_seed(0)
    n = GRID[0] * GRID[1] + options.get("prefix", 0)
    kv = kv_heads or heads
    sizes = [(2, heads, n, 8), (2, kv, n, 8), (2, kv, n, 5), *shapes.values()]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
    weight = torch.randn((2, heads, n, 5), generator=generator, dtype=torch.float64)
    results = []
    for op, kind in (
        (attnc.compile(pattern, grid=GRID, backend=backend, **options), dtype),
        (attnc.reference(pattern, grid=GRID, **options), torch.float64),
    ):
        mine = [t.detach().to(kind).requires_grad_() for t in leaves]
        out, lse = op(*mine[:3], return_lse=True, **dict(zip(shapes, mine[3:], strict=True)))
        finite = torch.where(lse.isfinite(), lse, 0.0)
        loss = (out * weight.to(kind)).sum() + (finite * weight[..., 0].to(finite)).sum()
        results.append([out, finite, *torch.autograd.grad(loss, mine)])
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for i, (got, true) in enumerate(zip(*results, strict=True)):
        worst = (got.double() - true.double()).abs().max().item()
        limit = 2e-5 if i == 1 else tolerance  # the LSE of the meaning is float64, of a kernel float32
        assert worst <= limit * max(1.0, true.abs().max().item()), f"{name}, {backend}: result {i} differs by {worst:.2e}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_parts(name: str, backend: str) -> None:
    if backend == "cpp" and not has_compiler():
        pytest.skip("no C++ compiler")
    check(name, backend, torch.float64 if backend == "torch" else torch.float32)


def test_a_union_runs_whole_where_its_parts_save_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query costs each part as much as many keys do, and masked pairs cost more than others."""
    monkeypatch.setattr(splitting, "QUERY", strategies.COST_OF_A_QUERY)
    for union, side, parts in (
        (axial("x") | axial("y"), 14, 2), (axial("x") | axial("y"), 8, 1),
        (cross(7), 14, 2), (cross(3), 7, 1),  # 147 of 196 keys, without a mask once the columns' gap is known; 27 of 49
        (full() | cross(7), 14, 1),
    ):  # fmt: skip
        grid = (side, side)
        (run,) = split.__wrapped__(attnc.compile(union, grid=grid).program(2), grid, grid, 2, 2)
        assert len(run.parts) == parts, (union, side)


@pytest.mark.interpret
def test_parts_in_triton() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__)), "triton"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["ok"] * len(CASES)


if __name__ == "__main__":
    for case in CASES:
        check(case, sys.argv[1], torch.float32)
        sys.stdout.write("ok\n")
