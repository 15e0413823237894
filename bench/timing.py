"""How times are taken: runners in turns on rotating inputs, medians; the machine's own GEMM beside them; results as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COPIES = 3  # of the inputs, taken in turn so that caches do not flatter
FEWEST, MOST = 5, 200  # measured rounds of a row
HOPELESS = 3.0  # a runner that is so much slower than the best peer after two calls is not called again
Run = Callable[..., Any]


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Torch (and so attnc) on n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(run: Run, *args: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def gemm_rate(dtype: torch.dtype, calls: int = 8) -> float:
    """The machine's own GEMM on these threads, floating-point operations per second: the best of several 1024^3 products."""
    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    return 2 * 1024**3 / min(timed(torch.mm, a, b) for _ in range(calls))


def training(run: Run, leaves: list[tuple[Tensor, ...]]) -> Run:
    """Forward and backward of one set of inputs."""
    weight = torch.randn_like(run(*leaves[0]).detach())
    return lambda i: torch.autograd.grad(run(*leaves[i]), leaves[i], weight)


def passes(runners: Mapping[str, Run], inputs: Callable[[], tuple[Tensor, ...]], backward: bool) -> dict[str, Run]:
    """Runners of the number of an input set."""
    sets = [inputs() for _ in range(COPIES)]
    if backward:
        leaves = [tuple(t.requires_grad_() for t in s) for s in sets]
        return {name: training(run, leaves) for name, run in runners.items()}
    return {name: lambda i, run=run: run(*sets[i]) for name, run in runners.items()}


def interleaved(runners: Mapping[str, Run], seconds: float, benchmark: Any = None) -> dict[str, list[float]]:
    """Times of each runner. They take turns, so that a slow moment of the machine falls on all of them.

    The first runner is ours; `benchmark`, where given, times it (pytest-benchmark), and the peers run in the setup of its rounds.
    """
    ours, *peers = runners
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run(0)  # builds, warms caches
    alive = {name: [timed(runners[name], i) for i in (1, 2)] for name in peers}
    best = min((min(t) for n, t in alive.items() if not n.startswith(ours)), default=float("inf"))  # (not of ours in another dtype)
    for name in [n for n, t in alive.items() if min(t) > HOPELESS * best]:
        times[name] = alive.pop(name)
    round_time = sum(map(min, alive.values())) + timed(runners[ours], 1)
    rounds = max(FEWEST, min(MOST, int(seconds / max(round_time, 1e-6))))
    count = iter(range(1 << 60))

    def turn() -> tuple[tuple[int], dict[str, Any]]:
        i = next(count) % COPIES
        for name in alive:
            times[name].append(timed(runners[name], i))
        return (i,), {}

    if benchmark is not None:
        benchmark.pedantic(runners[ours], setup=turn, rounds=rounds, warmup_rounds=0)
        times[ours] = list(benchmark.stats.stats.data)
        return times
    for _ in range(rounds):
        times[ours].append(timed(runners[ours], *turn()[0]))
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds of each runner."""
    return {name: statistics.median(t) for name, t in times.items()}


def machine() -> dict[str, Any]:
    """What figures depend on: processor, versions; its kind is the widest vectors it has, which name the folder of the results."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    model = next(named, platform.processor() or platform.machine())
    flags = next((x.split() for x in lines if x.startswith(("flags", "Features"))), [])
    sets = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve") if f in flags]
    kind = next((f for f in ("avx512", "avx2", "sve", "asimd") if any(s.startswith(f) for s in sets)), platform.machine())
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("timm", "natten"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = "not installed"
    return {
        "kind": kind,
        "processor": model,
        "cores": os.cpu_count(),
        "sets": sets,
        "versions": versions,
        "system": platform.system(),
    }


class Results:
    """One JSON file of rows, written anew with each row, so that what was measured survives an interruption."""

    def __init__(self, name: str, folder: Path | None) -> None:
        self.path = None if folder is None else folder / f"{name}.json"
        self.report: dict[str, Any] = {"machine": machine(), "rows": []}

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write the file."""
        self.report["rows"].append(row)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.report, indent=1) + "\n")
        part.replace(self.path)
