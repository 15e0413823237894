"""One call of the C++ backend, forward and backward, held to a dense evaluation of its statement in float64."""

from __future__ import annotations

import math

import torch
from channel_checks import tensors
from strategies import unwritten_is_nan

from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.runtime import cpp
from attnc.runtime.call import Call
from attnc.schedule.geometry import geometry

AXES = {1: ("x",), 2: ("y", "x"), 3: ("t", "y", "x")}


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


@unwritten_is_nan()
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
