"""Block lists: classes that interval arithmetic finds are sound, and every backend that walks lists agrees with the meaning."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strategies as draws
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Problem, hold, weighted

import attnc
from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.analysis.intervals import Boxes, RangeTable, Span
from attnc.codegen.torch import LIMITS
from attnc.compiler import has_compiler
from attnc.schedule.boxes import pieces
from attnc.schedule.geometry import Geometry, geometry
from attnc.schedule.list_choice import Limits, Listed, box_work, listed
from attnc.schedule.lists import BlockLists, Walk, cut
from attnc.schedule.split import split
from attnc.schedule.tiles import of_lists
from attnc.schedule.walks import Tile

CPP = importlib.util.find_spec("attnc.runtime.cpp") is not None and has_compiler()
BACKENDS = ["torch", *(["cpp"] if CPP else [])]


# -------------------------------------------------------------------------------------------------------- interval arithmetic
Q, K, HEAD = ir.coord("q", 0), ir.coord("k", 0), ir.HEAD
NUMBERS = st.one_of(st.sampled_from([Q, K, HEAD, ir.size("q", 0)]), st.integers(-9, 9).map(ir.const))


def _grown(inner: st.SearchStrategy[ir.Expr]) -> st.SearchStrategy[ir.Expr]:
    two = st.sampled_from(["add", "sub", "mul", "min", "max", "floordiv", "mod"])
    test = st.builds(ir.make, st.sampled_from(["lt", "le", "eq", "ne"]), inner, inner)
    table = st.builds(lambda e: ir.load("t", (ir.make("mod", e, ir.const(7)),), "int"), inner)
    choice = st.builds(lambda c, a, b: ir.make("where", c, a, b), test, inner, inner)
    return st.one_of(
        st.builds(ir.make, two, inner, inner), st.builds(ir.make, st.sampled_from(["abs", "neg"]), inner), choice, table
    )


INTEGERS = st.recursive(NUMBERS, _grown, max_leaves=8)
TESTS = st.builds(ir.make, st.sampled_from(["lt", "le", "eq", "ne"]), INTEGERS, INTEGERS)
PREDICATES = st.recursive(
    TESTS,
    lambda inner: st.one_of(
        st.builds(ir.make, st.sampled_from(["and", "or"]), inner, inner),
        st.builds(lambda e: ir.make("not", e), inner),
        st.builds(lambda c, a, b: ir.make("where", c, a, b), inner, inner, inner),
    ),
    max_leaves=4,
)
SIDES = st.lists(st.tuples(st.integers(-12, 40), st.integers(0, 9)), min_size=4, max_size=4)


@draws.examples(300)
@given(PREDICATES, SIDES, SIDES, st.integers(0, 3))
def test_classes_of_boxes_are_sound(e: ir.Expr, queries: Any, keys: Any, known: int) -> None:
    """Four boxes at once: what is called true of a box is true of each of its pairs, what is called false of none."""
    table = np.array([3, -1, 4, 1, -5, 9, 2])
    low, high = (np.array([f(a, n) for a, n in queries]) for f in (lambda a, n: a, lambda a, n: a + n))
    low_k, high_k = (np.array([f(a, n) for a, n in keys]) for f in (lambda a, n: a, lambda a, n: a + n))
    spans = {Q: Span(low, high), K: Span(low_k, high_k), HEAD: Span(0, 2), ir.size("q", 0): Span(11, 11)}
    found = Boxes(spans, {"t": RangeTable(table)} if known else {}).truth(e)
    must, may = np.broadcast_to(found.must, 4), np.broadcast_to(found.may, 4)
    for i in range(4):
        leaves: dict[ir.Expr, Any] = {
            Q: np.arange(low[i], high[i] + 1)[:, None, None],
            K: np.arange(low_k[i], high_k[i] + 1)[:, None],
            HEAD: np.arange(3),
            ir.size("q", 0): np.array(11),
        }
        if _divides_by_zero(e, leaves, table):
            continue  # refused before anything runs
        allowed = np.asarray(evaluate(e, leaves, np, lambda _, at: table[at[0]]))
        assert not (must[i] and not allowed.all()), ir.show(e)
        assert may[i] or not allowed.any(), ir.show(e)


def _divides_by_zero(e: ir.Expr, leaves: dict[ir.Expr, Any], table: Any) -> bool:
    divisors = {n.args[1] for n in ir.walk(e) if n.op in ("floordiv", "mod")}
    with np.errstate(divide="ignore"):
        return any(bool((np.asarray(evaluate(d, leaves, np, lambda _, at: table[at[0]])) == 0).any()) for d in divisors)


@pytest.mark.parametrize("op", ["mod", "floordiv", "mul", "min", "max", "sub"])
@draws.examples(60)
@given(SIDES, st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9), st.booleans()), min_size=4, max_size=4))
def test_operations_on_ranges(op: str, queries: Any, keys: Any) -> None:
    """Of two coordinates, the second of one sign: every value lies in the range, whose ends some pair has where it is short."""
    low, high = (np.array([f(a, n) for a, n in queries], float) for f in (lambda a, n: a, lambda a, n: a + n))
    ends = [(-a - n, -a) if negative else (a, a + n) for a, n, negative in keys]
    low_k, high_k = np.array(ends, float).T
    found = Boxes({Q: Span(low, high), K: Span(low_k, high_k)}, {}).span(ir.make(op, Q, K))
    for i in range(4):
        q, k = np.arange(low[i], high[i] + 1)[:, None], np.arange(low_k[i], high_k[i] + 1)
        values = evaluate(ir.make(op, Q, K), {Q: q, K: k}, np)
        assert found.low[i] <= values.min()
        assert values.max() <= found.high[i]
        if op != "mod" or q.size == k.size == 1:
            assert (found.low[i], found.high[i]) == (values.min(), values.max())


def test_points_are_exact() -> None:
    """Over boxes of one pair nothing is unknown."""
    e = ir.make("lt", ir.make("mod", ir.make("add", ir.make("mul", Q, Q), K), ir.const(5)), ir.const(2))
    q, k = (x.ravel() for x in np.meshgrid(np.arange(12), np.arange(12), indexing="ij"))
    found = Boxes({Q: Span(q, q), K: Span(k, k)}, {}).truth(e)
    assert (found.must == found.may).all()
    assert (found.must == ((q * q + k) % 5 < 2)).all()


@draws.examples(60)
@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_ranges_of_tables(rank: int, at: int) -> None:
    """Least and greatest of random boxes of a table; nothing is known of a box that leaves it."""
    g = np.random.default_rng(at)
    values = g.integers(-50, 50, g.integers(1, 9, rank))
    low = [g.integers(0, n, 20) for n in values.shape]
    high = [np.minimum(a + g.integers(0, 5, 20), n - 1 + (g.random(20) < 0.1)) for a, n in zip(low, values.shape, strict=True)]
    found = RangeTable(values).of([Span(a.astype(float), b.astype(float)) for a, b in zip(low, high, strict=True)])
    for i in range(20):
        ends = list(zip(low, high, values.shape, strict=True))
        if any(n > 1 and b[i] >= n for _, b, n in ends):
            assert (found.low[i], found.high[i]) == (-np.inf, np.inf)
            continue
        part = values[tuple(slice(a[i], b[i] + 1) if n > 1 else slice(0, 1) for a, b, n in ends)]
        assert (found.low[i], found.high[i]) == (part.min(), part.max())


# ------------------------------------------------------------------------------------------------------------------------ lists
def geometry_of(p: attnc.Pattern, grid: tuple[int, ...], **options: Any) -> Geometry:
    kv_grid = options.pop("kv_grid", None)
    program = attnc.compile(p, grid=grid, kv_grid=kv_grid, **options).program(len(grid))
    return geometry(program, grid, kv_grid or grid)


def brute(g: Geometry, queries: list[Any], keys: list[Any], heads: int) -> np.ndarray:
    """[tiles, blocks]: 0, 1 or 2 where none, some or all pairs are allowed, one after the other."""

    def members(parts: list[Any]) -> list[np.ndarray]:
        found = [np.zeros((0, 1), int)]
        for a, p in zip(g.axes, parts, strict=True):
            found = [
                np.concatenate([np.repeat(f, e - b, 1), np.tile(np.arange(b, e) * a.split + r, f.shape[1])[None]])
                for f in found
                for r, b, e in p
            ]
        return found

    out = np.zeros((np.prod([len(p) for p in queries]), np.prod([len(p) for p in keys])), int)
    k = members(keys)
    for i, q in enumerate(members(queries)):
        for j, other in enumerate(k):
            ok = g.mask(q, other, heads)
            out[i, j] = int(ok.any()) + int(ok.all())
    return out


def dense(lists: BlockLists) -> np.ndarray:
    out = np.zeros((len(lists.full), lists.columns), int)
    for t, (a, b) in enumerate(zip(lists.offsets, lists.offsets[1:], strict=False)):
        assert (np.diff(lists.blocks[a : a + lists.full[t]]) > 0).all()
        assert (np.diff(lists.blocks[a + lists.full[t] : b]) > 0).all()
        out[t, lists.blocks[a:b]] = 1
        out[t, lists.blocks[a : a + lists.full[t]]] = 2
    return out


@draws.examples(60)
@given(
    st.integers(1, 2).flatmap(lambda r: st.tuples(draws.patterns(r), st.lists(st.integers(1, 9), min_size=r, max_size=r))),
    st.data(),
)
def test_lists_are_sound_on_random_patterns(drawn: Any, data: Any) -> None:
    """No allowed pair in a skipped block, no forbidden pair in a full one, at any sides of tiles and blocks; and with slabs and
    coarse levels so small that all of them take part."""
    p, grid = drawn
    if any(n.op in ("load", "batch") for n in ir.walk(p.trace(ir.AXES[len(grid)]).relation)):
        return
    program = attnc.compile(p, grid=tuple(grid)).program(len(grid))
    for run in split(program, tuple(grid), tuple(grid), 4, 4):
        for part in run.parts:
            g = geometry(part, tuple(grid), tuple(grid))
            sides = [data.draw(st.integers(1, 4)) for _ in range(2 * len(g.axes))]
            queries = [pieces(a, s) for a, s in zip(g.axes, sides, strict=False)]
            keys = [cut(a.keys, a.split, s) for a, s in zip(g.axes, sides[len(g.axes) :], strict=True)]
            with pytest.MonkeyPatch.context() as small:
                small.setattr("attnc.schedule.lists.SLAB", 64)
                small.setattr("attnc.schedule.lists.COARSEST", data.draw(st.sampled_from([1, 16, 4096])))
                lists = Walk(g, queries, keys, run.last - run.first, 1).lists()
            found, truth = dense(lists), brute(g, queries, keys, run.last - run.first)
            assert (found[truth > 0] > 0).all(), "an allowed pair in a skipped block"
            assert (truth[found == 2] == 2).all(), "a forbidden pair in a full block"
            assert (dense(lists.transposed()) == found.T).all()
            assert lists.visited <= lists.boxed
            assert lists.bytes == 4 * (len(lists.offsets) + len(lists.full) + lists.visited)
            together = np.ones((1, 1), bool)  # tiles and blocks of one residue class on every axis
            for a, b in zip(queries, keys, strict=True):
                together = np.kron(together, a[:, None, 0] == b[None, :, 0])
            assert not (found > 0)[~together].any()
            assert lists.boxed <= together.sum()


@attnc.pattern
def checker(q: Any, k: Any) -> Any:
    return (q.y + k.x) % 5 < 2


@attnc.pattern
def ring(q: Any, k: Any, *, inner: int, outer: int) -> Any:
    d = (q.y - k.y) ** 2 + (q.x - k.x) ** 2
    return (d >= inner**2) & (d <= outer**2)


@attnc.pattern
def diagonals(q: Any, k: Any, *, step: int) -> Any:
    return abs(q.x - k.x) % step == 0


@attnc.pattern
def bigbird(q: Any, k: Any, *, side: int, every: int) -> Any:
    return (abs(q.x - k.x) <= side) | (k.x % every == 0) | (k.x < 4)


@attnc.pattern
def tilted(q: Any, k: Any) -> Any:
    """From one grid to another, along lines that no axis knows."""
    return abs(2 * (q.y + q.x) - 3 * (k.y + k.x)) <= 4


@attnc.pattern
def by_head(q: Any, k: Any) -> Any:
    return abs(q.x * 3 - k.x * 2 - q.y) <= 8 * (attnc.HEAD + 1)


@attnc.pattern
def documents(q: Any, k: Any, *, ids: attnc.Table) -> Any:
    return ids[attnc.BATCH, q.x] == ids[attnc.BATCH, k.x]


@attnc.pattern
def half_plane(q: Any, k: Any) -> Any:
    """Keys beyond a line that no axis knows."""
    return q.y + 2 * q.x >= k.y + 2 * k.x + 3


@attnc.pattern
def biased_half_plane(q: Any, k: Any, *, bias: attnc.Table) -> Any:
    return attnc.where(q.y + 2 * q.x >= k.y + 2 * k.x + 3, attnc.SCORE + bias[attnc.HEAD, q.y - k.y + 15, q.x - k.x + 15])


CASES: dict[str, Problem] = {
    "checker": Problem(checker(), (20, 24)),
    "weights by sigmoid": Problem(weighted(half_plane(), "sigmoid", post=True), (16, 16), dropout=0.4),
    "ring": Problem(ring(inner=15, outer=16), (30, 34), batch=1, heads=4, kv_heads=2),
    "half plane with a prefix": Problem(half_plane(), (16, 20), prefix=3),
    "half plane with padding": Problem(half_plane(), (15, 18), pad=((2, 3), (0, 6))),
    "biased half plane": Problem(biased_half_plane(), (16, 16), reach=31, batch=1),
    "diagonals": Problem(diagonals(step=64), (400,), batch=1),
    "bigbird": Problem(bigbird(side=6, every=96), (500,), batch=1),
    "by head": Problem(by_head(), (12, 30), heads=4),
}
# interpreted kernels take their time
TRITON: dict[str, Problem] = {
    "checker": Problem(checker(), (16, 16), heads=1, kv_heads=1, batch=1),
    "checker of three axes": Problem(checker(), (3, 6, 8), heads=1, kv_heads=1, batch=1),
    "cross": Problem(attnc.patterns.cross(4), (8, 16), batch=1, heads=2, kv_heads=1),
    "checker in windows": Problem(attnc.patterns.window(12) & checker(), (24, 12), heads=1, kv_heads=1, batch=1),
    "half plane with a prefix": Problem(half_plane(), (9, 10), prefix=3, batch=1, heads=2, kv_heads=1),
    "biased half plane": Problem(biased_half_plane(), (8, 12), heads=1, kv_heads=1, reach=31, batch=1),
    "bigbird": Problem(bigbird(side=6, every=48), (150,), heads=1, kv_heads=1, batch=1),
    "diagonals": Problem(diagonals(step=48), (100,), heads=1, kv_heads=1, batch=1),
}
NARROW = Limits(32, 32, partial=1.0, query=1.0, key=1.0)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[Listed]:
    """The lists that calls walk. Tiles and blocks are so small that these grids have many, on every backend."""
    seen: list[Listed] = []
    for module, name in (("attnc.codegen.torch", "_listed_tiles"), ("attnc.runtime.cpp", "_ready_listed")):
        if not CPP and module.endswith("cpp"):
            continue
        real = getattr(importlib.import_module(module), name)

        def noted(*args: Any, real: Any = real) -> Any:
            seen.extend(a for a in args if isinstance(a, Listed))
            return real(*args)

        monkeypatch.setattr(f"{module}.{name}", noted)
    monkeypatch.setattr("attnc.codegen.torch.LIMITS", NARROW)
    monkeypatch.setattr("attnc.codegen.cpp.Spec.list_limits", lambda self, backward: NARROW)
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_backends_walk_lists(name: str, backend: str, walked: list[Listed]) -> None:
    """Forward and backward against float64, walking lists in both directions."""
    hold(CASES[name], backend)
    assert len(walked) >= 2
    assert all(0 < x.lists.visited < x.lists.boxed for x in walked)


def by_both(op: attnc.Operator, truth: attnc.Operator, rows: list[torch.Tensor], **tables: torch.Tensor) -> None:
    """Outputs and gradients in float64 against the eager meaning."""
    found = []
    for run in (op, truth):
        leaves = [t.detach().requires_grad_() for t in rows]
        out = run(*leaves, **tables)
        cotangent = torch.arange(out.numel(), dtype=out.dtype).view(out.shape) % 7 - 3
        found.append([out, *torch.autograd.grad((out * cotangent).sum(), leaves)])
    for mine, true in zip(*found, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-11)


def rows_of(heads: int, kv_heads: int, n: int, m: int, batch: int = 1, d: int = 16) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    sizes = ((heads, n), (kv_heads, m), (kv_heads, m))
    return [torch.randn(batch, h, t, d, generator=g, dtype=torch.float64) for h, t in sizes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents(backend: str, walked: list[Listed]) -> None:
    """Lists follow the values of a table: of each batch item at once, and of each call's own."""
    op, truth = (attnc.compile(documents(), grid=600, backend=b) for b in (backend, "eager"))
    rows = rows_of(4, 2, 600, 600, batch=2)
    for borders in ((140, 300, 320), (80, 400, 580)):
        ids = torch.bucketize(torch.arange(600), torch.tensor(borders), right=True)
        by_both(op, truth, rows, ids=torch.stack([ids, ids.roll(-9)]))
    assert len({x.lists.blocks.tobytes() for x in walked}) > 1
    before = len(walked)
    scattered = torch.arange(600) * 7 % 3  # nothing to skip: boxes
    by_both(op, truth, rows, ids=torch.stack([scattered, scattered]))
    assert len(walked) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_one_grid_to_another(backend: str, walked: list[Listed]) -> None:
    op, truth = (attnc.compile(tilted(), grid=(18, 24), kv_grid=(12, 16), backend=b) for b in (backend, "eager"))
    by_both(op, truth, rows_of(2, 2, 18 * 24, 12 * 16))
    assert walked


@pytest.mark.skipif(not CPP, reason="no C++ backend or no compiler here")
@pytest.mark.parametrize("longest", [0, 20_000])
def test_stand_alone_modules_carry_short_lists(longest: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the lists in their text, and without where those are too long: the same results."""
    monkeypatch.setattr("attnc.codegen.cpp.Spec.list_limits", lambda self, backward: NARROW)
    monkeypatch.setattr("attnc.codegen.cpp_module.CARRIED", longest)
    text = attnc.emit(checker(), grid=(20, 24), heads=2, head_dim=16, dtype="float64", target="cpu")
    assert ("'key_pieces'" in text) == bool(longest)
    path = tmp_path / "module.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("emitted_lists", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    by_both(module.attention, attnc.compile(checker(), grid=(20, 24), backend="eager"), rows_of(2, 1, 480, 480))


def test_explain_tells_of_lists() -> None:
    text = attnc.explain(checker(), grid=(40, 40))
    assert "lists       tiles of 1x40 queries visit 640 blocks of 40x1 keys, 640 of them in full;" in text
    assert "40.0 % of the boxes' 1,600" in text
    assert "operators walk them, in tiles of their backend's own, and modules for the CPU; Triton modules walk boxes" in text
    striped = attnc.pattern(lambda q, k: ((q.x - k.x) % 2 == 0) & (2 * q.y + q.x >= 2 * k.y + k.x))()
    assert "Triton kernels walk boxes, because of residue classes" in attnc.explain(striped, grid=(40, 40))
    assert "Triton kernels walk boxes, because of virtual rows" in attnc.explain(half_plane(), grid=(40, 40), pad=((0, 4), (0, 4)))


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
def test_inspect_compiles_the_kernels_that_walk_lists() -> None:
    """Of an operator's calls, with the elements of the listed blocks: all of them allowed where every block is full."""
    options: dict[str, Any] = {"heads": 2, "head_dim": 32, "target": "cuda:80"}
    found = attnc.inspect(checker(), grid=(64, 64), **options)
    assert found.strategy == "dense by lists"
    assert found.issued_elements == found.allowed_elements == 2 * 13418496 // 2
    for k in ("forward", "backward_dq", "backward_dkv"):
        assert found.kernels[k].issued_elements == found.issued_elements
        assert [(x.kind, x.iterations > 0) for x in found.kernels[k].loops] == [("full", True)], "no loop over blocks in part"
    # prefix tokens: a loop of their own before those over blocks
    beside = attnc.inspect(half_plane(), grid=(48, 48), prefix=2, **options)
    prefix, full, part = beside.kernels["forward"].loops
    programs = 2 * 48 * 48 // 64
    assert (prefix.iterations, full.kind, part.kind) == (programs, "full", "partial")
    assert (full.iterations + part.iterations) * 64 * 64 == beside.kernels["forward"].issued_elements
    # a grid so small that lists would not pay
    assert attnc.inspect(half_plane(), grid=(8, 8), **options).strategy == "dense"


@needs_triton
def test_interpreted_triton_walks_lists() -> None:
    """Forward and backward against float64, full chunks and partial ones, with prefix tokens, a table and shared key heads."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(here / "triton_lists.py"), *TRITON],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, cwd=here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(told) == set(TRITON)
    assert not any(line.startswith("0 lists") for line in told.values()), told
    assert sum(int(line.split()[-2]) for line in told.values()) > 0, told
    assert told["cross"].startswith("2 lists, 2 filled"), "of the second part, forward and backward: kernels with one loop"
    assert told["biased half plane"].startswith("2 lists, 0 filled"), told


def test_boxes_and_lists_are_weighed_alike() -> None:
    """What is compared has one unit: boxes that leave nothing out cost about what a list of all blocks, in part, would."""
    limits = Limits(64, 64)
    for grid, sides in (((2048,), (64,)), ((32, 64), (8, 8))):
        n = math.prod(grid)
        g = geometry_of(attnc.pattern(lambda q, k: q.x >= 0)(), grid)
        assert box_work(g, sides[: len(g.axes)], limits) == pytest.approx(limits.work(64, 64, 0, (n // 64) ** 2), rel=0.03)


def test_sides_are_no_longer_than_a_residue_class() -> None:
    """Every fourth key: 128 of 512. Blocks of that side are whole; of a longer one they would be cut, and masked."""
    p = attnc.pattern(lambda q, k: ((q.x - k.x) % 4 == 0) & ((q.x // 64 + k.x // 64) % 3 == 0))()
    found = listed(geometry_of(p, (512,)), Limits(256, 256), (32,), 1, 1)
    assert found is not None
    assert (found.query_sides, found.key_sides) == ((128,), (128,))


def test_chunks_of_listed_tiles_fill_registers() -> None:
    """Triton's chunks have powers of two, at least 16, of rows and of columns."""
    flat = Tile((16,), (64,))
    for queries, keys, fits in ((32, 64, True), (16, 16, True), (32, 48, False), (24, 64, False), (8, 32, False)):
        found = of_lists(((queries,), (keys,)), 32, 2, "cuda:80", flat)
        assert (found is not None) == fits, (queries, keys)
        assert found is None or (found.forward.bm, found.forward.bn, found.dkv.bm) == (queries, keys, keys)


def test_the_rule_leaves_what_lists_would_not_help() -> None:
    """A predicate that holds for a pair here and there in every block keeps its boxes; so does one that intervals express."""
    scattered = attnc.pattern(lambda q, k: (q.x * 7 + k.x * 13) % 11 < 3)()
    assert listed(geometry_of(scattered, (512,)), LIMITS, (64,), 1, 1) is None
    assert listed(geometry_of(attnc.patterns.window(7), (56, 56)), LIMITS, (7, 7), 1, 1) is None
