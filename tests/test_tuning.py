"""Choices: candidates are right whichever runs, a winner is kept and used by other processes, and what is kept is only data."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attnc
from attnc import ir, patterns
from attnc.cli import app
from attnc.codegen import cpp_host
from attnc.errors import DeclarationError, ShapeError, UnsupportedError
from attnc.runtime import cpp, tuner, winners
from attnc.runtime.cache import write_json
from attnc.runtime.call import Call
from attnc.schedule.boxes import Kernel, tiling
from attnc.schedule.choose import bucket, candidates
from attnc.schedule.geometry import geometry


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build cache that the tests of this file share; what is tuned in it is forgotten after each."""
    return tmp_path_factory.mktemp("built") / "cache"


@pytest.fixture(autouse=True)
def cache(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(built))
    monkeypatch.setattr(tuner, "_winners", {})
    monkeypatch.setattr(tuner, "SECONDS", 0.0)
    monkeypatch.setattr(cpp_host, "FLAGS", ["-O1", *cpp_host.FLAGS[1:]])
    derived = (cpp._machine, cpp._choice, cpp._tunable)
    for c in derived:
        c.cache_clear()
    yield built
    for c in derived:
        c.cache_clear()
    shutil.rmtree(built / "tuned", ignore_errors=True)


def call_of(p: attnc.Pattern, grid: tuple[int, ...], **more: Any) -> Call:
    program = attnc.compile(p, grid=grid).program(len(grid))
    return Call(program, geometry(program, grid, grid), 0.3, {}, **more)


def rows(n: int, heads: int = 2, d: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, n, d) for _ in range(3)]


# ------------------------------------------------------------------------------------------------------------------ candidates
@pytest.mark.parametrize("p", [patterns.neighborhood(3), patterns.window(3, 1), patterns.full(), patterns.axial("x")], ids=str)
def test_every_candidate_computes_the_same(p: attnc.Pattern) -> None:
    """Whichever is kept, the result is the statement's."""
    grid = (9, 20)
    call, (q, k, v) = call_of(p, grid), rows(180)
    true = attnc.reference(p, grid=grid)(*(t.double() for t in (q, k, v)), scale=0.3)
    out, lse = cpp.forward(call, q, k, v)
    grad = torch.randn_like(out)
    first = cpp.backward(call, q, k, v, out, lse, grad, None)
    for backward in (False, True):
        found = cpp.tunable(call, q, k, v, backward).candidates
        assert len({c.shown for c in found}) == len(found)
        for c in found[:: max(1, len(found) // 6)]:
            mine = Call(call.program, call.geometry, call.scale, {}, choice=c.choice)
            if backward:
                for a, b in zip(first[:3], cpp.backward(mine, q, k, v, out, lse, grad, None)[:3], strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, c=c: f"{c.shown}: {m}")
            else:
                assert (cpp.forward(mine, q, k, v)[0] - true).abs().max() < 1e-5, c.shown


def test_no_candidate_is_too_large_for_the_kernel() -> None:
    big = [(patterns.full(), (60, 60)), (patterns.window(40), (60, 60)), (patterns.causal(), (5000,)), (patterns.band(1, 1), (3,))]
    for p, grid in big:
        call = call_of(p, grid)
        spec = cpp._check(call, *rows(1))
        for kernel in (spec.kernel(False), spec.kernel(True)):
            found = candidates(call.geometry, kernel, 4, 2)
            for _, c in found:
                axes = tiling(call.geometry, kernel, c.sides, 4, 2).axes
                assert math.prod(int((a.pieces[:, 2] - a.pieces[:, 1]).max()) for a in axes) <= kernel.queries, (p, c)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("p", [patterns.neighborhood(3), patterns.full(), patterns.dilated(3, 2)], ids=str)
def test_segments_hold_every_piece_once(p: attnc.Pattern, prefix: int) -> None:
    """Whatever the number of threads that share keys: one segment begins where the one before it ends."""
    tokens = ir.Tokens((None, None), prefix)
    g = geometry(ir.Program(p.trace(("y", "x")), tokens, tokens), (9, 20), (9, 20))
    for threads in (1, 3, 16):
        found = tiling(g, Kernel(16, 64, 8, 6, 8, 8, backward=True), (2,) * len(g.axes), 1, threads)
        for a in found.axes:
            ends = a.segments[:, :2]
            assert (ends[0, 0], ends[-1, 1]) == (0, len(a.pieces))
            assert (ends[1:, 0] == ends[:-1, 1]).all()
            assert (ends[:, 0] < ends[:, 1]).all()
        assert found.covers


def test_choices_follow_the_registers() -> None:
    """With 8 lanes and 16 registers a band's permuted vectors cost as much as a tile's masked ones: short rows are tiles there."""
    wanted = [  # band, at AVX-512's registers and at AVX2's
        (patterns.neighborhood(7), 56, (True, True)),
        (patterns.neighborhood(7), 28, (True, True)),
        (patterns.neighborhood(7), 14, (True, False)),
        (patterns.dilated(7, 4), 56, (True, False)),
        (patterns.neighborhood(3), 28, (True, True)),
        (patterns.neighborhood(13), 56, (True, True)),
        (patterns.neighborhood(13), 28, (True, False)),
        (patterns.neighborhood(7), 7, (False, False)),
    ]
    for p, side, bands in wanted:
        call = call_of(p, (side, side))
        for backward in (False, True):
            kernel = cpp._check(call, *rows(1, d=32)).kernel(backward)
            kernels = kernel, replace(kernel, lanes=8, wide=False)
            assert tuple(candidates(call.geometry, k, 64, 1)[0][1].band for k in kernels) == bands, (p, side, backward)
    # whole groups are whole tiles, whatever the registers
    for p, grid, sides in ((patterns.axial("x"), (28, 28), (1, 0)), (patterns.window(7), (28, 28), (0, 0))):
        call = call_of(p, grid)
        kernel = cpp._check(call, *rows(1, d=32)).kernel(False)
        for k in (kernel, replace(kernel, lanes=8, wide=False)):
            assert candidates(call.geometry, k, 64, 1)[0][1].sides == sides


def test_buckets() -> None:
    for steps in (1, 4):
        found = [bucket(n, steps) for n in range(1, 4000)]
        assert found == sorted(found)
        assert all(n <= b for n, b in enumerate(found, 1))
        assert all(bucket(b, steps) == b for b in found)
        assert all(b <= n * (1 + 1 / steps) for n, b in enumerate(found, 1) if n >= steps)
    assert [bucket(n) for n in (7, 14, 28, 56)] == [7, 14, 28, 56]


# ----------------------------------------------------------------------------------------------------------------- the store
def kept(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(f.read_text()) for f in sorted((cache / "tuned").glob("*.json"))]


def test_tune_tells_what_it_tried(cache: Path) -> None:
    p = patterns.window(3, bias="relative")
    found = attnc.tune(p, [{"grid": (6, 9), "heads": 2, "head_dim": 8}, attnc.Shape((9, 9), batch=2, layout="b y x (three h d)")])
    assert [(r.direction, r.shape) for r in found.races] == [
        ("forward", "6x9, 1x2 heads of 8"),
        ("backward", "6x9, 1x2 heads of 8"),
        ("forward", "9x9, 2x1 heads of 32"),
        ("backward", "9x9, 2x1 heads of 32"),
    ]
    for r in found.races:
        assert 1 < len(r.trials) <= tuner.KEPT
        assert r.winner is r.trials[0]
        assert r.untuned in [t.choice for t in r.trials]
        assert all(t.seconds > 0 and t.predicted > 0 for t in r.trials)
        assert r.gain >= 1
    text = str(found)
    assert text.startswith(f"{p.name} on cpu, {torch.get_num_threads()} threads")
    assert all(t.choice in text for r in found.races for t in r.trials)
    assert {json.loads(e["key"])["direction"] for e in kept(cache)} == {"forward", "backward"}
    assert json.loads(json.dumps(found.to_dict()))["races"][0]["trials"][0]["choice"] == found.races[0].winner.choice


def test_a_kept_winner_is_taken_here_and_in_other_processes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (10, 10)
    call, (q, k, v) = call_of(patterns.window(5), grid), rows(100)
    tunable = cpp.tunable(call, q, k, v, False)
    slowest = tunable.candidates[-1]
    assert tuner.chosen(tunable) is tunable.candidates[0]

    def fake(runners: dict[str, Any]) -> dict[str, float]:
        return {name: 1.0 + (name != slowest.shown) for name in runners}

    monkeypatch.setattr(tuner, "race", fake)
    monkeypatch.setattr(tuner, "KEPT", 1000)
    op = attnc.compile(patterns.window(5), grid=grid, tune=True)
    op(q, k, v)
    assert tuner.chosen(cpp.tunable(call, q, k, v, False)) is slowest
    script = f"""if True:
        import torch, attnc
        from attnc import patterns
        from attnc.codegen import cpp_host
        from attnc.runtime import cpp, tuner, winners
        from attnc.runtime.call import Call
        from attnc.schedule.geometry import geometry
        torch.set_num_threads({torch.get_num_threads()})
        cpp_host.FLAGS[0] = "-O1"
        program = attnc.compile(patterns.window(5)).program(2)
        # a size of the same bucket, and one that is not
        for n in (10, 9, 20):
            q = torch.randn(1, 2, n * n, 8)
            g = geometry(program, (n, n), (n, n))
            spec = cpp._check(Call(program, g, 1.0, {{}}), q, q, q)
            print(cpp._choice(spec, g, *cpp._size(q, q, False), tuner.version()).show())
    """
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[:2] == [slowest.shown] * 2
    assert said[2] != slowest.shown


def test_a_winner_counts_only_as_one_of_the_candidates(cache: Path) -> None:
    """What lies on disk is data: sides that no candidate has would overrun the kernel's buffers."""
    call, (q, k, v) = call_of(patterns.full(), (30, 30)), rows(900)
    tunable = cpp.tunable(call, q, k, v, False)
    for value in ({"choice": {"sides": [100000], "band": False}}, {"choice": None}, [], 3, "x"):
        write_json(winners.KIND, tunable.like, value)
        tuner._winners.clear()
        assert tuner.chosen(tunable) is tunable.candidates[0]


def test_tuning_once_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    races: list[int] = []

    def fake(runners: dict[str, Any]) -> dict[str, float]:
        races.append(len(runners))
        return dict.fromkeys(runners, 1.0)

    monkeypatch.setattr(tuner, "race", fake)
    q, k, v = (t.requires_grad_() for t in rows(36))
    op = attnc.compile(patterns.window(3), grid=(6, 6), tune=True)
    for _ in range(3):
        op(q, k, v).sum().backward()
    assert len(races) == 2  # forward and backward
    attnc.tune(patterns.window(3), {"grid": (6, 6), "heads": 2, "head_dim": 8})
    assert len(races) == 4  # asked for, it measures again
    cpp.tunable(call_of(patterns.window(3), (6, 6)), q, k, v, False)


def test_tiles_that_come_with_lists_are_timed_and_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that walks lists has one candidate, which is timed for whoever asks and not kept."""
    races: list[list[str]] = []

    def fake(runners: dict[str, Any]) -> dict[str, float]:
        races.append(list(runners))
        return dict.fromkeys(runners, 1.0)

    monkeypatch.setattr(tuner, "race", fake)
    half_plane = attnc.pattern(lambda q, k: q.y + 2 * q.x >= k.y + 2 * k.x + 3)()
    found = attnc.tune(half_plane, {"grid": (40, 40), "heads": 1, "head_dim": 8, "backward": False})
    assert [r.untuned for r in found.races] == races[0]
    assert races[0][0].endswith(", by lists")
    assert len(races) == len(races[0]) == 1
    assert set(tuner._winners.values()) == {None}
    q, k, v = rows(1600, heads=1)
    attnc.compile(half_plane, grid=(40, 40), tune=True)(q, k, v)
    assert len(races) == 1


def test_only_those_tune_that_were_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """One packed tensor, forward and backward, with and without."""
    races: list[int] = []

    def fake(runners: dict[str, Any]) -> dict[str, float]:
        races.append(len(runners))
        return dict.fromkeys(runners, 1.0)

    monkeypatch.setattr(tuner, "race", fake)
    found = []
    for tune, expected in ((False, 0), (True, 2)):
        qkv = torch.randn(1, 6, 6, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
        op = attnc.compile(patterns.window(3), grid=(6, 6), layout="b y x (three h d)", heads=2, tune=tune)
        op(qkv).square().sum().backward()
        assert len(races) == expected
        found.append(qkv.grad)
    torch.testing.assert_close(*found)


def test_tuned_operators_are_operators() -> None:
    """Unions, runs of heads, torch.compile: tune=True changes no result."""
    p = patterns.per_head([patterns.cross(2), patterns.window(3)])
    q, k, v = (t.requires_grad_() for t in rows(60))
    tuned = attnc.compile(p, grid=(6, 10), tune=True)
    out = torch.compile(tuned, fullgraph=True)(q, k, v)
    plain = attnc.compile(p, grid=(6, 10))(q, k, v)
    torch.testing.assert_close(out, plain)
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(plain.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------------------------- refusals
FULL = patterns.full()
REFUSALS: list[tuple[Any, type[Exception], str]] = [
    (lambda: attnc.tune(FULL, {"heads": 2}), ShapeError, r"full\(\): a shape needs a grid: .* not {'heads': 2}"),
    (
        lambda: attnc.tune(FULL, {"grid": 8, "head": 2}),
        DeclarationError,
        r"a shape has no field 'head'; it has grid, batch",
    ),
    (lambda: attnc.tune(FULL, {"grid": (8, None)}), ShapeError, r"tuning needs known lengths, not grid=\(8, None\)"),
    (lambda: attnc.tune(FULL, {"grid": 8, "dtype": "int7"}), DeclarationError, r"dtype='int7': one of float32"),
    (lambda: attnc.tune(3, {"grid": 8}), DeclarationError, r"attnc.tune takes a pattern or a mechanism, not int"),  # type: ignore[arg-type]
    (
        lambda: attnc.compile(FULL, tune=True, backend="torch"),
        UnsupportedError,
        r'tune=True: backend "torch" has no tuner yet',
    ),
]


@pytest.mark.parametrize(("act", "error", "message"), REFUSALS, ids=[r[2][:30] for r in REFUSALS])
def test_refusals(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def test_a_relation_that_reads_a_table_is_tuned_where_it_runs() -> None:
    @attnc.pattern
    def listed(q: Any, k: Any, *, label: attnc.Table) -> Any:
        return label[q.x] == label[k.x]

    with pytest.raises(ShapeError, match=r"the relation reads the table 'label'.*compile with tune=True"):
        attnc.tune(listed(), {"grid": 8})
    q, k, v = rows(8)
    label = torch.arange(8) % 3
    op = attnc.compile(listed(), grid=8, tune=True)
    true = attnc.reference(listed(), grid=8)(*(t.double() for t in (q, k, v)), label=label)
    assert (op(q, k, v, label=label) - true).abs().max() < 1e-5


# ----------------------------------------------------------------------------------------------------------------- the command
def test_command(cache: Path) -> None:
    words = ["tune", "window:size=3", "--grid", "6x6", "--heads", "2", "--head-dim", "8"]
    said = CliRunner().invoke(app, [*words, "--no-backward"])
    assert said.exit_code == 0, said.output
    assert "untuned" in said.stdout
    assert "backward" not in said.stdout
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [r["direction"] for r in found["races"]] == ["forward", "backward"]
    wrong = CliRunner().invoke(app, [*words, "--dtype", "int7"])
    assert wrong.exit_code == 2
    assert "one of float32" in wrong.stderr
    said = CliRunner().invoke(app, ["tune", "channel", "--grid", "6x6"])
    assert "one way to run it" in said.stdout


# ----------------------------------------------------------------------------------------------------------------- warm starts
def test_a_second_process_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proof, kernel and choice come from the cache: sympy's rules are not even imported."""
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path))
    script = """if True:
        import sys, torch, attnc
        from attnc import patterns
        op = attnc.compile(patterns.neighborhood(3, dilation=2), grid=(12, 20))
        out = op(*(torch.ones(1, 1, 240, 8) for _ in range(3)))
        print("attnc.analysis.forms" in sys.modules, float(out.sum()))
    """
    run = [sys.executable, "-c", script]
    said = [subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert [s[0] for s in said] == ["True", "False"]
    assert said[0][1] == said[1][1] == "1920.0"
