"""docs/models.md is what the model layer says of itself: the cheap parts are written again, the numbers held to the papers'."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from attnc.models import list_models

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
ADVICE = "run python docs/make_models.py"
SMALL = ("davit", "coswin", "gmm_mask_pit")  # whose variants are built quickly


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_models")


def counts() -> dict[str, int]:
    """Parameters by variant, as the page says."""
    return {
        name: int(n.replace(",", ""))
        for name, n in re.findall(r"`(\w+)` ([\d,]+\d)", PAGE.read_text().partition("## Parameters")[2])
    }


def test_every_variant_is_there(make: Any) -> None:
    page = PAGE.read_text()
    assert sorted(counts()) == list_models(), ADVICE
    for file, names in make.files().items():
        goldens = len(list((ROOT / "tests" / "goldens" / file.replace("_", "-")).glob("*.json")))
        (line,) = [x for x in page.splitlines() if f"(../models/{file}.py) |" in x]
        cells = [c.strip() for c in line.strip("|").split(" | ")]
        assert cells[1] == str(len(names)), ADVICE
        assert cells[3] == str(goldens or "-"), ADVICE


@pytest.mark.parametrize("file", SMALL)
def test_rows_are_up_to_date(file: str, make: Any) -> None:
    page, names = PAGE.read_text(), make.files()[file]
    assert make.row(file, names) in page, ADVICE
    assert make.counts(file, names) in page, ADVICE


def test_numbers_are_the_papers(make: Any) -> None:
    """Against the integers that the papers' own tests hold the models to; nothing is built."""
    stated, compared = counts(), 0
    for file in make.files():
        papers = importlib.import_module(f"test_{file}") if (ROOT / "tests" / f"test_{file}.py").exists() else None
        for name, expected in getattr(papers, "PARAMETERS", {}).items():
            if name in stated and isinstance(expected, int):
                assert stated[name] == expected, f"{name}: {ADVICE}"
                compared += 1
    assert compared > 60


def test_what_accelerate_knows(make: Any) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    assert make.replaced() in PAGE.read_text(), ADVICE


def test_measured_rows(make: Any) -> None:
    """The table of times is that of the results that are kept."""
    for report in make.measured():
        assert make.speed(report) in PAGE.read_text(), ADVICE
    row = {"name": "swin", "peer": "swin_t", "size": "224x224", "mode": "eager", "batch": 8, "threads": 2, "windowed": True}
    row |= {"seconds": {"accelerated": 0.5, "eager": 1.0}, "ratios": {"accelerated": 2.0, "attention part": 3.0}}
    rival = {
        "name": "shvit_s4",
        "peer": "mobilevitv2_100",
        "size": "256x256",
        "mode": "rival",
        "batch": 8,
        "threads": 2,
        "paper": 8.1,
    }
    rival |= {"seconds": {"attnc": 0.5, "mobilevitv2_100": 4.0}, "ratios": {"attnc": 8.0}}
    text = make.speed({"rows": [row, rival], "machine": {"processor": "a", "versions": {"torch": "1"}}})
    assert "| `swin_t` | 224x224 | eager | 1000 | 2.00x | - | 3.00x |" in text
    assert "| shvit_s4 against mobilevitv2_100 (paper: 8.1x) | 256x256 | rival | 4000 | - | 8.00x | - |" in text
