"""Compiled PTX of the generated kernels, run in the simulator that may lie beside the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton_cases
from test_triton import failures, run_cases

SIMULATOR = Path(__file__).parents[2] / "shared" / "tools" / "gpusim"


@pytest.mark.gpusim
@pytest.mark.skipif(
    not (SIMULATOR / "simdriver.py").exists(), reason="the PTX simulator (../shared/tools/gpusim) is not beside the project"
)
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_kernels_agree_with_the_meaning(arch):
    group = {90: "simulated", 80: "simulated, few"}[arch]
    found = run_cases(group, "--sim", str(SIMULATOR), str(arch), interpret=False)
    assert set(found) == set(triton_cases.GROUPS[group])
    assert not failures(found)
