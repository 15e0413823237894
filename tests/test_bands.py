"""Bands on the C++ backend (neighbourhoods: every query sees equally many keys of the last axis), forward and backward."""

from __future__ import annotations

import ctypes
import math
import platform
import shutil

import pytest
import torch
from test_cpp import axial, causal_axes, check, full, make_program, neighborhood, overlapping, quick_builds, window  # noqa: F401

from attnc import patterns
from attnc.codegen import cpp_host
from attnc.codegen.cpp import Spec, source
from attnc.lang.pattern import pattern
from attnc.runtime import cpp
from attnc.runtime.call import Call
from attnc.schedule.geometry import geometry

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Nothing may be read from outputs, or left in them, that was never written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: x.fill_(math.nan) if (x := empty(*a, **k)).is_floating_point() else x)


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pattern
def halved(q, k):
    return (k.y >= q.y // 2) & (k.y <= q.y // 2 + 1) & (k.x >= q.x // 2) & (k.x <= q.x // 2 + 2)


@pattern
def aside(q, k):
    return (k.y == q.y // 2 + 2) & (k.x >= q.x // 2 + 3) & (k.x <= q.x // 2 + 4)


BANDS = {
    "two vectors": (neighborhood(s=3), (9, 37), {"dim": 24, "kind": "packed"}),
    "clamped both sides of one vector": (neighborhood(s=5), (6, 13), {"dim": 16, "value_dim": 20}),
    "one vector and one query": (neighborhood(s=5), (11, 17), {"kind": "heads_last"}),
    "dilated": (neighborhood(s=7, d=3), (25, 70), {"dim": 32, "heads": 1}),
    "classes of one token": (neighborhood(s=3, d=5), (7, 21), {}),
    "even": (neighborhood(s=4), (7, 50), {"dim": 33, "value_dim": 7, "kind": "channels_first"}),
    "one row": (neighborhood(s=3), (1, 40), {"kv_heads": 1}),
    "too short for its width": (neighborhood(s=7), (12, 5), {}),
    "as short as its width": (neighborhood(s=5), (5, 5), {"lse_gradient": False}),
    "widest": (neighborhood(s=17), (19, 41), {"heads": 1}),
    "grouped queries": (neighborhood(s=3), (9, 37), {"heads": 4, "kv_heads": 2}),
    "expanded tensors": (neighborhood(s=3), (5, 17), {"kind": "expanded"}),
    "volume": (neighborhood(s=3), (4, 5, 18), {"dim": 17, "heads": 4, "kv_heads": 2}),
    "dilated volume": (neighborhood(s=3, d=2), (7, 6, 19), {}),
    "wide heads": (neighborhood(s=3), (5, 34), {"dim": 144, "heads": 1}),
    "negative scale": (neighborhood(s=3), (5, 20), {"scale": -0.3}),
    "float64": (neighborhood(s=3), (6, 35), {"dtype": torch.float64, "dim": 10}),
    "bfloat16": (neighborhood(s=3), (6, 35), {"dtype": torch.bfloat16, "dim": 24}),
    "float16": (neighborhood(s=3), (6, 35), {"dtype": torch.float16, "dim": 24}),
    "a row in strips": (neighborhood(s=7), (8, 700), {"dim": 48, "heads": 1, "batch": 1}),
    "strips of grouped queries": (neighborhood(s=3), (6, 900), {"heads": 2, "kv_heads": 1, "batch": 1, "dim": 48}),
    "shared windows": (patterns.neighborhood(5, stride=4), (9, 39), {}),
    "a whole vector shares its window": (patterns.neighborhood(17, stride=16), (6, 70), {"heads": 1}),
    "keys on a coarser grid": (halved(), (9, 35), {"k_grid": (6, 20)}),
    "keys that nobody sees": (aside(), (5, 38), {"k_grid": (8, 30)}),
}


def program_of(name):
    p, grid, options = BANDS[name]
    k_grid = options.get("k_grid")
    return make_program(p, len(grid), kv=k_grid)


@pytest.mark.parametrize("name", BANDS)
def test_bands(name):
    p, grid, options = BANDS[name]
    program, dim = program_of(name), options.get("dim", 8)
    for backward in (False, True):
        assert "int BAND =" in source(Spec(program, dim, options.get("value_dim", dim), "float32"), backward, band=True)
    check(program if "k_grid" in options else p, grid, **options)


def test_only_bands_are_taken_as_bands():
    for p in (window(s=7), causal_axes(), axial(), full(), overlapping(s=3)):
        assert not Spec(make_program(p), 8, 8, "float32").band


@pytest.mark.parametrize("name", ["one vector and one query", "grouped queries", "dilated volume"])
def test_the_same_bits_on_any_number_of_threads(name, threads):
    """Few (batch, head) pairs: rows are cut into chunks, which share keys."""
    p, grid, options = BANDS[name]
    grid = (grid[0], 41, *grid[1:]) if len(grid) == 2 else grid
    grid = (41, grid[-1]) if len(grid) == 3 and "volume" not in name else grid
    program = make_program(p, len(grid))
    heads, kv = options.get("heads", 1), options.get("kv_heads", 1)
    torch.manual_seed(0)
    n = math.prod(grid)
    q, k, v = torch.randn(1, heads, n, 8), torch.randn(1, kv, n, 8), torch.randn(1, kv, n, 8)
    grad, grad_lse = torch.randn(1, heads, n, 8), torch.randn(1, heads, n)
    call = Call(program, geometry(program, grid, grid), 0.4, {})
    results = []
    for count in (1, 2, 3):
        threads(count)
        out, lse = cpp.forward(call, q, k, v)
        results.append([out, lse, *cpp.backward(call, q, k, v, out, lse, grad, grad_lse)[:3]])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    threads(3)
    check(p, grid, batch=1, heads=heads, kv_heads=kv)


def test_as_shipped():
    """With the flags that users get."""
    flags, caches = cpp_host.FLAGS[0], (cpp._machine, cpp._function, cpp._kernel)
    cpp_host.FLAGS[0] = "-O3"
    try:
        for c in caches:
            c.cache_clear()
        check(neighborhood(s=7), (14, 45), dim=32)
        check(neighborhood(s=7), (14, 14), dim=32)
    finally:
        cpp_host.FLAGS[0] = flags
        for c in caches:
            c.cache_clear()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 instruction sets")
@pytest.mark.parametrize("instructions", ["haswell", "x86-64"])
def test_other_instruction_sets(instructions, monkeypatch):
    """Vectors of 8 and of 4 lanes."""
    flags = [f"-march={instructions}" if f == "-march=native" else f for f in cpp_host.FLAGS]
    monkeypatch.setattr(cpp_host, "FLAGS", flags)
    caches = (cpp._machine, cpp._function, cpp._kernel)
    for c in caches:
        c.cache_clear()
    try:
        for name in ("two vectors", "volume", "dilated", "shared windows"):
            p, grid, options = BANDS[name]
            check(p, grid, **options)
    finally:
        for c in caches:
            c.cache_clear()


class _Memory(ctypes.Structure):
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(n, ctypes.c_size_t) for n in names]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's mallinfo2")
def test_memory_does_not_grow_with_the_grid(threads):
    """What a thread keeps between calls is what it needs beyond inputs and outputs."""
    threads(1)
    info = ctypes.CDLL(None).mallinfo2
    info.restype = _Memory

    def held():
        m = info()
        return m.uordblks + m.hblkhd

    program = make_program(neighborhood(s=7), 2)
    kept = []
    for side in (56, 448):
        n = side * side
        q, k, v = (torch.zeros(1, 1, n, 32) for _ in range(3))
        call = Call(program, geometry(program, (side, side), (side, side)), 1.0, {})
        before = held()
        result = cpp.forward(call, q, k, v)
        made = sum(t.numel() * t.element_size() for t in result)
        kept.append(held() - before - made)
        del result
    assert kept[0] < 4 << 20
    assert kept[0] + kept[1] < 4 << 20, "the second, larger grid needed much more"
