"""The C++ backend against a dense evaluation of the statement in float64."""

from __future__ import annotations

import shutil

import pytest
import torch
from cpp_checks import check, make_program
from cpp_statements import (
    absolute,
    axial,
    biased,
    causal,
    decaying,
    documents,
    factored,
    factored_by_place,
    full,
    grid,
    located,
    mixed_index,
    near_bias,
    neighborhood,
    no_product,
    none_left,
    odd,
    over_queries,
    pooled,
    soft_cap,
    window,
)

from attnc.errors import UnsupportedError
from attnc.runtime import cpp
from attnc.runtime.call import Call
from attnc.schedule.geometry import geometry

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
R = torch.randn


RELATIONS = {
    "window": (window(s=4), (9, 11), {}),
    "a window of one key more than whole vectors": (window(s=7), (14, 15), {"dim": 32}),
    "window as long as the grid": (window(s=4), (3, 4), {}),
    "shifted window": (window(s=4, t=-2), (9, 11), {"kind": "packed"}),
    "one token": (window(s=4), (1, 1), {}),
    "neighbourhood": (neighborhood(s=3), (9, 11), {"kind": "heads_last"}),
    "neighbourhood in columns": (neighborhood(s=3), (20, 3), {"kind": "channels_first"}),
    "neighbourhood of expanded tensors": (neighborhood(s=3), (5, 17), {"kind": "expanded"}),
    "grouped queries": (neighborhood(s=3), (9, 11), {"heads": 4, "kv_heads": 2}),
    "one key head": (window(s=4), (9, 11), {"heads": 4, "kv_heads": 1, "batch": 1}),
    "negative scale": (neighborhood(s=3), (7, 6), {"scale": -0.7}),
    "scale 0": (neighborhood(s=3), (7, 6), {"scale": 0.0}),
    "dilated": (neighborhood(s=3, d=2), (9, 11), {}),
    "axial": (axial(), (5, 17), {"lse_gradient": False}),
    "causal": (causal(), (20, 30), {"batch": 1}),
    "dense": (full(), (700,), {"batch": 1, "heads": 1}),
    "grid": (grid(), (9, 11), {}),
    "residual": (odd(), (9, 11), {}),
    "rows without keys": (none_left(), (4, 7), {}),
    "union": (axial() | window(s=3), (9, 11), {}),
    "per head": (window(s=3).heads([0]) | axial().heads([1]), (8, 8), {}),
    "three axes": (window(s=3), (4, 5, 7), {}),
    "virtual keys": (neighborhood(s=3), (6, 7), {"pad": ((1, 2), (0, 3)), "heads": 4, "kv_heads": 2}),
    "prefix": (neighborhood(s=3), (6, 5), {"prefix": (2, 2)}),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_relation(name):
    p, sizes, more = RELATIONS[name]
    check(p, sizes, **more)


torch.manual_seed(0)  # of the tables below
SCORES = {
    "relative bias": (biased(s=4), (8, 11), {"bias": R(2, 7, 7)}, {}),
    "relative bias shared by heads": (biased(s=4), (9, 11), {"bias": R(1, 7, 7).transpose(1, 2)}, {"kind": "packed"}),
    "bias around": (near_bias(s=3), (9, 14), {"bias": R(2, 5, 5)}, {}),
    "documents": (documents(), (4, 6), {"ids": torch.randint(0, 2, (2, 24))}, {}),
    "soft cap": (soft_cap(), (30,), {"temperature": torch.rand(2) + 0.5}, {}),
    "coordinates": (located(), (7, 9), {"slope": torch.rand(2)}, {}),
    "no product": (no_product(), (14,), {"bias": R(2, 4, 4)}, {}),
    "absolute bias": (absolute(), (20, 30), {"bias": R(1, 600, 600)}, {"batch": 1}),
    "index of both": (mixed_index(), (40,), {"bias": R(7, 2)}, {}),
    "factor": (factored(), (23,), {"gate": R(2, 5, 5)}, {}),
    "factor by place": (factored_by_place(), (23,), {"gate": R(2, 9)}, {}),
    "bias of windows of several chunks": (biased(s=24), (24, 26), {"bias": R(2, 47, 47)}, {"batch": 1}),
    "bias of a large window": (biased(s=14), (14, 17), {"bias": R(2, 27, 27)}, {"batch": 3}),
    "bias of many windows": (biased(s=2), (11, 13), {"bias": R(2, 3, 3)}, {"batch": 3}),
    "decay over several chunks": (decaying(), (1100,), {"bias": R(1, 1100)}, {"batch": 1, "heads": 1}),
    "bias and virtual keys": (biased(s=4), (9, 11), {"bias": R(4, 7, 7)}, {"multiple": (4, 4), "heads": 4, "kv_heads": 2}),
    "bias and prefix": (biased(s=4), (8, 11), {"bias": R(2, 7, 7)}, {"prefix": (1, 1)}),
}


@pytest.mark.parametrize("name", SCORES)
def test_score(name):
    p, sizes, tables, more = SCORES[name]
    check(p, sizes, tables=tables, **more)


def test_keys_on_another_grid():
    check(make_program(pooled(r=2), kv=(5, 4)), (10, 8), k_grid=(5, 4))


@pytest.mark.parametrize("dims", [(1, 1), (24, 24), (33, 7), (80, 80), (256, 256)], ids=str)
def test_head_dims(dims):
    check(neighborhood(s=3), (6, 7), dim=dims[0], value_dim=dims[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    check(located(), (7, 9), tables={"slope": torch.rand(2)}, dtype=dtype, dim=24)


def test_sharing_keys_between_threads():
    """Few (batch, head) pairs: segments of one key range go to several threads, and their sums are added in order."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(neighborhood(s=3), (40, 9), batch=1, heads=1)
        check(neighborhood(s=3), (20, 12), batch=1, heads=1, prefix=(2, 2))
    finally:
        torch.set_num_threads(before)


def test_refusals():
    program = make_program(over_queries())
    call = Call(program, geometry(program, (4, 4), (4, 4)), 1.0, {})
    x = torch.randn(1, 1, 16, 8)
    with pytest.raises(UnsupportedError, match=r"softmax over queries; an operator .* with queries and keys exchanged"):
        cpp.forward(call, x, x, x)
