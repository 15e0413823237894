"""The committed table of compiled kernels: what each is held to, the bars of six patterns, and that it is of today's kernels."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from attnc.schedule import tiles
from attnc.schedule.chips import chip

DOCS = Path(__file__).parents[1] / "docs"
REPORTS: dict[str, dict[str, Any]] = json.loads((DOCS / "gpu-static.json").read_text(encoding="utf-8"))
# in float16 as in bfloat16: loops over full tiles that take more than dense attention's
DEARER = {
    "causal(), one axis 4096 | 64 | hip:gfx1100",
    # tiles of 64 rows, a block of eight by eight
    *(f"cross(8) 64x64 | {x}" for x in ("64 | hip:gfx942", "64 | hip:gfx1100")),
}


def in_half(key: str) -> str:
    """A report's key without which of the two half precisions it is of: their kernels differ in no tile."""
    return key.replace(" | bfloat16 ", " | ").replace(" | float16 ", " | ")


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("make_gpu_static", DOCS / "make_gpu_static.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_gpu_static"] = module
    spec.loader.exec_module(module)
    return module


PAGE = generator()


SETTINGS: dict[str, dict[str, Any]] = dict(PAGE.wanted([]))


@pytest.mark.parametrize("key", list(REPORTS))
def test_no_kernel_spills_or_asks_for_more_than_its_chip_has(key: str) -> None:
    assert not PAGE.faults(key, REPORTS[key])


def test_loops_over_full_tiles_are_dense_attentions() -> None:
    """Instructions, compares and selects for a score, but for what the page lists."""
    assert {in_half(key) for key in REPORTS if PAGE.dearer(key, REPORTS)} == DEARER


@pytest.mark.parametrize("target", PAGE.HELD)
@pytest.mark.parametrize("call", [call for call, *_ in PAGE.LIBRARY])
def test_forwards_without_tables_load_rows_128_bits_at_a_time_and_nothing_else(call: str, target: str) -> None:
    """A later part of a union reads the log-sum-exp of those before it, one number a row."""
    n = [each[0] for each in PAGE.LIBRARY].index(call)
    report = REPORTS[PAGE.name_of(n, "float16", 64, target)]
    if "bias" in call:
        return
    parts = report["strategy"].count(" + ")
    loads = report["kernels"]["forward"]["global_loads"]
    assert sum(count for bits, count in loads.items() if bits != "128") <= 2 * parts, loads


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx1100"])
@pytest.mark.parametrize("call", [call for call, *_ in PAGE.LIBRARY])
def test_every_module_compiles_for_every_target(call: str, target: str) -> None:
    """float16, 64 channels, forward and backward. The table's report is of a module with this very text, compiled by this very
    triton; a module that has changed since is compiled here."""
    n = [each[0] for each in PAGE.LIBRARY].index(call)
    setting = {"n": n, "dtype": "float16", "head_dim": 64, "target": target}
    kept = REPORTS[PAGE.name_of(**setting)]
    report = PAGE.settled((call, setting, kept["module"]))[1] or kept
    assert {"forward", "backward_dkv"} <= set(report["kernels"])
    assert all(k["instructions"] > 0 for k in report["kernels"].values())


def test_tiles_fit_the_shared_memory_of_smaller_chips() -> None:
    """Computed, for the tiles chosen there; what was compiled for others never had more than the figure computed for it."""
    for target in PAGE.SMALLER:
        assert tiles.shared_limit(target) == 1024 * chip(target).shared_block
        for dim in (32, 64, 128):
            for n in range(len(PAGE.LIBRARY)):
                assert max(PAGE.shared(n, "float16", dim, target).values()) <= tiles.shared_limit(target), (target, dim, n)
    for key, report in REPORTS.items():
        setting = SETTINGS[key]
        computed = PAGE.shared(**setting)
        for name, k in report.get("kernels", {}).items():
            if name in computed:
                assert k["shared_bytes"] <= computed[name], (key, name)


@pytest.mark.parametrize("target, more", [("cuda:90", 1.0), ("cuda:80", 1.3)])
@pytest.mark.parametrize("call", list(PAGE.BARS))
def test_six_patterns_keep_their_bars(call: str, target: str, more: float) -> None:
    _, dim, *most = PAGE.BARS[call]
    n = next(n for n, each in enumerate(PAGE.LIBRARY) if each[0] == call)
    kernels = REPORTS[PAGE.name_of(n, "float16", dim, target)]["kernels"]
    helped = sum(k["ti"] for name, k in kernels.items() if name.endswith("_pre"))
    assert kernels["forward"]["ti"] + helped <= most[0] * more
    back = {name: k["ti"] for name, k in kernels.items() if name.startswith("backward")}
    if most[2] is None:
        assert sum(back.values()) <= most[1] * more
        return
    assert back["backward_dq"] <= most[1] * more
    assert back["backward_dkv"] <= most[2] * more


def test_waste_is_what_is_asked() -> None:
    asked = {
        "neighborhood(7)": 3.3,
        "neighborhood(7, dilation=4)": 3.3,
        'window(7, bias="relative")': 1.71,
        "window(7, shift=3)": 1.95,
    }
    asked |= dict.fromkeys(('axial("y") | axial("x")', "causal(), one axis", "full(), one axis"), 1.05)
    held = [
        (call, r["waste"]) for key, r in REPORTS.items() for call in asked if key.startswith(f"{call} ") and "64 | cuda:90" in key
    ]
    assert held
    assert all(waste <= asked[call] for call, waste in held), held


def test_full_tiles_are_as_free_of_masks_as_dense_attention() -> None:
    """Compares and selects in the loop over full tiles, against those of the dense kernel's loop: causal has no more."""
    for target in ("cuda:90", "cuda:80"):
        dense, causal = (
            REPORTS[f"{call}, one axis 4096 | float16 64 | {target}"]["kernels"]["forward"]["loops"]
            for call in ("full()", "causal()")
        )
        full = [next(x for x in loops if x["kind"] == "full") for loops in (dense, causal)]
        assert full[1]["mask_instructions"] <= full[0]["mask_instructions"] + 2
        assert full[1]["instructions"] <= 1.1 * full[0]["instructions"]


def test_every_setting_is_there() -> None:
    assert set(REPORTS) == set(SETTINGS)


def test_the_page_is_written_from_the_table() -> None:
    assert (DOCS / "gpu-static.md").read_text(encoding="utf-8") == PAGE.page(REPORTS)


def test_a_report_made_anew_is_the_one_kept() -> None:
    n = next(n for n, each in enumerate(PAGE.LIBRARY) if each[0] == "window(8)")
    setting = {"n": n, "dtype": "float16", "head_dim": 64, "target": "cuda:90"}
    kept = REPORTS[PAGE.name_of(**setting)]
    found = PAGE.measure(setting, kept["module"])["kernels"]
    for name, kernel in kept["kernels"].items():  # another ptxas may count otherwise, and must not spill
        assert found[name]["tile"] == kernel["tile"]
        assert found[name]["spill_bytes"] == 0
        assert found[name]["ti"] < 1.15 * kernel["ti"]
