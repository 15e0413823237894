"""Working memory of C++ kernels: no more of it is taken than was reserved. What lies beyond belongs to others."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cpp_statements as statements
import pytest
import test_bands as bands
import torch
from builds import QUICK, built_with
from channel_checks import check_channel
from cpp_checks import check
from strategies import Problem, hold
from test_bands import preferred  # noqa: F401  # a fixture: bands wherever they fit

from attnc import patterns
from attnc.errors import BuildError
from attnc.runtime import cpp

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
RESERVED, TAKEN = "void reserve(size_t bytes) {\n", "used += up(n * sizeof(T), 64); return p; }"


@pytest.fixture
def beyond(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A file that kernels make as soon as they take more than they reserved."""
    path, plain = tmp_path / "beyond", cpp._function

    def counted(text: str, name: str) -> Any:
        assert text.count(RESERVED) == text.count(TAKEN) == 1
        text = text.replace(RESERVED, f"{RESERVED}        reserved = bytes;\n")
        said = TAKEN.replace("return", f'if (used > reserved) fclose(fopen("{path}", "w")); return')
        return plain(f"#include <stdio.h>\n{text.replace(TAKEN, f'{said} size_t reserved = 0;')}", name)

    with built_with(QUICK):
        monkeypatch.setattr(cpp, "_function", counted)
        yield path
        monkeypatch.undo()


NARROW, ODD = {"dim": 8, "value_dim": 8, "batch": 1}, {"dim": 33, "value_dim": 7, "batch": 1}
TILES: dict[str, Callable[[], None]] = {
    "window": lambda: check(statements.window(s=4), (9, 11), **ODD),
    "relative bias": lambda: check(statements.biased(s=4), (8, 11), tables={"bias": torch.randn(2, 7, 7)}, **NARROW),
    "terms and a prefix": lambda: check(
        statements.located(), (7, 9), tables={"slope": torch.rand(2)}, prefix=(1, 1), dtype=torch.float64, **NARROW
    ),
    "predicate and virtual keys": lambda: check(statements.odd(), (9, 11), pad=((1, 2), (0, 3)), **NARROW),
}
TILES["two keys more than whole vectors"] = lambda: hold(Problem(patterns.window((3, 6)), (6, 12)), "cpp")
TILES["dropout beside a prefix"] = lambda: hold(Problem(patterns.window(3), (4, 5), prefix=2, dropout=0.3), "cpp")
BANDS: dict[str, Callable[[], None]] = {
    "neighbourhood": lambda: check(statements.neighborhood(s=5, d=2), (11, 37), **ODD),
    "many lines": lambda: check(statements.neighborhood(s=3), (4, 5, 18), **NARROW),
    "bias": lambda: check(statements.near_bias(s=3), (9, 37), tables=bands.bias(2, 3, 3), **NARROW),
}


@pytest.mark.parametrize("name", TILES)
def test_tiles(name: str, beyond: Path) -> None:
    TILES[name]()
    assert not beyond.exists()


@pytest.mark.parametrize("name", BANDS)
def test_bands(name: str, beyond: Path) -> None:
    BANDS[name]()
    assert not beyond.exists()


def test_channels(beyond: Path) -> None:
    check_channel("long")
    assert not beyond.exists()


@pytest.mark.parametrize("name", ["dropout beside a prefix", "predicate and virtual keys", "two keys more than whole vectors"])
def test_no_array_is_left(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Indices of arrays of known length, which the compiler's sanitizer checks."""
    with built_with([*QUICK, "-fsanitize=bounds-strict"]):
        try:
            TILES[name]()
        except BuildError as e:
            if "libubsan" not in str(e):
                raise
            pytest.skip("no sanitizer here")
    assert "runtime error" not in capfd.readouterr().err


def test_taking_more_is_seen(beyond: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with reservations that are too small by four pages."""
    counted = cpp._function
    short = "arena.reserve(2 * Aimed::bytes() - (1 << 14)"
    monkeypatch.setattr(cpp, "_function", lambda text, name: counted(text.replace("arena.reserve(2 * Aimed::bytes()", short), name))
    TILES["window"]()
    assert beyond.exists()
