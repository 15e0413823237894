"""Queries that see the blocks of an axis beside their own: tiles of Triton kernels pass over it, and ask nothing of a pair.

`python tests/test_own_blocks.py` holds such kernels to the meaning in one process, as the interpreter is chosen before Triton is
imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import strategies
import torch
from strategies import Problem

import attnc
from attnc import ir, patterns
from attnc.analysis.structure import other_blocks
from attnc.codegen.around import core_program
from attnc.codegen.triton import make_spec, source
from attnc.runtime import triton_lists
from attnc.schedule import tiles
from attnc.schedule.geometry import Geometry, geometry
from attnc.schedule.walks import Tile, asks, walks


@attnc.pattern
def relation(q: Any, k: Any, *, of: Any) -> Any:
    return of(q, k)


def columns(q: Any, k: Any) -> Any:
    return (k.x // 8 != q.x // 8) & (k.y // 2 == q.y // 2)


def rows(q: Any, k: Any) -> Any:
    return (k.y // 4 != q.y // 4) & (k.x // 4 == q.x // 4)


def shifted(q: Any, k: Any) -> Any:
    return ((k.x - 4) // 8 != (q.x - 4) // 8) & (k.y // 4 == q.y // 4)


def frame(q: Any, k: Any) -> Any:
    return ((k.y + 2) // 4 != (q.y + 2) // 4) & (k.x // 8 != q.x // 8)


def line(q: Any, k: Any) -> Any:
    return ~((k.x + 32) // 48 == (q.x + 32) // 48)


def three(q: Any, k: Any) -> Any:
    return (k.t // 2 == q.t // 2) & (k.y // 4 != q.y // 4) & (k.x // 4 == q.x // 4)


SMALL: dict[str, Any] = {"batch": 1, "heads": 2, "kv_heads": 1, "dv": 5}
PROBLEMS = {
    **{f"columns {n}": Problem(relation(of=columns), (3, n), **SMALL) for n in (35, 40)},
    "rows": Problem(relation(of=rows), (37, 6), **SMALL),
    "rows, nothing seen": Problem(relation(of=rows), (4, 20), **SMALL),
    "shifted": Problem(relation(of=shifted), (5, 21), **SMALL),
    "frame": Problem(relation(of=frame), (9, 17), **SMALL),
    **{f"line {n}": Problem(relation(of=line), (n,), **SMALL) for n in (70, 100)},
    "video": Problem(relation(of=three), (3, 9, 13), **SMALL),
    "half precision": Problem(relation(of=columns), (4, 41), dtype=torch.float16, d=64, dv=64, batch=1, heads=1, kv_heads=1),
    "sigmoid": Problem(strategies.weighted(relation(of=columns), "sigmoid"), (3, 37), **SMALL),
    "sink": Problem(strategies.weighted(relation(of=frame), "sink"), (7, 21), **SMALL),
    "dropout": Problem(relation(of=columns), (3, 37), dropout=0.4, **SMALL),
    "cross": Problem(patterns.cross(4), (13, 22), **SMALL),
    # virtual keys and prefix tokens: pairs are asked as ever
    "prefix": Problem(relation(of=columns), (3, 37), prefix=2, **SMALL),
    "virtual keys": Problem(relation(of=columns), (3, 36), pad=((0, 1), (1, 0)), **SMALL),
}


def passing(g: Geometry) -> bool:
    return any(a.others for a in g.axes)


def only_tiles_that_pass_over() -> None:
    """The model takes others for grids this small."""
    every = tiles._fitting

    def some(g: Geometry, *args: Any, **named: Any) -> Any:
        found, least = every(g, *args, **named)
        mine = [x for x in found if passing(g) and not asks(g, x[1])]
        return mine[::3] or found, least

    tiles._fitting, tiles._whole = some, lambda *_: None  # type: ignore[assignment]


def of(p: Problem) -> Geometry:
    return geometry(core_program(p.compile("triton").program(len(p.grid))), p.grid, p.grid)


@pytest.mark.interpret
def test_interpreted_kernels_agree_with_the_meaning() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{name}: ok" for name in PROBLEMS]


def test_conditions_that_leave_out_the_own_block() -> None:
    q, k = ir.coord("q", 0), ir.coord("k", 0)

    def block(e: ir.Expr, n: int) -> ir.Expr:
        return ir.make("floordiv", e, ir.const(n))

    same = ir.make("eq", block(ir.make("sub", q, ir.const(3)), 8), block(ir.make("sub", k, ir.const(3)), 8))
    assert other_blocks(ir.make("not", same)) == (8, 3)
    assert other_blocks(ir.make("ne", block(ir.make("add", k, ir.const(3)), 8), block(ir.make("add", q, ir.const(3)), 8))) == (8, 5)
    others = [
        same,
        ir.make("ne", block(q, 8), block(k, 4)),
        ir.make("ne", block(q, 8), block(q, 8)),
        ir.make("lt", block(q, 8), block(k, 8)),
        ir.make("ne", block(q, 8), block(ir.make("sub", k, ir.const(8)), 8)),  # the block before one's own
        ir.make("ne", q, k),
    ]
    for e in others:
        assert other_blocks(e) is None, e


def test_only_where_it_is_all_that_is_asked() -> None:
    for name, p in PROBLEMS.items():
        if name not in ("cross", "prefix", "virtual keys"):
            assert passing(of(p)), name
    for other in (
        lambda q, k: columns(q, k) & (abs(q.x - k.x) < 30),  # an interval, too
        lambda q, k: columns(q, k) & (abs(q.x - k.x) + abs(q.y - k.y) < 30),  # a condition on both axes
        lambda q, k: (k.x // 8 != q.x // 8) & (k.x // 16 != q.x // 16) & (k.y == q.y),
    ):
        assert not passing(of(Problem(relation(of=other), (5, 40))))
    assert not passing(of(PROBLEMS["virtual keys"]))


@pytest.mark.parametrize("n", [5, 16, 37, 48])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_columns_are_counted_without_the_own_block(n: int, rows: int) -> None:
    g = of(Problem(relation(of=lambda q, k: (k.x + 4) // 8 != (q.x + 4) // 8), (n,)))
    assert g.axes[0].others == (8, 4)
    for chunk in (1, 4, 16):
        (found,) = walks(g, "q", Tile((rows,), (chunk,)))
        allowed = (np.arange(n)[:, None] + 4) // 8 != (np.arange(n) + 4) // 8
        seen = [int(allowed[first].sum()) for first in range(0, n, rows)]
        if rows == 8:  # of several blocks: pairs are asked
            assert asks(g, Tile((rows,), (chunk,)))
            continue
        assert not asks(g, Tile((rows,), (chunk,)))
        steps = [-(-s // chunk) for s in seen]
        steps = steps if max(steps) > 1 else [1] * len(steps)
        whole = all(s and s % chunk == 0 for s in seen)
        counts = (found.programs, found.steps, found.most, found.full, found.partial, found.left)
        full = sum(s // chunk for s in seen)
        assert counts == (len(seen), sum(steps), max(steps), full, sum(steps) - full, 0)
        assert (found.exact, found.overruns, found.passes, found.one_box) == (whole, not whole, not whole, True)
    allowed = (np.arange(n)[:, None] + 4) // 8 != (np.arange(n) + 4) // 8
    assert g.axes[0].pairs(gaps=True) == allowed.sum()


def test_nothing_is_asked_and_no_list_is_walked() -> None:
    cross = core_program(attnc.compile(patterns.cross(8), grid=(64, 64), heads=1).program(2))
    second = strategies.split.split(cross, (64, 64), (64, 64), 1, 1)[0].parts[1]
    for target in ("cuda:80", "cuda:90"):
        for symbolic in (False, True):
            spec = make_spec(second, (64, 64), (64, 64), head_dim=64, value_dim=64, target=target, symbolic=symbolic, part=True)
            text = source(spec, dtype="float16", target=target, alone=not symbolic)
            assert text.count("x_own = x0") == 3  # the tile is a block wide
            assert "!=" not in text.split("def strides")[0]
        g = geometry(second, (64, 64), (64, 64))
        assert triton_lists.of(g, triton_lists.Kernels(64, 64, 2, target), 1, 1, ()) is None


if __name__ == "__main__":
    only_tiles_that_pass_over()
    from attnc.runtime import triton

    texts: list[str] = []
    load = triton.load
    triton.load = lambda text: [texts.append(text), load(text)][1]  # type: ignore[func-returns-value]
    for name, problem in PROBLEMS.items():
        texts.clear()
        triton.text_for.cache_clear()
        triton._module.cache_clear()
        strategies.hold(problem, "triton")
        assert any("_own = " in text for text in texts) != (name in ("virtual keys",)), name
        sys.stdout.write(f"{name}: ok\n")
