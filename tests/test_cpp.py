"""The C++ backend against a dense evaluation of the statement in float64."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from builds import QUICK, SHIPPED, built_with
from channel_checks import check_channel, tensors

from attnc import ir, patterns
from attnc.analysis.evaluate import evaluate
from attnc.codegen.cpp import Spec, source
from attnc.codegen.cpp_module import emit_cpu
from attnc.errors import BuildError, UnsupportedError
from attnc.lang import functions as fn
from attnc.lang.functions import BATCH, HEAD, SCORE, where
from attnc.lang.pattern import pattern
from attnc.lang.symbols import Table
from attnc.runtime import cpp
from attnc.runtime.call import Call
from attnc.schedule.geometry import geometry

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
R = torch.randn
AXES = {1: ("x",), 2: ("y", "x"), 3: ("t", "y", "x")}


@pattern
def window(q, k, *, s, t=0):
    r = True
    for a, b in zip(q, k, strict=True):
        same = (a - t) // s == (b - t) // s
        r = same if r is True else r & same
    return r


@pattern
def biased(q, k, *, s, t=0, bias: Table):
    (qy, qx), (ky, kx) = q, k
    same = ((qy - t) // s == (ky - t) // s) & ((qx - t) // s == (kx - t) // s)
    b = bias[HEAD, (qy - t) % s - (ky - t) % s + s - 1, (qx - t) % s - (kx - t) % s + s - 1]
    return where(same, SCORE + b)


@pattern
def neighborhood(q, k, *, s, d=1):
    r = None
    for a, b, n in zip(q, k, q.size, strict=True):
        g = (n - a % d + d - 1) // d
        low = fn.maximum(fn.minimum(a // d - s // 2, g - s), 0)
        c = (a % d == b % d) & (b // d >= low) & (b // d <= low + s - 1)
        r = c if r is None else r & c
    return r


@pattern
def near_bias(q, k, *, s, bias: Table):
    r = None
    for a, b, n in zip(q, k, q.size, strict=True):
        low = fn.maximum(fn.minimum(a - s // 2, n - s), 0)
        c = (b >= low) & (b <= low + s - 1)
        r = c if r is None else r & c
    return where(r, SCORE + bias[HEAD, q.y - k.y + s - 1, q.x - k.x + s - 1])


@pattern
def axial(q, k):
    return q.y == k.y


@pattern
def causal(q, k):
    return q.index >= k.index


@pattern
def causal_axes(q, k):
    return (q.y >= k.y) & (q.x >= k.x)


@pattern
def full(q, k):
    return q.x >= 0


@pattern
def grid(q, k):
    return (q.y % ((q.size.y + 2) // 3) == k.y % ((q.size.y + 2) // 3)) & ((q.x - k.x) % 4 == 0)


@pattern
def odd(q, k):
    near = (q.y - k.y) * (q.y - k.y) + (q.x - k.x) * (q.x - k.x) <= 9
    return (k.y == q.size.y - 1 - q.y) & (k.x <= q.x) & (k.x >= q.x - 5) & near


@pattern
def far(q, k):
    return (k.x > q.x // 3 * 2) & (k.x <= q.x // 3 * 2 + 301)


@pattern
def none_left(q, k):
    return (k.x > q.x + 1) & (k.y == q.y)


@pattern
def documents(q, k, *, ids: Table):
    return (ids[BATCH, q.index] == ids[BATCH, k.index]) & (q.index >= k.index)


@pattern
def soft_cap(q, k, *, temperature: Table):
    return where(abs(q.x - k.x) <= 4, 5.0 * fn.tanh(SCORE * temperature[HEAD] / 5.0))


@pattern
def located(q, k, *, slope: Table):
    distance = abs(q.y - k.y) + abs(q.x - k.x)
    return where(q.y >= k.y - 3, SCORE - slope[HEAD] * distance + 0.1 * (q.x % 3) - fn.exp(-0.2 * k.y))


@pattern
def no_product(q, k, *, bias: Table):
    return where(q.x // 4 == k.x // 4, bias[HEAD, q.x % 4, k.x % 4])


@pattern
def absolute(q, k, *, bias: Table):
    return where(q.x >= 0, SCORE + bias[HEAD, q.index, k.index])


@pattern
def mixed_index(q, k, *, bias: Table):
    return where(abs(q.x - k.x) <= 6, SCORE * bias[abs(q.x - k.x), HEAD])


@pattern
def decaying(q, k, *, bias: Table):
    return where(k.x <= q.x, SCORE + bias[HEAD, q.x - k.x])


@pattern
def factored(q, k, *, gate: Table):
    return where(q.x // 5 == k.x // 5, SCORE, post=gate[HEAD, q.x % 5, k.x % 5] * 0.5 + 1.0)


@pattern
def factored_by_place(q, k, *, gate: Table):
    return where(q.x // 5 == k.x // 5, SCORE, post=gate[HEAD, q.x - k.x + 4] * 0.5 + 1.0)


@pattern
def overlapping(q, k, *, s):
    return (k.y // s >= q.y // s - 1) & (k.y // s <= q.y // s + 1) & (k.x // s == q.x // s)


@pattern
def pooled(q, k, *, r):
    return (k.y == q.y // r) & (abs(k.x - q.x // r) <= 1)


@pattern
def over_queries(q, k):
    return where(q.x >= 0, SCORE, normalizer=fn.softmax(over="queries"))


def make_program(p, rank=2, prefix=(0, 0), pad=None, multiple=None, kv=None) -> ir.Program:
    none = (None,) * rank
    queries, keys = ir.Tokens(none, prefix[0], pad, multiple), ir.Tokens(none, prefix[1], pad, multiple)
    if kv is not None:  # a token set of its own
        keys = ir.Tokens(kv, prefix[1], pad, multiple)
    return ir.Program(p.trace(AXES[rank], same_grid=queries == keys), queries, keys)


def extended(tokens: ir.Tokens, grid: tuple[int, ...]):
    if tokens.pad is not None:
        return tokens.pad
    if tokens.pad_multiple is not None:
        return tuple((0, -n % m) for n, m in zip(grid, tokens.pad_multiple, strict=True))
    return tuple((0, 0) for _ in grid)


def meaning(program, q_grid, k_grid, q, k, v, scale, tables):
    """Dense evaluation: out, lse. Tensors [B, H, N, D]; any dtype."""
    a, pads = program.attend, [extended(t, g) for t, g in ((program.queries, q_grid), (program.keys, k_grid))]
    same = program.queries == program.keys
    batch, heads, group = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    big = [tuple(n + b + e for n, (b, e) in zip(g, p, strict=True)) for g, p in zip((q_grid, k_grid), pads, strict=True)]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    kp, qp = program.keys.prefix, program.queries.prefix
    if big[1] != k_grid:  # virtual keys

        def widen(t, row):
            row = row.expand(k.shape[1] // group, -1).repeat_interleave(group, 0)
            out = row[None, :, None].expand(batch, heads, math.prod(big[1]), t.shape[-1]).clone().reshape(batch, heads, *big[1], -1)
            where_real = tuple(slice(b, b + n) for n, (b, _) in zip(k_grid, pads[1], strict=True))
            out[(slice(None), slice(None), *where_real)] = t.reshape(batch, heads, *k_grid, -1)
            return out.flatten(2, -2)

        k, v = widen(k, tables["pad_k"]), widen(v, tables["pad_v"])
    raw = (q * 1.0) @ k.transpose(-1, -2) * scale
    grids = [torch.stack(torch.meshgrid(*[torch.arange(n) for n in g], indexing="ij")).flatten(1) for g in (q_grid, big[1])]
    cq = grids[0] + torch.tensor([b for b, _ in pads[0]])[:, None]
    leaves = {ir.HEAD: torch.arange(heads)[None, :, None, None], ir.BATCH: torch.arange(batch)[:, None, None, None]}
    leaves[ir.SCORE] = raw[:, :, qp:, kp:]
    for i in range(len(q_grid)):
        leaves |= {ir.coord("q", i): cq[i][:, None], ir.coord("k", i): grids[1][i][None, :]}
        leaves |= {ir.size("q", i): big[0][i], ir.size("k", i): big[1][i]}

    def load(name, indices):
        t = tables[name]
        indices = [torch.as_tensor(x).clamp(0, n - 1) for x, n in zip(indices, t.shape, strict=True)]
        return t[tuple(indices)]

    def value(e):
        return evaluate(ir.flatten_index(e, a.rank, same), leaves, torch, load)

    shape = raw[:, :, qp:, kp:].shape
    allowed = torch.ones(raw.shape, dtype=torch.bool)
    allowed[:, :, qp:, kp:] = torch.as_tensor(value(a.relation)).expand(shape)
    score = raw.clone()
    score[:, :, qp:, kp:] = torch.as_tensor(value(a.score)).to(raw.dtype).expand(shape)
    score = score.masked_fill(~allowed, -math.inf)
    lse = torch.logsumexp(score, -1)
    shift = lse.detach().masked_fill(lse.isinf(), 0)[..., None]
    weight = torch.where(allowed, torch.exp(score - shift), torch.zeros(())).to(raw.dtype)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-300 if raw.dtype == torch.float64 else 1e-30)
    if a.post is not None:
        factor = torch.ones_like(raw)
        factor[:, :, qp:, kp:] = torch.as_tensor(value(a.post)).to(raw.dtype).expand(shape)
        weight = weight * factor
    return weight @ v, lse


def check(
    p, grid=(9, 11), *, k_grid=None, batch=2, heads=2, kv_heads=None, dim=8, value_dim=None, dtype=torch.float32, kind="plain",
    tables=None, prefix=(0, 0), pad=None, multiple=None, scale=None, lse_gradient=True,
):  # fmt: skip
    """Output, lse and every gradient of one call: errors against float64, as multiples of what plain eager code has."""
    torch.manual_seed(0)
    program = p if isinstance(p, ir.Program) else make_program(p, len(grid), prefix, pad, multiple)
    k_grid = k_grid or grid
    kv_heads, value_dim = kv_heads or heads, value_dim or dim
    nq, nk = math.prod(grid) + program.queries.prefix, math.prod(k_grid) + program.keys.prefix
    q = tensors(kind, batch, heads, nq, dim, dtype)
    k, v = tensors(kind, batch, kv_heads, nk, dim, dtype), tensors(kind, batch, kv_heads, nk, value_dim, dtype)
    if kind == "packed":
        qkv = torch.randn(batch, nq, 3, heads, dim).to(dtype)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    wide = {torch.float64: torch.float64}.get(dtype, torch.float32)
    tables = {n: t.to(wide) if t.is_floating_point() else t for n, t in (tables or {}).items()}
    if pad or multiple:
        tables |= {"pad_k": torch.randn(kv_heads, dim, dtype=wide), "pad_v": torch.randn(1, value_dim, dtype=wide)}
    scale = dim**-0.5 if scale is None else scale
    call = Call(program, geometry(program, grid, k_grid), scale, tables)

    def reference(wide):
        torch.set_default_dtype(wide if wide == torch.float64 else torch.float32)  # of constants in a score
        leaf = {n: (t.to(wide) if t.is_floating_point() else t).detach().clone().requires_grad_(t.is_floating_point()) for n, t in
                {"q": q, "k": k, "v": v, **tables}.items()}  # fmt: skip
        rest = {n: t for n, t in leaf.items() if n not in ("q", "k", "v")}
        try:
            return leaf, *meaning(program, grid, k_grid, leaf["q"], leaf["k"], leaf["v"], scale, rest)
        finally:
            torch.set_default_dtype(torch.float32)

    exact, true_out, true_lse = reference(torch.float64)
    out, lse = cpp.forward(call, q, k, v)
    low = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == dtype and lse.dtype == low
    assert out.shape == true_out.shape
    plain, plain_out, plain_lse = reference(dtype)

    def close(name, got, true, eager, factor):
        got, true, eager = got.double(), true.detach().double(), eager.detach().double()
        assert torch.isfinite(got).all() or name == "lse", name
        same = (got == true) | (got.isinf() & true.isinf())
        error = (got - true).masked_fill(same, 0).abs().max().item()
        eps = torch.finfo(dtype).eps
        size = true.masked_fill(true.isinf(), 0).abs().max().item()
        eps *= 20 if dtype == torch.float64 else 2  # maxima over few elements scatter; float64's reference is no better than we are
        allowed = factor * max((eager - true).masked_fill(same | true.isinf(), 0).abs().nan_to_num(0).max().item(), eps * size)
        assert error <= allowed + 1e-300, f"{name}: error {error:.3g}, eager's {allowed / factor:.3g}, size {size:.3g}"

    close("out", out, true_out, plain_out, 2)
    close("lse", lse, true_lse, plain_lse, 2)
    empty = true_lse.isinf()
    assert (out[empty] == 0).all()
    grad_out = torch.randn(true_out.shape).to(dtype)
    grad_lse = torch.randn(lse.shape, dtype=low) if lse_gradient else None

    def gradients(leaf, o, s):
        total = (o * grad_out.to(o.dtype)).sum()
        if lse_gradient:
            total = total + (s * grad_lse.to(s.dtype)).masked_fill(empty, 0).sum()
        names = [n for n, t in leaf.items() if t.requires_grad]
        found = torch.autograd.grad(total, [leaf[n] for n in names], allow_unused=True)
        return {n: torch.zeros_like(leaf[n]) if g is None else g.nan_to_num(0) for n, g in zip(names, found, strict=True)}

    true, eager = gradients(exact, true_out, true_lse), gradients(plain, plain_out, plain_lse)
    dq, dk, dv, others = cpp.backward(call, q, k, v, out, lse, grad_out, grad_lse)
    got = {"q": dq, "k": dk, "v": dv, **others}
    assert set(got) == set(true)
    for n, g in got.items():
        assert g.shape == true[n].shape, n
        close(f"gradient of {n}", g, true[n], eager[n], 3)
    again = cpp.backward(call, q, k, v, out, lse, grad_out, grad_lse)
    for x, y in zip((dq, dk, dv, *others.values()), (*again[:3], *again[3].values()), strict=True):
        assert torch.equal(x, y), "the gradient differs from one run to the next"
    assert (dq[empty] == 0).all()


RELATIONS = {
    "window": (window(s=4), (9, 11), {}),
    "a window of one key more than whole vectors": (window(s=7), (14, 15), {"dim": 32}),
    "window as long as the grid": (window(s=4), (3, 4), {}),
    "shifted window": (window(s=4, t=-2), (9, 11), {"kind": "packed"}),
    "one token": (window(s=4), (1, 1), {}),
    "neighbourhood": (neighborhood(s=3), (9, 11), {"kind": "heads_last"}),
    "neighbourhood in columns": (neighborhood(s=3), (20, 3), {"kind": "channels_first"}),
    "neighbourhood of expanded tensors": (neighborhood(s=3), (5, 17), {"kind": "expanded"}),
    "grouped queries": (neighborhood(s=3), (9, 11), {"heads": 4, "kv_heads": 2}),
    "one key head": (window(s=4), (9, 11), {"heads": 4, "kv_heads": 1, "batch": 1}),
    "negative scale": (neighborhood(s=3), (7, 6), {"scale": -0.7}),
    "scale 0": (neighborhood(s=3), (7, 6), {"scale": 0.0}),
    "dilated": (neighborhood(s=3, d=2), (9, 11), {}),
    "axial": (axial(), (5, 17), {"lse_gradient": False}),
    "causal": (causal(), (20, 30), {"batch": 1}),
    "dense": (full(), (700,), {"batch": 1, "heads": 1}),
    "grid": (grid(), (9, 11), {}),
    "residual": (odd(), (9, 11), {}),
    "rows without keys": (none_left(), (4, 7), {}),
    "union": (axial() | window(s=3), (9, 11), {}),
    "per head": (window(s=3).heads([0]) | axial().heads([1]), (8, 8), {}),
    "three axes": (window(s=3), (4, 5, 7), {}),
    "virtual keys": (neighborhood(s=3), (6, 7), {"pad": ((1, 2), (0, 3)), "heads": 4, "kv_heads": 2}),
    "prefix": (neighborhood(s=3), (6, 5), {"prefix": (2, 2)}),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_relation(name):
    p, sizes, more = RELATIONS[name]
    check(p, sizes, **more)


torch.manual_seed(0)  # of the tables below
SCORES = {
    "relative bias": (biased(s=4), (8, 11), {"bias": R(2, 7, 7)}, {}),
    "relative bias shared by heads": (biased(s=4), (9, 11), {"bias": R(1, 7, 7).transpose(1, 2)}, {"kind": "packed"}),
    "bias around": (near_bias(s=3), (9, 14), {"bias": R(2, 5, 5)}, {}),
    "documents": (documents(), (4, 6), {"ids": torch.randint(0, 2, (2, 24))}, {}),
    "soft cap": (soft_cap(), (30,), {"temperature": torch.rand(2) + 0.5}, {}),
    "coordinates": (located(), (7, 9), {"slope": torch.rand(2)}, {}),
    "no product": (no_product(), (14,), {"bias": R(2, 4, 4)}, {}),
    "absolute bias": (absolute(), (20, 30), {"bias": R(1, 600, 600)}, {"batch": 1}),
    "index of both": (mixed_index(), (40,), {"bias": R(7, 2)}, {}),
    "factor": (factored(), (23,), {"gate": R(2, 5, 5)}, {}),
    "factor by place": (factored_by_place(), (23,), {"gate": R(2, 9)}, {}),
    "bias of windows of several chunks": (biased(s=24), (24, 26), {"bias": R(2, 47, 47)}, {"batch": 1}),
    "bias of a large window": (biased(s=14), (14, 17), {"bias": R(2, 27, 27)}, {"batch": 3}),
    "bias of many windows": (biased(s=2), (11, 13), {"bias": R(2, 3, 3)}, {"batch": 3}),
    "decay over several chunks": (decaying(), (1100,), {"bias": R(1, 1100)}, {"batch": 1, "heads": 1}),
    "bias and virtual keys": (biased(s=4), (9, 11), {"bias": R(4, 7, 7)}, {"multiple": (4, 4), "heads": 4, "kv_heads": 2}),
    "bias and prefix": (biased(s=4), (8, 11), {"bias": R(2, 7, 7)}, {"prefix": (1, 1)}),
}


@pytest.mark.parametrize("name", SCORES)
def test_score(name):
    p, sizes, tables, more = SCORES[name]
    check(p, sizes, tables=tables, **more)


def test_keys_on_another_grid():
    check(make_program(pooled(r=2), kv=(5, 4)), (10, 8), k_grid=(5, 4))


@pytest.mark.parametrize("dims", [(1, 1), (24, 24), (33, 7), (80, 80), (256, 256)], ids=str)
def test_head_dims(dims):
    check(neighborhood(s=3), (6, 7), dim=dims[0], value_dim=dims[1])


WORDS = {  # pairs of channels in scores, pairs of keys in outputs: odd numbers of both, ends of intervals between two of a pair
    "window": (window(s=7), (14, 15), {"dim": 32, "kind": "packed"}),
    "window with bias": (biased(s=7), (14, 15), {"dim": 32, "kind": "packed", "tables": {"bias": R(2, 13, 13)}}),
    "shifted window": (biased(s=5, t=2), (12, 13), {"dim": 24, "value_dim": 33, "tables": {"bias": R(2, 9, 9)}}),
    "odd channels": (axial(), (3, 41), {"dim": 33, "value_dim": 80}),
    "one channel": (window(s=3), (7, 8), {"dim": 1, "value_dim": 1}),
    "wide": (full(), (77,), {"dim": 80, "value_dim": 130, "kind": "heads_last"}),
    "causal": (causal(), (20, 31), {"dim": 64, "batch": 1}),
    "several chunks": (causal(), (1200,), {"dim": 64, "batch": 1, "heads": 1}),
    "many keys from an odd one on": (far(), (701,), {"dim": 32, "batch": 1, "heads": 1}),
    "channels first": (window(s=4), (9, 11), {"dim": 24, "kind": "channels_first"}),
    "residual": (odd(), (9, 11), {"dim": 16}),
    "rows without keys": (none_left(), (4, 7), {"dim": 32}),
    "negative scale": (axial(), (4, 21), {"dim": 16, "scale": -0.4}),
    "virtual keys": (window(s=3), (6, 7), {"pad": ((1, 2), (0, 3)), "heads": 4, "kv_heads": 2, "dim": 31}),
    "prefix": (window(s=5), (6, 5), {"prefix": (2, 3), "dim": 32}),
    "factor": (factored(), (23,), {"dim": 18, "tables": {"gate": R(2, 5, 5)}}),
}


@pytest.mark.parametrize("name", WORDS)
def test_bfloat16(name):
    p, grid, options = WORDS[name]
    check(p, grid, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    check(located(), (7, 9), tables={"slope": torch.rand(2)}, dtype=dtype, dim=24)


def test_sharing_keys_between_threads():
    """Few (batch, head) pairs: segments of one key range go to several threads, and their sums are added in order."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(neighborhood(s=3), (40, 9), batch=1, heads=1)
        check(neighborhood(s=3), (20, 12), batch=1, heads=1, prefix=(2, 2))
    finally:
        torch.set_num_threads(before)


def test_as_shipped(monkeypatch):
    """With the flags that users get; nothing is read from outputs that were never written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    with built_with(SHIPPED):
        check(biased(s=7), (14, 15), tables={"bias": R(2, 13, 13)}, dim=32)
        check(*WORDS["shifted window"][:2], dtype=torch.bfloat16, **WORDS["shifted window"][2])
        check_channel("channels first")


def test_libraries_share_nothing():
    """Kernels of several dtypes in one process, whose sums are cut: no constant of one stands for that of another."""
    for dtype in (torch.float32, torch.float64, torch.float32):
        check(patterns.full(), (300,), dtype=dtype)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 instruction sets")
@pytest.mark.parametrize("instructions", ["haswell", "x86-64"])
def test_other_instruction_sets(instructions):
    """Vectors of 8 and of 4 lanes."""
    with built_with([f"-march={instructions}" if f == "-march=native" else f for f in QUICK]):
        check(window(s=4), (9, 11), dim=24)
        check(*WORDS["shifted window"][:2], dtype=torch.bfloat16, **WORDS["shifted window"][2])
        for name in ("long", "channels first", "bfloat16 packed"):
            check_channel(name)


def test_refusals():
    program = make_program(over_queries())
    call = Call(program, geometry(program, (4, 4), (4, 4)), 1.0, {})
    x = torch.randn(1, 1, 16, 8)
    with pytest.raises(UnsupportedError, match=r"softmax over queries; an operator .* with queries and keys exchanged"):
        cpp.forward(call, x, x, x)


def test_a_failed_build_shows_its_output(tmp_path):
    with pytest.raises(BuildError, match=r"kept at [\s\S]*kernel\.cpp:1:.* error"):
        cpp._build("this is no C++\n", tmp_path)


def test_the_same_source_each_time():
    program = make_program(biased(s=7))
    for backward in (False, True):
        text = source(Spec(program, 32, 32, "float32"), backward)
        assert text == source(Spec(program, 32, 32, "float32"), backward)
        assert text.startswith("// Attention `biased(s=7)`")


def test_stand_alone_module(tmp_path):
    """The emitted module runs where attnc cannot be imported, and gives what the backend gives."""
    program = make_program(biased(s=4), multiple=(4, 4))
    (tmp_path / "made.py").write_text(emit_cpu(program, grid=(6, 9), heads=2, head_dim=8).replace('"-O2"', '"-O1"'))
    channel = ir.Program(ir.Channel(), ir.Tokens((None,)), ir.Tokens((None,)))
    (tmp_path / "channel.py").write_text(emit_cpu(channel, heads=2, head_dim=8).replace('"-O2"', '"-O1"'))
    torch.manual_seed(0)
    q, k, v, bias = R(1, 2, 54, 8), R(1, 2, 54, 8), R(1, 2, 54, 8), R(2, 7, 7)
    torch.save([q, k, v, bias], tmp_path / "in.pt")
    script = """if True:
        import sys
        sys.modules["attnc"] = None
        import torch, made, channel
        q, k, v, bias = (t.requires_grad_() for t in torch.load("in.pt"))
        out = made.attention(q, k, v, bias=bias)
        out.square().sum().backward()
        other = channel.attention(q, k, v)
        torch.save([out.detach(), bias.grad, other.detach()], "out.pt")
    """
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    out, bias_grad, other = torch.load(tmp_path / "out.pt")
    tables = {"bias": bias, "pad_k": torch.zeros(1, 8), "pad_v": torch.zeros(1, 8)}
    call = Call(program, geometry(program, (6, 9), (6, 9)), 8**-0.5, tables)
    expected, lse = cpp.forward(call, q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(bias_grad, cpp.backward(call, q, k, v, expected, lse, 2 * expected, None)[3]["bias"])
    torch.testing.assert_close(other, cpp.channel_forward(q, k, v, 8**-0.5))
