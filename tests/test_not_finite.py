"""A key that a query does not see does not matter to it, nor a query to keys that it does not see, whatever they hold: NaN and
infinities show where the statement lets them, and nowhere else.

`eager` and `torch` keep them apart pair by pair. Kernels multiply what lies in one tile, zeros by NaN too: they keep groups apart.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from strategies import weighted

import attnc
from attnc import patterns
from attnc.compiler import has_compiler

CPP = pytest.param("cpp", marks=pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here"))
EXACT: dict[str, tuple[attnc.Pattern, tuple[int, ...], dict[str, Any]]] = {
    "causal": (patterns.causal(), (40,), {}),
    "neighbourhood": (patterns.neighborhood(3, bias="relative"), (7, 9), {}),
    "parts": (patterns.axial("y") | patterns.axial("x"), (5, 6), {}),
    "prefix tokens and virtual keys": (patterns.window(3), (4, 5), {"prefix": 2, "pad": "multiple"}),
    "a predicate": (patterns.causal() & patterns.band(3, 3), (5, 9), {}),
    "sigmoid": (weighted(patterns.neighborhood(3), "sigmoid", post=True), (5, 6), {}),
    "relu": (weighted(patterns.causal(), "relu cubed"), (12,), {}),
    "sink": (weighted(patterns.causal(), "sink"), (12,), {}),
    "one channel": (patterns.causal(), (12,), {}),
}
GROUPS = {
    "windows": (patterns.window(3), (6, 7), {}),
    "windows with a bias": (patterns.window(3, bias="relative"), (6, 7), {}),
    "lines": (patterns.axial("x"), (3, 20), {}),
}
CASES = [(name, backend) for name in (*EXACT, *GROUPS) for backend in ("eager", "torch")]
CASES += [pytest.param(name, "cpp", marks=CPP.marks) for name in GROUPS]
SHAPES = {"bias": (2, 5, 5), "sink": (2,), "gate": (2,)}


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name, backend", CASES)
def test_it_shows_in_what_sees_it_alone(name: str, backend: str, value: float) -> None:
    p, grid, options = {**EXACT, **GROUPS}[name]
    op = attnc.compile(p, grid=grid, backend=backend, **options)
    prefix = options.get("prefix", 0)
    seen = torch.nn.functional.pad(attnc.mask(p, grid=grid, heads=2), (prefix, 0, prefix, 0), value=True)
    n, dim = seen.shape[1], 1 if name == "one channel" else 8
    g = torch.Generator().manual_seed(0)
    clean = [torch.randn(2, 2, n, dim, generator=g) for _ in range(4)]
    tables = {t: torch.randn(SHAPES[t], generator=g) for t in op.program(len(grid)).attend.tables}

    def run(rows: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in rows[:3]]
        out = op(*leaves, **tables)
        return [out.detach(), *torch.autograd.grad(out, leaves, rows[3])]

    right, odd = run(clean), n // 2
    assert all(t.isfinite().all() for t in right)
    for which in range(4):  # of q, k, v and the output's gradient
        rows = [t.clone() for t in clean]
        rows[which][0, :, odd] = value
        queries = seen[:, :, odd] if which in (1, 2) else (torch.arange(n) == odd).expand(2, n)
        keys = (seen & queries[:, :, None]).any(1)
        nothing = torch.zeros_like(keys)
        wrong = [nothing if which == 3 else queries, queries, keys, nothing if which == 2 else keys]
        for got, want, those, what in zip(run(rows), right, wrong, ("out", "dq", "dk", "dv"), strict=True):
            shown = ~got.isfinite().all(-1)
            assert not shown[1].any() and not (shown[0] & ~those).any(), f"{what} for {'qkvg'[which]}"
            if math.isnan(value) and name not in ("sigmoid", "relu"):  # where one weight leaves the others of its row alone
                assert torch.equal(shown[0], those), f"{what} for {'qkvg'[which]}"
            torch.testing.assert_close(got[1], want[1])
            torch.testing.assert_close(got[0][~those], want[0][~those])


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_softmax_over_queries(backend: str) -> None:
    p = weighted(patterns.causal(), "queries")
    q, k, v = (torch.randn(1, 1, 12, 4, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        v[:, :, 5] = math.nan
    out = attnc.compile(p, grid=(12,), backend=backend)(q, k, v)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    shown = [~t.isfinite().all(-1)[0, 0] for t in (out, dq, dk, dv)]
    later = torch.arange(12) >= 5
    assert [s.tolist() for s in shown] == [later.tolist(), later.tolist(), (torch.arange(12) == 5).tolist(), [False] * 12]
