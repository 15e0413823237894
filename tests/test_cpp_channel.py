"""Channel attention in C++: outputs and gradients, threads, what is not a number."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from channel_checks import CHANNELS, channel_tensors, check_channel

from attnc.runtime import cpp

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")


@pytest.mark.parametrize("name", CHANNELS)
def test_channel(name):
    check_channel(name)


@pytest.mark.parametrize("batch,heads", [(1, 1), (1, 3), (2, 3)], ids=str)
def test_channel_sums_do_not_depend_on_threads(batch, heads):
    """Whole heads to a thread, or parts of their tokens: the sums are the same to the last bit."""
    q, k, v, grad, scale = channel_tensors("long", heads, batch)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append([cpp.channel_forward(q, k, v, scale), *cpp.channel_backward(q, k, v, scale, grad)])
    finally:
        torch.set_num_threads(before)
    for r in results[1:]:
        assert all(map(torch.equal, results[0], r))


def test_channel_passes_nan_and_inf_on():
    q, k, v, _, scale = channel_tensors("wide")
    q[0, 1, 5, 3] = math.nan  # row 3 of S
    v[1, 0, 7, 2] = math.inf
    out = cpp.channel_forward(q, k, v, scale)
    assert out[0, 1, :, 3].isnan().all()
    assert out[0, 1, :, :3].isfinite().all()
    assert out[1, 0, 7].isinf().all()
    assert out[1, 0, :7].isfinite().all()
