"""The operator as PyTorch sees it: opcheck, compile, export, autograd, layouts without copies. More: test_operator_alone.py."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import strategies as draws
import torch
from heard import Heard
from strategies import Problem
from torch import Tensor, nn

import attnc
from attnc import patterns
from attnc.runtime import layout as layouts

OPS = torch.ops.attnc
DOUBLE = torch.float64


def rows(n: int = 20, heads: int = 2, d: int = 8, dtype: torch.dtype = torch.float32, at: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(at)
    return [torch.randn(2, heads, n, d, generator=g, dtype=dtype) for _ in range(3)]


def compiled(p: Any = None, **options: Any) -> attnc.Operator:
    return attnc.compile(patterns.window(2) if p is None else p, **{"grid": (4, 5), "backend": "torch", **options})


# ------------------------------------------------------------------------------------------------------------------------ opcheck
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "tokens first": lambda t: draws.spread(t, "tokens first"),
    "packed": lambda t: draws.spread(t, "packed").nan_to_num(),
    "channels first": lambda t: draws.spread(t, "channels first"),
    "guarded": lambda t: draws.spread(t, "guarded"),
    "expanded": lambda t: draws.spread(t, "expanded"),
    "a slice of heads": lambda t: torch.cat([t, t], 1)[:, ::2],
}


@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own copies of list arguments
def test_opcheck_of_the_operators(how: str, backend: str) -> None:
    """Schemas, fake kernels (strides too), autograd and AOT dispatch; on strided inputs, where fake kernels lie most easily."""
    q, k, v = (LAYOUTS[how](t) for t in rows())
    op = compiled(patterns.neighborhood(3, bias="relative"))
    text, bias = op._traced(2).text, torch.randn(2, 5, 5)
    out, lse = OPS.attend(q, k, v, [bias], 0.3, (4, 5), (4, 5), text, backend, False, None)
    g, gl = torch.randn_like(out), torch.randn_like(lse)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_()

    # the AOT check is slow: two layouts have it
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    every = (*names, "test_aot_dispatch_dynamic") if how in ("plain", "packed") and backend == "torch" else names
    attend = (leaf(q), leaf(k), leaf(v), [leaf(bias)], 0.3, (4, 5), (4, 5), text, backend, False, None)
    torch.library.opcheck(OPS.attend.default, attend, test_utils=every)
    backward = (q, k, v, [bias], out, lse, g, gl, 0.3, (4, 5), (4, 5), text, backend, False, None)
    torch.library.opcheck(OPS.channel.default, (leaf(q), leaf(k), leaf(v), 0.3, backend), test_utils=every)
    torch.library.opcheck(OPS.attend_backward.default, backward, test_utils=every)
    qkv = torch.stack((q, k, v), int(how == "packed")).movedim(int(how == "packed"), 0)
    torch.library.opcheck(OPS.attend_packed.default, (leaf(qkv), *attend[3:]), test_utils=every)
    torch.library.opcheck(OPS.attend_packed_backward.default, (qkv, *backward[3:]), test_utils=every)
    torch.library.opcheck(OPS.channel_backward.default, (q, k, v, g, 0.3, backend), test_utils=every)


def test_a_flop_counter_watches_a_training_step() -> None:
    """Inside a dispatch mode torch.func's keys are shut off, by which the portable backend differentiates."""
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (t.requires_grad_() for t in rows())
    found = []
    for watch in (FlopCounterMode(display=False), torch.enable_grad()):
        with watch:
            found.append(torch.autograd.grad(compiled()(q, k, v).square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_backwards_change_and_alias_nothing() -> None:
    q, k, v = rows()
    bias, op = torch.randn(2, 5, 5), compiled(patterns.neighborhood(3, bias="relative"))
    text = op._traced(2).text
    out, lse = OPS.attend(q, k, v, [bias], 0.3, (4, 5), (4, 5), text, "torch", False, None)
    inputs = [q, k, v, bias, out, lse, torch.randn_like(out), torch.randn_like(lse)]
    before = [t.clone() for t in inputs]
    q, k, v, bias, out, lse, g, gl = inputs
    found = OPS.attend_backward(q, k, v, [bias], out, lse, g, gl, 0.3, (4, 5), (4, 5), text, "torch", False, None)
    results = [*found[:3], *found[3], *OPS.channel_backward(q, k, v, g, 0.3, "torch")]
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert len({t.untyped_storage().data_ptr() for t in (*inputs, *results)}) == len(inputs) + len(results)


@pytest.mark.parametrize("backend", ["cpp", "torch", "eager"])
def test_a_packed_tensor_gets_one_gradient(backend: str) -> None:
    """Equal to the gradients of q, k and v apart; nothing puts three tensors together afterwards."""
    op = attnc.compile(patterns.window(3, bias="relative"), layout="b y x (three h d)", heads=2, backend=backend)
    qkv = torch.randn(2, 6, 7, 48, requires_grad=True)
    bias = torch.randn(2, 5, 5, requires_grad=True)
    weight = torch.randn(2, 6, 7, 16)
    with Heard() as seen:
        found = torch.autograd.grad((op(qkv, bias=bias) * weight).sum(), (qkv, bias))
    assert not [n for n in seen.names if n.split(".")[1] in ("cat", "stack")]
    apart = attnc.compile(patterns.window(3, bias="relative"), layout="b y x (h d)", heads=2, backend=backend)
    q, k, v = (t.flatten(-2) for t in qkv.unflatten(-1, (3, 2, 8)).unbind(-3))
    truth = torch.autograd.grad((apart(q, k, v, bias=bias) * weight).sum(), (qkv, bias))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck_of_integer_tables_and_pads() -> None:
    q, k, v = (t.requires_grad_() for t in rows())
    tables = {"document": torch.randint(0, 2, (5,)), "pad_k": torch.randn(2, 8), "pad_v": torch.randn(2, 8)}
    op = compiled(draws.documents(), pad=((0, 2), (0, 1)))
    ordered = [tables[s.name] for s in op._traced(2).tables]
    torch.library.opcheck(
        OPS.attend.default,
        (q, k, v, ordered, 0.3, (4, 5), (4, 5), op._traced(2).text, "torch", False, None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


# ---------------------------------------------------------------------------------------------------------- compile and export
class Block(nn.Module):
    """A projection, attention with a learned bias, and what follows."""

    def __init__(self, grid: Any = None, backend: str = "torch") -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.bias = nn.Parameter(torch.randn(2, 5, 5))
        self.op = attnc.compile(
            patterns.neighborhood(3, bias="relative"), grid=grid, layout="b y x (three h d)", heads=2, backend=backend
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.qkv(x), bias=self.bias).relu()


def gradients(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = run(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_compile_fullgraph_forward_and_backward() -> None:
    torch._dynamo.reset()
    block = Block()
    fast = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 16)
    same(gradients(block, fast, x), gradients(block, block, x))


def test_one_dynamic_graph_serves_many_sizes() -> None:
    torch._dynamo.reset()
    block, graphs = Block(), []
    from torch._dynamo.backends.debugging import aot_eager

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    fast = torch.compile(block, fullgraph=True, dynamic=True, backend=count)
    first = 0
    for shape in ((2, 4, 5), (3, 7, 9), (2, 8, 6), (5, 12, 11)):
        x = torch.randn(*shape, 16)
        same(gradients(block, fast, x), gradients(block, block, x))
        first = first or len(graphs)
    assert len(graphs) == first  # dynamo may start over once before the first graph is done


def test_a_grid_given_with_the_call_may_be_symbolic() -> None:
    torch._dynamo.reset()
    op = attnc.compile(patterns.window(3), backend="torch")

    def call(x: Tensor, y: int) -> Tensor:
        return op(x, x, x, grid=(y, x.shape[2] // y))

    fast = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for y, x in ((4, 5), (6, 7), (3, 3)):
        t = torch.randn(1, 2, y * x, 8)
        torch.testing.assert_close(fast(t, y), call(t, y))


def test_export_round_trip() -> None:
    block, x = Block(), torch.randn(2, 4, 5, 16)
    exported = torch.export.export(block, (x,))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    torch.testing.assert_close(loaded(x), block(x))
    assert any("attnc.attend" in str(n.target) for n in exported.graph.nodes)


def test_export_with_a_dynamic_batch_and_channels() -> None:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = attnc.compile(patterns.channel(), backend="torch")

        def forward(self, q: Tensor) -> Tensor:
            return self.op(q, q * 2, q + 1)

    m, x = Channels(), rows()[0]
    exported = torch.export.export(m, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=2)},))
    more = torch.cat([x, x, x])
    torch.testing.assert_close(exported.module()(more), m(more))


def test_errors_are_raised_while_compiling_too() -> None:
    torch._dynamo.reset()
    op = compiled()
    fast = torch.compile(lambda x: op(x, x, x), backend="eager")
    with pytest.raises(Exception, match=r"q has 21 tokens, the grid \(4, 5\) make 20"):
        fast(torch.randn(1, 2, 21, 8))


# ---------------------------------------------------------------------------------------------------------------------- autograd
@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize(
    ("p", "tables"),
    [
        (patterns.neighborhood(3, bias="relative"), {"bias": (2, 5, 5)}),
        (draws.decay() & patterns.window(2), {"rate": (2,)}),
        (draws.capped(cap=1.5) & patterns.neighborhood(3, 2), {}),
        (draws.per_item(), {"item": (2, 2)}),
        (patterns.cross(1), {}),
    ],
    ids=lambda p: p.name if isinstance(p, attnc.Pattern) else "",
)
def test_gradcheck_with_lse(p: attnc.Pattern, tables: dict[str, tuple[int, ...]], backend: str) -> None:
    """Against finite differences, in float64: q, k, v, tables and the virtual rows, through out and lse at once."""
    op = compiled(p, grid=(2, 3), backend=backend, pad=((0, 1), (1, 0)))
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=DOUBLE, requires_grad=True)

    learned = [leaf(*s) for s in tables.values()]

    def run(q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor, pad_v: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        return op(q, k, v, pad_k=pad_k, pad_v=pad_v, return_lse=True, **dict(zip(tables, more, strict=True)))

    inputs = (leaf(2, 2, 6, 3), leaf(2, 1, 6, 3), leaf(2, 1, 6, 2), leaf(1, 3), leaf(1, 2), *learned)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_gradcheck_of_channel_attention() -> None:
    inputs = [t.requires_grad_() for t in rows(5, d=3, dtype=DOUBLE)]
    assert torch.autograd.gradcheck(compiled(patterns.channel(), grid=5), inputs, fast_mode=True)


@attnc.pattern
def mostly_nothing(q: Any, k: Any) -> Any:
    return attnc.where((k.x < q.x) & (q.y == k.y), attnc.SCORE / (q.x - k.x))


STRICT = attnc.pattern(lambda q, k: k.x < q.x)()


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize(
    "p",
    [mostly_nothing(), patterns.window(2).heads([0]), ~patterns.full(), patterns.band(1, 1) & patterns.window(2).shift(1) & STRICT],
    ids=str,
)
def test_rows_without_keys_are_zero_and_so_are_their_gradients(p: attnc.Pattern, backend: str) -> None:
    """Never NaN, also where the score divides by zero for pairs that the relation excludes."""
    q, k, v = (t.requires_grad_() for t in rows())
    out, lse = compiled(p, backend=backend)(q, k, v, return_lse=True)
    empty = ~attnc.mask(p, grid=(4, 5), heads=2).any(-1)
    assert empty.any()
    assert torch.equal(lse == -math.inf, empty.expand_as(lse))
    assert (out[empty.expand(2, -1, -1)] == 0).all()
    loss = out.square().sum() + torch.where(lse > -math.inf, lse, 0.0).sum()
    for g in torch.autograd.grad(loss, (q, k, v)):
        assert g.isfinite().all()
    (g,) = torch.autograd.grad(compiled(p, backend=backend)(q, k, v, return_lse=True)[1].exp().sum(), q)
    assert g.isfinite().all()
    assert (g[empty.expand(2, -1, -1)] == 0).all()


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_lse_alone_has_a_gradient(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in rows(dtype=DOUBLE))
    _, lse = compiled(patterns.full(), backend=backend)(q, k, v, return_lse=True)
    plain = torch.logsumexp(q @ k.transpose(-1, -2) * 8**-0.5, -1)
    torch.testing.assert_close(lse, plain)
    for a, b in zip(torch.autograd.grad(lse.sum(), (q, k)), torch.autograd.grad(plain.sum(), (q, k)), strict=True):
        torch.testing.assert_close(a, b)
    assert lse.dtype == DOUBLE
    assert compiled()(*[t.half() for t in rows()], return_lse=True)[1].dtype == torch.float32


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    q, k, v = rows()
    bias = torch.randn(2, 3, 3, requires_grad=True)
    op = compiled(patterns.window(2, bias="relative"))
    op(q, k, v, bias=bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.shape == bias.shape
    with torch.no_grad():
        assert not op(q, k, v, bias=bias).requires_grad
    with torch.inference_mode():
        assert op(q, k, v, bias=bias).shape == q.shape


def test_broadcast_and_strided_tables_get_gradients_of_their_own_shape() -> None:
    q, k, v = rows(dtype=DOUBLE)
    op = compiled(patterns.window(2, bias="relative"))
    one = torch.randn(1, 3, 3, dtype=DOUBLE, requires_grad=True)
    wide = one.detach().expand(2, 3, 3).clone().requires_grad_()
    strided = wide.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    found = [torch.autograd.grad(op(q, k, v, bias=b).square().sum(), b)[0] for b in (one, wide, strided)]
    torch.testing.assert_close(found[0], found[1].sum(0, keepdim=True))
    torch.testing.assert_close(found[1], found[2])


def test_autocast_and_low_precision() -> None:
    block = Block()
    x = torch.randn(2, 4, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.bfloat16  # the projection's, which is what attention was given
    torch.testing.assert_close(out.float(), block(x), rtol=5e-2, atol=5e-2)
    out.float().sum().backward()
    assert block.bias.grad is not None
    assert block.bias.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- layouts and copies
VIEWS = ("view", "transpose", "permute", "unbind", "select", "slice", "expand", "alias", "unflatten", "_unsafe_view", "detach")


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("b (y x) (three h d)", (2, 20, 48)),
        ("b y x (three h d)", (2, 4, 5, 48)),
        ("b (y x) (h three d)", (2, 20, 48)),
        ("b (three h d) y x", (2, 48, 4, 5)),
        ("three b h (y x) d", (3, 2, 2, 20, 8)),
        ("b three h d (y x)", (2, 3, 2, 8, 20)),
        ("b (y x) three (d h)", (2, 20, 3, 16)),
    ],
)
@pytest.mark.parametrize("grown", [False, True])
def test_packed_layouts_copy_nothing(layout: str, shape: tuple[int, ...], grown: bool) -> None:
    """Before and after the operator there are views only: q, k and v share the projection's memory, and the merge is a view."""
    op = compiled(layout=layout, heads=2)
    t = torch.randn(shape)
    if grown:  # part of a larger tensor
        t = torch.cat([t, torch.full_like(t, math.nan)], -1)[..., : shape[-1]]
    with Heard() as seen:
        out = op(t)
    outside = [n for n in seen.names if not n.startswith("attnc.")]
    assert sum(n.startswith("attnc.") for n in seen.names) == 1
    assert all(n.split(".")[1] in VIEWS for n in outside), outside
    parts = layouts.to_rows(t, op.layout, 2, "qkv")
    low, high = t.data_ptr(), t.data_ptr() + 4 * t.untyped_storage().size()
    assert all(low <= p.data_ptr() < high for p in parts)
    truth = compiled()(*[p.reshape(2, 2, 20, 8) for p in parts])
    back = layouts.to_rows(out, layouts.parse(layout.replace("three ", "").replace("three", "")), 2, "out")
    torch.testing.assert_close(back.reshape(2, 2, 20, 8), truth)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("b (h d) y x", (2, 16, 4, 5)),
        ("b y x h d", (2, 4, 5, 2, 8)),
        ("b h y x d", (2, 2, 4, 5, 8)),
        ("b (y x) (h d)", (2, 20, 16)),
    ],
)
def test_separate_layouts(layout: str, shape: tuple[int, ...]) -> None:
    op = compiled(layout=layout, heads=2)
    tensors = [torch.randn(shape) for _ in range(3)]
    out = op(*tensors)
    parsed = layouts.parse(layout)
    flat = [layouts.to_rows(t, parsed, 2, "q").reshape(2, 2, 20, 8) for t in tensors]
    back = layouts.to_rows(out, parsed, 2, "out").reshape(2, 2, 20, 8)
    torch.testing.assert_close(back, compiled()(*flat))
    assert out.shape == shape
    assert out.stride() == tensors[0].stride()  # the query's memory order


def test_nothing_around_the_inputs_is_read() -> None:
    """Guard bands of NaN on every side: one stray load and the result shows it."""
    for how in draws.STRIDES:
        for pad in (None, ((1, 0), (0, 2))):
            p = Problem(patterns.neighborhood(3, bias="relative"), (4, 5), strides=how, pad=pad, kv_heads=1)
            for name, t in draws.run_operator(p, "torch").items():
                assert t.isfinite().all(), (how, name)


def test_unwritten_outputs_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output is allocated full of NaN: what no tile writes stays NaN."""

    def poisoned(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = real(*args, **kwargs)
            return t.fill_(math.nan) if t.is_floating_point() and t.device.type == "cpu" else t

        return made

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for p in (
        patterns.cross(1),
        patterns.window(3, shift=1),
        patterns.neighborhood(3, 2),
        ~patterns.full(),
        patterns.window(2).heads([1]),
    ):
        for backend in ("torch", "eager", "cpp"):
            found = draws.run_operator(Problem(p, (5, 6), prefix=0), backend)
            assert all(t.isfinite().all() for n, t in found.items() if n != "lse"), (p, backend)
            assert not found["lse"].isnan().any()


def test_empty_batches() -> None:
    q = torch.randn(0, 2, 20, 8, requires_grad=True)
    for backend in ("torch", "eager"):
        out, lse = compiled(backend=backend)(q, q, q, return_lse=True)
        assert out.shape == (0, 2, 20, 8)
        assert lse.shape == (0, 2, 20)
        out.sum().backward()
