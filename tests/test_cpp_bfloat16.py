"""bfloat16 on the C++ backend: words that hold two channels of a score or two keys of an output."""

from __future__ import annotations

import shutil

import pytest
import torch
from cpp_checks import check
from cpp_statements import axial, biased, causal, factored, far, full, none_left, odd, window

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
R = torch.randn

torch.manual_seed(0)  # of the tables below
WORDS = {  # pairs of channels in scores, pairs of keys in outputs: odd numbers of both, ends of intervals between two of a pair
    "window": (window(s=7), (14, 15), {"dim": 32, "kind": "packed"}),
    "window with bias": (biased(s=7), (14, 15), {"dim": 32, "kind": "packed", "tables": {"bias": R(2, 13, 13)}}),
    "shifted window": (biased(s=5, t=2), (12, 13), {"dim": 24, "value_dim": 33, "tables": {"bias": R(2, 9, 9)}}),
    "odd channels": (axial(), (3, 41), {"dim": 33, "value_dim": 80}),
    "one channel": (window(s=3), (7, 8), {"dim": 1, "value_dim": 1}),
    "wide": (full(), (77,), {"dim": 80, "value_dim": 130, "kind": "heads_last"}),
    "causal": (causal(), (20, 31), {"dim": 64, "batch": 1}),
    "several chunks": (causal(), (1200,), {"dim": 64, "batch": 1, "heads": 1}),
    "many keys from an odd one on": (far(), (701,), {"dim": 32, "batch": 1, "heads": 1}),
    "channels first": (window(s=4), (9, 11), {"dim": 24, "kind": "channels_first"}),
    "residual": (odd(), (9, 11), {"dim": 16}),
    "rows without keys": (none_left(), (4, 7), {"dim": 32}),
    "negative scale": (axial(), (4, 21), {"dim": 16, "scale": -0.4}),
    "virtual keys": (window(s=3), (6, 7), {"pad": ((1, 2), (0, 3)), "heads": 4, "kv_heads": 2, "dim": 31}),
    "prefix": (window(s=5), (6, 5), {"prefix": (2, 3), "dim": 32}),
    "factor": (factored(), (23,), {"dim": 18, "tables": {"gate": R(2, 5, 5)}}),
}


@pytest.mark.parametrize("name", WORDS)
def test_bfloat16(name):
    p, grid, options = WORDS[name]
    check(p, grid, dtype=torch.bfloat16, **options)
