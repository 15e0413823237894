"""Winners as data: what is kept, exported, imported and merged, and what is refused; processes killed over one cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_cache
import pytest
from typer.testing import CliRunner

import attnc
from attnc import patterns
from attnc.cli import app
from attnc.errors import CacheError
from attnc.runtime import cache, tuner, winners


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuner, "_winners", {})
    return tmp_path / "cache"


def record(seconds: float = 1.0, *, shape: str = "8", measured: str = "2026-01-01T00:00:00Z", n: int = 0) -> dict[str, Any]:
    trial = {"choice": "a", "seconds": seconds, "predicted": 1}
    return {
        "choice": {"n": n}, "trials": [trial], "statement": "p", "shape": shape, "untuned": "a", "measured": measured
    }  # fmt: skip


def exported(path: Path, *rows: tuple[int, dict[str, Any]]) -> Path:
    found = [{"key": json.loads(kill_cache.like(n)), "record": r} for n, r in rows]
    path.write_text(json.dumps({"attnc": "tuned", "schema": winners.SCHEMA, "winners": found}))
    return path


# ------------------------------------------------------------------------------------------------------------- there and back
def test_what_is_exported_here_is_imported_there(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        winners.keep(kill_cache.like(n), record(n=n))
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert attnc.export_winners(str(first)) == 3
    assert json.loads(first.read_text())["schema"] == winners.SCHEMA
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "elsewhere"))
    version = tuner.version()
    found = attnc.import_winners(str(first))
    assert (found.added, found.replaced, found.left, found.elsewhere) == (3, 0, 0, 0)
    assert str(found) == "3 winners: 3 new, 0 better than the kept one, 0 no better"
    assert tuner.version() > version  # what was derived from older winners is derived again
    assert tuner.winner(kill_cache.like(1)) == {"n": 1}
    assert attnc.import_winners(str(first)).left == 3
    assert attnc.export_winners(str(second)) == 3
    assert first.read_bytes() == second.read_bytes()


def test_merging_keeps_the_faster_at_a_shape_else_the_newer(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    steps: list[tuple[dict[str, Any], int]] = [
        (record(2.0, n=1), 1),
        (record(3.0, n=2, measured="2027-01-01T00:00:00Z"), 1),  # slower at the same shape
        (record(1.0, n=3, measured="2025-01-01T00:00:00Z"), 3),  # faster, though older
        (record(0.1, n=4, shape="7", measured="2024-01-01T00:00:00Z"), 3),  # another shape of the bucket, older
        (record(9.0, n=5, shape="7", measured="2026-06-01T00:00:00Z"), 5),  # and newer
    ]
    for new, expected in steps:
        winners.import_winners(exported(path, (0, new)))
        assert winners.kept(kill_cache.like(0))["choice"] == {"n": expected}  # type: ignore[index]
    for a, b in (
        (record(1.0), record(2.0)),
        (record(n=1), record(n=2)),
        (record(shape="7"), record(measured="2027-01-01T00:00:00Z")),
    ):
        assert winners.better(a, b) != winners.better(b, a)  # so it does not matter who imports whom
        assert not winners.better(a, a)


def test_winners_of_other_versions_are_kept_and_counted(home: Path, tmp_path: Path) -> None:
    path = exported(tmp_path / "w.json", (0, record()), (1, record()))
    found = json.loads(path.read_text())
    found["winners"][0]["key"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(found))
    merged = winners.import_winners(path)
    assert (merged.added, merged.elsewhere) == (2, 1)
    assert "1 of them measured with other versions" in str(merged)


# --------------------------------------------------------------------------------------------------------------------- refused
def _with(*path: Any, value: Any) -> Callable[[Any], None]:
    def spoil(found: Any) -> None:
        *way, last = path
        for step in way:
            found = found[step]
        found[last] = value

    return spoil


def _without(*path: Any) -> Callable[[Any], None]:
    def spoil(found: Any) -> None:
        *way, last = path
        for step in way:
            found = found[step]
        del found[last]

    return spoil


ROW = ("winners", 0)
SPOILT: list[tuple[Callable[[Any], None], str]] = [
    (_with("schema", value=2), r"its schema is 2, and this attnc reads 1; export it again"),
    (_with("schema", value=True), "its schema is True"),
    (_with("attnc", value="proofs"), "not a file of winners"),
    (_with("more", value=1), "the file has the unknown field 'more'"),
    (_with(*ROW, "record", "code", value="x"), r"\.winners\[0\]\.record has the unknown field 'code'"),
    (_with(*ROW, "key", "bucket", "x", value=1), r"\.winners\[0\]\.key\.bucket has the unknown field 'x'"),
    (_without(*ROW, "record", "measured"), r"\.winners\[0\]\.record lacks the field 'measured'"),
    (_without(*ROW, "key", "device", "target"), r"\.winners\[0\]\.key\.device is an object, not an object with a target"),
    (_with(*ROW, "key", "head_dim", value="8"), r"\.key\.head_dim is '8', not a whole number"),
    (_with(*ROW, "key", "head_dim", value=True), r"\.key\.head_dim is 'True', not a whole number"),
    (_with(*ROW, "key", "head_dim", value=-1), r"\.key\.head_dim is '-1', not a whole number"),
    (_with(*ROW, "record", "trials", value=[]), r"\.record\.trials is empty"),
    (_with(*ROW, "record", "trials", 0, "seconds", value="1"), r"\.trials\[0\]\.seconds is '1', not a time"),
    (_with(*ROW, "record", "trials", 0, "seconds", value=float("nan")), r"\.trials\[0\]\.seconds is 'nan', not a time"),
    (_with(*ROW, "record", "trials", 0, "seconds", value=-1.0), r"\.trials\[0\]\.seconds is '-1.0', not a time"),
    (_with(*ROW, "record", "shape", value=None), r"\.record\.shape is null, not a short text"),
    (_with(*ROW, "record", "shape", value="x" * 5000), r"\.record\.shape is .*, not a short text"),
    (_with(*ROW, "record", "measured", value="yesterday"), r"\.measured is 'yesterday', not a time such as"),
    (_with(*ROW, "record", "choice", value=1.5), r"\.record\.choice is '1.5', not a choice"),
    (_with(*ROW, "record", "choice", value={"a": [[[[[[[1]]]]]]]}), r"\.record\.choice is a list, not a choice"),
    (_with("winners", value={}), r"\.winners is an object, not a list"),
    (_with("winners", 1, value=3), r"\.winners\[1\] is '3', not an object"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILT, ids=[s[1][:40] for s in SPOILT])
def test_files_that_are_no_winners_are_refused_whole(home: Path, tmp_path: Path, spoil: Any, says: str) -> None:
    path = exported(tmp_path / "w.json", (0, record()), (1, record()))
    found = copy.deepcopy(json.loads(path.read_text()))
    spoil(found)
    path.write_text(json.dumps(found))
    with pytest.raises(CacheError, match=says):
        winners.import_winners(path)
    assert list(winners.every()) == []  # the good one beside it neither
    assert path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\x00"])
def test_files_that_are_no_json_are_refused(home: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(CacheError, match=r"w.json: not (JSON|a file of winners)"):
        winners.import_winners(path)


def test_paths_that_cannot_be_read_or_written(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match="cannot read the winners in"):
        winners.import_winners(tmp_path / "absent.json")
    with pytest.raises(CacheError, match="cannot write the winners to"):
        winners.export_winners(tmp_path / "absent" / "w.json")
    monkeypatch.setattr(winners, "LARGEST", 10)
    with pytest.raises(CacheError, match="bytes are no file of winners"):
        winners.import_winners(exported(tmp_path / "w.json", (0, record())))


def test_what_lies_in_the_cache_and_is_no_winner_is_set_aside(home: Path) -> None:
    """Never trusted, never fatal: the model's choice runs, and the rest of the cache stays of use."""
    winners.keep(kill_cache.like(0), record(n=7))
    cache.write_json(winners.KIND, kill_cache.like(1), record() | {"more": 1})
    cache.write_json(winners.KIND, "not a key", record())
    (home / winners.KIND / "stray.json").write_text("{")
    assert tuner.winner(kill_cache.like(1)) is None
    assert [r["choice"] for _, r in winners.every()] == [{"n": 7}]
    assert len(list((home / "quarantine").iterdir())) == 3
    assert tuner.winner(kill_cache.like(0)) == {"n": 7}


def test_update_sees_what_is_there_and_may_leave_it(home: Path) -> None:
    assert cache.update_json("tuned", "key", lambda old: [old]) == [None]
    assert cache.update_json("tuned", "key", lambda old: [old]) == [[None]]
    assert cache.update_json("tuned", "key", lambda old: None) == [[None]]
    assert cache.read_json("tuned", "key") == [[None]]
    with pytest.raises(CacheError, match="cannot be stored as JSON"):
        cache.update_json("tuned", "key", lambda old: {1, 2})
    assert cache.read_json("tuned", "key") == [[None]]


# ------------------------------------------------------------------------------------------------------------------- the table
def test_a_table_holds_what_was_measured_of_a_program_on_a_target(home: Path) -> None:
    program = attnc.compile(patterns.window(4), grid=(8, 8)).program(2)
    other = attnc.compile(patterns.window(2), grid=(8, 8)).program(2)
    for p, target, n in ((program, "cuda:90", 1), (program, "cuda:80", 2), (other, "cuda:90", 3)):
        like = winners.key(
            backend="triton", device={"name": "x", "target": target}, source="0", program=p, direction="forward", dtype="float16",
            head_dim=32, value_dim=32, bucket={"grid": [8, 8], "kv_grid": [8, 8], "items": 1},
        )  # fmt: skip
        winners.keep(like, record(0.5, n=n))
    found = winners.table(program, "cuda:90")
    assert found["pattern"] == {"name": "window(4)", "hash": winners.pattern_hash(program)}
    assert [(r["choice"], r["seconds"], r["device"]["name"], r["shape"]) for r in found["winners"]] == [({"n": 1}, 0.5, "x", "8")]
    assert found == winners.table(program, "cuda:90") == json.loads(json.dumps(found))
    assert winners.table(program, "hip:gfx942")["winners"] == []


# --------------------------------------------------------------------------------------------------------------------- kill -9
def test_processes_killed_over_one_cache(tmp_path: Path) -> None:
    """Four at once, killed in the middle: no corrupt entry, no lost winner. The whole of it: `python tests/kill_cache.py`."""
    if "forkserver" not in kill_cache.multiprocessing.get_all_start_methods():
        pytest.skip("no forkserver here")
    before = kill_cache.os.environ["ATTNC_CACHE_DIR"]
    try:
        found = kill_cache.attack(tmp_path / "cache", times=3, workers=4)
    finally:
        kill_cache.os.environ["ATTNC_CACHE_DIR"] = before
    assert found["wrong"] == []
    assert found["killed"] == 12
    assert found["done before the kills"] >= 12


# ----------------------------------------------------------------------------------------------------------------- the command
def test_commands_hand_winners_over(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    winners.keep(kill_cache.like(0), record())
    path = tmp_path / "w.json"
    said = CliRunner().invoke(app, ["tune", "--export", str(path)])
    assert said.exit_code == 0, said.output
    assert said.stdout == f"{path}: 1 winner\n"
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "elsewhere"))
    said = CliRunner().invoke(app, ["tune", "--import", str(path)])
    assert said.exit_code == 0, said.output
    assert "1 winner: 1 new" in said.stdout
    path.write_text("{}")
    said = CliRunner().invoke(app, ["tune", "--import", str(path)])
    assert said.exit_code == 2
    assert "CacheError" in said.stderr
    assert len(said.stderr.strip().splitlines()) == 1
    for words in (["tune"], ["tune", "full"]):
        said = CliRunner().invoke(app, words)
        assert said.exit_code == 2
        assert "SPEC and --grid" in said.stderr
