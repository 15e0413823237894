"""`python -m bench [NAME ...]`: time attnc beside its peers, write bench/results/<dtype>.json and docs/performance.md."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.cases import Case, cases

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# page faults of freshly mapped memory would dominate eager code: freed memory is kept instead, for both sides
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
COPIES = 3


def gemm_rate(dtype: torch.dtype) -> float:
    """The machine's own GEMM, floating-point operations per second: best of several 1024^3 products."""
    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        t = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - t)
    return 2 * 1024**3 / best


def interleaved(runners: dict[str, Callable[[int], Any]], seconds: float) -> dict[str, float]:
    """Median seconds per call; runners take turns, so a slow moment of the machine falls on all of them."""
    for run in runners.values():
        for i in range(COPIES):
            run(i)
    times: dict[str, list[float]] = {name: [] for name in runners}
    end, i = time.perf_counter() + seconds * len(runners), 0
    while time.perf_counter() < end or i < 5:
        for name, run in runners.items():
            t = time.perf_counter()
            run(i % COPIES)
            times[name].append(time.perf_counter() - t)
        i += 1
    return {name: statistics.median(t) for name, t in times.items()}


def measure(case: Case, seconds: float, gemm: float) -> dict[str, Any]:
    """One row, forward and forward + backward."""
    row: dict[str, Any] = {"name": case.name, "bars": case.bars}
    with torch.no_grad():
        sets = [case.inputs() for _ in range(COPIES)]
        row["forward"] = interleaved({n: lambda i, f=f: f(*sets[i]) for n, f in case.runners.items()}, seconds)
    leaves = [tuple(t.detach().requires_grad_() for t in s) for s in sets]

    def train(run: Callable[..., torch.Tensor]) -> Callable[[int], Any]:
        weight = torch.randn_like(run(*leaves[0]).detach())
        return lambda i: torch.autograd.grad(run(*leaves[i]), leaves[i], weight)

    able = {n: f for n, f in case.runners.items() if not n.startswith("flex")}  # FlexAttention has no backward on a CPU
    row["backward"] = interleaved({n: train(f) for n, f in able.items()}, seconds)
    for what, factor in (("forward", 1.0), ("backward", 3.5)):
        ours, others = row[what]["attnc"], {n: t for n, t in row[what].items() if n != "attnc"}
        best = min(others, key=lambda n: others[n])
        row[f"{what} ratio"], row[f"{what} peer"] = others[best] / ours, best
        row[f"{what} share"] = factor * case.flops / ours / gemm
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    out = Table(title="median milliseconds; ratio = best peer / attnc; share = of the machine's GEMM rate")
    for c in ("case", "pass", "attnc ms", "best peer", "peer ms", "ratio", "bar", "share"):
        out.add_column(c, justify="left" if c in ("case", "pass", "best peer") else "right")
    for r in rows:
        for what in ("forward", "backward"):
            peer = r[f"{what} peer"]
            ms = (f"{1e3 * r[what]['attnc']:.2f}", peer, f"{1e3 * r[what][peer]:.2f}")
            bar = f"{r['bars'].get(what, 1.0):.1f}"
            label = "forward" if what == "forward" else "fwd + bwd"
            out.add_row(r["name"], label, *ms, f"{r[f'{what} ratio']:.2f}", bar, f"{r[f'{what} share']:.2f}")
    return out


def markdown(report: dict[str, Any]) -> str:
    """docs/performance.md."""
    lines = [
        "# Performance on a CPU",
        "",
        f"Written by `make bench` on {report['machine']}, {report['threads']} threads, torch {report['torch']}, "
        f"batch {report['batch']}, {report['dtype']}; GEMM {report['gemm'] / 1e9:.0f} GF/s. Medians of interleaved calls. "
        "Ratio: best peer's time over attnc's. Share: useful floating-point operations over the machine's GEMM rate. "
        "Bar: the ratio the project asks of itself.",
        "",
        "| case | pass | attnc ms | best peer | peer ms | ratio | bar | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        for what, label in (("forward", "forward"), ("backward", "forward + backward")):
            peer = r[f"{what} peer"]
            ratio, bar = r[f"{what} ratio"], r["bars"].get(what, 1.0)
            times = f"{1e3 * r[what]['attnc']:.2f} | {peer} | {1e3 * r[what][peer]:.2f}"
            lines.append(f"| {r['name']} | {label} | {times} | {ratio:.2f} | {bar:.1f} | {r[f'{what} share']:.2f} |")
    for what, label in (("forward", "forward"), ("backward", "forward + backward")):
        mean = statistics.geometric_mean([r[f"{what} ratio"] for r in report["rows"]])
        lines += ["", f"Geometric mean of the ratios, {label}: {mean:.2f}."]
    return "\n".join(lines) + "\n"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="rows whose name contains one of these; all without")] = None,
    batch: int = 8,
    dtype: str = "float32",
    seconds: Annotated[float, typer.Option(help="per runner and pass")] = 1.0,
    flex: Annotated[bool, typer.Option(help="also FlexAttention (its compilation takes a while)")] = False,
) -> None:
    """Measure attnc beside its peers in one run."""
    if any(os.environ.get(k) != v for k, v in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], {**os.environ, **MALLOC})
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    gemm = gemm_rate(kind)
    chosen = [c for c in cases(batch, kind, flex=flex) if not names or any(n in c.name for n in names)]
    rows = [measure(c, seconds, gemm) for c in track(chosen, description="measuring")]
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), platform.machine()
    )
    report = {"machine": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "batch": batch, "dtype": dtype}
    report |= {"gemm": gemm, "rows": rows}
    Console().print(table(rows))
    if not names:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{dtype}.json").write_text(json.dumps(report, indent=1) + "\n")
        if dtype == "float32":
            (ROOT / "docs" / "performance.md").write_text(markdown(report))


if __name__ == "__main__":
    typer.run(main)
