"""Bugs that peers shipped, each as a test with the issue's number: what broke there must not break here.

Those about shared memory and registers of a chip (pytorch#133254, #180278, #198224) are where kernels are compiled; here stands
what they say about head dimensions and fallbacks.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import strategies as draws
import torch
from strategies import Problem, hold
from torch import Tensor

import attnc
from attnc import ir, patterns
from attnc.analysis import structure
from attnc.codegen import torch as portable
from attnc.schedule.geometry import Axis, geometry


def rows(n: int, heads: int = 2, d: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(1, heads, n, d, generator=g, dtype=dtype) for _ in range(3)]


# ----------------------------------------------------------------------------------------------------------- row 10: learnable bias
@attnc.pattern
def one_number(q: Any, k: Any, *, number: attnc.Table) -> Any:
    return attnc.SCORE * number[0]


def test_attention_gym_20_a_bias_that_is_a_parameter_learns() -> None:
    bias = torch.nn.Parameter(torch.zeros(2, 3, 3))
    op = attnc.compile(patterns.window(2, bias="relative"), grid=(4, 4), backend="torch")
    q, k, v = rows(16)
    target = op(q, k, v, bias=torch.randn(2, 3, 3))
    optimizer = torch.optim.Adam([bias], 0.1)
    losses = []
    for _ in range(30):
        loss = (op(q, k, v, bias=bias) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_pytorch_145208_a_single_learnable_number() -> None:
    """There a 0-dimensional parameter failed to compile; a table of one entry serves here."""
    number = torch.nn.Parameter(torch.tensor([0.7]))
    op = attnc.compile(one_number(), grid=5, backend="torch")
    q, k, v = rows(5)
    op(q, k, v, number=number).square().sum().backward()
    assert number.grad is not None
    assert number.grad.shape == (1,)
    assert number.grad.abs() > 0
    with pytest.raises(attnc.ShapeError, match=r"the table 'number' has shape \(\), the pattern indexes 1 dimensions"):
        op(q, k, v, number=torch.tensor(0.7))


def test_pytorch_145208_a_leaf_made_inside_the_compiled_function() -> None:
    torch._dynamo.reset()
    op = attnc.compile(patterns.window(2, bias="relative"), grid=(4, 4), backend="torch")

    def step(q: Tensor, k: Tensor, v: Tensor, raw: Tensor) -> Tensor:
        return op(q, k, v, bias=raw.exp() - 1)

    q, k, v = rows(16)
    raw = torch.randn(2, 3, 3, requires_grad=True)
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    (a,) = torch.autograd.grad(fast(q, k, v, raw).square().sum(), raw)
    (b,) = torch.autograd.grad(step(q, k, v, raw).square().sum(), raw)
    torch.testing.assert_close(a, b)


def test_pytorch_145869_a_bias_of_every_pair_of_tokens() -> None:
    """A dense [heads, N, N] bias has N * N entries: the gradient is its own, element by element."""

    @attnc.pattern
    def pairs(q: Any, k: Any, *, bias: attnc.Table) -> Any:
        return attnc.SCORE + bias[attnc.HEAD, q.index, k.index]

    hold(Problem(pairs(), (4, 5), tables={"bias": (2, 20, 20)}), "torch")


# -------------------------------------------------------------------------------------------------------- rows 11 to 13: head sizes
@pytest.mark.parametrize("d", [128, 129, 160, 192, 256])
def test_pytorch_133254_180278_198224_wide_heads_forward_and_backward(d: int) -> None:
    hold(Problem(patterns.neighborhood(3), (4, 5), d=d, dv=d, batch=1), "torch")


# ---------------------------------------------------------------------------------------------------------- rows 14, 15: gradients
@pytest.mark.parametrize("dynamic", [False, True])
def test_pytorch_158212_gradients_of_a_structured_mask_when_compiled(dynamic: bool) -> None:
    torch._dynamo.reset()
    op = attnc.compile(patterns.window(4) & patterns.causal(), grid=(6, 6), backend="torch")
    fast = torch.compile(lambda q, k, v: op(q * 2, k, v) + 1, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    q, k, v = (t.requires_grad_() for t in rows(36))
    found = torch.autograd.grad(fast(q, k, v).square().sum(), (q, k, v))
    true = torch.autograd.grad((op(q * 2, k, v) + 1).square().sum(), (q, k, v))
    for a, b in zip(found, true, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


def test_pytorch_186775_a_mask_that_depends_on_the_batch_item_is_the_same_static_and_dynamic() -> None:
    @attnc.pattern
    def valid(q: Any, k: Any, *, length: attnc.Table) -> Any:
        return k.index < length[attnc.BATCH]

    torch._dynamo.reset()
    op = attnc.compile(valid(), backend="torch")

    def call(q: Tensor, length: Tensor) -> Tensor:
        return op(q, q, q, grid=q.shape[2], length=length)

    dynamic = torch.compile(call, dynamic=True, fullgraph=True, backend="eager")
    for n, lengths in ((6, [6, 0, 3]), (9, [1, 9, 0]), (4, [0, 0, 0])):
        q = torch.randn(3, 2, n, 8)
        length = torch.tensor(lengths)
        out = dynamic(q, length)
        assert out.isfinite().all()
        assert (out[length == 0] == 0).all()
        torch.testing.assert_close(out, call(q, length))
        for item, m in enumerate(lengths):
            if m:
                part = torch.nn.functional.scaled_dot_product_attention(q[item], q[item, :, :m], q[item, :, :m])
                torch.testing.assert_close(out[item], part, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ rows 16, 17: maps and kernels agree
def test_pytorch_188322_a_trivial_score_does_not_make_attention_dense() -> None:
    """There the block list was ignored where the mask function was trivial. The map follows from the statement alone here."""
    q, k, v = rows(64)
    v[:, :, 16:] = float("nan")  # in other blocks than the first 16 tokens'
    out = attnc.compile(patterns.blocks(16), grid=64, backend="torch")(q, k, v)
    assert out[:, :, :16].isfinite().all()
    assert out[:, :, 16:].isnan().all()


def test_pytorch_182593_a_tile_taken_as_partial_has_the_same_bits() -> None:
    """Full tiles demoted to partial ones: the same keys masked by a predicate that is always true."""
    always = attnc.pattern(lambda q, k: (q.x - k.x) * (q.x - k.x) >= 0)()  # no rule proves it, so that it is evaluated
    for p in (patterns.window(4), patterns.neighborhood(3), patterns.causal()):
        a, b = p.trace(("y", "x")), (p & always).trace(("y", "x"))
        tokens = ir.Tokens((None, None))
        assert geometry(ir.Program(b, tokens, tokens), (8, 9), (8, 9)).structure.residual != ir.TRUE
        assert geometry(ir.Program(a, tokens, tokens), (8, 9), (8, 9)).structure.residual == ir.TRUE
        q, k, v = rows(72)
        full = attnc.compile(p, grid=(8, 9), backend="torch")(q, k, v, return_lse=True)
        partial = attnc.compile(p & always, grid=(8, 9), backend="torch")(q, k, v, return_lse=True)
        assert all(torch.equal(x, y) for x, y in zip(full, partial, strict=True))


# ------------------------------------------------------------------------------------------------------------- row 18: the backward
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [patterns.window(4), patterns.neighborhood(3, 2), patterns.causal(), patterns.cross(1)], ids=str)
def test_flash_attention_2623_gradients_are_checked_for_d_64(p: attnc.Pattern, dtype: torch.dtype) -> None:
    """There the forward was exact and the backward wrong by 150 to 700 times."""
    hold(Problem(p, (7, 6), d=64, dv=64, dtype=dtype, batch=1), "torch")


def test_a_wrong_backward_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget can fail: a gradient of which one key in twenty is dropped is far outside it."""
    real = portable.backward

    def wrong(*args: Any) -> Any:
        dq, dk, dv, tables = real(*args)
        dk[:, :, ::20] = 0
        return dq, dk, dv, tables

    problem = Problem(patterns.neighborhood(3), (7, 6), d=64, dv=64)
    hold(problem, "torch")
    monkeypatch.setattr(portable, "backward", wrong)
    with pytest.raises(AssertionError, match=r"dk of torch: .* error .*, budget"):
        hold(problem, "torch")


# ---------------------------------------------------------------------------------------------------------------- row 19: counts
@pytest.mark.parametrize("n", [1, 5, 16, 63, 64, 65, 200])
def test_attention_gym_93_sparsity_is_between_zero_and_one(n: int) -> None:
    """Their printout said -63.8%. Counts are exact, never estimated from blocks."""
    tokens = ir.Tokens((None, None))
    for p in (patterns.window(7), patterns.neighborhood(7), patterns.causal(), patterns.full(), ~patterns.full()):
        g = geometry(ir.Program(p.trace(("y", "x")), tokens, tokens), (n, 3), (n, 3))
        assert 0 <= g.allowed() / (3 * n) ** 2 <= 1


# ----------------------------------------------------------------------------------------------------- found while this was written
def test_an_end_far_outside_the_axis_does_not_wrap_into_it() -> None:
    """Ends were narrowed to 32 bits before they were cut: q + 2^40 became q."""
    for far in (1 << 31, 1 << 32, 1 << 40):
        p = _beyond(far)
        tokens = ir.Tokens((None,))
        g = geometry(ir.Program(p.trace(("x",)), tokens, tokens), (6,), (6,))
        assert g.allowed() == 0


def _beyond(far: int) -> attnc.Pattern:
    @attnc.pattern
    def beyond(q: Any, k: Any) -> Any:
        return k.x >= q.x + far

    return beyond()


def test_a_residue_far_longer_than_the_axis_takes_no_memory() -> None:
    p = attnc.pattern(lambda q, k: q.x % (1 << 40) == k.x % (1 << 40))()
    tokens = ir.Tokens((None,))
    axis: Axis = geometry(ir.Program(p.trace(("x",)), tokens, tokens), (6,), (6,)).axes[0]
    assert axis.lo.size <= 4096
    assert axis.pairs() == 6
    assert np.array_equal(attnc.mask(p, grid=(6,))[0].numpy(), np.eye(6, dtype=bool))


def test_a_grid_by_name_is_not_taken_by_position() -> None:
    op = attnc.compile(patterns.window((1, 3)), backend="torch")
    q, k, v = rows(12)
    assert torch.equal(op(q, k, v, grid={"x": 6, "y": 2}), op(q, k, v, grid=(2, 6)))


def test_an_infinite_slope_outside_the_relation_does_not_reach_the_gradient() -> None:
    p = attnc.pattern(lambda q, k: attnc.where(k.x < q.x, attnc.SCORE / (q.x - k.x) + attnc.log(q.x - k.x)))()
    q, k, v = (t.requires_grad_() for t in rows(6))
    for backend in ("torch", "eager"):
        for g in torch.autograd.grad(attnc.compile(p, grid=6, backend=backend)(q, k, v).sum(), (q, k, v)):
            assert g.isfinite().all()


def test_a_pattern_for_one_run_of_heads_is_known_to_every_backend() -> None:
    """per_head beside prefix tokens cannot run as parts; the number of heads is then a number in the program."""
    hold(Problem(patterns.per_head([patterns.causal(), patterns.band(1, 1)]), (3, 4), heads=3, kv_heads=1, prefix=1), "torch")


def test_copies_of_expressions_are_the_expressions() -> None:
    a = patterns.neighborhood(3).trace(("y", "x"))
    assert copy.deepcopy(a) == a
    assert {a.relation: 1}[copy.deepcopy(a.relation)] == 1


def test_the_reference_does_not_take_part_in_splitting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every backend is held to is the statement as a whole, not the parts that a proof made of it."""
    from attnc.codegen import eager

    seen = []
    real = eager.forward
    monkeypatch.setattr(eager, "forward", lambda call, *rest: seen.append(call.attend.relation) or real(call, *rest))
    p = patterns.cross(1)
    attnc.reference(p, grid=(9, 9))(*rows(81))
    assert seen == [p.trace(("y", "x")).relation]


def test_every_drawn_pattern_can_be_declared() -> None:
    for p in (draws.lookup(), draws.decay(), draws.capped(cap=1.0), draws.per_item(), draws.documents()):
        assert p.trace(("y", "x")).rank == 2


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_everything_sees_keys_on_a_coarser_grid(backend: str) -> None:
    q, _, _ = (t.requires_grad_() for t in rows(48))
    _, k, v = (t.requires_grad_() for t in rows(12))
    out = attnc.compile(patterns.full(), grid=(6, 8), kv_grid=(3, 4), backend=backend)(q, k, v)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    g = torch.ones_like(out)
    for mine, theirs in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_dilated_blocks_moved_by_less_than_their_interval(backend: str) -> None:
    """Borders then lie elsewhere in each residue class, so that there is no block of one shift."""
    problem = Problem(patterns.dilated_blocks((3, 2), 2, bias="relative").shift(-1, 3), (9, 8))
    hold(problem, backend)
    form = structure.analyse(problem.pattern.trace(("y", "x")), True, False).axes[0]
    assert form.kind == "residue 2 of interval"
    assert form.block is None


@pytest.mark.parametrize("over", ["keys", "queries"])
@pytest.mark.parametrize("backend", ["torch", "cpp", "eager"])
def test_a_nan_shows_in_outputs_and_gradients(backend: str, over: str) -> None:
    """A scaler of gradients finds its overflow by them: a row whose scores are NaN is no row without keys."""
    p = patterns.window(3) if over == "keys" else patterns.reversed_attention(patterns.window(3))
    q, k, v = (t.requires_grad_() for t in rows(12))
    hurt = q.detach().clone()
    hurt[0, 0, 4] = float("nan")
    out = attnc.compile(p, grid=(12,), backend=backend)(hurt.requires_grad_(), k, v)
    seen = slice(4, 5) if over == "keys" else slice(3, 6)  # over queries, a NaN is in the sums of the keys that all of them see
    assert out[0, 0, seen].isnan().all()
    assert out[0, 1].isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), (hurt, k)):
        assert gradient[0, 0, 3:6].isnan().any()
        assert gradient[0, 1].isfinite().all()


def test_tensors_without_values_have_shapes() -> None:
    """On the meta device an operator is its fake."""
    q, k, v = (t.to("meta").requires_grad_() for t in rows(12))
    out, lse = attnc.compile(patterns.cross(2), grid=(3, 4))(q, k, v, return_lse=True)
    assert out.is_meta and out.shape == q.shape and lse.shape == q.shape[:3]
    assert [g.shape for g in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))] == [q.shape] * 3
