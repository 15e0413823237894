"""`make gpu` without a GPU: its checks on another backend, its rows by a scripted clock, its page from what those gave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attnc
from attnc import patterns
from attnc.runtime import winners
from attnc.runtime.device import Device
from bench import cases as bench_cases
from bench import gpu


class Clock:
    """Runs each runner once and says what its place in the row takes."""

    def __call__(self, runners: Any) -> dict[str, float]:
        for run in runners.values():
            run()
        return {name: 1e-4 * (n + 1) for n, name in enumerate(runners)}


FAKE = Device("Fake GPU 9000", "cuda:90", torch.device("cpu"), Clock())


def test_every_relation_of_the_library_is_checked() -> None:
    """A pattern added to the library is checked on a GPU from then on, or is one of those whose checks are told apart below."""
    names = " ".join(c.pattern.name for c in gpu.checks())
    elsewhere = {  # scores, mechanisms and other grids than the query's: checked by the suite on the interpreter
        n for n in patterns.__all__ if f"{n}(" not in names and f"{n} " not in names
    }
    assert {"window", "neighborhood", "dilated", "axial", "cross", "causal", "full"}.isdisjoint(elsewhere)
    assert len({c.name for c in gpu.checks()}) == len(gpu.checks()) >= 20


@pytest.mark.parametrize("name", ["window + relative bias", "neighborhood dilated", "line"])
def test_correctness_is_held_to_eagers_error(name: str) -> None:
    check = next(c for c in gpu.checks() if c.name == name)
    found = gpu.correctness(FAKE, check, "float32", backend="torch")
    assert found["ok"], found
    assert found["out"] < 1e-5
    assert found["eager gradients"] < 1e-5


def test_what_is_wrong_or_refused_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    check = gpu.Check("full", patterns.full(), (12,))
    assert gpu.correctness(FAKE, check, "float32", backend="torch")["ok"]
    compiled = attnc.compile

    def wrong(*args: Any, **options: Any) -> Any:
        op = compiled(*args, **options)
        return lambda *rows, **tables: op(*rows, **tables) * 1.001

    monkeypatch.setattr(attnc, "compile", wrong)
    assert not gpu.correctness(FAKE, check, "float32", backend="torch")["ok"]
    monkeypatch.undo()
    found = gpu.correctness(FAKE, check, "float32", backend="triton")  # there is no GPU that would run it
    if not torch.cuda.is_available():
        assert not found["ok"]
        assert found["refused"].startswith("UnsupportedError")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bench_cases.Case]:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    found = [c for c in bench_cases.cases() if c.grid[0] == 14][:2] + [c for c in bench_cases.cases() if c.name == "global 196"]
    found = [replace(c, batch=1, peers={n: make for n, make in c.peers.items() if n != "timm"}) for c in found]
    monkeypatch.setattr(bench_cases, "cases", lambda: iter(found))
    monkeypatch.setattr("attnc.compiler._COMPILER", False)  # the portable backend: nothing is built
    monkeypatch.setattr(gpu, "checks", lambda: [gpu.Check("full", patterns.full(), (12,))])
    return found


def test_rows_name_the_peers_that_do_not_run(small: list[bench_cases.Case]) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel for this GPU\nmore")

    def absent() -> Any:
        raise ImportError("no such package")

    peers = {n: make for n, make in small[0].peers.items() if n != "timm"} | {"broken": lambda: broken, "absent": absent}
    case = replace(small[0], peers=peers | {"nothing": lambda: None}, slow_peers={})
    row = gpu.speed(FAKE, case, "float32", 1, backward=True)
    assert row["failed"] == {"broken": "RuntimeError: no kernel for this GPU", "absent": "ImportError: no such package"}
    assert set(row["seconds"]) == {"attnc", "eager", "sdpa partitioned"}
    assert row["peer"] == "eager"
    assert row["ratio"] == pytest.approx(2.0)
    assert row["share"] > 0
    alone = gpu.speed(FAKE, replace(case, peers={}), "float32", 1, backward=False)
    assert alone["ratio"] is None
    with pytest.raises(RuntimeError, match="no kernel"):
        gpu.speed(FAKE, case, "float32", 1, False, makers={"attnc": lambda: broken})


def test_page_from_a_run(small: list[bench_cases.Case], tmp_path: Path) -> None:
    said: list[str] = []
    now = iter(range(10**6))
    report = gpu.measure(FAKE, minutes=4.0, clock=lambda: 60.0 * next(now), say=said.append, backend="torch")
    assert len(report["correctness"]) == len(gpu.DTYPES)
    assert len(report["rows"]) + report["not measured"] == 4 * len(small)
    assert report["not measured"] > 0 < len(report["rows"])
    out = gpu.write(report, tmp_path / "results", tmp_path / "docs")
    text = out.read_text()
    assert out.name == "performance-gpu-fake-gpu-9000.md"
    assert text.startswith("# Performance on Fake GPU 9000\n")
    assert f"{report['not measured']} rows were not reached in the time; 0 tuned winners" in text
    assert all(f"| {r['name']} | {r['size']} |" in text for r in report["rows"])
    for picture in [x.split("](")[1].rstrip(")") for x in text.splitlines() if x.startswith("![")]:
        assert (tmp_path / "docs" / picture).stat().st_size > 1000
    assert json.loads((tmp_path / "results" / "gpu-fake-gpu-9000.json").read_text()) == json.loads(json.dumps(report))
    assert list(winners.every()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(gpu.main)
    for words, says in (([], "no GPU here"), (["--device", "cpu"], "is no GPU; `make bench` measures the CPU")):
        said = CliRunner().invoke(app, [*words, "--docs", str(tmp_path)])
        assert said.exit_code == 2
        assert said.stderr.startswith("make gpu: device=")
        assert says in said.stderr
        assert len(said.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
