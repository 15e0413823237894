"""One test for each message that compile and call can raise: it names the pattern, the argument, the value, and the way out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import strategies as draws
import torch
from torch.autograd import forward_ad

import attnc
from attnc import AttncError, BuildError, CacheError, DeclarationError, ShapeError, UnsupportedError
from attnc.patterns import alibi, causal, channel, full, neighborhood, per_head, soft_cap, strip, window


def rows(n: int = 20, heads: int = 2, d: int = 8, batch: int = 1, **options: Any) -> torch.Tensor:
    return torch.randn(batch, heads, n, d, **options)


def compiled(p: Any = None, **options: Any) -> attnc.Operator:
    return attnc.compile(window(2) if p is None else p, **{"grid": (4, 5), "backend": "torch", **options})


@attnc.pattern
def reserved(q: Any, k: Any, *, scale: attnc.Table) -> Any:
    return attnc.SCORE * scale[attnc.HEAD]


@attnc.pattern
def with_v(q: Any, k: Any, *, v: attnc.Table) -> Any:
    return attnc.SCORE + v[attnc.HEAD]


@attnc.pattern
def with_pad(q: Any, k: Any, *, pad_k: attnc.Table) -> Any:
    return attnc.SCORE + pad_k[attnc.HEAD]


@attnc.pattern
def over_queries(q: Any, k: Any) -> Any:
    return attnc.where(q.x == k.x, attnc.SCORE, normalizer=attnc.softmax(over="queries"))


@attnc.pattern
def sigmoid(q: Any, k: Any) -> Any:
    return attnc.where(q.x == k.x, attnc.SCORE, normalizer=attnc.sigmoid())


@attnc.pattern
def with_sink(q: Any, k: Any, *, sink: attnc.Table) -> Any:
    return attnc.where(q.x == k.x, attnc.SCORE, normalizer=attnc.softmax(sink=sink))


COMPILE: list[tuple[Callable[[], Any], type[AttncError], str]] = [
    (lambda: window(2) | window, DeclarationError, r"`window\(2\) \| ...`: takes patterns, not <function .* \(call it"),
    (lambda: per_head([window(2), None]), DeclarationError, "per_head: takes patterns, not None"),
    (lambda: per_head(3), DeclarationError, r"per_head\(3\): at least one pattern"),
    (lambda: soft_cap("a"), DeclarationError, r"soft_cap\('a'\): a positive number"),
    (lambda: alibi(3), DeclarationError, "alibi: takes patterns, not 3"),
    (lambda: window(2).heads("a"), DeclarationError, r"heads\('a'\): a non-empty list of head numbers"),
    (lambda: compiled(strip("x", "a")), DeclarationError, r"strip\('x', 'a'\): an axis of \(y, x\) and a positive width"),
    (lambda: compiled(heads=0), DeclarationError, "heads=0: the number of query heads"),
    (lambda: compiled(layout=3), DeclarationError, "layout=3: a string that names each dimension"),
    (lambda: compiled(prefix=True), DeclarationError, "prefix=True: a non-negative int"),
    (lambda: attnc.mask(channel(), grid=(4, 5)), UnsupportedError, r"mechanism channel\(\): its steps are no relation on a grid"),
    (lambda: attnc.compile(window), DeclarationError, r"takes a pattern or a mechanism, not function \(call it"),
    (lambda: attnc.compile(3), DeclarationError, "takes a pattern or a mechanism, not int"),
    (lambda: compiled(tune=True), UnsupportedError, r"window\(2\): tune=True"),
    (lambda: compiled(backend="cuda"), DeclarationError, "backend='cuda': one of auto, triton, cpp, torch, eager"),
    (lambda: compiled(fallback="eager"), DeclarationError, "fallback='eager': None"),
    (lambda: compiled(prefix=-1), DeclarationError, "prefix=-1: a non-negative int"),
    (lambda: compiled(kv_prefix=1.5), DeclarationError, "kv_prefix=1.5: a non-negative int"),
    (lambda: compiled(grid=(4, 0)), DeclarationError, r"grid \(4, 0\): axis lengths are positive ints"),
    (lambda: compiled(grid=(4, 2.0)), DeclarationError, r"grid \(4, 2.0\): axis lengths are positive ints"),
    (lambda: compiled(grid=(4, True)), DeclarationError, r"grid \(4, True\): axis lengths are positive ints"),
    (lambda: compiled(grid=(2, 2, 2, 2)), DeclarationError, "4 axes need names: pass a dict"),
    (lambda: compiled(grid=()), DeclarationError, "0 axes need names"),
    (lambda: compiled(grid={}), DeclarationError, "at least one axis"),
    (lambda: compiled(grid={"size": 4}), DeclarationError, "'size' cannot name an axis"),
    (lambda: compiled(grid={"my axis": 4}), DeclarationError, "'my axis' cannot name an axis"),
    (
        lambda: compiled(grid={"a": 4, "b": 5}, layout="b (y x) h d"),
        DeclarationError,
        r"the axes \('y', 'x'\), grid= has \('a', 'b'\)",
    ),
    (lambda: compiled(kv_grid=(4,)), DeclarationError, r"window\(2\): kv_grid=\(4,\) beside grid=\(4, 5\): give both"),
    (lambda: compiled(grid=None, kv_grid=(4, 4)), DeclarationError, "beside grid=None: give both"),
    (lambda: compiled(pad=((1, 1),)), DeclarationError, r"pad=\(\(1, 1\),\): .* one pair of non-negative ints for each axis"),
    (lambda: compiled(pad=((1, 1), (0, -1))), DeclarationError, "one pair of non-negative ints for each axis"),
    (lambda: compiled(pad=4), DeclarationError, r"pad=4: \"multiple\", or \(\(before, after\), \.\.\.\)"),
    (lambda: compiled(pad="all"), DeclarationError, 'pad=.all.: "multiple", or'),
    (lambda: compiled(pad=((1, 1), (0, 1.5))), DeclarationError, "one pair of non-negative ints for each axis"),
    (lambda: compiled(channel(), pad="multiple"), UnsupportedError, r"channel\(\): pad= belongs to patterns"),
    (lambda: compiled(neighborhood(3), pad="multiple"), UnsupportedError, r"axis 0 is a clamped band: give pad=\(\(before"),
    (lambda: compiled(reserved()), DeclarationError, r"reserved\(\): 'scale' is a reserved keyword; rename the table"),
    (lambda: compiled(with_v()), DeclarationError, r"with_v\(\): 'v' is a reserved keyword; rename the table"),
    (lambda: compiled(with_pad()), DeclarationError, "'pad_k' is a reserved keyword"),
    (lambda: compiled(layout="b (y (x)) h d"), DeclarationError, "grouped by one level of brackets"),
    (lambda: compiled(layout="b h y x"), DeclarationError, "layout 'b h y x': no 'd'"),
    (lambda: compiled(layout="b h d"), DeclarationError, "no grid axis"),
    (lambda: compiled(layout="b y y h d"), DeclarationError, "a name occurs twice"),
    (lambda: compiled(layout="(b y x) h d"), DeclarationError, "the batch `b` is a dimension of its own"),
    (lambda: compiled(layout="b (x h) y d"), DeclarationError, "either one group"),
    (lambda: compiled(layout="b (y x) h d ()"), DeclarationError, "every dimension has a name"),
    (lambda: compiled(layout="b (y x) h d 1"), DeclarationError, "every dimension has a name"),
    (lambda: compiled(layout="b size h d", grid=None), DeclarationError, "'index' and 'size' cannot name an axis"),
    (lambda: compiled(layout="b y x h d", prefix=1), DeclarationError, "prefix tokens have no place in it"),
    (lambda: attnc.mask(window(2), grid=(4, None)), ShapeError, r"window\(2\): mask needs a grid with known lengths"),
    (lambda: attnc.mask(draws.documents(), grid=(4, 5)), UnsupportedError, r"documents\(\): the relation reads the runtime tables"),
]


@pytest.mark.parametrize(("make", "kind", "message"), COMPILE, ids=[m for *_, m in COMPILE])
def test_compile_refuses(make: Callable[[], Any], kind: type[AttncError], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


x = rows()
CALL: list[tuple[Callable[[], Any], type[AttncError], str]] = [
    (lambda: compiled()(x), ShapeError, r"window\(2\): q, k and v are three tensors; for one packed tensor give layout="),
    (lambda: compiled()(x, x, None), ShapeError, "q, k and v are three tensors"),
    (lambda: compiled()(x, x, [1]), ShapeError, "v is a list, not a tensor"),
    (lambda: compiled()(x[0], x, x), ShapeError, r"q has shape \(2, 20, 8\), expected \[B, H, N, D\]; say any other with layout="),
    (lambda: compiled()(rows(21), rows(21), rows(21)), ShapeError, r"q has 21 tokens, the grid \(4, 5\) make 20"),
    (lambda: compiled(prefix=2)(x, x, x), ShapeError, r"q has 20 tokens, the grid \(4, 5\) and 2 prefix tokens make 22"),
    (lambda: compiled()(x, rows(19), rows(19)), ShapeError, r"k has 19 tokens, the grid \(4, 5\) make 20"),
    (lambda: compiled()(x, x, rows(19)), ShapeError, r"k and v have different tokens: q \(1, 2, 20, 8\)"),
    (lambda: compiled()(x, rows(batch=2), rows(batch=2)), ShapeError, r"batch sizes differ: q \(1, 2, 20, 8\), k \(2, 2, 20, 8\)"),
    (lambda: compiled()(rows(heads=3), x, x), ShapeError, "3 query heads over 2 key and 2 value heads"),
    (lambda: compiled()(x, x, rows(heads=1)), ShapeError, "2 query heads over 2 key and 1 value heads"),
    (lambda: compiled()(x, x[:, :0], x[:, :0]), ShapeError, "2 query heads over 0 key and 0 value heads"),
    (lambda: compiled()(x[:, :0], x, x), ShapeError, "0 query heads over 2 key and 2 value heads"),
    (lambda: compiled(heads=4)(x, x, x), ShapeError, "compiled for heads=4, called with 2"),
    (lambda: compiled()(x, rows(d=4), x), ShapeError, "head dimensions of q and k differ"),
    (lambda: compiled()(x[..., :0], x[..., :0], x), ShapeError, "D = 0; head dimensions go from 1 to 256"),
    (lambda: compiled()(x, x, x[..., :0]), ShapeError, "Dv = 0; head dimensions go from 1 to 256"),
    (lambda: compiled()(rows(d=257), rows(d=257), x), ShapeError, "D = 257; head dimensions go from 1 to 256"),
    (lambda: compiled()(x, x, x.double()), ShapeError, "dtypes torch.float32, torch.float32, torch.float64: q, k and v share one"),
    (lambda: compiled()(*[x.int()] * 3), ShapeError, "dtypes torch.int32"),
    (lambda: compiled()(*[x.to(torch.complex64)] * 3), ShapeError, "share one of float32, float16, bfloat16, float64"),
    (lambda: compiled()(*[x.to(torch.float8_e4m3fn)] * 3), ShapeError, "share one of float32, float16, bfloat16, float64"),
    (lambda: compiled()(x, x.to("meta"), x), ShapeError, "devices cpu, meta, cpu differ"),
    (lambda: compiled()(None), ShapeError, "q is a NoneType, not a tensor"),
    (lambda: compiled(backend="cpp")(x.to_sparse(), x, x), ShapeError, r"q is a torch.sparse_coo tensor, .*: give q.to_dense\(\)"),
    (lambda: compiled()(x, x, x, scale="a"), ShapeError, "scale='a': a finite number, or None"),
    (lambda: compiled(backend="cpp")(x, x, x, scale=math.nan), ShapeError, "scale=nan: a finite number, or None"),
    (lambda: torch.func.grad(lambda t: compiled()(t, x, x).sum())(x), UnsupportedError, "torch.func's transforms .*: take gradi"),
    (lambda: torch.vmap(lambda t: compiled()(t, x, x))(x[None]), UnsupportedError, "torch.func's transforms .*: take gradients by"),
    (lambda: compiled()(x, x, x, scale=torch.ones(())), ShapeError, "scale= is a number, .* make it a table of the pattern"),
    (
        lambda: compiled()(x, x, x, sizes=torch.ones(1, 2)),
        ShapeError,
        r"window\(2\): sizes= is torch.float32 \(1, 2\), expected an int",
    ),
    (lambda: compiled()(x, x, x, dropout_p=1.0), ShapeError, "dropout_p=1.0: the probability of dropping a weight"),
    (
        lambda: compiled(sigmoid())(x, x, x, return_lse=True),
        ShapeError,
        "return_lse=True, but weights by sigmoid have no log-sum-exp",
    ),
    (
        lambda: compiled(over_queries())(x, x, x, return_lse=True),
        ShapeError,
        "return_lse=True, but weights by softmax over queries have no log-sum-exp of a query",
    ),
    (lambda: compiled(grid=None)(x, x, x), ShapeError, "compiled without a grid: pass grid="),
    (lambda: compiled(grid=(None, None))(x, x, x), ShapeError, r"the lengths of \(y, x\) are open: pass grid= with the call"),
    (lambda: compiled()(x, x, x, grid=(5, 4)), ShapeError, r"compiled for grid=\(4, 5\), called on \(5, 4\)"),
    (lambda: compiled(grid=(None, None))(x, x, x, grid=(20,)), ShapeError, r"compiled for the axes \('y', 'x'\)"),
    (lambda: compiled(grid=None)(x, x, x, grid=(-4, -5)), ShapeError, r"grid=\(-4, -5\): a call gives every axis its length"),
    (lambda: compiled(grid=None)(x, x, x, grid=(4, None)), ShapeError, "a call gives every axis its length"),
    (lambda: compiled(grid=None)(x, x, x, grid={"a": 4, "b": 5}), ShapeError, r"but the axes are \(y, x\)"),
    (
        lambda: compiled(window(2).on("x"), grid=None)(x, x, x, grid={"t": 1, "y": 4, "z": 5}),
        ShapeError,
        r"the axes are \(t, y, x\)",
    ),
    (lambda: compiled(causal().on("y"), grid=None)(x, x, x, grid=20), DeclarationError, r"\.on\('y'\): this grid has the axes x"),
    (lambda: compiled()(x, x, x, bias=x), ShapeError, r"window\(2\): unknown table 'bias' \(it reads: none\)"),
    (lambda: compiled(draws.decay())(x, x, x), ShapeError, r"the table 'rate' is missing: pass rate=tensor with 1 dimensions"),
    (lambda: compiled(draws.decay())(x, x, x, rate=2.0), ShapeError, "the table 'rate' is a float, not a tensor"),
    (
        lambda: compiled(draws.decay())(x, x, x, rate=torch.ones(2, 2)),
        ShapeError,
        r"'rate' has shape \(2, 2\), the pattern indexes 1",
    ),
    (
        lambda: compiled(draws.decay())(x, x, x, rate=torch.ones(2).int()),
        ShapeError,
        "holds floating-point numbers, not torch.int32",
    ),
    (lambda: compiled(draws.documents())(x, x, x, document=torch.ones(5)), ShapeError, "holds integers, not torch.float32"),
    (lambda: compiled(draws.decay())(x, x, x, rate=torch.ones(2, device="meta")), ShapeError, "'rate' is on meta, q on cpu"),
    (
        lambda: compiled(draws.decay())(x, x, x, rate=torch.ones(3)),
        ShapeError,
        "counts query heads, of which this call has 2: it is 2 or 1",
    ),
    (
        lambda: compiled(draws.per_item())(x, x, x, item=torch.ones(3, 2)),
        ShapeError,
        "counts batch items, of which this call has 1",
    ),
    (
        lambda: compiled(with_sink())(x, x, x, sink=torch.ones(3)),
        ShapeError,
        r"the sink 'sink' has 3 entries, expected one per query head \(2\)",
    ),
    (
        lambda: compiled(pad=((0, 1), (0, 1)))(x, x, x, pad_k=torch.ones(3, 8)),
        ShapeError,
        r"pad_k has shape \(3, 8\), expected \[2 or 1, 8\]",
    ),
    (lambda: compiled()(x, x, x, pad_k=torch.ones(2, 8)), ShapeError, "unknown table 'pad_k'"),
    (
        lambda: compiled(channel())(x, rows(10), rows(10)),
        ShapeError,
        r"mechanism channel\(\): q, k and v have the same heads, tokens",
    ),
    (lambda: compiled(channel())(x, x, x[..., :4]), ShapeError, "the same heads, tokens and channels"),
    (lambda: compiled(channel())(x, x, x, return_lse=True), ShapeError, r"mechanism channel\(\): unexpected argument return_lse"),
    (lambda: compiled(channel())(x, x, x, grid=(4, 5)), ShapeError, "its tokens have no grid"),
]


@pytest.mark.parametrize(("call", "kind", "message"), CALL, ids=[m for *_, m in CALL])
def test_a_call_refuses(call: Callable[[], Any], kind: type[AttncError], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_layouts_refuse() -> None:
    packed = compiled(layout="b (y x) (three h d)", heads=2)
    room = torch.randn(1, 20, 48)
    assert packed(room).shape == (1, 20, 16)
    for call, message in (
        (lambda: packed(room, room, room), "packs q, k and v in the first argument; k and v are left out"),
        (lambda: packed(room[0]), r"qkv has shape \(20, 48\), but the layout .* has 3 dimensions"),
        (lambda: packed(room[..., :47]), r"a dimension of 47 that \(three h d\) with heads=2 does not fit"),
        (
            lambda: compiled(layout="b (y x) (three h d)")(room),
            r"packs \(three h d\) in one dimension of 48: pass heads= to compile",
        ),
        (
            lambda: compiled(layout="three b h (y x) d")(x[None].expand(2, -1, -1, -1, -1)),
            "the dimension `three` of qkv has length 2",
        ),
        (lambda: compiled(layout="b (y x) h d")(x), "has no `three`: q, k and v are three tensors"),
        (
            lambda: attnc.compile(window(2), layout="b y x h d", backend="torch")(
                *(torch.randn(1, *s, 2, 8) for s in ((4, 6), (6, 4), (6, 4)))
            ),
            r"q lies on \(4, 6\) and k on \(6, 4\); compile with kv_grid=",
        ),
        (
            lambda: compiled(grid=(4, 5), layout="b y x h d")(*[torch.randn(1, 5, 4, 2, 8)] * 3),
            r"compiled for grid=\(4, 5\), called on \(5, 4\)",
        ),
    ):
        with pytest.raises(ShapeError, match=message):
            call()


@attnc.pattern
def looked_up(q: Any, k: Any, *, at: Callable[..., Any], when: Callable[..., Any], where: attnc.Table) -> Any:
    return attnc.where(when(q, k), attnc.SCORE + where[at(q, k)])


TABLES: list[tuple[str, Callable[..., Any], Callable[..., Any], int, int | None]] = [
    # what is indexed, relation, index, entries, an index outside (None: all is well)
    ("difference", lambda q, k: abs(q.x - k.x) <= 3, lambda q, k: q.x - k.x + 3, 7, None),
    ("difference, one short", lambda q, k: abs(q.x - k.x) <= 3, lambda q, k: q.x - k.x + 3, 6, 6),
    ("difference, negative", lambda q, k: abs(q.x - k.x) <= 3, lambda q, k: q.x - k.x + 2, 9, -1),
    ("causal distance", lambda q, k: k.index <= q.index, lambda q, k: q.index - k.index, 30, None),
    ("causal distance, too far", lambda q, k: k.index <= q.index, lambda q, k: q.index - k.index, 29, 29),
    ("modulus", lambda q, k: True, lambda q, k: (q.x - k.x) % 4, 4, None),
    ("modulus, too few", lambda q, k: True, lambda q, k: (q.x - k.x) % 4, 3, 3),
    ("modulus of seen keys", lambda q, k: k.x < 3, lambda q, k: k.x % 4, 3, None),
    ("modulus of seen keys, too few", lambda q, k: q.x >= k.x, lambda q, k: k.x % 4, 3, 3),
    ("modulus of keys, too few", lambda q, k: True, lambda q, k: k.x % 4, 3, 3),
    ("two axes", lambda q, k: (q.y == k.y) & (q.x == k.x), lambda q, k: q.y * 6 + q.x, 30, None),
    ("two axes, too few", lambda q, k: (q.y == k.y) & (q.x == k.x), lambda q, k: q.y * 6 + k.x, 29, 29),
    ("two axes that follow each other", lambda q, k: q.y == k.y, lambda q, k: q.y - k.y + q.x * 0, 2, None),
    ("a sum of two axes, negative", lambda q, k: True, lambda q, k: q.y + (k.x - 2), 9, -2),
    ("outside the relation only", lambda q, k: q.index < 4, lambda q, k: attnc.where(q.index < 4, q.index, 99), 4, None),
    ("a diagonal over both axes", lambda q, k: q.y + q.x == k.y + k.x, lambda q, k: q.y + q.x - k.y - k.x, 2, None),
    ("a diagonal, off by one", lambda q, k: q.y + q.x == k.y + k.x + 1, lambda q, k: q.y + q.x - k.y - k.x - 2, 2, -1),
    ("a diagonal, along one axis", lambda q, k: (q.y + q.x == k.y + k.x) & (q.y <= 1), lambda q, k: q.y + k.y, 6, None),
    ("a diagonal, along one axis, too few", lambda q, k: (q.y + q.x == k.y + k.x) & (q.y <= 1), lambda q, k: q.y + k.y, 5, 5),
    ("heads beside", lambda q, k: (attnc.HEAD == 0) & (q.x == k.x) & (q.x < 2), lambda q, k: q.x * (attnc.HEAD + 1), 2, None),
    ("no pair at all", lambda q, k: q.x < 0, lambda q, k: q.x - 100, 2, None),
]


@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize(("what", "when", "at", "entries", "outside"), TABLES, ids=[t[0] for t in TABLES])
def test_a_table_index_outside_its_table_is_no_silent_number(
    what: str, when: Callable[..., Any], at: Callable[..., Any], entries: int, outside: int | None, backend: str
) -> None:
    """Backends clamp indices, so an allowed pair whose index leaves the table would read a neighbour's entry."""
    op = compiled(looked_up(at=at, when=when), grid=(5, 6), backend=backend)
    q = rows(30)
    table = torch.randn(entries)
    if outside is None:
        assert op(q, q, q, where=table).isfinite().all()
        return
    with pytest.raises(
        ShapeError, match=rf"the table 'where' has shape \({entries},\), but .* comes to {outside} for an allowed pair"
    ):
        op(q, q, q, where=table)
    op(q, q, q, where=torch.randn(1))  # one entry serves all


def test_a_library_bias_that_is_too_small_is_refused_and_guards_are_read() -> None:
    op = compiled(window(2, bias="relative"))
    with pytest.raises(
        ShapeError, match=r"table 'bias' has shape \(2, 3, 2\), but `q.x % 2 - k.x % 2 \+ 1` \(dimension 2\) comes to 2"
    ):
        op(x, x, x, bias=torch.randn(2, 3, 2))
    # a union: each part reads its own range, under its own condition
    joined = compiled(window(2, bias="relative") | full())
    assert joined(x, x, x, bias=torch.randn(2, 3, 3)).isfinite().all()
    joined = compiled(neighborhood(3, bias="relative") | full())
    assert joined(x, x, x, bias=torch.randn(2, 5, 5)).isfinite().all()
    with pytest.raises(ShapeError, match="comes to 4 for an allowed pair"):
        joined(x, x, x, bias=torch.randn(2, 5, 4))


def test_virtual_rows_before_the_grid_move_the_index() -> None:
    """The first of 6 queries after 2 virtual ones has the coordinate 2, as every query's number says."""
    op = compiled(looked_up(at=lambda q, k: q.x, when=lambda q, k: q.x >= k.x), grid=(5, 6), pad=((0, 0), (2, 0)))
    q, pads = rows(30), {"pad_k": torch.randn(2, 8), "pad_v": torch.randn(2, 8)}
    assert op(q, q, q, where=torch.randn(8), **pads).isfinite().all()
    with pytest.raises(ShapeError, match=r"`q\.x` \(dimension 0\) comes to 7 for an allowed pair"):
        op(q, q, q, where=torch.randn(7), **pads)


def test_what_other_batch_items_may_not_see_is_not_looked_up_for_them() -> None:
    """Item 1 sees nothing, and what item 0 may not see does not count either."""
    ahead = looked_up(at=lambda q, k: (k.x - q.x) * (1 - 2 * attnc.BATCH), when=lambda q, k: (attnc.BATCH == 0) & (q.x <= k.x))
    op, q = compiled(ahead, grid=(5, 6)), rows(30, batch=2)
    assert op(q, q, q, where=torch.randn(6)).isfinite().all()
    with pytest.raises(ShapeError, match="comes to 5 for an allowed pair"):
        op(q, q, q, where=torch.randn(5))


def test_divisors_that_can_be_zero_are_refused() -> None:
    """Integer division by zero ends a C++ process."""
    q = rows(20)
    for body in (
        lambda q, k: q.x // k.x == 0,
        lambda q, k: q.x % (k.y - q.y) == 0,
        lambda q, k: q.x // (q.size.y // 5) == 0,
        lambda q, k: q.x // (q.size.x - 1 - k.x) == 0,  # of the last key alone
    ):
        with pytest.raises(ShapeError, match=r"divides by .* which can be 0 on this grid: use attnc.max\(.*, 1\)"):
            compiled(attnc.pattern(body)())(q, q, q)
    for body in (
        lambda q, k: q.x // attnc.max(k.x, 1) == 0,
        lambda q, k: q.x // (q.size.y // 4) == 0,
        lambda q, k: q.x % (k.x + 1) == 0,
    ):
        assert compiled(attnc.pattern(body)())(q, q, q).isfinite().all()


def test_integers_that_do_not_fit_are_refused() -> None:
    from attnc.schedule import bounds

    p = attnc.pattern(lambda q, k: q.x * 2**30 >= k.x * 2**30)()
    op = compiled(p, grid=(4, 5))
    assert op(x, x, x).isfinite().all()  # 64 bits are wide enough
    program = op.program(2)
    bounds.check(program, (4, 5), (4, 5), 2, 1, (), True)
    with pytest.raises(UnsupportedError, match=r"`[qk].x \* 1073741824` comes to 4294967296 on this grid"):
        bounds.check(program, (4, 5), (4, 5), 2, 1, (), False)
    with pytest.raises(UnsupportedError, match="more than the integers of this backend hold"):
        compiled(attnc.pattern(lambda q, k: q.x * 2**62 >= k.x)())(x, x, x)


def test_second_derivatives_are_refused_not_zero() -> None:
    q = rows(20, dtype=torch.float64).requires_grad_()
    for op in (compiled(), compiled(channel())):
        (g,) = torch.autograd.grad(op(q, q, q).sum(), q, create_graph=True)
        with pytest.raises(UnsupportedError, match="second derivatives of attention are not lowered by the torch backend"):
            torch.autograd.grad(g.square().sum(), q)


@pytest.mark.parametrize("backend", ["torch", "cpp", "eager"])
def test_forward_mode_derivatives_are_refused_not_zero(backend: str) -> None:
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match=r"window\(2\): forward-mode .*: take gradients by"):
        compiled(backend=backend)(forward_ad.make_dual(x, x), x, x)
    with forward_ad.dual_level():
        assert compiled(backend=backend)(x, x, x).shape == x.shape


def test_fallback_warns_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnc.codegen import eager
    from attnc.runtime import operator

    def refuse(*_: Any) -> Any:
        raise UnsupportedError("pattern window(2): not this one.")

    class Cannot:
        forward = staticmethod(refuse)

    found = operator.backend_module
    monkeypatch.setattr(operator, "backend_module", lambda name: Cannot if name == "cpp" else found(name))
    with pytest.raises(UnsupportedError, match="not this one"):
        compiled(backend="cpp")(x, x, x)
    op = compiled(backend="cpp", fallback="torch")
    with pytest.warns(UserWarning, match=r"not this one. Falling back to backend='torch'"):
        out = op(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(op(x, x, x), out)
    assert eager is found("eager")


def test_every_error_is_one_of_ours() -> None:
    for kind in (DeclarationError, UnsupportedError, ShapeError, BuildError, CacheError):
        assert issubclass(kind, AttncError)
        assert issubclass(AttncError, Exception)
    assert {"DeclarationError", "UnsupportedError", "ShapeError", "BuildError", "CacheError", "AttncError"} <= set(attnc.__all__)


def test_a_pattern_that_fits_no_rank_says_why_when_called() -> None:
    op = attnc.compile(attnc.patterns.axial("y"), backend="torch")
    assert op(x, x, x, grid=(4, 5)).shape == x.shape
    with pytest.raises(DeclarationError, match=r"axial\('y'\): this grid has the axes x"):
        op(x, x, x, grid=(20,))
