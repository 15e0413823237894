"""Prefix tokens beside a padded grid: the grid's queries see prefix keys and their padded window, prefix queries see all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import Problem, hold, weighted
from torch import Tensor

import attnc
from attnc import patterns
from attnc.compiler import has_compiler

BACKENDS = ("eager", "torch", *(("cpp",) if has_compiler() else ()))
MORE: dict[str, Any] = {"heads": 4, "kv_heads": 2, "d": 12, "dv": 5}
CASES: dict[str, Problem] = {
    "window": Problem(patterns.window(3, bias="relative"), (4, 5), prefix=2, pad=((1, 1), (0, 1)), **MORE),
    "neighborhood": Problem(patterns.neighborhood(3), (5, 4), prefix=1, pad=((2, 0), (0, 3)), dropout=0.3, **MORE),
    "dilated": Problem(patterns.neighborhood(3, 2), (7, 5), prefix=3, pad=((1, 2), (2, 1)), **MORE),
    "line": Problem(patterns.dilated_blocks(2, 3), (11,), prefix=1, pad=((0, 1),), dtype=torch.float64, **MORE),
    "volume": Problem(patterns.window(2), (3, 2, 3), prefix=1, pad=((0, 1), (1, 1), (1, 0)), dropout=0.4, **MORE),
    "sink": Problem(weighted(patterns.window(3), "sink", post=True, maps=True), (4, 5), prefix=1, pad=((1, 1), (0, 1)), **MORE),
    "sigmoid": Problem(weighted(patterns.window(3), "sigmoid", post=True), (4, 5), prefix=2, pad=((1, 1), (0, 1)), **MORE),
    "rotary": Problem(weighted(patterns.window(3), "softmax", maps="rotary"), (4, 5), prefix=2, pad=((1, 1), (0, 1)), **MORE),
    "union": Problem(patterns.cross(2), (9, 8), prefix=1, pad=((1, 1), (0, 2)), dropout=0.2, **MORE),
    "heads": Problem(
        patterns.per_head([patterns.window(2), patterns.neighborhood(3)]), (5, 5), prefix=2, pad=((0, 1), (0, 1)), **MORE
    ),
    "half": Problem(patterns.window(4), (6, 7), prefix=1, pad=((0, 2), (0, 1)), dtype=torch.bfloat16, strides="packed"),
    "images": Problem(
        patterns.window(3), (4, 5), batch=4, prefix=2, pad=((1, 0), (0, 2)), dropout=0.3, strides="guarded",
        sizes=((4, 5), (2, 3), (2, 3), (0, 1)), **MORE,
    ),
    "nobody": Problem(~patterns.full(), (3, 3), prefix=1, pad=((1, 0), (0, 0)), **MORE),
}  # fmt: skip
BUILT = ("neighborhood", "sigmoid")  # a kernel takes the C++ compiler seconds; the fuzzer builds others


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str, backend: str) -> None:
    if backend == "cpp" and name not in BUILT:
        pytest.skip("one kernel a case: the cases of BUILT are enough")
    hold(CASES[name], backend)


def rows(tokens: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, tokens, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2)]


def pads(value: float) -> dict[str, Tensor]:
    return {n: torch.full((2, 8), value, dtype=torch.float64) for n in ("pad_k", "pad_v")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_token_does_not_see_the_padding(backend: str) -> None:
    op = attnc.compile(patterns.window(3), grid=(4, 5), prefix=1, pad="multiple", backend=backend)
    x = rows(21)
    few, many = (op(*x, **pads(value)) for value in (0.1, 3.0))
    torch.testing.assert_close(
        few[:, :, :1], torch.nn.functional.scaled_dot_product_attention(x[0][:, :, :1], *x[1:], enable_gqa=True)
    )
    assert torch.equal(few[:, :, :1], many[:, :, :1])
    assert float((few - many)[:, :, 1:].abs().max()) > 0.1
    explicit = attnc.compile(patterns.window(3), grid=(4, 5), prefix=1, pad=((0, 2), (0, 1)), backend=backend)
    torch.testing.assert_close(explicit(*x, **pads(0.1)), few)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_keys_without_prefix_queries(backend: str) -> None:
    """Tokens that are read and do not ask: the rows of the whole call, without those of the prefix."""
    x = rows(22)
    whole = attnc.compile(patterns.window(3), grid=(4, 5), prefix=2, pad=((1, 1), (0, 1)), backend=backend)
    keys = attnc.compile(patterns.window(3), grid=(4, 5), kv_prefix=2, pad=((1, 1), (0, 1)), backend=backend)
    out, lse = whole(*x, **pads(0.4), return_lse=True)
    mine, log = keys(x[0][:, :, 2:], *x[1:], **pads(0.4), return_lse=True)
    torch.testing.assert_close(mine, out[:, :, 2:])
    torch.testing.assert_close(log, lse[:, :, 2:])


def test_explain_says_what_prefix_queries_see() -> None:
    text = attnc.explain(patterns.window(3), grid=(4, 5), prefix=1, pad="multiple")
    assert "prefix queries see the tokens alone" in text
