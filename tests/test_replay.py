"""Calls run again: what looks like an earlier call skips all but the kernel, and is right for the tensors that it gets."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from heard import Heard
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnc
from attnc import patterns
from attnc.compiler import has_compiler
from attnc.runtime import replay

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

PACKED = "b y x (three h d)"
Make = Callable[[torch.dtype], tuple[tuple[Tensor, ...], dict[str, Tensor]]]


def _packed(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return (torch.randn(2, 6, 5, 3 * 2 * 8, dtype=dtype),), {"bias": torch.randn(2, 5, 5, dtype=dtype)}


def _three(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    q = torch.randn(2, 30, 4, 8, dtype=dtype).transpose(1, 2)
    return (q, *(torch.randn(2, 2, 30, w, dtype=dtype) for w in (8, 16))), {"bias": torch.randn(4, 5, 5, dtype=dtype).mT}


def _merged(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return tuple(torch.randn(2, 30, 2 * w, dtype=dtype) for w in (8, 8, 16)), {"bias": torch.randn(1, 5, 5, dtype=dtype)}


CALLS: dict[str, tuple[dict[str, Any], Make]] = {
    "packed": ({"layout": PACKED, "heads": 2}, _packed),
    "three tensors": ({}, _three),
    "one group": ({"layout": "b (y x) (h d)", "heads": 2}, _merged),
}


def _operators(options: dict[str, Any], p: Any = None) -> tuple[Any, Any]:
    p = patterns.window(3, bias="relative") if p is None else p
    return tuple(make(p, grid=(6, 5), **options) for make in (attnc.compile, attnc.reference))


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def _close(found: Tensor, truth: Tensor, what: str) -> None:
    at_most = {torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01, torch.float64: 1e-10}[found.dtype]
    assert (found.double() - truth).abs().max() <= at_most * max(1.0, truth.abs().max().item()), what


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One True for each kernel run by a replay."""
    runs: list[bool] = []
    plain = replay.Plan.__call__

    def counted(plan: Any, addresses: list[int]) -> None:
        runs.append(True)
        plain(plan, addresses)

    monkeypatch.setattr(replay.Plan, "__call__", counted)
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_other_tensors_of_the_same_look(name: str, dtype: torch.dtype, replayed: list[bool]) -> None:
    options, make = CALLS[name]
    op, meaning = _operators(options)
    for turn in range(3):
        rows, tables = make(dtype)
        for t in (*rows, *tables.values()):
            t.requires_grad_()
        with torch.no_grad():
            _close(op(*rows, **tables), meaning(*map(_double, rows), **{n: _double(t) for n, t in tables.items()}), f"out {turn}")
            _, lse = op(*rows, **tables, return_lse=True)
        exact = [*map(_double, rows)], {n: _double(t) for n, t in tables.items()}
        truth, logs = meaning(*exact[0], **exact[1], return_lse=True)
        out = op(*rows, **tables)
        assert (lse - logs).abs().max() < 1e-4
        weight = torch.randn_like(out)
        if turn == 2:  # laid out in another way
            weight = weight.permute(*reversed(range(out.dim()))).contiguous().permute(*reversed(range(out.dim())))
        found = torch.autograd.grad(out, (*rows, *tables.values()), weight)
        wanted = torch.autograd.grad(truth, (*exact[0], *exact[1].values()), weight.double())
        for n, (a, b) in enumerate(zip(found, wanted, strict=True)):
            _close(a, b, f"gradient {n} of turn {turn}")
            assert a.shape == b.shape
    assert len(replayed) >= 9  # all but the first call of each kind, and their backwards


@attnc.pattern
def _documents(q: Any, k: Any, *, ids: attnc.Table) -> Any:
    return ids[q.x] == ids[k.x]


def _window() -> tuple[Any, Tensor, Tensor]:
    op, _ = _operators({"layout": PACKED, "heads": 2})
    (x,), tables = _packed(torch.float32)
    return op, x, tables["bias"]


def test_an_output_looks_as_it_did(replayed: list[bool]) -> None:
    for options, make in CALLS.values():
        op, _ = _operators(options)
        rows, tables = make(torch.float32)
        first = op(*rows, **tables)
        again = op(*rows, **tables)
        assert torch.equal(first, again)
        assert first.stride() == again.stride()
        *other, last = rows
        wide = torch.cat([last, last], 0)[::2]  # another stride of the batch
        assert torch.equal(op(*other, wide, **tables)[:1], op(*other, wide.clone(), **tables)[:1])
    assert len(replayed) == 6  # not those of another stride


def test_arguments_are_told_apart() -> None:
    op, x, bias = _window()
    plain = op(x, bias=bias)
    for _ in range(2):
        assert torch.equal(op(x, bias=bias), plain)
        assert not torch.equal(op(x, bias=bias, scale=0.1), plain)
        assert isinstance(op(x, bias=bias, return_lse=True), tuple)
        assert not torch.equal(op(x, bias=bias, dropout_p=0.5, seed=1), plain)
    free = attnc.compile(patterns.window(3))
    t = torch.randn(1, 1, 36, 8)
    results = [free(t, t, t, grid=g) for g in ((6, 6), (4, 9), (6, 6), (4, 9))]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])


def test_threads_and_processes(replayed: list[bool]) -> None:
    op, x, bias = _window()
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 1, 2):
            torch.set_num_threads(n)
            found.append(op(x, bias=bias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)
    assert len(replayed) == 2
    other = pickle.loads(pickle.dumps(op))  # noqa: S301
    assert torch.equal(other(x, bias=bias), found[0])
    assert torch.equal(other(x, bias=bias), found[0])
    assert len(replayed) == 3


def test_virtual_keys_and_prefix_tokens(replayed: list[bool]) -> None:
    p = patterns.window(4)
    op, meaning = (make(p, grid=(6, 5), pad="multiple", prefix=2) for make in (attnc.compile, attnc.reference))
    pads = {"pad_k": torch.randn(1, 8, requires_grad=True), "pad_v": torch.randn(1, 8, requires_grad=True)}
    for tables in ({}, {n: t.detach() for n, t in pads.items()}, pads):
        for _ in range(2):
            q, k, v = (torch.randn(2, 3, 32, 8, requires_grad=True) for _ in range(3))
            out = op(q, k, v, **tables)
            truth = meaning(*(exact := [*map(_double, (q, k, v))]), **{n: _double(t) for n, t in tables.items()})
            _close(out, truth, "out")
            weight = torch.randn_like(out)
            wanted = torch.autograd.grad(truth, exact, weight.double())
            for a, b in zip(torch.autograd.grad(out, (q, k, v), weight), wanted, strict=True):
                _close(a, b, "gradient")
            with torch.no_grad():
                _close(op(q, k, v, **tables), truth.detach(), "without gradients")
    assert replayed


def test_tables_that_decide_which_blocks_run_are_looked_at_each_time(replayed: list[bool]) -> None:
    n = 600
    op, meaning = (make(_documents(), grid=n) for make in (attnc.compile, attnc.reference))
    x = torch.randn(1, 1, n, 8)
    for size in (16, 128, 32):
        ids = torch.arange(n) // size
        _close(op(x, x, x, ids=ids), meaning(*[x.double()] * 3, ids=ids), f"documents of {size}")
    assert not replayed


def test_negative_views_are_what_they_stand_for() -> None:
    op = attnc.compile(patterns.full(), grid=(20,))
    x = torch.randn(1, 2, 20, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    for _ in range(2):
        assert torch.equal(op(x, x, x), op(*[x.resolve_neg().clone()] * 3))


def test_who_listens_later_hears_the_operators(replayed: list[bool]) -> None:
    op, x, bias = _window()
    quiet = op(x, bias=bias)
    assert torch.equal(op(x, bias=bias), quiet)
    assert len(replayed) == 1
    with Heard() as heard:
        assert torch.equal(op(x, bias=bias), quiet)
    assert "attnc.attend_packed.default" in heard.names
    leaves = x.requires_grad_(), bias.requires_grad_()
    weight = torch.randn_like(quiet)
    wanted = torch.autograd.grad(op(*leaves[:1], bias=bias), leaves, weight)
    before = len(replayed)
    with Heard() as heard:
        found = torch.autograd.grad(op(x, bias=bias), leaves, weight)
    assert "attnc.attend_packed_backward.default" in heard.names
    out = op(x, bias=bias)
    assert len(replayed) == before + 1
    with Heard() as heard:
        later = torch.autograd.grad(out, leaves, weight)
    assert "attnc.attend_packed_backward.default" in heard.names
    for a, b, c in zip(wanted, found, later, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        assert torch.allclose(a, c, atol=1e-6)
    with pytest.raises(attnc.UnsupportedError, match="second derivatives"):
        torch.autograd.grad(op(x, bias=bias), x, weight, create_graph=True)[0].sum().backward()


def test_nothing_of_a_call_stays_in_memory(replayed: list[bool]) -> None:
    op, x, bias = _window()
    op(x, bias=bias.requires_grad_()).sum().backward()
    op(x, bias=bias).sum().backward()
    assert len(replayed) == 4
    gone = [weakref.ref(t) for t in (x, bias)]
    del x, bias
    gc.collect()
    assert [g() for g in gone] == [None, None]


@attnc.mechanism
def _turned(q: Any, k: Any, v: Any) -> Any:
    return attnc.channel_attend(v, q, k)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mechanism", [patterns.channel(), _turned()], ids=["channel", "turned"])
def test_channel_attention(mechanism: Any, packed: bool, replayed: list[bool]) -> None:
    options = {"layout": "b x (three h d)", "heads": 2} if packed else {"layout": "b x h d"}
    op, meaning = (make(mechanism, **options) for make in (attnc.compile, attnc.reference))
    for turn in range(3):
        given = [torch.randn(2, 20, 3 * 2 * 8)] if packed else [torch.randn(2, 20, 2, 8) for _ in range(3)]
        for t in given:
            t.requires_grad_()
        exact = [*map(_double, given)]
        truth, out = meaning(*exact), op(*given)
        with torch.no_grad():
            assert torch.equal(op(*given), out)
        _close(out, truth, f"out {turn}")
        weight = torch.randn_like(out)
        wanted = torch.autograd.grad(truth, exact, weight.double())
        for a, b in zip(torch.autograd.grad(out, given, weight, retain_graph=True), wanted, strict=True):
            _close(a, b, f"gradient of turn {turn}")
        with Heard() as heard:
            again = torch.autograd.grad(out, given, weight)
        assert "attnc.channel_backward.default" in heard.names
        for a, b in zip(again, wanted, strict=True):
            _close(a, b, f"gradient of turn {turn}, heard")
    assert len(replayed) == 9


def test_a_mechanism_of_two_steps_is_no_replay(replayed: list[bool]) -> None:
    @attnc.mechanism
    def two(q: Any, k: Any, v: Any) -> Any:
        return attnc.channel_attend(q, k, attnc.channel_attend(k, q, v))

    op, meaning = (make(two()) for make in (attnc.compile, attnc.reference))
    for _ in range(2):
        rows = [torch.randn(1, 2, 20, 8) for _ in range(3)]
        _close(op(*rows), meaning(*map(_double, rows)), "out")
    assert not replayed


@pytest.mark.parametrize("mechanism", [False, True])
def test_checkpoints_of_a_first_call(mechanism: bool) -> None:
    op, meaning = (make(patterns.channel() if mechanism else patterns.window(3)) for make in (attnc.compile, attnc.reference))
    options = {} if mechanism else {"grid": (6, 5)}
    rows = [torch.randn(1, 2, 30, 8, requires_grad=True) for _ in range(3)]
    for _ in range(2):
        out = checkpoint(lambda *r: op(*r, **options).square(), *rows, use_reentrant=False)
        exact = [*map(_double, rows)]
        wanted = torch.autograd.grad(meaning(*exact, **options).square().sum(), exact)
        for a, b in zip(torch.autograd.grad(out.sum(), rows), wanted, strict=True):
            _close(a, b, "gradient")


@pytest.mark.parametrize("mechanism", [False, True])
def test_a_packed_tensor_that_lies_in_a_wider_one(mechanism: bool, replayed: list[bool]) -> None:
    """Its gradient is dense: q, k and v lie elsewhere in it."""
    p = patterns.channel() if mechanism else patterns.window(3)
    options: dict[str, Any] = {"layout": "three b h x d" if mechanism else "three b h (y x) d"}
    options |= {} if mechanism else {"grid": (6, 5)}
    op, meaning = (make(p, **options) for make in (attnc.compile, attnc.reference))
    for _ in range(2):
        whole = torch.randn(3, 4, 2, 30, 8, requires_grad=True)
        exact = _double(whole)
        out, truth = op(whole[:, 1:3]), meaning(exact[:, 1:3])
        weight = torch.randn_like(out)
        _close(torch.autograd.grad(out, whole, weight)[0], torch.autograd.grad(truth, exact, weight.double())[0], "gradient")
    assert len(replayed) == 4


def test_a_key_too_many_is_refused_however_often_the_others_were_seen() -> None:
    op, x, bias = _window()
    op(x, bias=bias)
    with pytest.raises(attnc.ShapeError, match="packs q, k and v"):
        op(x, x, bias=bias)


@attnc.pattern
def _crossing(q: Any, k: Any, *, bias: attnc.Table) -> Any:
    return attnc.where((q.y == k.y) | (q.x == k.x), attnc.SCORE + bias[attnc.HEAD, q.x - k.x + 11])


SEVERAL: dict[str, tuple[Any, int, dict[str, tuple[int, ...]]]] = {
    "a union": (_crossing(), 4, {"bias": (4, 23)}),
    "heads that differ": (patterns.per_head([patterns.window(3, bias="relative"), patterns.grid(3)]), 4, {"bias": (4, 5, 5)}),
    "heads that share keys": (patterns.per_head([patterns.strip("x", 2), patterns.strip("y", 3)]), 2, {}),
    "heads that share them all": (patterns.per_head([patterns.strip("x", 2), patterns.neighborhood(3)]), 1, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SEVERAL)
def test_several_kernels(name: str, dtype: torch.dtype, replayed: list[bool]) -> None:
    """Also of gradients, but in half precision where several are summed: the operators sum them in float32."""
    p, kv_heads, shapes = SEVERAL[name]
    gradients = dtype == torch.float32 or name == "heads that differ"
    op, meaning = (make(p, grid=(12, 12)) for make in (attnc.compile, attnc.reference))
    for turn in range(3):
        rows = [torch.randn(2, h, 144, 8, dtype=dtype) for h in (4, kv_heads, kv_heads)]
        tables = {n: torch.randn(s) for n, s in shapes.items()}
        exact = [*map(_double, rows)], {n: _double(t) for n, t in tables.items()}
        truth, logs = meaning(*exact[0], **exact[1], return_lse=True)
        _close(op(*rows, **tables), truth, f"out {turn}")
        out, lse = op(*rows, **tables, return_lse=True)
        _close(out, truth, f"out {turn}")
        assert (lse - logs).abs().max() < (1e-4 if dtype == torch.float32 else 0.05)
        if not gradients:
            continue
        leaves = [t.requires_grad_() for t in (*rows, *tables.values())]
        wide = [t.requires_grad_() for t in (*exact[0], *exact[1].values())]
        weight = torch.randn_like(out)
        found = torch.autograd.grad(op(*rows, **tables), leaves, weight)
        wanted = torch.autograd.grad(meaning(*exact[0], **exact[1]), wide, weight.double())
        for a, b in zip(found, wanted, strict=True):
            _close(a.to(dtype), b, f"gradient of turn {turn}")
    assert len(replayed) == (20 if gradients else 8)  # two kernels for each call but the first of its kind, and each backward


def test_integers_of_more_than_32_bits_are_refused_however_often_smaller_ones_were_seen() -> None:
    op = attnc.compile(_documents(), grid=30)
    x = torch.randn(1, 1, 30, 8)
    large = torch.arange(30) << 31
    with pytest.raises(attnc.UnsupportedError, match="'ids' holds 62277025792"):
        op(x, x, x, ids=large)
    for _ in range(2):
        op(x, x, x, ids=torch.arange(30))
    with pytest.raises(attnc.UnsupportedError, match=r"_documents.*backend='torch'"):
        op(x, x, x, ids=large)
    with pytest.raises(attnc.UnsupportedError, match="holds -4294967296"):
        op(x, x, x, ids=torch.full((30,), -(2**32)))
