"""A comparison is worth something only between equal results: every peer of every row computes what attnc computes."""

from __future__ import annotations

import pytest
import torch

from attnc.compiler import compile
from attnc.schedule.geometry import geometry
from bench.cases import Case, cases

CASES = list(cases())
SMALL = [c for c in CASES if c.grid[0] <= 28 or c.name in ("global 196",)]


def name_of(c: Case) -> str:
    return f"{c.name} {c.size}"


def test_names_are_apart() -> None:
    assert len({name_of(c) for c in CASES}) == len(CASES)


@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_peers_agree(case: Case) -> None:
    torch.manual_seed(0)
    inputs = case.inputs(2, torch.float32)
    with torch.no_grad():
        ours, *theirs = ((n, run(*inputs)) for n, run in case.runners().items())
    assert theirs
    for name, out in theirs:
        assert out.shape == ours[1].shape, name
        torch.testing.assert_close(ours[1], out, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [c for c in CASES if c.pattern], ids=name_of)
def test_pairs_are_counted(case: Case) -> None:
    """The share of the machine's GEMM rests on the number of allowed pairs."""
    assert case.pattern
    program = compile(case.pattern, grid=case.grid).program(len(case.grid))
    if case.grid[0] <= 28:
        assert geometry(program, case.grid, case.grid).allowed(case.heads) == case.heads * case.pairs
