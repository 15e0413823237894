"""What C++ kernels fetch ahead of their use: rows of their tensors and nothing else, of a tile each once."""

from __future__ import annotations

import ctypes
import math
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from builds import QUICK, built_with
from cpp_checks import make_program
from cpp_statements import neighborhood, window
from test_bands import preferred  # noqa: F401  # a fixture: bands wherever they fit

import attnc
from attnc import patterns
from attnc.runtime import cpp
from attnc.runtime.call import Call
from attnc.schedule.geometry import geometry

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
MOST = 1 << 18
RECORDED = f"""#include <stdint.h>
static int64_t fetched_at[{MOST}], fetched_count = 0;
extern "C" const int64_t* fetched() {{ return fetched_at; }}
extern "C" int64_t fetches() {{ return fetched_count; }}
static inline void fetch(const void* p) {{ if (fetched_count < {MOST}) fetched_at[fetched_count++] = (int64_t)p; }}
#define __builtin_prefetch(p, ...) fetch((const void*)(p))
"""
BUILT = cpp._function
LINE, BATCH, HEADS = 64, 2, 2  # bytes of a line of the cache: a row of 16 float32


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """The kernels that were built, which record what they fetch; one thread."""
    texts: list[tuple[str, str]] = []
    threads = torch.get_num_threads()

    def recorded(text: str, name: str) -> Any:
        texts.append((RECORDED + text, name))
        return BUILT(*texts[-1])

    torch.set_num_threads(1)
    with built_with(QUICK):
        monkeypatch.setattr(cpp, "_function", recorded)
        yield texts
        monkeypatch.undo()
    torch.set_num_threads(threads)


def fetched(
    p: attnc.Pattern, grid: tuple[int, ...], sources: list[tuple[str, str]], channels: int = 16
) -> list[dict[str, list[int]]]:
    """Per direction: of each tensor the lines that were fetched, in order. Nothing outside of tensors was."""
    n = math.prod(grid)
    q, k, v, grad = (torch.randn(BATCH, n, HEADS, channels).transpose(1, 2) for _ in range(4))
    call = Call(make_program(p, len(grid)), geometry(make_program(p, len(grid)), grid, grid), 1.0, {})
    out, lse = cpp.forward(call, q, k, v)
    dq, dk, dv, _ = cpp.backward(call, q, k, v, out, lse, grad, None)
    tensors = {"q": q, "k": k, "v": v, "out": out, "grad": grad, "dq": dq, "dk": dk, "dv": dv}
    results = []
    for source in sources:
        library = cpp._library(*source)  # the one that is loaded
        place, count = library.fetched, library.fetches
        place.restype, count.restype = ctypes.POINTER(ctypes.c_int64), ctypes.c_int64
        assert 0 < count() < MOST
        at = np.ctypeslib.as_array(place(), (count(),)).copy()
        found: dict[str, list[int]] = {}
        for name, t in tensors.items():
            offset = at - t.untyped_storage().data_ptr()
            inside = (offset >= 0) & (offset < t.untyped_storage().nbytes())
            found[name] = (offset[inside] // LINE).tolist()
        assert sum(map(len, found.values())) == len(at), "addresses of no tensor"
        results.append(found)
    return results


def test_tiles_fetch_the_next_one_s_rows_once(sources: list[tuple[str, str]]) -> None:
    """All but those of the first of all windows; what is written too."""
    forward, backward = fetched(window(s=4), (12, 12), sources)
    rows = BATCH * HEADS * 144
    for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv"):
        for found in (forward, backward)[name in ("grad", "dq", "dk", "dv") :]:
            assert len(set(found[name])) == len(found[name]) == rows - 16, name


def test_tiles_fetch_every_line_of_a_row(sources: list[tuple[str, str]]) -> None:
    """Of the forward: rows of 17 channels lie on two lines, which other rows share."""
    rows = torch.arange(BATCH * 144 * HEADS).view(BATCH, 12, 12, HEADS)
    first = set(rows[0, :4, :4, 0].ravel().tolist())
    ends = [(68 * r // LINE, (68 * r + 67) // LINE) for r in range(rows.numel()) if r not in first]
    forward, _ = fetched(window(s=4), (12, 12), sources, channels=17)
    for name in ("q", "k", "v", "out"):
        assert {x for pair in ends for x in pair} <= set(forward[name]), name


@pytest.mark.parametrize(
    "p, grid, keys",
    [(neighborhood(s=3), (12, 40), 0.85), (patterns.neighborhood(3), (4, 6, 36), 0.45)],  # keys of the last plane alone
    ids=["rows", "planes"],
)
def test_bands_fetch_the_next_lines(p: attnc.Pattern, grid: tuple[int, ...], keys: float, sources: list[tuple[str, str]]) -> None:
    """All but what the first rows need; where chunks of a row meet, keys twice."""
    forward, backward = fetched(p, grid, sources)
    rows = BATCH * HEADS * math.prod(grid)
    for found, names in ((forward, ("q", "k", "v", "out")), (backward, ("q", "k", "v", "out", "grad", "dq"))):
        for name in names:
            lines = set(found[name])
            assert (keys if name in ("k", "v") else 0.85) * rows <= len(lines) <= rows, name
            assert len(found[name]) <= (1.05 if name not in ("k", "v") else 2) * len(lines), name
