"""`sizes=`: images of unlike sizes in one call, held to each image computed alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import strategies as draws
import torch
from strategies import Problem, hold, weighted
from torch import Tensor

import attnc
from attnc import patterns
from attnc.errors import ShapeError, UnsupportedError
from attnc.patterns.relation import rescored
from attnc.runtime import regions

GRID = (7, 8)
SIZES = ((7, 8), (3, 5), (3, 5), (0, 4), (6, 8), (1, 1))  # the whole grid, two neighbours alike, an empty one, a view of rows
DOUBLE = torch.float64
OPS = torch.ops.attnc


def images(p: attnc.Pattern, **options: Any) -> Problem:
    given: dict[str, Any] = {"batch": 6, "heads": 4, "kv_heads": 2, "d": 8, "dv": 5, "reach": 5, "sizes": SIZES}
    return Problem(p, options.pop("grid", GRID), **(given | options))


def turned(p: attnc.Pattern) -> attnc.Pattern:
    """With rotary rows."""
    rotary = attnc.rotary(100.0)
    return rescored("turned", p, lambda q, k, s: replace(s, q_map=rotary, k_map=rotary))


@attnc.pattern
def later(q: Any, k: Any) -> Any:
    """Reads the batch index outside of tables."""
    return k.x <= q.x + attnc.BATCH


PATTERNS: dict[str, attnc.Pattern] = {
    "window": patterns.window(3, bias="relative"),
    "shifted window": patterns.window(3, shift=1),
    "neighborhood": patterns.neighborhood(3, bias="relative"),
    "dilated neighborhood": patterns.neighborhood(3, 2),
    "grid": patterns.grid(2),
    "axial": patterns.axial("y"),
    "full": patterns.full(),
    "causal": patterns.causal(),
    "cross": patterns.cross(1),
    "per head": patterns.per_head([patterns.window(2), patterns.neighborhood(3)]),
    "a table by batch item": draws.per_item(),
    "an integer table": draws.documents(),
    "the batch index": later(),
    "mirrored": attnc.pattern(lambda q, k: (k.y == q.size.y - 1 - q.y) & (k.x <= q.x))(),
}
WEIGHTS: dict[str, Problem] = {
    "prefix": images(patterns.window(3, bias="relative"), prefix=2),
    "pad": images(patterns.window(3), pad=((1, 0), (0, 2))),
    "pad beside a prefix": images(patterns.window(3), pad=((1, 0), (0, 2)), prefix=2, dropout=0.4),
    "sink": images(weighted(patterns.window(3), "sink", maps=True)),
    "sigmoid beside a prefix": images(weighted(patterns.window(3), "sigmoid", post=True), prefix=1),
    "over queries": images(weighted(patterns.window(3), "queries with a sink"), prefix=1),
    "a line": images(patterns.neighborhood(3), grid=(9,), sizes=((9,), (4,), (0,), (5,), (5,), (1,))),
    "a volume": images(patterns.window(2), grid=(3, 4, 5), batch=3, sizes=((3, 4, 5), (2, 3, 4), (3, 1, 2))),
    "dropout": images(patterns.neighborhood(3, bias="relative"), dropout=0.4),
    "dropout beside a prefix": images(patterns.per_head([patterns.window(2), patterns.full()]), dropout=0.4, prefix=2),
    "rotary": images(turned(patterns.window(3)), pad=((1, 0), (0, 2)), d=16),
    "rotary beside a prefix": images(turned(patterns.window(3)), prefix=2, d=16, dropout=0.4),
    **{f"strides: {s}": images(patterns.window(3), strides=s) for s in draws.STRIDES},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_each_image_is_attended_alone(name: str) -> None:
    hold(images(PATTERNS[name]), "torch")


@pytest.mark.parametrize("name", WEIGHTS)
def test_with_everything_else(name: str) -> None:
    hold(WEIGHTS[name], "torch")


@pytest.mark.parametrize(
    "name", ["the batch index", "a table by batch item", "sink", "over queries", "rotary beside a prefix", "pad"]
)
def test_the_meaning_too(name: str) -> None:
    hold(WEIGHTS[name] if name in WEIGHTS else images(PATTERNS[name]), "eager")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    hold(images(patterns.neighborhood(3, bias="relative"), dtype=dtype), "torch")


BUILT = {
    "neighborhood": images(patterns.neighborhood(3, bias="relative"), dv=8),
    "prefix": images(patterns.window(3), prefix=2, dtype=torch.bfloat16, strides="packed", dropout=0.3),
}


@pytest.mark.parametrize("name", BUILT)
def test_built_kernels(name: str) -> None:
    hold(BUILT[name], "cpp")


# ------------------------------------------------------------------------------------------------------------------------ packed
LENGTHS = ((3, 5), (3, 5), (2, 2), (0, 3), (4, 3))


def rows(tokens: int, heads: tuple[int, ...] = (4, 2, 2), batch: int = 1, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(batch, h, tokens, 8, generator=g, dtype=dtype).requires_grad_() for h in heads]


def one_by_one(p: attnc.Pattern, lengths: Any, q: Tensor, k: Tensor, v: Tensor, prefix: int, **tables: Tensor) -> Any:
    """Out and lse of packed images, each computed alone."""
    outs, at = [], 0
    for i, size in enumerate(lengths):
        n = prefix + math.prod(size)
        each = [t[:, :, at : at + n] for t in (q, k, v)]
        own = {name: t[i : i + 1] if name == "item" else t for name, t in tables.items()}
        if math.prod(size):
            outs.append(attnc.reference(p, prefix=prefix)(*each, grid=size, return_lse=True, **own))
        elif prefix:
            outs.append(attnc.reference(patterns.full(), grid=(prefix,))(*each, return_lse=True))
        at += n
    return torch.cat([o for o, _ in outs], 2), torch.cat([s for _, s in outs], 2)


@pytest.mark.parametrize(
    ("backend", "prefix", "dtype"),
    [("eager", 0, DOUBLE), ("eager", 2, DOUBLE), ("torch", 0, DOUBLE), ("torch", 2, DOUBLE), ("cpp", 0, torch.float32)],
)
def test_packed_images(backend: str, prefix: int, dtype: torch.dtype) -> None:
    p = patterns.neighborhood(3, bias="relative")
    tensors = rows(sum(prefix + math.prod(s) for s in LENGTHS), dtype=dtype)
    bias = torch.randn(4, 5, 5, dtype=dtype, requires_grad=True)
    op = attnc.compile(p, prefix=prefix, backend=backend)
    found = op(*tensors, bias=bias, sizes=torch.tensor(LENGTHS), return_lse=True)
    truth = one_by_one(p, LENGTHS, *tensors, prefix, bias=bias)
    torch.testing.assert_close(found, truth)
    weight = torch.randn_like(found[0])
    grads = [torch.autograd.grad((o * weight).sum() + s.square().sum(), (*tensors, bias)) for o, s in (found, truth)]
    torch.testing.assert_close(*grads)


def test_packed_images_have_numbers_of_their_own() -> None:
    """attnc.BATCH counts images, and a table may have a row for each."""
    tensors, item = rows(46), torch.randn(5, 4, dtype=DOUBLE)
    found = attnc.compile(draws.per_item(), backend="torch")(*tensors, item=item, sizes=torch.tensor(LENGTHS), return_lse=True)
    torch.testing.assert_close(found, one_by_one(draws.per_item(), LENGTHS, *tensors, 0, item=item))
    with pytest.raises(ShapeError, match=r"'item' has shape \(4, 4\); its dimension 0 counts images, of which this call has 5"):
        attnc.compile(draws.per_item(), backend="torch")(*tensors, item=item[:4], sizes=torch.tensor(LENGTHS))


def test_packed_images_are_turned_and_dropped_as_regions_are() -> None:
    """One number of an image, one place of a token, wherever the tokens lie."""
    sizes = torch.tensor(SIZES)
    rows = [torch.randn(6, h, 58, 16, dtype=DOUBLE) for h in (4, 2, 2)]
    there = regions.inside(sizes, GRID, 2)
    flat = [torch.cat([t[b : b + 1, :, there[b]] for b in range(6)], 2) for t in rows]
    drop: dict[str, Any] = {"dropout_p": 0.4, "seed": 11}
    for backend in ("torch", "eager"):
        region = attnc.compile(turned(patterns.neighborhood(3)), grid=GRID, prefix=2, backend=backend)(*rows, sizes=sizes, **drop)
        packed = attnc.compile(turned(patterns.neighborhood(3)), prefix=2, backend=backend)(*flat, sizes=sizes, **drop)
        torch.testing.assert_close(packed, torch.cat([region[b : b + 1, :, there[b]] for b in range(6)], 2))


def test_packed_layout_and_a_single_image() -> None:
    qkv = torch.randn(1, 46, 48, dtype=DOUBLE)
    op = attnc.compile(patterns.window(2), layout="b (y x) (three h d)", heads=2, backend="torch")
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in qkv.chunk(3, -1))
    truth, _ = one_by_one(patterns.window(2), LENGTHS, q, k, v, 0)
    torch.testing.assert_close(op(qkv, sizes=torch.tensor(LENGTHS)), truth.transpose(1, 2).flatten(2))
    torch.testing.assert_close(op(qkv[:, :15], sizes=torch.tensor([[3, 5]])), op(qkv[:, :15], grid=(3, 5)))


def test_one_axis_is_packed_where_images_are_not_batch_items() -> None:
    q, k, v = rows(12)
    op = attnc.compile(patterns.causal(), backend="torch")
    lengths = torch.tensor([[5], [0], [7]])
    torch.testing.assert_close(op(q, k, v, sizes=lengths), one_by_one(patterns.causal(), lengths.tolist(), q, k, v, 0)[0])
    short = op(q, k, v, sizes=torch.tensor([[5]]))  # one for each batch item: regions of the token axis
    torch.testing.assert_close(short[:, :, :5], op(*(t[:, :, :5] for t in (q, k, v)), grid=5))
    assert not short[:, :, 5:].any()


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_keys_on_a_grid_of_their_own(backend: str) -> None:
    """A pair of sizes; regions and packed, and images that are empty on one side."""

    @attnc.pattern
    def pooled(q: Any, k: Any) -> Any:
        return (q.y // 2 == k.y) & (k.x >= q.size.x // 2 - k.size.x)

    sizes = (torch.tensor([[4, 6], [4, 5], [0, 2], [2, 3]]), torch.tensor([[2, 3], [2, 0], [1, 1], [1, 2]]))
    (q,), (k, v) = rows(24, (2,), 4), rows(6, (2, 2), 4)
    options: dict[str, Any] = {"prefix": 1, "kv_prefix": 1}
    (q,), (k, v) = rows(25, (2,), 4), rows(7, (2, 2), 4)
    op = attnc.compile(pooled(), grid=(4, 6), kv_grid=(2, 3), backend=backend, **options)
    out = op(q, k, v, sizes=sizes)
    cut_q, cut_k, truth = [], [], []
    for b, (n, m) in enumerate(zip(*(s.tolist() for s in sizes), strict=True)):
        numbers = [torch.arange(math.prod(g)).view(g)[: s[0], : s[1]].flatten() for g, s in (((4, 6), n), ((2, 3), m))]
        at = [torch.cat([torch.zeros(1, dtype=torch.long), i + 1]) for i in numbers]
        each = [q[b : b + 1, :, at[0]], k[b : b + 1, :, at[1]], v[b : b + 1, :, at[1]]]
        if math.prod(n) and math.prod(m):
            own = attnc.reference(pooled(), grid=n, kv_grid=m, **options)(*each)
        else:  # prefix tokens alone on one side: nothing is masked
            own = torch.nn.functional.scaled_dot_product_attention(*each)
        torch.testing.assert_close(out[b : b + 1, :, at[0]], own)
        outside = torch.ones(25, dtype=torch.bool)
        outside[at[0]] = False
        assert not out[b, :, outside].any()
        cut_q, cut_k, truth = [*cut_q, each[0]], [*cut_k, each[1:]], [*truth, own]
    packed = attnc.compile(pooled(), grid=(None, None), kv_grid=(None, None), layout="b h (y x) d", backend=backend, **options)
    keys, values = (torch.cat(t, 2) for t in zip(*cut_k, strict=True))
    torch.testing.assert_close(packed(torch.cat(cut_q, 2), keys, values, sizes=sizes), torch.cat(truth, 2))


# ------------------------------------------------------------------------------------------------------------ what lies outside
CASES = [(b, k, DOUBLE) for b in ("eager", "torch") for k in ("sink", "sink, mapped rows")]


@pytest.mark.parametrize(("backend", "kind", "dtype"), [*CASES, ("cpp", "plain", torch.float32)])
def test_outside_holds_anything_and_gets_nothing(backend: str, kind: str, dtype: torch.dtype) -> None:
    p = patterns.window(3) if kind == "plain" else weighted(patterns.window(3), "sink", maps="mapped" in kind)
    sizes = torch.tensor([[3, 5], [6, 2]])
    there = regions.inside(sizes, GRID, 0)
    every = [torch.where(there[:, None, :, None], t, math.nan).detach() for t in rows(56, batch=2, dtype=dtype)]
    tables = {} if kind == "plain" else {"sink": torch.zeros(4, dtype=dtype, requires_grad=True)}
    q, k, v = (t.requires_grad_() for t in every)
    out, lse = attnc.compile(p, grid=GRID, backend=backend)(q, k, v, sizes=sizes, return_lse=True, **tables)
    assert not out[~there[:, None].expand(out.shape[:3])].any()
    assert torch.equal(lse == -math.inf, ~there[:, None].expand(lse.shape))
    loss = out.square().sum() + torch.where(lse > -math.inf, lse, 0.0).sum()
    for g in torch.autograd.grad(loss, (q, k, v, *tables.values())):
        assert g.isfinite().all()
        if g.dim() == 4:
            assert not g[~there[:, None].expand(g.shape[:3])].any()


def test_no_rows_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend is handed shares memory with the call's tensors, and an image's output may be written where it belongs."""
    from attnc.runtime import cpp

    seen: list[Tensor] = []
    plain, back = cpp.forward, cpp.backward

    def forward(call: Any, *tensors: Tensor) -> Any:
        seen.extend((*tensors, call.into[0]))
        return plain(call, *tensors)

    def backward(call: Any, *tensors: Any) -> Any:
        seen.extend((*tensors[:4], tensors[5], *call.into))
        return back(call, *tensors)

    monkeypatch.setattr(cpp, "forward", forward)
    monkeypatch.setattr(cpp, "backward", backward)
    for layout, shape in (("b (y x) (three h d)", (3, 56, 48)), ("b y x (three h d)", (3, 7, 8, 48))):
        qkv = torch.randn(shape, requires_grad=True)
        op = attnc.compile(patterns.window(3), grid=GRID, layout=layout, heads=2, backend="cpp")
        out = op(qkv, sizes=torch.tensor([[7, 8], [3, 5], [6, 2]]))
        weight = torch.randn_like(out)
        (g,) = torch.autograd.grad(out, qkv, weight)
        low, high = qkv.data_ptr(), qkv.data_ptr() + 4 * qkv.numel()
        assert len(seen) == 3 * 4 + 3 * 8
        mine = [t for call in (0, 4, 8) for t in seen[call : call + 3]]
        mine += [t for call in (12, 20, 28) for t in seen[call : call + 3]]
        assert all(low <= t.data_ptr() < high for t in mine)
        for t, whole in [(seen[i], out) for i in (3, 7, 11)] + [(seen[i], g) for i in range(17, 20)]:
            low, high = whole.data_ptr(), whole.data_ptr() + 4 * whole.numel()
            assert low <= t.data_ptr() < high
        seen.clear()


# --------------------------------------------------------------------------------------------------- layouts, compile, operators
@pytest.mark.parametrize(
    ("layout", "axes"), [("b y x h d", (0, 2, 3, 1, 4)), ("b h y x d", (0, 1, 2, 3, 4)), ("b h d y x", (0, 1, 4, 2, 3))]
)
def test_layouts(layout: str, axes: tuple[int, ...]) -> None:
    q, k, v = rows(56, batch=3)
    sizes = torch.tensor([[7, 8], [3, 5], [6, 2]])
    there = [t.unflatten(2, GRID).permute(axes) for t in (q, k, v)]
    truth = attnc.reference(patterns.neighborhood(3), grid=GRID)(q, k, v, sizes=sizes)
    out = attnc.compile(patterns.neighborhood(3), layout=layout, backend="torch")(*there, sizes=sizes)
    torch.testing.assert_close(out, truth.unflatten(2, GRID).permute(axes))


@pytest.mark.parametrize("layout", ["b y x (three h d)", "b h (y x) d"])
def test_one_graph_serves_all_sizes(layout: str) -> None:
    torch._dynamo.reset()
    op = attnc.compile(patterns.window(3, bias="relative"), grid=GRID, layout=layout, heads=2, backend="torch")
    shape = (2, 7, 8, 48) if "three" in layout else (2, 2, 56, 8)
    bias, graphs = torch.randn(2, 5, 5, requires_grad=True), []
    from torch._dynamo.backends.debugging import aot_eager

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def call(x: Tensor, sizes: Tensor) -> Tensor:
        return op(x, bias=bias, sizes=sizes) if "three" in layout else op(x, x * 2, x + 1, bias=bias, sizes=sizes)

    fast = torch.compile(call, fullgraph=True, backend=count)
    for sizes in ([[7, 8], [3, 5]], [[1, 2], [0, 5]], [[6, 6], [6, 6]]):
        x = torch.randn(shape, requires_grad=True)
        found = [(o, *torch.autograd.grad(o.square().sum(), (x, bias))) for o in (f(x, torch.tensor(sizes)) for f in (fast, call))]
        torch.testing.assert_close(*found)
    assert len(graphs) == 1


def test_packed_images_in_a_compiled_graph_and_an_exported_one() -> None:
    torch._dynamo.reset()
    op = attnc.compile(patterns.window(3), backend="torch")

    class Images(torch.nn.Module):
        def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
            return op(x, x * 2, x + 1, sizes=sizes).relu()

    calls = [(torch.randn(1, 2, n, 8), torch.tensor(s)) for n, s in ((27, [[3, 5], [3, 4]]), (31, [[3, 5], [2, 2], [4, 3]]))]
    fast = torch.compile(Images(), fullgraph=True, dynamic=True, backend="aot_eager")
    shapes = {"x": {2: torch.export.Dim("tokens", min=2)}, "sizes": {0: torch.export.Dim("images", min=2)}}
    exported = torch.export.export(Images(), calls[0], dynamic_shapes=shapes).module()
    for x, sizes in calls:
        torch.testing.assert_close(fast(x, sizes), Images()(x, sizes))
        torch.testing.assert_close(exported(x, sizes), Images()(x, sizes))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool) -> None:
    op = attnc.compile(patterns.window(3, bias="relative"), grid=None if packed else (4, 5), backend="torch")
    text, sizes = op._traced(2).text, torch.tensor([[3, 2], [4, 2]] if packed else [[3, 2], [4, 5]])
    q, k, v = rows(14 if packed else 20, batch=1 if packed else 2, dtype=torch.float32)
    grid = (0, 0) if packed else (4, 5)
    bias, rest = torch.randn(4, 5, 5), (0.3, grid, grid, text, "torch", False, sizes)
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.attend.default, (q, k, v, [bias.requires_grad_()], *rest), test_utils=every)
    out, lse = (t.detach() for t in OPS.attend(q, k, v, [bias], *rest))
    plain = [t.detach() for t in (q, k, v)]
    saved = (out, lse, torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(OPS.attend_backward.default, (*plain, [bias.detach()], *saved, *rest), test_utils=every)


def test_gradcheck() -> None:
    op = attnc.compile(patterns.neighborhood(3, bias="relative"), grid=(3, 3), backend="torch")
    leaves = [*rows(9, (2, 1, 1), 2), torch.randn(2, 5, 5, dtype=DOUBLE, requires_grad=True)]
    sizes = torch.tensor([[2, 3], [3, 2]])

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = op(q, k, v, bias=bias, sizes=sizes, return_lse=True)
        return out, torch.where(lse > -math.inf, lse, 0.0)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_sums_over_images_have_a_fixed_order_and_round_once() -> None:
    q, k, v = (t.bfloat16() for t in rows(56, batch=6))
    bias = torch.randn(4, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    op = attnc.compile(patterns.window(3, bias="relative"), grid=GRID, backend="torch")
    found = [torch.autograd.grad(op(q, k, v, bias=bias, sizes=torch.tensor(SIZES)).sum(), bias)[0] for _ in range(2)]
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------------------------------------------ errors
def wrong(sizes: Any, match: str, *, batch: int = 2, tokens: int = 20, **options: Any) -> None:
    q = torch.randn(batch, 2, tokens, 8)
    with pytest.raises(ShapeError, match=match):
        attnc.compile(patterns.window(2), backend="torch", **({"grid": (4, 5)} | options))(q, q, q, sizes=sizes)


def test_what_does_not_fit_is_said() -> None:
    wrong(
        torch.tensor([[4, 5], [4, 6]]), r"window\(2\): sizes\[1\] is \(4, 6\): axis 1 is 6 long, expected 0 to 5, the grid's length"
    )
    wrong(torch.tensor([[-1, 5], [4, 5]]), r"sizes\[0\] is \(-1, 5\): axis 0 is -1 long")
    wrong(torch.tensor([[4, 5]]), r"sizes= has shape \(1, 2\), expected \(2, 2\)")
    wrong(torch.tensor([[4], [4]]), r"sizes= has shape \(2, 1\), expected \(2, 2\)")
    wrong(torch.ones(2, 2), r"sizes= is torch.float32 \(2, 2\), expected an int tensor \[images, rank\]")
    wrong([[4, 5], [4, 5]], r"sizes= holds a list, expected an int tensor \[images, rank\]: torch.tensor\(sizes\)")
    pair = (torch.tensor([[4, 5], [4, 5]]),) * 2
    wrong(pair[0], r"keys have a grid of their own: sizes= is a pair", kv_grid=(4, 5))
    wrong((pair[0], pair[0][:1]), r"sizes= of queries is \(2, 2\), of keys \(1, 2\)", kv_grid=(4, 5))
    wrong((pair[0], pair[0] + 1), r"sizes\[0\] is \(5, 6\) of keys: axis 0 is 5 long", kv_grid=(4, 5))


def test_what_does_not_fit_of_packed_images_is_said() -> None:
    wrong(
        torch.tensor([[2, 5], [3, 3]]), r"q has 20 tokens, the 2 images of sizes=\[\[2, 5\], \[3, 3\]\] make 19", batch=1, grid=None
    )
    wrong(torch.tensor([[2, 5], [2, 5]]), r"packed images, one after the other in a batch of 1.*give grid=", grid=None)
    wrong(torch.tensor([[2, -5], [3, 3]]), r"sizes\[0\] is \(2, -5\): axis 1 is -5 long, expected 0 or more", batch=1, grid=None)
    wrong(torch.tensor([[20], [0]]), r"sizes= has 1 columns .* the axes are \(y, x\)", batch=1, grid=(None, None))


def test_mechanisms_have_no_images() -> None:
    q = torch.randn(2, 2, 20, 8)
    with pytest.raises(UnsupportedError, match=r"mechanism channel.*: sizes= belongs to patterns"):
        attnc.compile(patterns.channel(), backend="torch")(q, q, q, sizes=torch.tensor([[4, 5], [4, 5]]))


def test_a_fallback_takes_the_sizes_along() -> None:
    q, k, v = rows(20, batch=2)
    sizes = torch.tensor([[3, 2], [4, 5]])
    op = attnc.compile(patterns.window(2), grid=(4, 5), backend="triton", fallback="torch")
    with pytest.warns(UserWarning, match="Falling back"):
        out = op(q, k, v, sizes=sizes)
    torch.testing.assert_close(out, attnc.reference(patterns.window(2), grid=(4, 5))(q, k, v, sizes=sizes))


def test_a_batch_without_images() -> None:
    q = torch.randn(0, 2, 20, 8, requires_grad=True)
    out = attnc.compile(patterns.window(2), grid=(4, 5), backend="torch")(q, q, q, sizes=torch.zeros(0, 2, dtype=torch.long))
    assert out.shape == (0, 2, 20, 8)
    out.sum().backward()
