"""attnc beside its peers, row by row, in one run: the tables that the project holds itself to."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from bench.cases import bar
from bench.conftest import Row
from bench.timing import Results, gemm_rate, interleaved, medians, passes, threads

FLEX = ("neighbourhood 7 56x56x64", "neighbourhood 7 14x14x256")  # rows with FlexAttention in the standard set: it compiles long
WIDE = "attnc, float32"


def test_row(row: Row, benchmark: Any, results: Results, seconds: float, request: pytest.FixtureRequest) -> None:
    """One row: medians of each runner, the ratio to the best peer, the share of the machine's GEMM."""
    case, dtype = row.case, getattr(torch, row.dtype)
    everything, standard = request.config.getoption("everything"), (row.dtype, row.batch, row.threads) == ("float32", 8, 2)
    slow = not row.backward and seconds > 0 and (everything or (standard and f"{case.name} {case.size}" in FLEX))
    with threads(row.threads), nullcontext() if row.backward else torch.no_grad():
        gemm = gemm_rate(dtype)
        start = time.perf_counter()
        runners = passes(case.runners(slow=slow), lambda: case.inputs(row.batch, dtype), row.backward)
        if row.dtype == "bfloat16":  # ours in float32 takes turns with them
            runners |= passes({WIDE: case.ours()}, lambda: case.inputs(row.batch, torch.float32), row.backward)
        setup = time.perf_counter() - start
        found = interleaved(runners, seconds * (1.5 if row.backward else 1.0), benchmark)
    times = medians(found)
    ours, theirs = times["attnc"], {n: t for n, t in times.items() if n not in ("attnc", WIDE)}
    peer = min(theirs, key=theirs.__getitem__)
    asked = bar(case, row.dtype, row.what, row.batch, row.threads)
    share = case.flops(row.batch, row.backward) / ours / gemm
    record = {
        "name": case.name, "size": case.size, "family": case.family, "model": case.model,
        "dtype": row.dtype, "asked batch": row.batch, "batch": case.batch or row.batch, "threads": row.threads, "pass": row.what,
        "seconds": times, "calls": {n: len(t) for n, t in found.items()}, "setup": setup, "gemm": gemm,
        "peer": peer, "ratio": theirs[peer] / ours, "share": share,
        "bar": {"ratio": asked.ratio, "share": asked.share, "float32": asked.float32},
    }  # fmt: skip
    benchmark.extra_info.update(record)
    results.add(record)
    mark = "" if record["ratio"] >= asked.ratio and share >= (asked.share or 0) else "  below"
    print(
        f"{row!s:72} {1e3 * ours:9.3f} ms  {peer} {1e3 * theirs[peer]:9.3f}  {record['ratio']:5.2f}x (bar {asked.ratio:.1f})"
        f"  {share:.2f} of GEMM (bar {asked.share or '-'}){mark}",
        flush=True,
    )
    gc.collect()
