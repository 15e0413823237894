"""A comparison is worth something only between equal results: every peer of every row computes what attnc computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnc
from attnc.schedule.geometry import geometry
from bench import page
from bench.cases import BARS, Case, bar, cases

ROOT = Path(__file__).resolve().parent.parent
CASES = list(cases())
SMALL = [
    c
    for c in CASES
    if c.grid[0] <= 14 or c.name in ("global 196", "channel 49x32") or c.name.startswith("neighbourhood 7 dilated 4")
]


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
    if case.grid[0] <= 28:
        program = attnc.compile(case.pattern, grid=case.grid).program(len(case.grid))
        assert geometry(program, case.grid, case.grid).allowed(case.heads) == case.heads * case.pairs


def test_bars_are_for_what_there_is() -> None:
    assert {family for family, _, _ in BARS} <= {c.family for c in CASES}
    for c in CASES:
        assert bar(c, "float32", "forward", 1, 1).ratio == 1


# ------------------------------------------------------------------------------------------------------------------- the page
def row(name: str, ours: float, peer: float, asked: float, **more: Any) -> dict[str, Any]:
    found = {
        "name": name, "size": "8x8x32", "family": "window", "model": "Swin", "dtype": "float32", "asked batch": 8, "batch": 8,
        "threads": 2, "pass": "forward", "seconds": {"attnc": ours, "eager": peer, "other": 2 * peer}, "peer": "eager",
        "ratio": peer / ours, "share": 0.5, "bar": {"ratio": asked, "share": 0.4, "float32": None},
    }  # fmt: skip
    return found | more


def test_page_tells_what_was_measured(tmp_path: Path) -> None:
    """Misses as well as hits, and the same bytes each time."""
    rows = [row("good", 1e-3, 4e-3, 3.0), row("short", 1e-3, 2e-3, 3.0), row("slow", 2e-3, 1e-3, 1.0)]
    half = row("good", 5e-4, 4e-3, 3.0, dtype="bfloat16", bar={"ratio": 1.0, "share": None, "float32": 1.45})
    half["seconds"]["attnc, float32"] = 1e-3  # which took turns with the others
    rows.append(half)
    machine = {"processor": "Somebody's", "cores": 2, "sets": ["avx2"], "versions": {"torch": "9"}}
    (tmp_path / "results" / "avx2").mkdir(parents=True)
    (tmp_path / "results" / "avx2" / "attention.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    page.write_all(tmp_path / "results", tmp_path / "docs")
    text = (tmp_path / "docs" / "performance-avx2.md").read_text()
    index = (tmp_path / "docs" / "performance.md").read_text()
    assert "(performance-avx2.md). Somebody's, 2 cores, avx2." in index
    assert "Somebody's, 2 cores, avx2. torch 9." in text
    mean = (4.0 * 2.0 * 0.5) ** (1 / 3)
    summary = f"| float32 | 8 | 2 | forward | 3 | {mean:.2f} | 3.0 | 0.50 | 2 | 1 |"
    assert summary in text
    assert summary in index
    assert "| good | 8x8x32 | 1 | eager | 4 | 4.00 | 3.0 | 0.50 | 0.4 |  |" in text
    assert "| short | 8x8x32 | 1 | eager | 2 | 2.00 | 3.0 | 0.50 | 0.4 | below |" in text
    assert "| good, 8x8x32 | batch 8 | 2 threads | forward | 2.00 | 1.45 |  |" in text
    pictures = sorted((tmp_path / "docs" / "img").glob("*.png"))
    assert [p.name for p in pictures] == [f"performance-avx2-{t}-b8-t2-forward.png" for t in ("bf16", "float32")]
    assert all(f"(img/{p.name})" in text for p in pictures)
    before = [p.read_bytes() for p in pictures]
    page.write_all(tmp_path / "results", tmp_path / "docs")
    assert [p.read_bytes() for p in pictures] == before
    assert (tmp_path / "docs" / "performance-avx2.md").read_text() == text
    assert (tmp_path / "docs" / "performance.md").read_text() == index


# ---------------------------------------------------------------------------------------------------------------- the command
def test_quick_run(tmp_path: Path) -> None:
    """From the command to the JSON and the page, on a few rows: no figure is judged, only that they fit together."""
    pytest.importorskip("pytest_benchmark")
    words = [
        "--quick",
        f"--out={tmp_path}",
        "shifted window 7 + bias 14x14x384 f32 b1",
        "channel 49x32",
        "overhead",
        "growth[window",
    ]
    alone = {n: value for n, value in os.environ.items() if not n.startswith("PYTEST_")}  # else pytest-benchmark is off
    done = subprocess.run([sys.executable, "-m", "bench", *words], capture_output=True, text=True, check=False, cwd=ROOT, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "minutes" in done.stdout.splitlines()[0]
    found = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert sorted(found) == ["attention", "costs"]
    rows = found["attention"]["rows"]
    assert {(r["name"], r["pass"]) for r in rows} >= {("shifted window 7 + bias", w) for w in ("forward", "forward + backward")}
    assert {"eager", "sdpa partitioned", "timm", "attnc"} == set(next(r for r in rows if "shifted" in r["name"])["seconds"])
    for r in rows:
        assert r["ratio"] == pytest.approx(r["seconds"][r["peer"]] / r["seconds"]["attnc"])
        assert r["seconds"][r["peer"]] == min(t for n, t in r["seconds"].items() if not n.startswith("attnc"))
        assert min(r["calls"].values()) >= 2
        assert 0 < r["share"] < (2 if r["dtype"] == "float32" else float("inf"))  # bf16 GEMM crawls where the CPU has no such unit
    page.write(tmp_path, tmp_path / "docs")
    text = next((tmp_path / "docs").glob("performance-*.md")).read_text()
    assert "shifted window 7 + bias" in text
    assert "Growing the grid" in text
