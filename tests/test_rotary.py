"""Rotary embedding as a row map, held to the book's complex numbers on every rank, layout and backend."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import by_the_book
import pytest
import torch
from strategies import MAPS, Problem, hold, weighted
from torch import Tensor

import attnc
from attnc import ir, patterns
from attnc.compiler import has_compiler

DOUBLE = torch.float64
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
GRIDS: list[tuple[int, ...]] = [(11,), (4, 5), (2, 3, 4)]


def places(grid: tuple[int, ...], prefix: int = 0) -> Tensor:
    """[axes, N]; prefix tokens lie at -1."""
    axes = torch.meshgrid(*[torch.arange(n) for n in grid], indexing="ij")
    return torch.cat([torch.full((len(grid), prefix), -1), torch.stack([a.flatten() for a in axes])], 1)


def pattern(base: float = 10000.0, interleaved: bool = False) -> attnc.Pattern:
    def everything(q: Any, k: Any) -> Any:
        turn = attnc.rotary(base, interleaved=interleaved)
        return attnc.where(q.x == q.x, attnc.SCORE, q_map=turn, k_map=turn)

    return attnc.pattern(everything)()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rotary_is_the_papers(grid: tuple[int, ...], prefix: int, interleaved: bool) -> None:
    """14 channels: 14, 6 + 6 and 4 + 4 + 4 of them turn; float64, gradients too."""
    n = prefix + torch.Size(grid).numel()
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 2, n, 14, generator=g, dtype=DOUBLE).requires_grad_() for _ in range(3)]
    found = attnc.compile(pattern(100.0, interleaved), grid=grid, prefix=prefix, backend="torch")(*leaves)
    q, k = (by_the_book.rotary(t, places(grid, prefix), 100.0, interleaved) for t in leaves[:2])
    wanted = torch.softmax(q @ k.mT * 14**-0.5, -1) @ leaves[2]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), leaves) for o in (found, wanted)))


@pytest.mark.parametrize("maps", MAPS[-2:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_rotary_in_the_budget(backend: str, dtype: torch.dtype, maps: str) -> None:
    p = weighted(patterns.neighborhood(3, bias="relative"), "sink", maps=maps)
    hold(Problem(p, (4, 5), d=15, dtype=dtype, prefix=1, heads=4, strides="tokens first"), backend)
    hold(Problem(p, (3, 4, 2), d=16, dtype=dtype, pad=((0, 1), (1, 0), (1, 1))), backend)


@needs_compiler
def test_rotary_in_cpp() -> None:
    hold(Problem(weighted(patterns.window(3), "softmax", maps="rotary"), (5, 7), dropout=0.2, prefix=1), "cpp")


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_rotary_in_interpreted_triton() -> None:
    script = """
import sys; sys.path.insert(0, sys.argv[1])
from test_rotary import Problem, hold, patterns, weighted
hold(Problem(weighted(patterns.window(2), "softmax", maps="rotary"), (3, 4), batch=1, prefix=1), "triton")
hold(Problem(weighted(patterns.neighborhood(3), "sink", maps="interleaved"), (2, 3, 2), batch=1, heads=2, kv_heads=1), "triton")
print("held")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(Path(__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("held\n")


def test_scores_know_differences_of_places_alone() -> None:
    """One query row and one key row everywhere: a score depends on key minus query."""
    q, k = (torch.randn(1, 1, 1, 12, dtype=DOUBLE).expand(1, 1, 20, 12) for _ in range(2))
    out = attnc.compile(pattern(20.0) & patterns.full(), grid=(4, 5), backend="torch")(
        q, k, torch.eye(20, dtype=DOUBLE)[None, None]
    )
    score = out[0, 0].log().view(4, 5, 4, 5)  # up to a constant of each row
    step = score[..., 1:] - score[..., :-1]
    torch.testing.assert_close(step[:, 1:, :, 1:], step[:, :-1, :, :-1])


def test_keys_on_a_grid_of_their_own_turn_by_its_places() -> None:
    op = attnc.compile(pattern(), grid=(4, 5), kv_grid=(2, 3), backend="torch")
    q, k, v = (torch.randn(1, 2, n, 8, dtype=DOUBLE) for n in (20, 6, 6))
    turned = [by_the_book.rotary(t, places(g), 10000.0, False) for t, g in ((q, (4, 5)), (k, (2, 3)))]
    torch.testing.assert_close(op(q, k, v), torch.softmax(turned[0] @ turned[1].mT * 8**-0.5, -1) @ v)


def test_every_layout_and_a_compiled_graph_turn_alike() -> None:
    x = torch.randn(2, 4, 5, 3 * 2 * 8)
    ops = [attnc.compile(pattern(), layout=f"b {t} (three h d)", grid=(4, 5), heads=2, backend="torch") for t in ("y x", "(y x)")]
    out, flat = ops[0](x), ops[1](x.flatten(1, 2))
    torch.testing.assert_close(out.flatten(1, 2), flat)
    torch.testing.assert_close(torch.compile(ops[0], fullgraph=True, backend="aot_eager")(x), out)
    open_op = attnc.compile(pattern(), layout="b y x (three h d)", heads=2, backend="torch")
    torch.testing.assert_close(open_op(x), out)


@pytest.mark.interpret
@pytest.mark.parametrize("target", ["cuda:90", pytest.param("cpu", marks=needs_compiler)])
def test_a_module_turns_by_itself(target: str, tmp_path: Path) -> None:
    text = attnc.emit(pattern(30.0, True), grid=(3, 4), prefix=1, heads=2, head_dim=16, target=target, dtype="float32")
    (tmp_path / "module.py").write_text(text)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 13, 16, generator=g).requires_grad_() for _ in range(3))
    out = attnc.compile(pattern(30.0, True), grid=(3, 4), prefix=1, backend="eager")(q, k, v)
    wanted = [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
    torch.save([t.detach() for t in (q, k, v, *wanted)], tmp_path / "data.pt")
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import module, torch
q, k, v, *wanted = (t.requires_grad_() for t in torch.load(sys.argv[1] + "/data.pt"))
out = module.attention(q, k, v)
for a, b in zip((out, *torch.autograd.grad(out.square().sum(), (q, k, v))), wanted, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
assert not any(name.partition(".")[0] == "attnc" for name in sys.modules)
"""
    environment = {n: x for n, x in os.environ.items() if n != "PYTHONPATH"} | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_program_with_maps_and_dropout_is_data() -> None:
    from attnc.analysis.dropout import with_dropout

    tokens = ir.Tokens((None, None), 2)
    p = with_dropout(ir.Program(pattern(7.0, True).trace(("y", "x")), tokens, tokens))
    assert ir.from_json(ir.to_json(p)) == p
    with pytest.raises(attnc.CacheError, match="unknown row map"):
        ir.from_json(ir.to_json(p).replace('"rotary"', '"spiral"'))


# ------------------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("base", [0, -1.0, float("inf"), "ten", True])
def test_what_is_no_base(base: Any) -> None:
    with pytest.raises(attnc.DeclarationError, match=r"rotary\(base=.*: a positive number"):
        attnc.rotary(base)


def test_what_rotary_refuses() -> None:
    with pytest.raises(attnc.DeclarationError, match=r"rotary\(interleaved='yes'\): True or False"):
        attnc.rotary(interleaved="yes")  # type: ignore[arg-type]
    narrow = torch.randn(1, 1, 24, 5)
    with pytest.raises(attnc.ShapeError, match="rotary over 3 axes turns 6 channels or more, and D is 5"):
        attnc.compile(pattern(), grid=(2, 3, 4))(narrow, narrow, narrow)
    x = torch.randn(1, 1, 20, 8)
    padded = {b: attnc.compile(pattern(), grid=(4, 5), pad=((0, 1), (1, 0)), backend=b) for b in ("torch", "eager")}
    with pytest.raises(attnc.UnsupportedError, match=r"pad_k= together with rotary keys: .*leave it out.*backend='eager'"):
        padded["torch"](x, x, x, pad_k=torch.ones(1, 8))
    assert padded["eager"](x, x, x, pad_k=torch.ones(1, 8)).isfinite().all()
    with pytest.raises(attnc.UnsupportedError, match="stand-alone module of rotary keys together with pad="):
        attnc.emit(pattern(), grid=(4, 5), pad=((0, 1), (1, 0)), heads=1, head_dim=8, target="cuda:90", dtype="float16")
