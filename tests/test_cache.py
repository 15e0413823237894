"""The build cache: built once among many processes, never torn by a kill, never trusted unverified."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnc.errors import BuildError, CacheError
from attnc.runtime import cache

POSIX = pytest.mark.skipif(os.name != "posix", reason="ownership and modes are POSIX notions")
FILES = ("kernel.so",)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(root))
    cache._verified.clear()
    return root


def writes(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "kernel.so").write_text(text) and None


def refuses(folder: Path) -> None:
    raise AssertionError("a complete entry was built again")


def one(kind: str, home: Path) -> Path:
    (found,) = [child for child in (home / kind).iterdir() if not child.name.startswith(".")]
    return found


def leftovers(home: Path) -> list[Path]:
    return [path for path in home.rglob(".*") if path.name != cache.MARKER]


# --- entries --------------------------------------------------------------------------------------


def test_built_once_and_verified_by_a_fresh_process(home: Path) -> None:
    path = cache.entry("cpp", "key", writes("code"), FILES)
    assert (path / "kernel.so").read_text() == "code"
    assert path.parent.parent == home
    assert cache.entry("cpp", "key", refuses, FILES) == path
    cache._verified.clear()  # what a new process starts with
    assert cache.entry("cpp", "key", refuses, FILES) == path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["key"] == "key"
    assert "torch" in manifest["versions"]


def test_keys_kinds_and_files_are_apart(home: Path) -> None:
    paths = {cache.entry(kind, key, writes(kind + key), FILES) for kind in ("cpp", "ptx") for key in ("a", "b")}
    assert len(paths) == 4
    assert {(path / "kernel.so").read_text() for path in paths} == {"cppa", "cppb", "ptxa", "ptxb"}


def test_what_was_not_asked_for_is_not_kept(home: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "kernel.so").write_text("code")
        (folder / "kernel.o").write_text("temporary")
        (folder / "parts").mkdir()

    path = cache.entry("cpp", "key", build, FILES)
    assert sorted(child.name for child in path.iterdir()) == ["kernel.so", "manifest.json"]


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "manifest.json"])
def test_file_names_cannot_leave_the_entry(home: Path, name: str) -> None:
    with pytest.raises(CacheError, match="not a legal file name"):
        cache.entry("cpp", "key", refuses, (name,))


@pytest.mark.parametrize("kind", ["..", "a/b", "", "locks", "quarantine", ".x"])
def test_kinds_cannot_leave_the_cache(home: Path, kind: str) -> None:
    with pytest.raises(CacheError, match="not a legal kind"):
        cache.entry(kind, "key", refuses, FILES)


# --- builds that fail or die ----------------------------------------------------------------------


def test_failed_build_leaves_nothing_behind(home: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "kernel.so").write_text("half")
        raise BuildError("g++ failed")

    with pytest.raises(BuildError, match=r"g\+\+ failed"):
        cache.entry("cpp", "key", build, FILES)
    assert list((home / "cpp").iterdir()) == []
    path = cache.entry("cpp", "key", writes("whole"), FILES)
    assert (path / "kernel.so").read_text() == "whole"


def test_incomplete_build_is_an_error(home: Path) -> None:
    with pytest.raises(CacheError, match=r"did not write b\.h"):
        cache.entry("cpp", "key", writes("code"), ("kernel.so", "b.h"))
    assert list((home / "cpp").iterdir()) == []


def _die_half_way(folder: Path) -> None:
    (folder / "kernel.so").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def _die(root: str) -> None:
    os.environ["ATTNC_CACHE_DIR"] = root
    cache.entry("cpp", "key", _die_half_way, FILES)


def _count(root: str, log: str, barrier: Any) -> None:
    os.environ["ATTNC_CACHE_DIR"] = root

    def build(folder: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)  # long enough for every other process to arrive at the lock
        (folder / "kernel.so").write_text("code")

    barrier.wait(30)
    path = cache.entry("cpp", "key", build, FILES)
    assert (path / "kernel.so").read_text() == "code"


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that share no state with this one; the server imports attnc once for all of them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no forkserver here")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attnc.runtime.cache"])
    return context


@POSIX
def test_many_processes_build_once(home: Path, tmp_path: Path, processes: Any) -> None:
    log = tmp_path / "builds"
    barrier = processes.Barrier(8)
    workers = [processes.Process(target=_count, args=(str(home), str(log), barrier)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert len(log.read_text().splitlines()) == 1
    assert leftovers(home) == []


@POSIX
def test_killed_builder_leaves_no_entry_and_the_next_build_works(home: Path, processes: Any) -> None:
    worker = processes.Process(target=_die, args=(str(home),))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert [child.name[0] for child in (home / "cpp").iterdir()] == ["."]  # the torn build, never an entry
    path = cache.entry("cpp", "key", writes("whole"), FILES)
    assert (path / "kernel.so").read_text() == "whole"
    assert leftovers(home) == []


# --- entries that cannot be trusted ---------------------------------------------------------------


def _edit(path: Path) -> None:
    (path / "kernel.so").write_text("evil")


def _truncate(path: Path) -> None:
    (path / "manifest.json").write_text("{")


def _remove(path: Path) -> None:
    (path / "kernel.so").unlink()


def _link(path: Path) -> None:
    real = path.parent.parent / "elsewhere"
    (path / "kernel.so").rename(real)
    (path / "kernel.so").symlink_to(real)


def _foreign(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "key": "another key"}))


def _deep(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 200_000)


def _shapeless(path: Path) -> None:
    (path / "manifest.json").write_text(json.dumps({"format": 1, "key": "key", "files": ["kernel.so"]}))


@pytest.mark.parametrize("spoil", [_edit, _truncate, _remove, _link, _foreign, _deep, _shapeless])
def test_spoilt_entry_is_set_aside_and_built_again(home: Path, spoil: Callable[[Path], None]) -> None:
    path = cache.entry("cpp", "key", writes("first"), FILES)
    spoil(path)
    cache._verified.clear()
    assert cache.entry("cpp", "key", writes("second"), FILES) == path
    assert (path / "kernel.so").read_text() == "second"
    assert len(list((home / "quarantine").iterdir())) == 1


def test_a_file_in_place_of_an_entry(home: Path) -> None:
    path = cache.entry("cpp", "key", writes("first"), FILES)
    path.rename(home / "away")
    path.write_text("a file")
    cache._verified.clear()
    assert (cache.entry("cpp", "key", writes("second"), FILES) / "kernel.so").read_text() == "second"


def test_a_file_added_later_is_not_trusted(home: Path) -> None:
    path = cache.entry("cpp", "key", writes("code"), FILES)
    (path / "extra.so").write_text("evil")

    def build(folder: Path) -> None:
        for name in ("kernel.so", "extra.so"):
            (folder / name).write_text("good")

    path = cache.entry("cpp", "key", build, ("kernel.so", "extra.so"))
    assert (path / "extra.so").read_text() == "good"


def test_entry_rebuilt_by_another_process_is_verified_again(home: Path) -> None:
    path = cache.entry("cpp", "key", writes("code"), FILES)
    manifest = json.loads((path / "manifest.json").read_text())
    _twin(path / "manifest.json", manifest).replace(path / "manifest.json")
    (path / "kernel.so").write_text("torn")
    assert (cache.entry("cpp", "key", writes("again"), FILES) / "kernel.so").read_text() == "again"


def _twin(path: Path, manifest: Any) -> Path:
    twin = path.with_name("twin")
    twin.write_text(json.dumps(manifest))
    return twin


# --- the directory --------------------------------------------------------------------------------


def test_default_is_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ATTNC_CACHE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    assert cache.root() == tmp_path / "attnc"


@POSIX
def test_made_private_and_refused_when_others_can_write(home: Path) -> None:
    cache.root()
    assert home.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o707, 0o777):
        home.chmod(mode)
        with pytest.raises(CacheError, match="can be written by others"):
            cache.entry("cpp", "key", refuses, FILES)
    home.chmod(0o755)  # others may read
    cache.entry("cpp", "key", writes("code"), FILES)


@POSIX
def test_refused_when_another_user_owns_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.root()
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(CacheError, match="belongs to user"):
        cache.root()


def test_a_directory_with_other_files_is_not_taken_over(home: Path) -> None:
    home.mkdir(mode=0o700)
    (home / "thesis.tex").write_text("years of work")
    for call in (cache.root, cache.clear, cache.info):
        with pytest.raises(CacheError, match="not an attnc build cache"):
            call()
    assert (home / "thesis.tex").exists()


def test_a_file_in_its_place(home: Path) -> None:
    home.write_text("")
    with pytest.raises(CacheError, match="cannot use"):
        cache.root()


def test_directory_removed_while_in_use(home: Path) -> None:
    path = cache.entry("cpp", "key", writes("code"), FILES)
    for child in sorted(home.rglob("*"), reverse=True):
        child.rmdir() if child.is_dir() else child.unlink()
    home.rmdir()
    assert cache.entry("cpp", "key", writes("code"), FILES) == path


# --- tables ---------------------------------------------------------------------------------------


def test_tables_round_trip(home: Path) -> None:
    assert cache.read_json("tuned", "key") is None
    value = {"tile": [2, 8], "ms": 0.125, "name": "7×7", "none": None, "deep": {"a": [True]}}
    cache.write_json("tuned", "key", value)
    assert cache.read_json("tuned", "key") == value
    cache.write_json("tuned", "key", [1])
    assert cache.read_json("tuned", "key") == [1]
    assert cache.read_json("tuned", "other") is None
    assert leftovers(home) == []


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, {"x": object()}])
def test_tables_refuse_what_is_not_json(home: Path, value: object) -> None:
    with pytest.raises(CacheError, match="cannot be stored as JSON"):
        cache.write_json("tuned", "key", value)
    assert not (home / "tuned").exists()


@pytest.mark.parametrize("text", ["", "{", "null", '{"format": 1}', "\x00\xff", "[" * 200_000])
def test_spoilt_table_is_set_aside(home: Path, text: str) -> None:
    cache.write_json("tuned", "key", 1)
    one("tuned", home).write_text(text, encoding="latin-1")
    assert cache.read_json("tuned", "key") is None
    assert len(list((home / "quarantine").iterdir())) == 1
    cache.write_json("tuned", "key", 2)
    assert cache.read_json("tuned", "key") == 2


def test_table_with_a_changed_value_is_set_aside(home: Path) -> None:
    cache.write_json("tuned", "key", {"tile": 64})
    path = one("tuned", home)
    path.write_text(path.read_text().replace("64", "65"))
    assert cache.read_json("tuned", "key") is None


# --- looking at it and emptying it ----------------------------------------------------------------


def test_info_and_clear(home: Path) -> None:
    assert cache.info() == {}
    path = cache.entry("cpp", "a", writes("x" * 1000), FILES)
    cache.entry("cpp", "b", writes("y" * 1000), FILES)
    cache.write_json("tuned", "key", 1)
    found = cache.info()
    assert {kind: each.entries for kind, each in found.items()} == {"cpp": 2, "tuned": 1}
    assert found["cpp"].bytes > 2000
    cache.clear()
    assert cache.info() == {}
    assert not path.exists()
    assert (cache.entry("cpp", "a", writes("new"), FILES) / "kernel.so").read_text() == "new"


def test_clear_spares_a_build_under_way(home: Path) -> None:
    def build(folder: Path) -> None:
        cache.clear()
        (folder / "kernel.so").write_text("code")

    path = cache.entry("cpp", "key", build, FILES)
    assert (path / "kernel.so").read_text() == "code"
