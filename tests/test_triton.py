"""The Triton backend: interpreted against the float64 meaning, compiled for every target, and its text."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_cases
from strategies import weighted

import attnc
from attnc import ir, patterns
from attnc.codegen import triton_plan
from attnc.codegen.triton import emit_triton
from attnc.codegen.triton_expr import text
from attnc.errors import UnsupportedError
from attnc.schedule import tiles
from attnc.schedule.geometry import geometry
from attnc.schedule.walks import Tile, issued, walks, whole

HERE = Path(__file__).parent


def run_cases(*arguments: str, interpret: bool) -> dict[str, dict]:
    environment = dict(os.environ, TRITON_INTERPRET="1" if interpret else "0", OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", str(HERE / "triton_cases.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def failures(found: dict[str, dict]) -> dict[str, object]:
    bad: dict[str, object] = {n: line["failure"] for n, line in found.items() if "failure" in line}
    for n, line in found.items():
        over = {k: round(e, 2) for k, e in line.get("errors", {}).items() if not e <= 1}
        if over:
            bad[n] = over
    return bad


@pytest.mark.interpret
@pytest.mark.parametrize("group", list(triton_cases.CASES))
def test_interpreted_kernels_agree_with_the_meaning(group):
    found = run_cases(group, interpret=True)
    assert set(found) == set(triton_cases.CASES[group])
    assert not failures(found)


def program(pattern, axes=("y", "x"), **tokens):
    t = ir.Tokens((None,) * len(axes), **tokens)
    return ir.Program(pattern.trace(axes), t, t)


def test_the_first_grids_of_a_statement_are_constants_of_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of later ones take sizes as arguments, and are one for all grids with the same tiles. Forward and backward of a call
    have the same kernels."""
    from attnc.runtime import triton

    triton._constants.cache_clear()
    monkeypatch.setattr(triton, "CONSTANT_GRIDS", 2)
    texts = []
    for n in (14, 21, 28, 35, 14):
        case = triton_cases.Case(lambda: patterns.window(7), (n, n))
        call = triton_cases.problem(case)[0]
        rows = (torch.empty(1, 2, n * n, 16),) * 3
        texts.append(triton.text_of(call, rows, None, "cuda:90"))
        assert texts[-1] == triton.text_of(call, rows, None, "cuda:90")
    first, second, third, fourth, again = texts
    assert first == again != second
    assert third == fourth
    assert "GRID = (14, 14)" in first and "NY: tl.constexpr" in first
    assert "GRID" not in third and "NY: tl.constexpr" not in third
    assert "def attention(" not in "".join(texts)  # an operator launches the kernels itself


COMPILED = {
    "window": (lambda: patterns.window(7, bias="relative"), (14, 14)),
    "neighborhood": (lambda: patterns.neighborhood(7), (16, 24)),
    "dense": (lambda: patterns.full(), (16, 16)),
    "sigmoid window": (lambda: weighted(patterns.window(7, bias="relative"), "sigmoid"), (14, 14)),
    "relu cubed": (lambda: weighted(patterns.neighborhood(7), "relu cubed"), (16, 24)),
}


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
@pytest.mark.parametrize("name", list(COMPILED))
def test_modules_compile_ahead_of_time(name, target):
    from attnc.report.inspect import inspect_triton

    make, grid = COMPILED[name]
    options = {"heads": 2, "head_dim": 32, "value_dim": 32, "dtype": "float16", "batch": 8}
    report = inspect_triton(program(make()), grid, grid, target=target, **options).to_dict()
    assert {"forward", "backward_dkv"} <= set(report["kernels"])
    assert report["issued_elements"] >= report["allowed_elements"] > 0
    for kernel, facts in report["kernels"].items():
        assert facts["registers"] > 0 and facts["instructions"] > 0
        assert facts["ti"] > 0
        if kernel in ("forward", "backward_dq", "backward_dkv"):
            assert facts["mma_instructions"] > 0, kernel
        if target == "cuda:90" and "window" not in name:
            assert facts["spill_bytes"] == 0, kernel


def test_inspect_compiles_padded_keys_of_half_precision() -> None:
    """The rows of virtual keys have the dtype of the others: float32 ones made products of two types."""
    padded = {"pad": "multiple", "heads": 2, "head_dim": 32, "dtype": "float16", "target": "cuda:80"}
    report = attnc.inspect(patterns.window(7), grid=(10, 10), **padded).to_dict()
    assert report["kernels"]["forward"]["mma_instructions"] > 0


WIDE = [  # pattern, grid, head dimension, dtype, target
    (patterns.window(7, bias="relative"), (14, 14), 256, "float32", "cuda:80"),
    (patterns.neighborhood(7), (16, 24), 160, "float32", "cuda:80"),
    (patterns.full(), (16, 16), 256, "float16", "cuda:80"),
    (patterns.window(12), (24, 24), 256, "bfloat16", "hip:gfx942"),
    (patterns.window(7, bias="relative"), (14, 14), 32, "float16", "cuda:100"),
    (patterns.neighborhood(7), (16, 24), 32, "float16", "hip:gfx1100"),
]


@pytest.mark.parametrize("pattern, grid, dim, dtype, target", WIDE, ids=str)
def test_wide_heads_and_other_targets_compile(pattern, grid, dim, dtype, target):
    from attnc.report.inspect import inspect_triton

    options = {"heads": 2, "head_dim": dim, "value_dim": dim, "dtype": dtype, "batch": 8}
    report = inspect_triton(program(pattern), grid, grid, target=target, **options)
    assert max(k.shared_bytes for k in report.kernels.values()) <= tiles.shared_limit(target)
    assert max(k.spill_bytes for k in report.kernels.values()) < 1024
    assert max(k.instructions for k in report.kernels.values()) < 5000  # what takes long to compile is unrolled products


@pytest.mark.parametrize("target", ["cuda:80", "cuda:86", "cuda:90", "hip:gfx942"])
@pytest.mark.parametrize("dim", [1, 16, 24, 64, 128, 160, 192, 256])
def test_tiles_fit_shared_memory_at_every_head_dimension(dim, target):
    width = triton_plan.lanes(dim)
    some = [patterns.window(7), patterns.window(12), patterns.neighborhood(7), patterns.neighborhood(5, 2), patterns.axial("x")]
    for pattern in (*some, patterns.full(), patterns.grid(7)):
        g = geometry(program(pattern), (48, 48), (48, 48))
        for itemsize in (2, 4):
            for kind in ("forward", "dq", "dkv"):
                tile = tiles.choose(g, width, kind, itemsize, target)
                assert tiles.shared_bytes(kind, tile, width, itemsize, target) <= tiles.shared_limit(target)
                assert itemsize == 2 or tiles.unrolled(tile, width) <= 512


@pytest.mark.parametrize(
    "pattern, most", [(patterns.window(7), 1.71), (patterns.neighborhood(7), 3.3), (patterns.neighborhood(7, 4), 3.31)], ids=str
)
def test_chosen_tiles_waste_little(pattern, most):
    g = geometry(program(pattern), (56, 56), (56, 56))
    for kind, side in (("forward", "q"), ("dq", "q"), ("dkv", "k")):
        tile = tiles.choose(g, 32, kind)
        assert issued(g, side, tile) / g.allowed() <= most
        assert issued(g, side, tile) / tile.bm / 56**2 <= 8.7  # rows of K and V loaded for each query


def test_tiles_walk_the_ends_that_kernels_compute():
    """On an axis that conditions no rule knows narrow at this size, a kernel visits what its form gives."""
    g = geometry(program(triton_cases.strange()), (7, 8), (7, 8))
    assert g.axes[0].lo.min() == 2 and g.axes[0].hi.max() == 4
    own, _ = walks(g, "q", Tile((8, 4), (4, 4)))
    assert (own.steps, own.most) == (2, 2)
    whole, _ = walks(g, "k", Tile((8, 4), (8, 4)))
    assert whole.one_box and whole.exact is False


@pytest.mark.parametrize("grid, odd", [((80,), 16), ((96,), 32), ((70,), 0), ((10, 8), 16), ((64,), 0), ((5, 16), 16)])
def test_columns_that_fill_no_whole_chunk_are_a_chunk_of_their_own(grid, odd):
    """Where they fill registers: nothing is masked, and nothing is issued in vain."""
    made, tile = program(patterns.full(), ir.AXES[len(grid)]), Tile((16,), (64,))
    g = geometry(made, grid, grid)
    (found,) = walks(g, "q", tile)
    columns = math.prod(grid)
    rows = -(-columns // 16)
    assert found.odd == odd
    assert found.exact == (odd > 0 or columns % 64 == 0)
    assert issued(g, "q", tile) == rows * 16 * (columns if found.exact else -(-columns // 64) * 64)
    options = {"heads": 1, "head_dim": 16, "value_dim": 16, "dtype": "float16", "target": "cuda:80"}
    text = emit_triton(made, grid, grid, chosen=tiles.Tiles(*[tile] * 4), **options)
    assert text.count("few = tl.arange(0, ") == (3 if odd else 0)
    assert text.count("in tl.range(0, 1):  # the columns that fill no whole chunk") == (3 if odd else 0)


def test_outputs_wider_than_tiles_are_summed_in_parts_where_warps_would_share_rows():
    """On sm_80; warpgroups of sm_90 have rows of their own."""
    for dim, target, parts in ((128, "cuda:80", 2), (80, "cuda:89", 2), (64, "cuda:80", 1), (128, "cuda:90", 1)):
        options = {"heads": 1, "head_dim": dim, "value_dim": dim, "dtype": "float16", "target": target}
        text = emit_triton(program(patterns.window(8), ("y", "x")), (8, 16), (8, 16), **options)
        assert len(set(re.findall(r"acc\d?(?= = tl.dot)", text))) == parts


def test_last_tiles_begin_earlier_where_all_rows_see_the_same():
    options = {"heads": 1, "head_dim": 16, "value_dim": 16, "dtype": "float16", "target": "cuda:80"}
    tile = Tile((64,), (64,))
    for pattern, n, earlier in ((patterns.full(), 200, True), (patterns.full(), 192, False), (patterns.causal(), 200, False)):
        text = emit_triton(program(pattern, ("x",)), (n,), (n,), chosen=tiles.Tiles(*[tile] * 4), **options)
        assert ("x0 = tl.minimum(x0, NX - TX)" in text) == earlier
        g = geometry(program(pattern, ("x",)), (n,), (n,))
        assert whole(g.axes[0], g.structure.axes[0], "q", 64) == (earlier or n == 192)
    g = geometry(program(patterns.full(), ("x",)), (40,), (40,))
    assert not whole(g.axes[0], g.structure.axes[0], "q", 64)  # no tile has as many rows as it may


def test_chunks_beside_a_passed_over_block_are_pairs():
    options = {"heads": 1, "head_dim": 64, "value_dim": 64, "dtype": "float16", "target": "cuda:90"}
    for n, paired in ((64, 3), (72, 0)):
        text = emit_triton(program(patterns.cross(8), ("y", "x")), (64, n), (64, n), **options)
        assert text.count("x_pair = x_own // 16 * 16") == paired


def test_floor_division_is_printed_where_the_sign_is_open():
    names = {ir.var("j"): "j", ir.size("q", 0): "n"}
    shifted = ir.make("floordiv", ir.make("sub", ir.var("j"), ir.const(3)), ir.const(7))
    assert text(shifted, names) == "floor_div(j - 3, 7)"
    assert text(ir.make("mod", ir.var("j"), ir.const(7)), names) == "j % 7"
    product = ir.make(
        "mul", ir.make("add", ir.var("j"), ir.ONE), ir.make("sub", ir.size("q", 0), ir.make("sub", ir.var("j"), ir.ONE))
    )
    assert text(product, names) == "(j + 1) * (n - (j - 1))"


def test_softmax_over_queries_has_no_kernel_of_its_own():
    @attnc.pattern
    def p(q, k):
        return attnc.where(abs(q.x - k.x) <= 1, attnc.SCORE, normalizer=attnc.softmax(over="queries"))

    with pytest.raises(UnsupportedError, match=r"softmax over queries in a kernel; an operator .* with queries and keys exchanged"):
        emit_triton(program(p()), (4, 4), (4, 4), heads=1, head_dim=16, value_dim=16, dtype="float16", target="cuda:90")


def test_a_tile_without_keys_masks_the_one_chunk_it_computes():
    across = attnc.compile(patterns.axial("x"), grid=(5, 40), kv_grid=(3, 40), backend="triton").program(2)
    tile = Tile((1, 16), (1, 16))
    own, _ = walks(geometry(across, (5, 40), (3, 40)), "q", tile)
    assert (own.steps, own.most, own.exact) == (5, 1, False)
    own, _ = walks(geometry(across, (3, 40), (5, 40)), "q", tile)
    assert (own.steps, own.most, own.exact) == (3, 1, True)
