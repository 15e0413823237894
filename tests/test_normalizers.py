"""Every normaliser, sinks, post-factors and row maps on every backend, held to the float64 meaning with gradients."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import strategies as draws
import torch
import triton_cases
from hypothesis import given
from strategies import NORMALIZERS, Problem, hold, weighted
from test_triton import failures, run_cases
from torch.utils.checkpoint import checkpoint

import attnc
from attnc import patterns
from attnc.compiler import has_compiler

CPP = importlib.util.find_spec("attnc.runtime.cpp") is not None and has_compiler()
needs_compiler = pytest.mark.skipif(not CPP, reason="no C++ compiler here")
BACKENDS = ("eager", "torch", pytest.param("cpp", marks=needs_compiler))
# a kernel takes the C++ compiler seconds: these build theirs when asked for
SOME_BACKENDS = BACKENDS if os.environ.get("ATTNC_TEST_MANY_KERNELS") else BACKENDS[:2]
REST = {"heads": 4, "kv_heads": 2, "dv": 5}


@draws.examples(30)
@given(draws.problems(made=draws.weights))
def test_eager_is_the_meaning_of_all_weights(p: Problem) -> None:
    hold(p, "eager")


@draws.examples(40)
@given(draws.problems(made=draws.weights))
def test_torch_on_all_weights(p: Problem) -> None:
    hold(p, "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", NORMALIZERS)
def test_normalisers_with_posts_maps_and_bias(kind: str, backend: str) -> None:
    """On cpp one kernel each, at two sizes and strides."""
    p = weighted(patterns.neighborhood(3, bias="relative"), kind, post=True, maps=True)
    for shape, strides in (((5, 7), "guarded"), ((3, 18), "tokens first")):
        hold(Problem(p, shape, strides=strides, **REST), backend)


@pytest.mark.parametrize("backend", SOME_BACKENDS)
@pytest.mark.parametrize("kind", ["sink", "sigmoid", "relu cubed", "queries"])
def test_normalisers_of_plain_scores_with_prefix_tokens(kind: str, backend: str) -> None:
    for scale in (None, -0.3):
        hold(Problem(weighted(patterns.window(3), kind), (4, 5), prefix=2, scale=scale, d=33, **REST), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_weight_where_nothing_is_seen_whatever_the_scale(backend: str) -> None:
    """A scale that turns signs turns no -inf of an excluded pair; times 0, or what float32 rounds to 0, it is no NaN."""
    for p in (weighted(patterns.causal(), "sigmoid"), patterns.causal()):
        for scale in (-0.3, 0.0, 1e-50):
            hold(Problem(p, (5, 7), scale=scale, **REST), backend)


@attnc.pattern
def later(q: Any, k: Any, *, kind: Any, by: int = 20) -> Any:
    return attnc.where(k.x > q.x + by, attnc.SCORE, normalizer=kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [attnc.softmax(), attnc.sigmoid(), attnc.relu(2)], ids=["softmax", "sigmoid", "relu"])
def test_rows_without_keys_beside_rows_with_some(kind: Any, backend: str) -> None:
    """A tile of such rows alone, which sigmoid and relu left as they were in C++."""
    for grid in ((37,), (90,), (2, 37)):
        hold(Problem(later(kind=kind), grid, **REST), backend)


@pytest.mark.parametrize("backend", SOME_BACKENDS)
@pytest.mark.parametrize("kind", ["sink", "sigmoid"])
def test_normalisers_with_virtual_keys_through_a_row_map(kind: str, backend: str) -> None:
    """pad_k goes through the keys' map too, and gets its gradient through it."""
    p = weighted(patterns.window(3), kind, maps=True)
    hold(Problem(p, (4, 5), pad=((1, 1), (0, 1)), **REST), backend)


PADDED: dict[str, Problem] = {
    "bias and maps": Problem(
        weighted(patterns.neighborhood(3, bias="relative"), "queries", post=True, maps=True), (5, 7), pad=((1, 2), (0, 3)), **REST
    ),
    "a sink and dropout": Problem(
        weighted(patterns.window(3), "queries with a sink"), (4, 5), pad=((1, 1), (0, 1)), dropout=0.4, strides="guarded", **REST
    ),
    "a grid of keys": Problem(weighted(patterns.window(3), "queries"), (4, 5), kv_grid=(3, 6), pad=((1, 1), (0, 1)), **REST),
    "images": Problem(weighted(patterns.window(3), "queries"), (4, 5), pad=((1, 1), (0, 1)), sizes=((3, 5), (2, 0)), **REST),
    "no interval": Problem(weighted(draws.lookup(), "queries"), (7,), pad=((1, 1),), dtype=torch.float64, **REST),
}


@pytest.mark.parametrize("backend", SOME_BACKENDS)
@pytest.mark.parametrize("prefix", [0, 1, 9])
@pytest.mark.parametrize("name", PADDED)
def test_softmax_over_queries_with_virtual_keys(name: str, prefix: int, backend: str) -> None:
    """Virtual keys share themselves out among the queries that see them; virtual queries take no share, and prefix tokens, here as
    many as fill more than a row of the grid, none of a virtual key."""
    hold(replace(PADDED[name], prefix=prefix), backend)


@pytest.mark.parametrize(("prefix", "kv_prefix"), [(2, 0), (0, 3), (1, 4)])
def test_softmax_over_queries_with_virtual_keys_and_prefix_tokens_of_one_side(prefix: int, kv_prefix: int) -> None:
    """Also where the statement reads sizes, an index and places of its tables, none of which the prefix tokens may move."""

    @attnc.pattern
    def folded(q: Any, k: Any, *, bias: attnc.Table) -> Any:
        near = (abs(q.y - k.y) <= 1) & (k.index < k.size.y * k.size.x - 1)
        return attnc.where(near, attnc.SCORE * bias[q.size.y - 1 - k.y, q.x], normalizer=attnc.softmax(over="queries"))

    g = torch.Generator().manual_seed(3)
    draw = {"generator": g, "dtype": torch.float64}
    q = torch.randn(2, 2, prefix + 12, 4, **draw)
    k, v = (torch.randn(2, 2, kv_prefix + 12, 4, **draw) for _ in range(2))
    tables = {"bias": torch.randn(4 + 2, 3 + 1, **draw), "pad_k": torch.randn(2, 4, **draw), "pad_v": torch.randn(2, 4, **draw)}
    results = []
    for backend in ("eager", "torch"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, *tables.values())]
        options = {"grid": (4, 3), "pad": ((1, 1), (0, 1)), "prefix": prefix, "kv_prefix": kv_prefix, "backend": backend}
        op = attnc.compile(folded(), **options)
        out = op(*leaves[:3], **dict(zip(tables, leaves[3:], strict=True)), dropout_p=0.3, seed=5)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true)


def test_softmax_over_queries_padded_to_a_multiple() -> None:
    """One operator at two sizes, one of them without virtual rows, beside the explicit padding."""
    p = weighted(patterns.window(3), "queries")
    for grid, pad in (((4, 5), ((0, 2), (0, 1))), ((3, 6), ((0, 0), (0, 0)))):
        q, k, v = (torch.randn(2, 2, math.prod(grid), 8, dtype=torch.float64) for _ in range(3))
        pads = {n: torch.randn(2, 8, dtype=torch.float64) for n in ("pad_k", "pad_v")}
        found = attnc.compile(p, pad="multiple", backend="torch")(q, k, v, grid=grid, **pads)
        torch.testing.assert_close(found, attnc.compile(p, grid=grid, pad=pad, backend="eager")(q, k, v, **pads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["sink", "sigmoid", "queries"])
def test_unions_add_or_merge_and_count_a_sink_once(kind: str, backend: str) -> None:
    """Two strips far longer than wide run as two parts."""
    p = weighted(patterns.cross(2), kind)
    hold(Problem(p, (12, 14), batch=1, **REST), backend)


@pytest.mark.parametrize("backend", SOME_BACKENDS)
@pytest.mark.parametrize("kind", ["sink", "relu", "queries with a sink"])
def test_heads_that_see_nothing(kind: str, backend: str) -> None:
    """A row without keys gives zeros (and the sink as its lse); head 1 has no key at all."""
    p = weighted(patterns.causal() & ~patterns.window(2).on("x"), kind)
    hold(Problem(p, (3, 6), heads=2), backend)
    hold(Problem(weighted(patterns.window(3).heads([0]), kind), (3, 6), heads=2), backend)


@needs_compiler
@pytest.mark.parametrize("kind", ["sink", "sigmoid", "relu", "queries"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    hold(Problem(weighted(patterns.window(3), kind), (6, 6), dtype=dtype, d=16, dv=16), "cpp")


@pytest.mark.interpret
@pytest.mark.parametrize("group", list(triton_cases.HELD))
def test_interpreted_kernels_on_all_weights(group: str) -> None:
    found = run_cases(group, interpret=True)
    assert set(found) == set(triton_cases.HELD[group])
    assert not failures(found)


# ------------------------------------------------------------------------------------------------------------------- what it means
def test_a_huge_sink_takes_everything_and_none_takes_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    plain = attnc.compile(patterns.window(3), grid=(3, 4), backend="torch")(q, k, v)
    op = attnc.compile(weighted(patterns.window(3), "sink"), grid=(3, 4), backend="torch")
    assert op(q, k, v, sink=torch.tensor([1e4, float("-inf")]))[:, 0].abs().max() == 0
    nothing = torch.full((2,), float("-inf"), requires_grad=True)
    out, lse = op(q.requires_grad_(), k, v, sink=nothing, return_lse=True)
    assert torch.equal(out, plain)
    for found in torch.autograd.grad(out.sum() + lse.sum(), (q, nothing)):
        assert torch.isfinite(found).all()


def test_a_sink_of_one_head_is_broadcast() -> None:
    p = weighted(patterns.window(3), "sink", post=True, maps=True)
    rows, _ = Problem(p, (3, 5)).inputs()
    op = attnc.compile(p, grid=(3, 5), backend="torch")
    sink = torch.tensor([0.7])
    assert torch.equal(op(*rows, sink=sink), op(*rows, sink=sink.expand(2)))


def test_weights_of_a_key_sum_to_one_over_its_queries() -> None:
    """With values of one, the outputs of all queries sum to the number of keys."""
    q, k = (torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2))
    op = attnc.compile(weighted(patterns.neighborhood(3), "queries"), grid=(4, 5), backend="torch")
    out = op(q, k, torch.ones(1, 2, 20, 1, dtype=torch.float64))
    torch.testing.assert_close(out.sum(2), torch.full((1, 2, 1), 20.0, dtype=torch.float64))


def test_softmax_over_queries_is_softmax_over_keys_transposed() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 20, 8, generator=g, dtype=torch.float64) for _ in range(3))
    out = attnc.compile(weighted(patterns.full(), "queries"), grid=(4, 5), backend="torch")(q, k, v)
    weight = torch.softmax(k @ q.transpose(-1, -2) * 8**-0.5, -1)
    torch.testing.assert_close(out, weight.transpose(-1, -2) @ v)


@pytest.mark.parametrize("kind", ["sink", "sigmoid", "queries with a sink"])
def test_gradients_are_the_same_on_every_run(kind: str) -> None:
    p = Problem(weighted(patterns.neighborhood(3, bias="relative"), kind), (5, 6), **REST)
    first, second = (draws.run_operator(p, "cpp" if CPP else "torch") for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("kind", ["sink", "queries"])
def test_a_compiled_graph_gives_the_same(kind: str) -> None:
    op = attnc.compile(weighted(patterns.window(3), kind, maps=True), grid=(3, 5), backend="torch")
    p = Problem(weighted(patterns.window(3), kind, maps=True), (3, 5))
    rows, tables = p.inputs()
    graph = torch.compile(lambda q, k, v, t: op(q, k, v, **t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(*rows, tables), op(*rows, **tables))


def test_a_packed_tensor_goes_through_the_maps() -> None:
    p = weighted(patterns.window(3), "sink", maps=True)
    x = torch.randn(2, 15, 3 * 2 * 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    packed = attnc.compile(p, grid=(3, 5), layout="b (y x) (three h d)", heads=2, backend="torch")
    q, k, v = x.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    sink = torch.tensor([0.3, -1.0])
    out, plain = packed(x, sink=sink), attnc.compile(p, grid=(3, 5), backend="torch")(q, k, v, sink=sink)
    torch.testing.assert_close(out, plain.transpose(1, 2).flatten(2))
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (out, plain)))


def over_a_grid_of_its_own(backend: str) -> tuple[attnc.Operator, list[torch.Tensor], torch.Tensor]:
    """Softmax over 20 queries (and a class token) for each of 6 keys, two query heads a key head."""
    near = attnc.pattern(lambda q, k: (q.y // 2 == k.y) & (abs(q.x // 2 - k.x) <= 1))
    op = attnc.compile(weighted(near(), "queries with a sink"), grid=(4, 5), kv_grid=(2, 3), prefix=1, kv_prefix=0, backend=backend)
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, h, n, d, generator=g, requires_grad=True) for h, n, d in ((4, 21, 8), (2, 6, 8), (2, 6, 5))]
    return op, rows, torch.randn(4, generator=g, requires_grad=True)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_compiler)])
def test_queries_and_keys_on_grids_of_their_own(backend: str) -> None:
    found = []
    for which in (backend, "eager"):
        op, rows, sink = over_a_grid_of_its_own(which)
        out = op(*rows, sink=sink)
        found.append([out, *torch.autograd.grad(out.square().sum(), [*rows, sink])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own copies of list arguments
def test_opcheck_of_softmax_over_queries(backend: str) -> None:
    """The fake kernels know that there is one lse per key."""
    op, rows, sink = over_a_grid_of_its_own(backend)
    rest = (0.3, (4, 5), (2, 3), op._traced(2).text, backend, False, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.attnc.attend.default, (*rows, [sink], *rest), test_utils=tests)
    plain = [t.detach() for t in (*rows, sink)]
    out, lse = torch.ops.attnc.attend(*plain[:3], plain[3:], *rest)
    assert lse.shape == (2, 4, 6)
    backward = (*plain[:3], plain[3:], out, lse, torch.randn_like(out), torch.randn_like(lse), *rest)
    torch.library.opcheck(torch.ops.attnc.attend_backward.default, backward, test_utils=tests)


# ----------------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_softmax_over_queries_under_checkpointing(backend: str) -> None:
    """Its forward runs a backward, under the hooks by which checkpointing keeps no tensors; they are in place again afterwards."""
    op = attnc.compile(patterns.reversed_attention(), grid=(5,), backend=backend)
    rows = [torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    kept: list[int] = []

    def packed(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    weight = torch.randn(1, 2, 5, 3, dtype=torch.float64)
    expected = torch.autograd.grad(op(*rows), rows, weight)
    with torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
        out = op(*rows)
        mine = len(kept)
        _ = rows[0] * rows[1]
    assert len(kept) > mine
    for found, wanted in zip(torch.autograd.grad(out, rows, weight), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    for found, wanted in zip(torch.autograd.grad(checkpoint(op, *rows, use_reentrant=False), rows, weight), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_no_log_sum_exp_of_a_query() -> None:
    x = torch.randn(1, 1, 4, 8)
    op = attnc.compile(weighted(patterns.full(), "queries"), grid=4)
    with pytest.raises(attnc.ShapeError, match="weights by softmax over queries have no log-sum-exp of a query"):
        op(x, x, x, return_lse=True)


@pytest.mark.parametrize("target", ["cuda:90", "cpu"])
def test_no_module_of_softmax_over_queries(target: str) -> None:
    with pytest.raises(attnc.UnsupportedError, match=r"softmax over queries.*any backend=.*queries and keys exchanged"):
        attnc.emit(weighted(patterns.window(3), "queries"), grid=(6, 6), heads=2, head_dim=16, target=target, dtype="float32")


# ------------------------------------------------------------------------------------------------------------------------ modules
SCRIPT = """
import importlib.util, sys
import torch

spec = importlib.util.spec_from_file_location("module", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["module"] = module
spec.loader.exec_module(module)
q, k, v, sink, pad_k, pad_v, g, *wanted = (t.requires_grad_() for t in torch.load(sys.argv[2]))
leaves = [q, k, v, pad_k, pad_v, *([sink] if sys.argv[3] == "sink" else [])]
out = module.attention(q, k, v, pad_k=pad_k, pad_v=pad_v, **({"sink": sink} if sys.argv[3] == "sink" else {}))
for a, b in zip((out, *torch.autograd.grad(out, leaves, g)), wanted, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
assert not any(name.partition(".")[0] == "attnc" for name in sys.modules)
"""


@pytest.mark.interpret
@pytest.mark.parametrize("target", ["cuda:90", pytest.param("cpu", marks=needs_compiler)])
@pytest.mark.parametrize("kind", ["sink", "sigmoid"])
def test_modules_with_sinks_and_row_maps_stand_alone(kind: str, target: str, tmp_path: Path) -> None:
    """Virtual keys, which the map of keys takes in, too; gradients of all there is."""
    p, pad = weighted(patterns.window(3), kind, maps=True), ((0, 1), (1, 0))
    text = attnc.emit(p, grid=(5, 5), pad=pad, heads=2, head_dim=16, target=target, dtype="float32")
    (tmp_path / "module.py").write_text(text)
    gen = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 2, 25, 16, generator=gen, requires_grad=True) for _ in range(4))
    pads = [torch.randn(2, 16, generator=gen, requires_grad=True) for _ in range(2)]
    sink = torch.randn(2, generator=gen, requires_grad=True)
    tables: dict[str, Any] = {"sink": sink} if kind == "sink" else {}
    out = attnc.compile(p, grid=(5, 5), pad=pad, backend="eager")(q, k, v, pad_k=pads[0], pad_v=pads[1], **tables)
    wanted = torch.autograd.grad(out, [q, k, v, *pads, *tables.values()], g)
    torch.save([t.detach() for t in (q, k, v, sink, *pads, g, out, *wanted)], tmp_path / "data.pt")
    environment = {n: x for n, x in os.environ.items() if n != "PYTHONPATH"} | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "module.py"), str(tmp_path / "data.pt"), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search("softmax with the sink sink" if kind == "sink" else "sigmoid", text.split("import")[0])
