"""Layout strings against einops, in both directions, and never by a copy on the way in."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

import attnc
from attnc import ShapeError
from attnc.compiler import has_compiler
from attnc.runtime import layout as layouts
from attnc.runtime.call import empty_like_order, strides

SIZES = {"b": 2, "h": 3, "d": 4, "y": 5, "x": 6, "t": 2, "three": 3}


@st.composite
def strings(draw: st.DrawFn) -> tuple[str, tuple[str, ...], bool]:
    """(layout, axes, packed): any order of dimensions, any legal grouping."""
    axes = draw(st.sampled_from((("x",), ("y", "x"), ("t", "y", "x"))))
    packed = draw(st.booleans())
    merged = len(axes) > 1 and draw(st.booleans())
    rest = ["h", "d", *(["three"] if packed else [])]
    rest = draw(st.permutations(rest))
    cuts = draw(st.lists(st.booleans(), min_size=len(rest) - 1, max_size=len(rest) - 1))
    groups, current = [], [rest[0]]
    for name, cut in zip(rest[1:], cuts, strict=True):
        if cut:
            groups.append(current)
            current = []
        current.append(name)
    groups.append(current)
    dims = [
        "b",
        *(["(" + " ".join(axes) + ")"] if merged else axes),
        *("(" + " ".join(g) + ")" if len(g) > 1 else g[0] for g in groups),
    ]
    order = draw(st.permutations(dims))
    if not merged:  # the axes keep their order among themselves
        at = sorted(order.index(a) for a in axes)
        for place, a in zip(at, axes, strict=True):
            order[place] = a
    return " ".join(order), axes, packed


@examples(150)
@given(strings())
def test_layouts_mean_what_einops_says(drawn: tuple[str, tuple[str, ...], bool]) -> None:
    text, axes, packed = drawn
    parsed = layouts.parse(text)
    assert (parsed.axes, parsed.packed) == (axes, packed)
    names = "three b h t y x d" if packed else "b h t y x d"
    names = " ".join(n for n in names.split() if n in (*axes, "three", "b", "h", "d"))
    plain = torch.arange(torch.tensor([SIZES[n] for n in names.split()]).prod()).view([SIZES[n] for n in names.split()])
    t = rearrange(plain, f"{names} -> {text}")
    merged = any(len(g) > 1 and set(g) == set(axes) for g in parsed.groups)
    rows = layouts.to_rows(t, parsed, SIZES["h"], "t")
    rows = rows if packed else rows[None]
    for row, part in zip(rows, plain if packed else (plain,), strict=True):
        assert torch.equal(row, part.flatten(2, -2) if merged else part)
        assert row.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
    out = rows[0]
    inner = names.replace("three ", "")
    expected = rearrange(plain[0] if packed else plain, f"{inner} -> {_without_three(parsed)}")
    back = layouts.from_rows(out, parsed)
    assert torch.equal(back, expected)


def _without_three(parsed: layouts.Layout) -> str:
    groups = [[n for n in g if n != "three"] for g in parsed.groups]
    return " ".join("(" + " ".join(g) + ")" if len(g) > 1 else g[0] for g in groups if g)


@examples(60)
@given(strings())
def test_an_output_in_the_querys_order_merges_without_a_copy(drawn: tuple[str, tuple[str, ...], bool]) -> None:
    text, *_ = drawn
    parsed = layouts.parse(text)
    shape = [torch.tensor([SIZES[n] for n in g]).prod().item() for g in parsed.groups]
    row = layouts.to_rows(torch.zeros([int(n) for n in shape]), parsed, SIZES["h"], "t")
    row = row[0] if parsed.packed else row
    out = empty_like_order(row, SIZES["d"])
    merged = layouts.from_rows(out, parsed)
    assert merged.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()


def test_a_broadcast_query_s_output_merges_without_a_copy() -> None:
    """Windows that share their queries: stride 0 along both axes of windows, and along the batch."""
    layout = layouts.parse("b i y j x h d")
    for q in (torch.randn(2, 1, 4, 1, 5, 3, 8), torch.randn(1, 1, 4, 1, 5, 3, 8)):
        shared = q.expand(2, 6, 4, 7, 5, 3, 8)
        out = layouts.from_rows(empty_like_order(layouts.to_rows(shared, layout, None, "q"), 8), layout)
        assert out.is_contiguous()


def test_strides_of_rows() -> None:
    t = torch.empty(2, 3, 20, 8)
    assert strides(t, (4, 5), 0) == strides(t.unflatten(2, (4, 5)), (4, 5), 0).__class__(480, 160, (40, 8), 1, 8, 0)
    s = strides(t, (4, 4), 4)
    assert (s.axes, s.prefix, s.grid_start) == ((32, 8), 8, 32)
    s = strides(t.unflatten(2, (4, 5)).transpose(2, 3), (5, 4), 0)
    assert s.axes == (8, 40)


def test_spaces_do_not_matter() -> None:
    assert layouts.parse("  b  (y   x) (h d) ").groups == (("b",), ("y", "x"), ("h", "d"))


def test_heads_that_a_group_tells_need_not_be_given() -> None:
    parsed = layouts.parse("b x (three h) d")
    assert layouts.to_rows(torch.zeros(1, 5, 6, 4), parsed, None, "t")[0].shape == (1, 2, 5, 4)
    with pytest.raises(ShapeError, match=r"dimension of 7 that \(three h\) with heads=None does not fit"):
        layouts.to_rows(torch.zeros(1, 5, 7, 4), parsed, None, "t")


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("grid", [(6, 1), (5, 4), (1, 5), (3, 2, 4)], ids=str)
def test_grids_cut_out_of_larger_ones(grid: tuple[int, ...]) -> None:
    """Rows do not follow each other, of a statement that knows tokens by one number; an axis of one token says nothing of it."""
    names = {2: "y x", 3: "t y x"}[len(grid)]
    op = attnc.compile(attnc.pattern(lambda q, k: q.index >= k.index)(), grid=grid, layout=f"b {names} h d", backend="cpp")
    larger = torch.randn(4, 2, *(n + 2 for n in grid), 2, 8)
    *cut, weight = larger[(slice(None), slice(None), *(slice(1, n + 1) for n in grid))]
    results = []
    for tensors in (cut, [t.contiguous() for t in cut]):
        mine = [t.detach().requires_grad_() for t in tensors]
        out = op(*mine)
        results.append([out, *torch.autograd.grad((out * weight).sum(), mine)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
