"""Rows of unit length (cosine attention) inside of C++ kernels: held to the meaning, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc import patterns
from attnc.codegen.around import unit_rows, unit_rows_gradient
from attnc.compiler import has_compiler
from attnc.lang.functions import minimum
from attnc.lang.symbols import as_expr
from attnc.patterns.relation import rescored
from attnc.runtime import cpp

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
MAPS = {"both": ("q_map", "k_map"), "queries": ("q_map",), "keys": ("k_map",)}
CASES: dict[str, dict[str, Any]] = {
    "odd windows": {"p": patterns.window(7), "grid": (14, 7)},  # 49 keys: the last in no panel
    "borders": {"p": patterns.window(4, shift=2), "grid": (9, 6)},
    "virtual keys": {"p": patterns.window(4), "grid": (6, 5), "pad": "multiple", "prefix": 2},
    "neighbours": {"p": patterns.neighborhood(3), "grid": (7, 6)},
    "a union": {"p": patterns.axial("y") | patterns.axial("x"), "grid": (6, 5)},
    "half planes": {"p": None, "grid": (7, 6)},
}


@attnc.pattern
def _half_planes(q: Any, k: Any) -> Any:
    return q.y + 2 * q.x >= k.y + 2 * k.x


def _statement(p: Any, maps: tuple[str, ...]) -> Any:
    heat = attnc.Table("heat")

    def change(q: Any, k: Any, s: Any) -> Any:
        score = attnc.SCORE * attnc.exp(minimum(heat[attnc.HEAD], 3.0)) + 0.1 * (q.x - k.x)
        return replace(s, score=as_expr(score), **{m: attnc.l2norm(1e-3) for m in maps})

    return rescored("cosine", _half_planes() if p is None else p, change)


def _operators(case: dict[str, Any], maps: str) -> list[Any]:
    options = {n: x for n, x in case.items() if n != "p"}
    return [attnc.compile(_statement(case["p"], MAPS[maps]), **options, backend=b) for b in ("cpp", "eager", "torch")]


def _inputs(case: dict[str, Any], dim: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    n = case["grid"][0] * case["grid"][1] + case.get("prefix", 0)
    rows = [torch.randn(2, 3, n, dim), torch.randn(2, 3, n, dim), torch.randn(2, 3, n, 8)]
    rows[0][:, :, -1] = 0  # rows without a direction
    rows[1][:, 0, 0] = 0
    rows[1][:, 1, 0] *= 1e-5  # shorter than a unit is taken of
    tables = {"heat": torch.randn(3)}
    if "pad" in case:
        tables |= {"pad_k": torch.randn(3, dim), "pad_v": torch.randn(3, 8)}
    rows = [t.to(dtype).requires_grad_() for t in rows]
    return rows, {n: t.to(dtype).requires_grad_() for n, t in tables.items()}


def _all(op: Any, rows: list[Tensor], tables: dict[str, Tensor], weight: Tensor) -> list[Tensor]:
    out, lse = op(*rows, **tables, return_lse=True)
    return [
        out,
        lse,
        *torch.autograd.grad((out, lse), (*rows, *tables.values()), (weight.to(out.dtype), torch.full_like(lse, 0.1))),
    ]


@pytest.mark.parametrize(
    ("dim", "dtype"), [(16, torch.float32), (24, torch.bfloat16), (32, torch.bfloat16), (9, torch.float16), (5, torch.float64)]
)
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("name", CASES)
def test_unit_rows(name: str, maps: str, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(len(name) + dim)
    op, meaning, copying = _operators(CASES[name], maps)
    rows, tables = _inputs(CASES[name], dim, dtype)
    weight = torch.randn(*rows[0].shape[:-1], 8)
    exact = (
        [t.detach().double().requires_grad_() for t in rows],
        {n: t.detach().double().requires_grad_() for n, t in tables.items()},
    )
    truth = _all(meaning, *exact, weight.to(dtype).double())
    plain = _all(meaning, rows, tables, weight)
    found = _all(op, rows, tables, weight)
    # One number gets the errors of all pairs, and plain code's is small by luck: kernels over copies of the rows tell more.
    fused = _all(copying, rows, tables, weight)
    least = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-13}[dtype]
    for what, f, p, c, t in zip(("out", "lse", "dq", "dk", "dv", *tables), found, plain, fused, truth, strict=True):
        error, allowed, copied = ((x.double() - t).abs().max().item() for x in (f, p, c))
        allowed = max(allowed, copied) if what == "heat" else allowed
        assert error <= 2 * allowed + least * max(1.0, t.abs().max().item()), (what, error, allowed)
    with torch.no_grad():
        for _ in range(2):  # the second time as a replay
            assert torch.equal(op(*rows, **tables), found[0])


def test_kernels_take_the_rows_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Tensor:
        raise AssertionError("a forward made a copy of its rows")

    monkeypatch.setattr(cpp, "unit_rows", refused)
    op, *_ = _operators(CASES["odd windows"], "both")
    rows, tables = _inputs(CASES["odd windows"], 16, torch.float32)
    assert op(*rows, **tables).isfinite().all()


def test_fallback_keeps_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["odd windows"]
    p = _statement(case["p"], MAPS["both"])
    op, meaning = (attnc.compile(p, grid=case["grid"], backend=b, fallback=f) for b, f in (("cpp", "torch"), ("eager", None)))
    rows, tables = _inputs(case, 16, torch.float32)

    def refused(*_: Any) -> None:
        raise attnc.UnsupportedError("not this one.")

    monkeypatch.setattr(cpp, "forward", refused)
    with pytest.warns(UserWarning, match="Falling back to backend='torch'"):
        out = op(*rows, **tables)
    assert (out - meaning(*rows, **tables)).abs().max() < 1e-5


def test_the_gradient_is_that_of_autograd() -> None:
    rows = torch.randn(4, 5, 6, dtype=torch.float64)
    rows[0] *= 1e-4
    rows.requires_grad_()
    weight = torch.randn_like(rows)
    (wanted,) = torch.autograd.grad(unit_rows(rows, 1e-2), rows, weight)
    assert torch.allclose(unit_rows_gradient(rows.detach(), 1e-2, weight), wanted, rtol=1e-12, atol=1e-12)
