"""The cases of test_lists.py on interpreted Triton: `TRITON_INTERPRET=1 python triton_lists.py NAME ...`, one line a case.

Whether kernels are interpreted is decided when triton is imported, so the tests run this file in a process of its own.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import test_lists as cases
import torch
from strategies import hold

from attnc.runtime import triton_lists
from attnc.schedule.list_choice import Limits


def main(names: list[str]) -> None:
    """Hold each case to the meaning, and tell how many lists its calls walked."""
    small = Limits(16, 16, partial=1.0, query=1.0, key=1.0, lattice=True)
    triton_lists.Kernels.limits = property(lambda self: small)  # type: ignore[assignment, method-assign]
    used: list[triton_lists.Lists] = []
    real = triton_lists.on

    def noted(lists: triton_lists.Lists, device: torch.device) -> tuple[tuple[torch.Tensor, ...], ...]:
        used.append(lists)
        return real(lists, device)

    triton_lists.on = noted  # type: ignore[assignment]
    for name in names:
        used.clear()
        hold(replace(cases.TRITON[name], dtype=torch.float32), "triton")
        full = sum(int(x.queries.full.sum()) for x in used)
        count = f"{len(used)} lists, {sum(x.filled for x in used)} filled"
        print(f"{name}: {count}, {sum(x.queries.visited for x in used)} chunks, {full} full")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
