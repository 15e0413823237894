"""The cost model: its counts against those of runs and of the tiling, its facts, and what it may never say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sympy as sp

import attnc
from attnc import ir, patterns
from attnc.analysis.algebra import FloorDiv, FloorMod, symbol
from attnc.report import costs, inspect, weigh
from attnc.report.issued import issued
from attnc.report.subject import subject
from attnc.schedule import cost, tiles, walks
from attnc.schedule.chips import chip, chips
from attnc.schedule.counts import counts, value
from attnc.schedule.geometry import geometry

SIZES = cost.Sizes(2, 2, 1, 32, 32)
PATTERNS: list[Any] = [
    patterns.neighborhood(7),
    patterns.neighborhood(3, dilation=3),
    patterns.window(6, shift=2),
    patterns.grid(4),
    patterns.strip("y", 3),
    patterns.causal(),
    patterns.axial("x"),
    patterns.band(3, 5),
    patterns.full(),
    patterns.dilated_blocks(3, 2),
]


@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_counts_as_functions_of_the_sizes_are_those_of_the_tiling(p: attnc.Pattern) -> None:
    """Programs and chunks, symbolic in the lengths, at sizes that no tile divides."""
    program = attnc.compile(p, grid=(None, None)).program(2)
    for side, rows, chunk in (("q", (4, 8), (2, 16)), ("k", (5, 3), (8, 4)), ("q", (6, 1), (6, 3))):
        structure = geometry(program, (9, 9), (9, 9)).structure
        n = len(structure.axes)
        tile = tiles.Tile(rows[:n], chunk[:n])
        symbolic = counts(p.name, structure, side, tile)  # type: ignore[arg-type]
        for grid in ((13, 8), (20, 31), (1, 64)):
            g = geometry(program, grid, grid)
            sizes = {symbol(ir.size("q", i)): a.queries for i, a in enumerate(g.axes)}
            ws = walks.walks(g, side, tile)  # type: ignore[arg-type]
            found = [value(e, sizes) for e in symbolic]
            expected = [1, 1]
            for w in ws:
                expected = [expected[0] * w.programs, expected[1] * w.steps]
            assert found == expected, (grid, side, tile)


AXES = [
    patterns.neighborhood(3, 2),
    patterns.window(4, shift=1),
    patterns.grid(3),
    patterns.causal(),
    attnc.pattern(lambda q, k: k.x >= q.x + 6)(),  # the last queries see nothing
]


@pytest.mark.parametrize("pad", [(0, 0), (5, 3), (2, 7)], ids=str)
@pytest.mark.parametrize("p", AXES, ids=str)
def test_a_walk_counts_what_its_tiles_visit(p: attnc.Pattern, pad: tuple[int, int]) -> None:
    """Tile by tile: chunks from the first key that a real row sees to the last, full ones those that every real row sees whole."""
    tokens = ir.Tokens((None,), 0, (pad,))
    axis = geometry(ir.Program(p.trace(("x",)), tokens, tokens), (19,), (19,)).axes[0]
    before, end = axis.before_queries, axis.before_queries + axis.real_queries
    for rows, chunk in ((1, 1), (3, 2), (4, 4), (2, 16)):
        visits = []
        for r in range(min(axis.split, end)):
            last = (end - 1 - r) // axis.split
            for t in range(walks.start(axis, "q", rows), -(-end // axis.split), rows):
                real = [j for j in range(max(t, 0), t + rows) if before <= j * axis.split + r < end]
                seen = [(int(axis.lo[r, j]), int(axis.hi[r, j]) + 1) for j in real or [max(min(t + rows - 1, last), 0)]]
                left, right = min(a for a, _ in seen), max(b for _, b in seen)
                chunks = [(at, at + chunk) for at in range(left, right, chunk)]
                visits.append((len(chunks), sum(all(a <= x and y <= b for a, b in seen) for x, y in chunks)))
        most = max(n for n, _ in visits)
        w = walks.walk(axis, "q", rows, chunk)
        steps = sum(max(n, 1) if most <= 1 else n for n, _ in visits)
        assert (w.programs, w.steps, w.most, w.full) == (len(visits), steps, max(most, 1), sum(n for _, n in visits)), (rows, chunk)
        assert w.full + w.partial == w.steps


def test_a_multiple_is_a_multiple_by_its_factors() -> None:
    """sympy 1.14 takes Max(0, 6 * z + 2 * n) / 6 for an integer, which it is not at n = 1."""
    z, n = sp.Symbol("z", integer=True), sp.Symbol("n", integer=True, positive=True)
    assert (sp.Max(0, 6 * z + 2 * n) / 6).is_integer in (True, None)
    assert FloorDiv(sp.Max(0, 6 * z + 2 * n), 6).subs({z: 0, n: 1}) == 0
    assert FloorMod(sp.Max(0, 6 * z + 2 * n), 6).subs({z: 0, n: 1}) == 2
    assert FloorDiv(6 * z + n, 6) == z + FloorDiv(n, 6)
    assert FloorDiv(z * n + 1, n) == z + FloorDiv(1, n)


def test_the_whole_model_is_a_function_of_the_sizes() -> None:
    """The same arithmetic on sympy counts, put at a size, gives the numbers of that size."""
    program = attnc.compile(patterns.neighborhood(7), grid=(None, None)).program(2)
    g = geometry(program, (20, 12), (20, 12))
    names = [symbol(ir.size("q", i)) for i in range(2)]
    sizes = dict(zip(names, (20, 12), strict=True))
    for kind, side in (("forward", "q"), ("dq", "q"), ("dkv", "k")):
        tile = tiles.choose(g, 32, kind)  # type: ignore[arg-type]
        programs, chunks = counts("p", g.structure, side, tile)  # type: ignore[arg-type]
        rows = names[0] * names[1]
        found = cost.work(
            kind, tile, SIZES, programs=programs, chunks=chunks, rows=rows, columns=rows, masked=1.0, target="cuda:90"
        )  # fmt: skip
        number = cost.of_geometry(g, kind, tile, SIZES, "cuda:90")
        for what in ("issued", "flops", "loaded", "stored", "least"):
            assert value(getattr(found, what), sizes) == getattr(number, what), (kind, what)
        assert found.shared == number.shared


def test_counts_are_those_of_an_instrumented_run() -> None:
    """Triton's interpreter counts its own products, loads and stores; the model says the same, or more where a chunk overruns."""
    here = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}
    run = [sys.executable, str(here / "counted_run.py")]
    said = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
    found = [json.loads(line) for line in said.splitlines()]
    assert len(found) == 8
    for f in found:
        counted, model = f["counted"], f["model"]
        assert counted["flops"] == model["flops"] > 0, f
        assert counted["stored"] == model["stored"] > 0, f
        if "odd" in f["case"] or f["case"] == "causal":  # columns past the end are masked, not loaded
            assert 0.7 * model["loaded"] < counted["loaded"] <= model["loaded"], f
        else:
            assert counted["loaded"] == model["loaded"] > 0, f


@pytest.mark.parametrize("p", PATTERNS[:6], ids=str)
def test_issued_elements_are_the_reports(p: attnc.Pattern) -> None:
    s = subject(p, grid=(14, 21), heads=3)
    assert s.geometry is not None
    forward, backward = costs.modelled(s, chip("cuda:90"))
    said = issued("triton", s.program, s.geometry, heads=3, head_dim=32, value_dim=32, dtype="float16")
    assert sum(w.issued for w in forward.works) == said
    assert backward.time.seconds > forward.time.seconds


# ------------------------------------------------------------------------------------------------------------------- the facts
def test_facts_of_gpus() -> None:
    """Every target has a chip with its sources, whose limits are those that tiles are chosen for and occupancy is counted with."""
    assert {c.target for c in chips()} == set(inspect.TARGETS)
    for c in chips():
        threads, registers, shared, blocks = weigh.LIMITS[c.target]
        assert (c.threads, c.registers, 1024 * c.shared, c.blocks) == (threads, registers, shared, blocks), c.name
        assert tiles.shared_limit(c.target) <= 1024 * c.shared_block <= shared
        assert c.peak["float16"] >= c.peak["float32"] > 0
        assert c.source.count(";") >= 1
        assert c.match in c.name
        assert c.rate("bfloat16") >= c.rate("float32")
    assert chip("cuda:89", "NVIDIA L40S").name == "NVIDIA L40S"
    assert chip("cuda:90", "NVIDIA H200").bandwidth > chip("cuda:90", "NVIDIA H100 80GB HBM3").bandwidth
    assert chip("cuda:77").target == "cuda:80"


def test_times_are_no_shorter_than_a_roof_and_grow_with_the_work() -> None:
    s = subject(patterns.neighborhood(7), grid=(56, 56), heads=4)
    for c in chips():
        last = 0.0
        for batch in (1, 8, 64):
            forward, _ = costs.modelled(s, c, batch=batch)
            (w,) = forward.works
            assert forward.time.seconds >= w.flops / c.rate("float16")
            assert forward.time.seconds >= w.least / (1e9 * c.bandwidth)
            assert forward.time.seconds >= last
            assert w.loaded + w.stored >= w.least
            last = forward.time.seconds
    a100, h100 = (costs.modelled(s, chip(t), batch=64)[0].time.seconds for t in ("cuda:80", "cuda:90"))
    assert h100 < a100


def test_explain_says_that_it_is_a_model() -> None:
    text = attnc.explain(patterns.neighborhood(7), grid=(28, 28), heads=2)
    assert "Cost on GPUs at 28x28, 2 heads of 32, batch 1, float16: a model, not a measurement" in text
    for t in costs.TARGETS:
        assert any(line.split()[:2] == [t, "forward"] for line in text.splitlines())
    assert "Cost on GPUs" not in attnc.explain(patterns.neighborhood(7))
