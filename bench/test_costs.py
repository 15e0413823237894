"""What users pay besides the kernel: building, the operator's own time, memory; and how the kernels hold up elsewhere."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import attnc
from attnc import patterns
from attnc.codegen import cpp_host
from attnc.runtime import cpp, parts, tuner, winners
from bench.cases import Case, cases
from bench.timing import Results, gemm_rate, interleaved, medians, passes, threads

CASES = {f"{c.name} {c.size}": c for c in cases()}
PATTERNS = {
    "window 7 + bias": "patterns.window(7, bias='relative'), (14, 14), bias=(2, 13, 13)",
    "shifted window 7 + bias": "patterns.window(7, 3, bias='relative'), (14, 14), bias=(2, 13, 13)",
    "neighbourhood 7": "patterns.neighborhood(7), (14, 14)",
    "causal": "patterns.causal(), (196,)",
}
FIRST_CALL = """
import gc, json, sys, time, torch, attnc
from attnc import patterns
attnc.compile  # the import of the compiler is no part of a call
gc.collect()  # nor is the garbage of all imports, which would be collected whenever its turn comes

def run(p, grid, **tables):
    n = 1
    for length in grid:
        n *= length
    q, k, v = (torch.randn(1, 2, n, 32, requires_grad=True) for _ in range(3))
    tables = {name: torch.randn(shape, requires_grad=True) for name, shape in tables.items()}
    times = [time.perf_counter()]
    out = attnc.compile(p, grid=grid)(q, k, v, **tables)
    times.append(time.perf_counter())
    out.sum().backward()
    times.append(time.perf_counter())
    print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""
MEMORY = """
import json, time, torch, attnc
from attnc import patterns
torch.set_num_threads(1)

def peak():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM")) / 1024

def run(p, side):
    op, other = attnc.compile(p), attnc.compile(patterns.full())
    with torch.no_grad():
        other(*(torch.randn(1, 2, 64, 32) for _ in range(3)), grid=(8, 8))  # what any first call brings into memory
        q, k, v = (torch.randn(1, 2, side * side, 32) for _ in range(3))
        outputs = torch.ones_like(q), torch.ones(1, 2, side * side)
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        del outputs
        op(q, k, v, grid=(side, side))
        extra, times = peak() - before, []
        for _ in range(5):
            start = time.perf_counter()
            op(q, k, v, grid=(side, side))
            times.append(time.perf_counter() - start)
    print(json.dumps([sorted(times)[2], extra]))
"""


def _script(text: str, **environment: str) -> Any:
    """What a fresh process prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PATTERNS)
def test_first_call(name: str, results: Results, tmp_path: Path) -> None:
    """Seconds of the first forward and backward in a fresh process: with nothing built, and with everything in the cache."""
    text = f"{FIRST_CALL}\nrun({PATTERNS[name]})"
    # modules have their bytecode kept, as those that pip installed have: the first run is for that alone
    folders = [{"ATTNC_CACHE_DIR": str(tmp_path / n), "PYTHONPYCACHEPREFIX": str(tmp_path / "code")} for n in ("first", "cache")]
    _, built, found = (_script(text, PYTHONDONTWRITEBYTECODE="", **folders[n > 0]) for n in range(3))
    results.add(
        {"name": "first call", "pattern": name, "built": built, "cached": found, "bar": {"built": [2.0, 4.0], "cached": 0.05}}
    )
    shown = f"built: forward {built[0]:.2f} s (bar 2), backward {built[1]:.2f} s (bar 4); cached: {1e3 * found[0]:.0f} ms (bar 50)"
    print(f"{f'first call of {name}':72} {shown}", flush=True)


@pytest.mark.parametrize("name", ["neighbourhood 7", "window 7"])
def test_growth(name: str, results: Results, quick: bool) -> None:
    """Time per allowed pair and extra memory of the forward as the grid grows."""
    if platform.system() != "Linux":
        pytest.skip("reads /proc/self/status")
    pattern = {"neighbourhood 7": "patterns.neighborhood(7)", "window 7": "patterns.window(7)"}[name]
    sides = [28, 56] if quick else [56, 112, 224, 448]
    small = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    _script(f"{MEMORY}\nrun({pattern}, 28)")  # builds
    found = [_script(f"{MEMORY}\nrun({pattern}, {side})", **small) for side in sides]
    per_pair = [t / side**2 for side, (t, _) in zip(sides, found, strict=True)]
    results.add(
        {
            "name": "growth",
            "pattern": name,
            "sides": sides,
            "seconds": [t for t, _ in found],
            "extra MiB": [m for _, m in found],
        }
    )
    shown = f"time per pair {sides[0]} to {sides[-1]}: {per_pair[-1] / per_pair[0]:.2f}x (bar 1.25); "
    shown += "extra MiB " + ", ".join(f"{m:.1f}" for _, m in found) + " (bar 4)"
    print(f"{f'growth of {name}':72} {shown}", flush=True)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tuned here is not kept: the other rows stay untuned."""
    monkeypatch.setattr(winners, "keep", lambda *_: None)
    monkeypatch.setattr(tuner, "_winners", {})


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.pattern])
def test_tuned(name: str, results: Results, quick: bool, forgetful: None) -> None:
    """The cost model's choice beside the best that was measured."""
    case = CASES[name]
    assert case.pattern
    axes = "x" if len(case.grid) == 1 else "y x"
    batch = case.batch or (1 if quick else 8)
    shape = attnc.Shape(case.grid, batch, case.heads, case.dim, layout=f"b {axes} (three h d)")
    with threads(2):
        found = attnc.tune(case.pattern, shape)
    for r in found.races:
        trials = [[t.choice, t.seconds] for t in r.trials]
        results.add({"name": "tuned", "case": name, "pass": r.direction, "gain": r.gain, "untuned": r.untuned, "trials": trials})
    gains = ", ".join(f"{r.direction} {r.gain:.2f}x by {r.winner.choice}" for r in found.races)
    print(f"{f'untuned over tuned: {name}':72} {gains} (bar 1.3)", flush=True)


def _built(case: Case, march: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner whose kernels are built for an instruction set, whatever others are built for."""
    flags = [f"-march={march}" if f.startswith("-march") else f for f in cpp_host.FLAGS]
    monkeypatch.setattr(cpp_host, "FLAGS", flags)
    for cached in (cpp._machine, cpp._function):
        cached.cache_clear()
    run, kernels, found = case.ours(), *(lru_cache(maxsize=None)(f.__wrapped__) for f in (cpp._kernel, parts.parts_of))

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        cpp._kernel, parts.parts_of = kernels, found
        return run(*inputs)

    with torch.no_grad():
        call(*case.inputs(8, torch.float32))
    return call


AVX2 = ("window 7 + bias 56x56x96", "window 7 + bias 14x14x384", "neighbourhood 7 56x56x64", "neighbourhood 7 14x14x256")


@pytest.mark.parametrize("name", AVX2)
def test_avx2(name: str, results: Results, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build for AVX2 beside the one for this machine."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("names of x86 instruction sets")
    case = CASES[name]
    monkeypatch.setattr(cpp, "_kernel", cpp._kernel)
    with threads(2), torch.no_grad():
        runners = {march: _built(case, march, monkeypatch) for march in ("native", "haswell")}
        found = medians(interleaved(passes(runners, lambda: case.inputs(8, torch.float32), False), seconds))
    for cached in (cpp._machine, cpp._function):
        cached.cache_clear()
    bar = 1.2 if "window" in name else 1.5
    ratio = found["haswell"] / found["native"]
    results.add({"name": "AVX2", "case": name, "seconds": found, "ratio": ratio, "bar": bar})
    print(f"{f'AVX2 build over native: {name}':72} {ratio:.2f}x (bar {bar})", flush=True)


@pytest.mark.parametrize("name", ["global 1024", "window 7 56"])
@pytest.mark.parametrize("dim", [16, 24, 32, 48, 64, 80, 96, 128])
def test_head_dims(name: str, dim: int, results: Results, seconds: float, quick: bool) -> None:
    """The share of the machine's GEMM at head dimensions that are no power of two."""
    grid, pattern = ((1024,), patterns.full()) if name == "global 1024" else ((56, 56), patterns.window(7))
    n, pairs = (1024, 1024**2) if name == "global 1024" else (3136, 3136 * 49)
    op = attnc.compile(pattern, grid=grid)
    with threads(1), torch.no_grad():
        gemm = gemm_rate(torch.float32)
        runners = passes({"attnc": op}, lambda: tuple(torch.randn(1, n, 4, dim).transpose(1, 2) for _ in range(3)), False)
        found = medians(interleaved(runners, seconds / 2))
    share = 4.0 * 4 * dim * pairs / found["attnc"] / gemm
    results.add({"name": "head dimension", "case": name, "dim": dim, "seconds": found["attnc"], "share": share})
    print(f"{f'head dimension {dim}: {name}':72} {share:.2f} of GEMM", flush=True)


def test_call_overhead(results: Results, seconds: float) -> None:
    """Microseconds of a tiny call beside those of its kernel."""
    op = attnc.compile(patterns.window(7), grid=(14, 14))
    with threads(1):
        rows = passes({"attnc": op, "sdpa": torch.nn.functional.scaled_dot_product_attention}, _tiny, False)
        with torch.no_grad():
            found = medians(interleaved(rows, max(seconds / 2, 0.01)))
        train = medians(interleaved(passes({"attnc": op}, _tiny, True), max(seconds / 2, 0.01)))["attnc"]
    results.add({"name": "call overhead", "seconds": found, "training": train})
    shown = ", ".join(f"{n} {1e6 * t:.0f} us" for n, t in found.items())
    print(f"{'window 7 on 14x14, one head of 32':72} {shown}, with backward {1e6 * train:.0f} us", flush=True)


def _tiny() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 1, 196, 32) for _ in range(3))
