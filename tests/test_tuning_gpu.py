"""The tuner of GPU kernels without a GPU: facts and a clock of a device that does not exist, tensors without data, no launch."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from typer.testing import CliRunner

import attnc
from attnc import patterns
from attnc.cli import app
from attnc.errors import BuildError, UnsupportedError
from attnc.report import fit, inspect
from attnc.runtime import device, triton_choice, tuner, winners
from attnc.runtime.call import Call
from attnc.runtime.device import Device
from attnc.schedule import tiles
from attnc.schedule.geometry import geometry
from attnc.schedule.walks import Tile

Launches = list[tuple[str, int]]
SHAPE: dict[str, Any] = {"grid": (28, 28), "heads": 2, "head_dim": 32, "dtype": "float16"}


class Clock:
    """Scripted times: what a runner takes follows from what it is called, and none of them runs."""

    def __init__(self, fast: str = "", lacking: str = "\0") -> None:
        self.fast, self.lacking, self.asked = fast, lacking, 0

    def __call__(self, runners: device.Runners) -> device.Times:
        self.asked += 1
        names = [n for n in runners if self.lacking not in n]
        return {n: 1e-5 if n == self.fast else 1e-4 * (1 + i) for i, n in enumerate(names)}


@pytest.fixture(autouse=True)
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """A cache of its own, and a driver that compiles for a target but launches nothing."""
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuner, "_winners", {})
    monkeypatch.setattr(triton_choice, "_static", None)
    monkeypatch.setattr("attnc.compiler._compile_before_measuring", lambda: None)
    found: Launches = []
    compiling = triton.runtime.JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **named: Any) -> Any:
        if warmup:
            return compiling(self, *args, warmup=True, **named)
        found.append((self.__name__, named.get("num_warps", 4)))
        return None

    monkeypatch.setattr(triton.runtime.JITFunction, "run", run)
    with inspect._pretending("cuda:90"):
        yield found


def fake(clock: Any, name: str = "NVIDIA H100 80GB HBM3", target: str = "cuda:90") -> Device:
    return Device(name, target, torch.device("meta"), clock)


def call_of(p: attnc.Pattern, grid: tuple[int, ...]) -> Call:
    program = attnc.compile(p, grid=grid).program(len(grid))
    return Call(program, geometry(program, grid, grid), 0.2, {})


def rows(n: int, heads: int = 2, d: int = 32, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    return [torch.empty(1, heads, n, d, dtype=dtype, device="meta") for _ in range(3)]


# ------------------------------------------------------------------------------------------------------------------ the tuner
def test_the_fastest_is_kept_and_launched_from_then_on(launches: Launches) -> None:
    """Tuned once by a scripted clock; later calls of the bucket launch the winner's tiles, others the model's."""
    p = patterns.neighborhood(7)
    where = fake(Clock())
    with device.using(where):
        found = attnc.tune(p, SHAPE, where)
        assert [(r.direction, r.shape) for r in found.races] == [
            ("forward", "28x28, 1x2 heads of 32"), ("backward", "28x28, 1x2 heads of 32")
        ]  # fmt: skip
        forward = found.races[0]
        assert found.device == where.name
        assert found.threads is None
        assert len(forward.trials) == tuner.KEPT
        other = forward.trials[5].choice
        again = attnc.tune(p, SHAPE, fake(Clock(fast=other)))
        assert again.races[0].winner.choice == other
        assert again.races[0].gain > 1
        assert f"{p.name} on {where.name}\n" in str(again)
        op = attnc.compile(p, grid=(28, 28), backend="triton")
        call = call_of(p, (28, 28))
        kept = triton_choice.tunable(call, tuple(rows(784)), False, where, False)
        choice = tuner.chosen(kept).choice
        assert choice.show() == other
        launches.clear()
        op(*rows(784))
        assert launches == [("forward", choice.forward.warps)]
        module, _ = next(iter(next(iter(call_kept(op))).values()))
        assert f"num_warps={choice.forward.warps}" in Path(module.__file__).read_text()


def test_tiles_that_come_with_lists_are_timed_and_not_chosen(launches: Launches) -> None:
    """Where a call walks lists of blocks nothing else is raced, nothing is kept, and a call that tunes measures nothing."""
    half_plane = attnc.pattern(lambda q, k: q.y + 2 * q.x >= k.y + 2 * k.x + 3)()
    clock = Clock()
    with device.using(fake(clock)):
        found = attnc.tune(half_plane, SHAPE | {"grid": (48, 48)}, fake(clock))
        assert [r.direction for r in found.races] == ["forward", "backward"]
        for r in found.races:
            (only,) = r.trials
            assert only.choice == r.untuned
            assert only.choice.endswith(", by lists")
            assert r.gain == 1
        assert not tuner._winners or set(tuner._winners.values()) == {None}
        asked = clock.asked
        attnc.compile(half_plane, grid=(48, 48), backend="triton", tune=True)(*rows(48 * 48))
        assert clock.asked == asked


def call_kept(op: Any) -> list[dict[Any, Any]]:
    """What the operator's backend kept for its calls."""
    from attnc.runtime.parts import parts_of

    (traced,) = op._programs.values()
    _, parts = parts_of(traced.text, (28, 28), (28, 28), 2, 2, 1, "triton")
    return [kept for part in parts for *_, kept in part.statements]


def test_tuning_once_is_enough_and_a_device_is_another(launches: Launches) -> None:
    p, clock = patterns.window(7), Clock()
    op = attnc.compile(p, grid=(28, 28), backend="triton", tune=True)
    with device.using(fake(clock)):
        for _ in range(2):
            op(*rows(784))
        assert clock.asked == 1
    with device.using(fake(clock, "NVIDIA H200")):
        op(*rows(784))
    assert clock.asked == 2
    with device.using(fake(clock)):
        op(*rows(784, dtype=torch.bfloat16))
        op(*rows(784, d=64))
    assert clock.asked == 4
    keys = [k for k, _ in winners.every()]
    assert {k["device"]["name"] for k in keys} == {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}
    assert {(k["dtype"], k["head_dim"]) for k in keys} == {("float16", 32), ("bfloat16", 32), ("float16", 64)}
    assert all(k["device"]["target"] == "cuda:90" and {"torch", "triton", "attnc", "source"} == set(k["versions"]) for k in keys)


def test_unions_and_learned_tables_are_tuned(launches: Launches) -> None:
    for p in (patterns.cross(2), patterns.window(4, bias="relative"), patterns.per_head([patterns.window(4), patterns.causal()])):
        found = attnc.tune(p, {"grid": (12, 8), "heads": 2, "head_dim": 16, "dtype": "float16"}, fake(Clock()))
        assert {r.direction for r in found.races} == {"forward", "backward"}
        assert len(found.races) == (2 if p.name.startswith("window") else 4)


def test_what_does_not_fit_the_device_is_left_out() -> None:
    p = patterns.neighborhood(5)
    with device.using(fake(Clock())):
        own = attnc.tune(p, SHAPE | {"backward": False}, fake(Clock())).races[0].untuned
        found = attnc.tune(p, SHAPE | {"backward": False}, fake(Clock(lacking=own))).races[0]
        assert found.untuned == own not in [t.choice for t in found.trials]
        assert (own, "does not fit the device") in found.dropped
        assert found.gain == 1
        with pytest.raises(BuildError, match=r"neighborhood\(5\): none of the \d+ candidates fits meta"):
            attnc.tune(p, SHAPE, fake(Clock(lacking="")))


def test_a_winner_that_is_no_candidate_is_not_launched(launches: Launches) -> None:
    """What lies on disk is data: a tile that no candidate has is never printed into a kernel."""
    p, where = patterns.neighborhood(3), fake(Clock())
    with device.using(where):
        attnc.tune(p, SHAPE | {"backward": False}, where)
        ((k, record),) = winners.every()
        own = record["choice"]["forward"]
        for wrong in ({"forward": own | {"rows": [999, 999]}}, {"forward": own | {"stages": "9"}}, {"other": 1}, {}):
            winners.keep(json.dumps(k, sort_keys=True), record | {"choice": wrong})
            tuner.forget()
            attnc.compile(p, grid=(28, 28), backend="triton")(*rows(784))
            assert launches[-1] == ("forward", tiles.tiles(call_of(p, (28, 28)).geometry, 32, 32, 2, "cuda:90").forward.warps)


def test_progress_is_told_race_by_race() -> None:
    told: list[str] = []
    attnc.tune(patterns.window(4), [SHAPE, SHAPE | {"grid": (8, 8)}], fake(Clock()), told=lambda r: told.append(r.shape))
    assert told == ["28x28, 1x2 heads of 32"] * 2 + ["8x8, 1x2 heads of 32"] * 2


def test_turns_by_a_clock_of_ones_own() -> None:
    """The processor's race takes a clock too: medians of turns, and stragglers leave after two."""
    now, calls = [0.0], {"a": 0, "b": 0, "slow": 0}

    def runner(name: str, seconds: float) -> Any:
        def run() -> None:
            calls[name] += 1
            now[0] += seconds

        return run

    found = tuner.race({"a": runner("a", 0.1), "b": runner("b", 0.11), "slow": runner("slow", 5.0)}, lambda: now[0])
    assert found == pytest.approx({"a": 0.1, "b": 0.11, "slow": 5.0})
    assert calls == {"a": 1 + tuner.ROUNDS, "b": 1 + tuner.ROUNDS, "slow": 3}


# -------------------------------------------------------------------------------------------------------------- candidates
@pytest.mark.parametrize(
    ("p", "grid"),
    [
        (patterns.neighborhood(7), (56, 56)),
        (patterns.window(7), (56, 56)),
        (patterns.window(2), (16, 16)),
        (patterns.causal(), (640,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_candidates_begin_with_the_models_choice_and_fit(p: attnc.Pattern, grid: Any, itemsize: int) -> None:
    g = call_of(p, grid if isinstance(grid, tuple) else (grid,)).geometry
    for kind in ("forward", "dq", "dkv"):
        for target in ("cuda:90", "cuda:86"):
            found = tiles.candidates(g, 64, kind, itemsize, target)  # type: ignore[arg-type]
            assert found[0] == tiles.choose(g, 64, kind, itemsize, target)  # type: ignore[arg-type]
            assert len(set(found)) == len(found) > 4
            limit = tiles.shared_limit(target)
            assert all(tiles.shared_bytes(kind, t, 64, itemsize, target) <= limit for t in found if t.warps > 1)  # type: ignore[arg-type]
            assert {t.warps for t in found} & {1, 2, 4, 8}


def test_a_wave_alone_keeps_one_chunk_in_shared_memory() -> None:
    """Of AMD's kernels: several warps pipeline, and hold two."""
    alone = tiles.choose(call_of(patterns.window(7), (56, 56)).geometry, 64, target="hip:gfx942")
    one, four = (replace(alone, rows=(4, 4), chunk=(8, 8), warps=w, stages=2) for w in (1, 4))
    bytes_of = [tiles.shared_bytes("forward", t, 64, 2, "hip:gfx942") for t in (one, four)]
    assert bytes_of == [2 * 64 * 64 * 2 + 16 * 64 * 2, 2 * 2 * 64 * 64 * 2]


def test_candidates_spare_memory_pack_blocks_and_vary_batch_items() -> None:
    """Beside the cheapest in instructions: five columns or fewer loaded a row for 7x7, several windows to a tile, other batches."""
    near = call_of(patterns.neighborhood(7), (56, 56)).geometry
    assert (
        min(tiles.reread(near, "q", t) for t in tiles.candidates(near, 32)[: tuner.KEPT])
        <= 5
        < tiles.reread(near, "q", tiles.choose(near, 32))
    )
    small = call_of(patterns.window(3), (18, 18)).geometry
    assert any(t.rows[0] * t.rows[1] > 9 and all(r % 3 == 0 for r in t.rows) for t in tiles.candidates(small, 32))
    window = call_of(patterns.window(7), (56, 56)).geometry
    assert len({t.batch for t in tiles.candidates(window, 32) if t.rows == (7, 7)}) > 2
    for shift in (0, 3):  # a window is one chunk, and so is one that goes on at the end of an axis: nothing to pipeline
        g = call_of(patterns.window(7, shift=shift), (56, 56)).geometry
        own = tiles.choose(g, 32)
        assert (own.rows, any(own.wraps)) == ((7, 7), shift > 0)
        assert [t for t in tiles.candidates(g, 32) if replace(t, stages=own.stages) == own] == [own]


# ------------------------------------------------------------------------------------------------------- compiled beforehand
def test_what_spills_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for the target, without a device: a tile that one warp cannot hold is dropped, the model's choice is not."""
    p, (q, k, v) = patterns.full(), rows(256, d=64)
    call, tile = call_of(p, (256,)), Tile((64,), (64,), 0, 1, 1)
    choice = triton_choice.Choice(forward=tile)
    own = triton_choice.candidates(call.geometry, triton_choice.sizes_of(q, k, v), False, "cuda:90", "")[0][1]
    assert fit.flaw(call, (q, k, v), own, "cuda:90") is None
    said = fit.flaw(call, (q, k, v), choice, "cuda:90")
    assert said is not None
    assert "spills" in said

    def check(call: Call, rows: Any, c: triton_choice.Choice, target: str) -> str | None:
        assert target == "cuda:90"
        return "spills" if c != own and c.forward is not None and c.forward.warps == own.forward.warps else None  # type: ignore[union-attr]

    monkeypatch.setattr(triton_choice, "_static", check)
    with device.using(fake(Clock())):
        found = attnc.tune(p, {"grid": 256, "heads": 2, "head_dim": 64, "dtype": "float16", "backward": False}, fake(Clock()))
    assert found.races[0].untuned in [t.choice for t in found.races[0].trials]
    assert {why for _, why in found.races[0].dropped} == {"spills"}
    assert "not measured: spills" in str(found)


# ---------------------------------------------------------------------------------------------------------------- no GPU here
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    for text in ("cuda", "cuda:3"):
        with pytest.raises(UnsupportedError, match=rf"device='{text}': no GPU here \(.*attnc tune --export"):
            attnc.tune(patterns.full(), {"grid": 8}, text)
    with pytest.raises(UnsupportedError, match="device='mps': calls are tuned on 'cpu' or 'cuda'"):
        attnc.tune(patterns.full(), {"grid": 8}, "mps")
    with pytest.raises(UnsupportedError, match="device='gpu': not a device"):
        attnc.tune(patterns.full(), {"grid": 8}, "gpu")
    with pytest.raises(UnsupportedError, match="CUDA graphs are a GPU's"):
        attnc.tune(patterns.full(), {"grid": 8}, graphs=True)
    said = CliRunner().invoke(app, ["tune", "full", "--grid", "8", "--device", "cuda"])
    assert said.exit_code == 2
    assert "no GPU here" in said.stderr
    assert len(said.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------------- in modules
def test_a_module_carries_what_was_measured_and_runs_it() -> None:
    """Tuned for H100s: the module emitted for their target has the table and the winner's tile; other targets and dtypes do not."""
    p = patterns.neighborhood(7)
    sizes: dict[str, Any] = {"grid": (28, 28), "heads": 2, "head_dim": 32}
    plain = {d: attnc.emit(p, **sizes, target="cuda:90", dtype=d) for d in ("float16", "float32")}
    assert "TUNED" not in plain["float16"]
    trials = attnc.tune(p, SHAPE, fake(Clock())).races[0].trials
    attnc.tune(p, SHAPE, fake(Clock(fast=next(t.choice for t in trials[1:] if "2 warps" in t.choice))))
    module = attnc.emit(p, **sizes, target="cuda:90")
    assert module == attnc.emit(p, **sizes, target="cuda:90")
    end = module.index("@triton.jit")
    table = ast.literal_eval(module[module.index("TUNED = ") + len("TUNED = ") : end].strip())
    assert table == winners.table(call_of(p, (28, 28)).program, "cuda:90")
    assert {r["device"]["name"] for r in table["winners"]} == {"NVIDIA H100 80GB HBM3"}
    assert {r["shape"] for r in table["winners"]} == {"28x28, 1x2 heads of 32"}
    (choice,) = (r["choice"]["forward"] for r in table["winners"] if r["direction"] == "forward")
    rows, chunk = ("x".join(map(str, choice[n])) for n in ("rows", "chunk"))
    for text, expected in ((module, True), (plain["float16"], False)):
        line = next(x for x in text.splitlines() if x.startswith("tile:") and "forward" in x)
        assert (f"{rows} rows" in line and f"chunks of {chunk}" in line and "2 warps" in line) == expected
    assert attnc.emit(p, **sizes, target="cuda:80").find("TUNED") == -1
    wide = attnc.emit(p, **sizes, target="cuda:90", dtype="float32")
    assert "TUNED" in wide  # the table goes along; its tiles are another dtype's
    assert wide.split('"""')[1] == plain["float32"].split('"""')[1]
