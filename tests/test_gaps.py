"""Keys that all queries of a tile leave out, one run of them on one axis: tiles of C++ kernels walk the two boxes beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from builds import QUICK, built_with
from cpp_checks import check

import attnc
from attnc import ir, patterns
from attnc.codegen.cpp import Spec, source
from attnc.codegen.cpp_module import axis_tables
from attnc.schedule.boxes import pieces
from attnc.schedule.choose import Choice
from attnc.schedule.geometry import Geometry, geometry
from attnc.schedule.split import split

Relation = Callable[[Any, Any], Any]


@attnc.pattern
def relation(q: Any, k: Any, *, of: Relation) -> Any:
    return of(q, k)


def other_blocks(q: Any, k: Any) -> Any:
    return (k.y // 5 != q.y // 5) & (abs(k.x - q.x) <= 40)


def other_blocks_of_columns(q: Any, k: Any) -> Any:
    return (k.x // 4 != q.x // 4) & (k.y // 3 == q.y // 3)


def frame(q: Any, k: Any) -> Any:  # gaps on both axes: what is left is no two boxes
    return (k.y // 4 != q.y // 4) & (k.x // 3 != q.x // 3)


def far(q: Any, k: Any) -> Any:  # every query has a gap of its own
    return (k.y < q.y - 3) | (k.y > q.y + 2)


def comb(q: Any, k: Any) -> Any:  # no one run of keys is left out
    return (k.y * k.y % 3 == q.y * q.y % 3) & (k.x // 4 == q.x // 4)


def dilated(q: Any, k: Any) -> Any:
    return (k.y % 3 == q.y % 3) & (k.y // 9 != q.y // 9)


def disc(q: Any, k: Any) -> Any:  # no axis says it
    return (q.x - k.x) ** 2 + (q.y - k.y) ** 2 <= 9


def outer(q: Any, k: Any) -> Any:  # one tile, in the middle of whose keys no query sees any
    return k.x // 8 != 1


def crossed(q: Any, k: Any) -> Any:
    return (k.y // 4 == q.y // 4) | (k.x // 3 == q.x // 3)


def made(of: Relation, grid: tuple[int, ...]) -> tuple[ir.Program, Geometry]:
    program = attnc.compile(relation(of=of), grid=grid).program(len(grid))
    return program, geometry(program, grid, grid)


@pytest.mark.parametrize("grid", [(13, 23), (5, 30), (4, 4), (1, 9)])
@pytest.mark.parametrize("of", [other_blocks, other_blocks_of_columns, frame, far, comb, dilated, outer])
def test_intervals_without_their_gaps_are_the_relation(of: Relation, grid: tuple[int, ...]) -> None:
    _, g = made(of, grid)
    coordinates = np.indices(grid).reshape(2, -1)
    truth = attnc.mask(relation(of=of), grid=grid)[0].numpy()
    allowed = np.ones_like(truth)
    for a, c in zip(g.axes, coordinates, strict=True):
        r, j, i = c % a.split, c // a.split, c // a.split
        allowed &= (r[:, None] == r[None]) & (a.lo[r, j][:, None] <= i[None]) & (i[None] <= a.hi[r, j][:, None])
        if a.gap_lo is not None and a.gap_hi is not None:
            allowed &= ~((a.gap_lo[r, j][:, None] <= i[None]) & (i[None] <= a.gap_hi[r, j][:, None]))
    if g.gaps:
        assert (allowed == truth).all()
    else:
        assert of is comb
        assert (allowed >= truth).all()


def test_pieces_begin_where_gaps_change() -> None:
    _, g = made(other_blocks_of_columns, (13, 23))
    assert pieces(g.axes[1], 0)[:, 1].tolist() == [0, 4, 8, 12, 16, 20]
    _, g = made(far, (13, 23))
    assert len(pieces(g.axes[0], 0)) == 1  # a tile would be a row


def test_only_statements_by_axis_take_gaps() -> None:
    def asks(p: ir.Program) -> bool:
        return "gap_lo" in source(Spec(p, 8, 8, "float32"), False)

    assert asks(made(far, (9, 9))[0])
    for of in (disc, lambda q, k: disc(q, k) & (k.y // 4 != q.y // 4)):
        assert not asks(made(of, (9, 9))[0])
    second = split(attnc.compile(patterns.cross(3), grid=(9, 9)).program(2), (9, 9), (9, 9), 1, 1)[0].parts[1]
    assert asks(second)
    spec, g = Spec(second, 8, 8, "float32"), geometry(second, (9, 9), (9, 9))
    axes, *_, gaps = axis_tables(g, spec, Choice((0, 0)), False, 1, 1)
    assert gaps is True
    assert [a["gap_lo"] for a in axes if "gap_lo" in a] == [[[0, 0, 0, 3, 3, 3, 6, 6, 6]]]


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    with built_with(QUICK):
        yield


@needs_compiler
@pytest.mark.parametrize("of", [other_blocks, other_blocks_of_columns, frame, far, comb, dilated, outer, crossed])
def test_kernels_walk_what_is_left(quick: None, of: Relation) -> None:
    check(relation(of=of), (13, 23), batch=1)
    check(relation(of=of), (11, 6), batch=1)


@needs_compiler
def test_with_prefix_tokens_groups_and_other_dtypes(quick: None) -> None:
    check(relation(of=other_blocks_of_columns), (9, 11), batch=1, prefix=(2, 3))
    check(relation(of=other_blocks_of_columns), (9, 11), batch=1, heads=4, kv_heads=2, dim=24, value_dim=20, scale=-0.3)
    check(relation(of=other_blocks_of_columns), (9, 31), batch=1, dtype=torch.bfloat16, dim=32)
    check(relation(of=dilated), (20, 3), batch=1, dtype=torch.float64)
    check(relation(of=outer), (3, 24), batch=1, dim=16, value_dim=32)


@needs_compiler
def test_unions_go_on_beside_what_was_counted(quick: None) -> None:
    for grid, bias in (((14, 14), False), ((7, 20), True), ((3, 2), False), ((12, 6), True)):
        rows = [torch.randn(2, 3, grid[0] * grid[1], 16, requires_grad=True) for _ in range(3)]
        pattern = patterns.cross(3, bias="relative" if bias else None)
        op, exact = (attnc.compile(pattern, grid=grid, backend=b) for b in ("cpp", "torch"))
        rows += [torch.randn(3, 2 * grid[0] - 1, 2 * grid[1] - 1, requires_grad=True)] if bias else []
        wide = [x.detach().double().requires_grad_() for x in rows]
        out, truth = (f(*x[:3], **dict(zip(("bias",), x[3:], strict=False))) for f, x in ((op, rows), (exact, wide)))
        grad = torch.randn_like(out)
        mine, theirs = torch.autograd.grad(out, rows, grad), torch.autograd.grad(truth, wide, grad.double())
        for a, b in zip((out, *mine), (truth, *theirs), strict=True):
            torch.testing.assert_close(a.double(), b, atol=3e-6, rtol=1e-5)
