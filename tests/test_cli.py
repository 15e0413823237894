"""The command line: specs, every command's output, and errors as one line with exit status 2."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnc import Mechanism, Pattern, spec
from attnc.cli import app
from attnc.errors import DeclarationError

FILE = '''
import attnc

@attnc.pattern
def near(q, k, *, size=3):
    """Keys at most size // 2 away."""
    return (abs(q.y - k.y) <= size // 2) & (abs(q.x - k.x) <= size // 2)

ready = near(size=5)
number = 7

def not_a_pattern():
    return 7
'''


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path


def attnc(*words: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == status, (result.output, result.exception)
    return result


def fails(*words: str) -> str:
    """The one line on stderr of a command that ends with status 2."""
    result = attnc(*words, status=2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return str(line)


# --- specs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("7", 7), ("-3", -3), ("7x5", (7, 5)), ("3x7x7", (3, 7, 7)),
        ("0.5", 0.5), ("1e-3", 1e-3), (".5", 0.5), ("true", True), ("False", False), ("none", None),
        ("relative", "relative"), ("7x", "7x"), ("inf", "inf"), ("__import__('os')", "__import__('os')"),
    ],
)  # fmt: skip
def test_values(word: str, value: object) -> None:
    found = spec.value(word)
    assert found == value
    assert type(found) is type(value)


def test_hyper_parameters() -> None:
    assert spec.hyper_parameters("") == {}
    assert spec.hyper_parameters("size=7x5, bias=relative") == {"size": (7, 5), "bias": "relative"}
    for text, said in [("7", "not a hyper-parameter"), ("size=", "not a"), ("a=1,a=2", "given twice")]:
        with pytest.raises(DeclarationError, match=said):
            spec.hyper_parameters(text)


@pytest.mark.parametrize("text", ["window:size=7", "window:size=7x5,shift=3", "neighborhood:size=7,dilation=2"])
def test_library_specs(text: str) -> None:
    assert isinstance(spec.resolve(text), Pattern)


def test_mechanisms_are_found() -> None:
    assert isinstance(spec.resolve("channel"), Mechanism)


@pytest.mark.parametrize("text", ["mine.py:near", "mine.py:near:size=7", "mine.py:ready", "./mine.py:ready"])
def test_file_specs(text: str) -> None:
    assert isinstance(spec.resolve(text), Pattern)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("windw:size=7", "no library pattern is called 'windw'; did you mean"),
        ("window:size=7,siz=7", "'window': got an unexpected keyword argument 'siz'; it takes size"),
        ("window", "missing a required argument: 'size'; it takes size"),
        ("window:size", "write key=value"),
        ("a b", "is neither NAME"),
        ("none.py:x", "there is no file none.py"),
        ("mine.py:neer", "mine.py defines no 'neer'; did you mean"),
        ("mine.py:near:sise=7", "unknown hyper-parameter 'sise'"),
        ("mine.py:ready:size=7", "finished pattern and takes no size"),
        ("mine.py:number", "'number' is a int, not a pattern"),
        ("mine.py:not_a_pattern", "gave a int, not a pattern"),
    ],
)
def test_bad_specs_are_one_line(text: str, said: str) -> None:
    line = fails("explain", text, "--grid", "8x8")
    assert line.startswith("attnc: DeclarationError: ")
    assert said in line


@pytest.mark.parametrize(
    ("source", "said"),
    [("x = 1\ny = 1 / 0\n", "stops at line 2 with ZeroDivisionError"), ("x = (\n", "SyntaxError")],
)
def test_a_file_that_stops(home: Path, source: str, said: str) -> None:
    (home / "bad.py").write_text(source)
    assert said in fails("explain", "bad.py:x", "--grid", "8x8")


def test_a_file_may_import_its_neighbour(home: Path) -> None:
    (home / "user.py").write_text("from mine import ready as again\n")
    assert isinstance(spec.resolve("user.py:again"), Pattern)


def test_traceback_on_request() -> None:
    result = CliRunner().invoke(app, ["--traceback", "explain", "windw", "--grid", "8x8"])
    assert isinstance(result.exception, DeclarationError)


@pytest.mark.parametrize("grid", ["8by8", "0x8", "-1", "8x"])
def test_bad_grids_are_usage_errors(grid: str) -> None:
    assert "--grid" in fails("explain", "window:size=7", f"--grid={grid}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain"], "Missing argument 'SPEC' (`attnc explain --help` shows what it takes)"),
        (["expalin", "window:size=7"], "No such command 'expalin'"),
        (["--fast", "list"], "No such option: --fast (`attnc --help` shows"),
        (["cache", "empty"], "No such command 'empty'"),
        (["compile", "window:size=7", "--heads", "many"], "Invalid value for '--heads'"),
        (["draw", "window:size=7", "--grid=8x8", "-o", "p.word"], "path='p.word': Format 'word' is not supported"),
        (["draw", "window:size=7", "--grid=8x8", "-o", "none/p.png"], "No such file or directory"),
        (["draw", "channel", "--grid=8x8"], "mechanism channel(): its steps are no relation on a grid"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str) -> None:
    assert said in fails(*words)


# --- commands ------------------------------------------------------------------------------------


def test_list() -> None:
    text = attnc("list").stdout
    for name in ("window", "neighborhood", "davit_tiny"):
        assert name in text


def test_doctor() -> None:
    text = attnc("doctor").stdout
    for name in ("python", "torch", "cache", "backend eager", "backend triton"):
        assert name in text
    assert re.search(r"ok +backend eager +works", text), text
    assert re.search(r"ok +tuned +\w+", text), text
    bad = [line.split()[1] for line in text.splitlines() if line.startswith("-- ")]
    assert ("Nothing to mend" in text) == (not bad)
    assert all(f"To mend {name}" in text for name in bad)


def test_explain() -> None:
    assert attnc("explain", "window:size=7", "--grid", "14x14").stdout.strip()


def test_compile(home: Path) -> None:
    words = ("compile", "window:size=7", "--grid", "14x14", "--heads", "2", "--head-dim", "32")
    text = attnc(*words).stdout
    names = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert "attention" in names
    attnc(*words, "-o", "module.py")
    assert (home / "module.py").read_text() == text  # the same input gives the same bytes


def test_compile_into_a_missing_folder() -> None:
    result = attnc("compile", "window:size=7", "--grid", "14x14", "-o", "none/module.py", status=2)
    assert "cannot write" in result.stderr


def test_inspect() -> None:
    words = ("inspect", "window:size=7", "--grid", "14x14", "--heads", "2")
    report = json.loads(attnc(*words, "--json").stdout)
    assert {"strategy", "allowed_elements", "issued_elements", "waste", "kernels"} <= set(report)
    assert "forward" in attnc(*words).stdout


def test_draw(home: Path) -> None:
    attnc("draw", "neighborhood:size=3", "--grid", "8x8", "--query", "3,4", "-o", "p.png")
    assert (home / "p.png").read_bytes().startswith(b"\x89PNG")


def test_cache(home: Path) -> None:
    from attnc.runtime import cache

    cache.write_json("tuned", "key", 1)
    text = attnc("cache", "info").stdout
    assert str(home / "cache") in text
    assert "tuned" in text
    assert "removed 1 entries" in attnc("cache", "clear").stdout
    assert "empty" in attnc("cache", "info").stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_unsafe_cache_is_one_line(home: Path) -> None:
    (home / "cache").mkdir()
    (home / "cache").chmod(0o777)
    assert fails("cache", "info").startswith("attnc: CacheError: ")


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "attnc.cli", "explain", "a b"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_bench_is_part_of_the_repository(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import attnc as package

    monkeypatch.setattr(package, "__file__", str(home / "attnc" / "__init__.py"))
    assert "clone the repository and run `make bench`" in fails("bench")
    (home / "bench").mkdir()
    (home / "bench" / "__init__.py").touch()
    (home / "bench" / "__main__.py").write_text("import sys; sys.exit(7 if sys.argv[1:] == ['axial', '--quick'] else 1)")
    attnc("bench", "axial", "--quick", status=7)
