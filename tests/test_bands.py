"""Bands on the C++ backend (neighbourhoods: every query sees equally many keys of the last axis), forward and backward."""

from __future__ import annotations

import ctypes
import math
import platform
import shutil

import pytest
import torch
from builds import QUICK, SHIPPED, built_with
from cpp_checks import check, make_program
from cpp_statements import absolute, axial, causal_axes, full, near_bias, neighborhood, overlapping, window
from strategies import weighted

from attnc import patterns
from attnc.codegen.cpp import Spec
from attnc.lang import functions as fn
from attnc.lang.functions import HEAD, SCORE, where
from attnc.lang.pattern import pattern
from attnc.lang.symbols import Table
from attnc.runtime import cpp, parts
from attnc.runtime.call import Call
from attnc.schedule import choose
from attnc.schedule.geometry import geometry

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Nothing may be read from outputs, or left in them, that was never written."""

    def filled(make):
        return lambda *a, **k: x.fill_(math.nan) if (x := make(*a, **k)).is_floating_point() else x

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))


@pytest.fixture(autouse=True)
def preferred(monkeypatch):
    """Bands are taken wherever they fit, also where tiles would cost less."""

    def forget():
        for known in (choose.candidates, cpp._tunable, cpp._choice, parts.parts_of):
            known.cache_clear()

    forget()
    monkeypatch.setattr(choose, "_band_cost", lambda geo, kernel: 0.0)
    yield
    forget()


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pattern
def halved(q, k):
    return (k.y >= q.y // 2) & (k.y <= q.y // 2 + 1) & (k.x >= q.x // 2) & (k.x <= q.x // 2 + 2)


def near(q, k):
    x = (k.x >= fn.maximum(fn.minimum(q.x - 1, q.size.x - 3), 0)) & (k.x <= fn.maximum(fn.minimum(q.x - 1, q.size.x - 3), 0) + 2)
    return x & (k.y >= q.y - 1) & (k.y <= q.y + 1)


@pattern
def flat_bias(q, k, *, bias: Table):
    return where(near(q, k), bias[(q.y - k.y + 2) * 5 + (q.x - k.x) + 2, HEAD] + SCORE)


@pattern
def scaled_bias(q, k, *, bias: Table):
    return where(near(q, k), SCORE + 2 * bias[HEAD, q.x - k.x + 2])


@pattern
def far_bias(q, k, *, bias: Table):
    return where(near(q, k), SCORE + bias[HEAD, 2 * q.x - k.x + 2])


@pattern
def folded_bias(q, k, *, bias: Table):
    return where(near(q, k), SCORE + bias[HEAD, q.x // 2 - k.x // 2 + 2])


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
    "one axis": (neighborhood(s=5), (45,), {"kind": "heads_last"}),
    "strips of one axis": (neighborhood(s=5, d=2), (3001,), {"heads": 1, "batch": 1, "dim": 64}),
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


# no band at these sizes, or none that the kernel takes
DECLINED = {"too short for its width", "negative scale"}


@pytest.fixture
def boxes(monkeypatch):
    """Which calls the bands declined."""
    declined = []
    plain = cpp._kernel

    def kernel(spec, backward, band):
        if not band:
            declined.append(spec)
        return plain(spec, backward, band)

    monkeypatch.setattr(cpp, "_kernel", kernel)
    return declined


@pytest.mark.parametrize("name", BANDS)
def test_bands(name, boxes):
    p, grid, options = BANDS[name]
    check(make_program(p, len(grid), kv=options["k_grid"]) if "k_grid" in options else p, grid, **options)
    assert bool(boxes) == (name in DECLINED)


def test_only_bands_are_taken_as_bands():
    for p in (window(s=7), causal_axes(), axial(), full(), overlapping(s=3), absolute(), scaled_bias(), far_bias(), folded_bias()):
        assert not Spec(make_program(p), 8, 8, "float32").band, p
    board = pattern(lambda q, k: (q.y + k.x) % 2 == 0)()
    near = neighborhood(s=3)
    for p in (near & board, weighted(near, "softmax", post=True), weighted(near, "sigmoid")):
        assert not Spec(make_program(p), 8, 8, "float32").band, p
    for width in (2, 17, 18):  # of two vectors of 16
        assert Spec(make_program(neighborhood(s=width)), 8, 8, "float32").band == (width if width < 18 else 0)
    for p in (neighborhood(s=3), near_bias(s=3), patterns.neighborhood(3, 2, bias="relative")):
        assert Spec(make_program(p), 8, 8, "float32").band == 3, p


def bias(heads, *sizes):
    return {"bias": torch.randn(heads, *(2 * s - 1 for s in sizes), generator=torch.Generator().manual_seed(1))}


TABLES = {
    "two vectors": (near_bias(s=3), (9, 37), bias(2, 3, 3), {}),
    "shared by heads": (near_bias(s=3), (9, 14), bias(1, 3, 3), {"kind": "packed", "dim": 24}),
    "clamped both sides of one vector": (near_bias(s=5), (6, 13), bias(2, 5, 5), {}),
    "dilated": (patterns.neighborhood(5, 3, bias="relative"), (19, 40), bias(2, 5, 5), {}),
    "shared windows": (patterns.neighborhood(5, stride=4, bias="relative"), (9, 39), bias(2, 5, 5), {}),
    "sides that differ": (patterns.neighborhood((5, 3), bias="relative"), (7, 20), bias(2, 5, 3), {}),
    "grouped queries": (near_bias(s=3), (9, 37), bias(4, 3, 3), {"heads": 4, "kv_heads": 2}),
    "one axis": (patterns.neighborhood(5, 2, bias="relative"), (75,), bias(2, 5), {}),
    "volume": (patterns.neighborhood(3, bias="relative"), (4, 5, 18), bias(2, 3, 3, 3), {}),
    "dilated volume": (
        patterns.neighborhood(3, (2, 1, 1), bias="relative"),
        (7, 4, 18),
        bias(2, 3, 3, 3),
        {"heads": 2, "kv_heads": 1},
    ),
    "float64": (near_bias(s=3), (6, 35), bias(2, 3, 3), {"dtype": torch.float64, "dim": 10}),
    "bfloat16": (near_bias(s=3), (6, 35), bias(2, 3, 3), {"dtype": torch.bfloat16, "dim": 24}),
    "strips": (near_bias(s=5), (6, 600), bias(1, 5, 5), {"dim": 48, "heads": 1, "batch": 1}),
    "flat": (flat_bias(), (9, 20), {"bias": bias(2, 3, 3)["bias"].reshape(2, 25).t()}, {}),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, boxes):
    p, grid, tables, options = TABLES[name]
    check(p, grid, tables=tables, **options)
    assert not boxes


def test_a_negative_scale_with_a_table(boxes):
    check(near_bias(s=3), (5, 20), tables=bias(2, 3, 3), scale=-0.5)
    assert boxes


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
    with built_with(SHIPPED):
        check(neighborhood(s=7), (14, 45), dim=32)
        check(neighborhood(s=7), (14, 14), dim=32)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 instruction sets")
@pytest.mark.parametrize("instructions", ["haswell", "x86-64"])
def test_other_instruction_sets(instructions):
    """Vectors of 8 and of 4 lanes."""
    with built_with([f"-march={instructions}" if f == "-march=native" else f for f in QUICK]):
        for name in ("two vectors", "volume", "dilated", "shared windows"):
            p, grid, options = BANDS[name]
            check(p, grid, **options)


class _Memory(ctypes.Structure):
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(n, ctypes.c_size_t) for n in names]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's mallinfo2")
@pytest.mark.parametrize(
    "program, grids",
    [
        (make_program(neighborhood(s=7), 2), ((56, 56), (448, 448))),
        (make_program(patterns.window(7), 2), ((56, 56), (448, 448))),  # not bands: tiles keep to the same bound
        (make_program(patterns.causal(), 1), ((1024,), (4096,))),
    ],
    ids=["neighbourhood", "window", "causal"],
)
def test_memory_does_not_grow_with_the_grid(program, grids, threads):
    """What a thread keeps between calls is what it needs beyond inputs and outputs."""
    threads(1)
    info = ctypes.CDLL(None).mallinfo2
    info.restype = _Memory

    def held():
        m = info()
        return m.uordblks + m.hblkhd

    kept = []
    for grid in grids:
        q, k, v = (torch.zeros(1, 1, math.prod(grid), 32) for _ in range(3))
        call = Call(program, geometry(program, grid, grid), 1.0, {})
        before = held()
        result = cpp.forward(call, q, k, v)
        made = sum(t.numel() * t.element_size() for t in result)
        kept.append(held() - before - made)
        del result
    assert kept[0] < 4 << 20
    assert kept[0] + kept[1] < 4 << 20, "the second, larger grid needed much more"


def test_short_rows_are_cheaper_as_tiles(monkeypatch):
    monkeypatch.undo()
    for p, side, band in (
        (patterns.neighborhood(7), 7, False),
        (patterns.neighborhood(7), 28, True),
        (patterns.dilated(7, 8), 56, False),
    ):
        program = make_program(p)
        geo = geometry(program, (side, side), (side, side))
        for backward in (False, True):
            found = choose.candidates(geo, Spec(program, 32, 32, "float32").kernel(backward), 64, 1)
            assert found[0][1].band == band
            assert any(c.band for _, c in found)
