"""A comparison is worth something only between equal results: every peer of every row computes what attnc computes."""

from __future__ import annotations

import pytest
import torch

from bench.cases import Case, cases

SMALL = [c for c in cases(1, torch.float32, flex=False) if not any(n in c.name for n in ("1024", "4096"))]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_peers_agree(case: Case) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        inputs = case.inputs()
        ours = case.runners["attnc"](*inputs)
        for name, run in case.runners.items():
            theirs = run(*inputs)
            assert theirs.shape == ours.shape, name
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
