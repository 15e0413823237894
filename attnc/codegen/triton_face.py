"""Prints what a module shows: its operators, the differentiable `attention`, and the refusal of tensors that do not fit."""

from __future__ import annotations

import numpy as np

from attnc import ir
from attnc.analysis.dropout import TABLE
from attnc.analysis.evaluate import evaluate
from attnc.codegen import around, once
from attnc.codegen.triton_plan import Spec
from attnc.schedule.geometry import Geometry

PLACE = "@@NAME@@"  # of the operator's name in a module's text, until the text is known


class Face:
    """The functions of a module that its users call."""

    spec: Spec
    whole: ir.Attend  # with the row maps and the sink that surround the kernels
    sink: str | None
    tables: tuple[str, ...]
    pads: tuple[str, ...]
    hosts: tuple[Face, ...]  # of the statements that run one after the other; this is the first

    def operator(self) -> str:
        """Registration of the forward and the backward as operators, which torch.compile and torch.export see as they are."""
        names = [*self.tables, *self.pads]
        learned = [*dict.fromkeys(n.args[0] for n in self.spec.learned), *self.pads]
        out = "torch.empty_like(q)" if self.spec.head_dim == self.spec.value_dim else f"like(q, {self.spec.value_dim})"
        more = ", ".join(f"torch.empty_like(tables[{names.index(n)}], dtype=torch.float32)" for n in learned)
        tables = "{" + ", ".join(f'"{n}": tables[{i}]' for i, n in enumerate(names)) + "}"
        found = ", ".join(f'found["{n}"]' for n in learned)
        return f'''\
def _forward(q, k, v, tables, scale):
    return run_forward(q, k, v, {tables}, scale)


def _backward(q, k, v, out, lse, grad_out, grad_lse, tables, scale):
    dq, dk, dv, {"found" if learned else "_"} = run_backward(q, k, v, out, lse, grad_out, grad_lse, {tables}, scale)
    return dq, dk, dv, [{found}]


def _forward_like(q, k, v, tables, scale):
    return {out}, q.new_empty(q.shape[0], q.shape[1], math.prod(q.shape[2:-1]), dtype=torch.float32)


def _backward_like(q, k, v, out, lse, grad_out, grad_lse, tables, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), [{more}]


NAME = "{PLACE}"
if not hasattr(torch.ops.attnc_emitted, NAME):  # a second import of the same module finds its operator
    for name, schema, run, like_it in (
        (NAME, "(Tensor q, Tensor k, Tensor v, Tensor[] tables, float scale) -> (Tensor, Tensor)", _forward, _forward_like),
        (
            NAME + "_backward",
            "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, "
            "Tensor[] tables, float scale) -> (Tensor, Tensor, Tensor, Tensor[])",
            _backward,
            _backward_like,
        ),
    ):
        torch.library.define(f"attnc_emitted::{{name}}", schema)
        torch.library.impl(f"attnc_emitted::{{name}}", "default", run)
        torch.library.register_fake(f"attnc_emitted::{{name}}", like_it)
'''

    def function(self) -> str:
        """The autograd function."""
        names = [*self.tables, *self.pads]
        learned = [*dict.fromkeys(n.args[0] for n in self.spec.learned), *self.pads]
        gradients = "".join(f", found[{learned.index(n)}]" if n in learned else ", None" for n in names)
        saved = "".join(f", {n}" for n in names)
        lse = ", lse" if self.sink else ""
        cotangents = ("grad_out, grad_lse", "grad_lse.contiguous()") if self.sink else ("grad_out", "None")
        given = f"[{', '.join(names)}]"
        forward = f"getattr(torch.ops.attnc_emitted, NAME)(q, k, v, {given}, scale)"
        name = 'getattr(torch.ops.attnc_emitted, NAME + "_backward")'
        backward = f"{name}(q, k, v, out, lse, grad_out, {cotangents[1]}, {given}, ctx.scale)"
        return f"""\
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale{saved}):
        out, lse = {forward}
        ctx.save_for_backward(q, k, v, out, lse{saved})
        ctx.scale = scale
        return out{lse}

    @staticmethod
    def backward(ctx, {cotangents[0]}):
{once.REFUSAL.rstrip()}
        q, k, v, out, lse{saved} = ctx.saved_tensors
        dq, dk, dv, {"found" if names else "_"} = {backward}
        return dq, dk, dv, None{gradients}
"""

    def attention(self) -> str:
        spec = self.spec
        g = spec.geometry
        assert g is not None
        sink = [self.sink] if self.sink else []
        drops = ["dropout_p=0.0", f"{TABLE}=None"] if spec.attend.dropout is not None else []
        given = [t for t in self.tables if t != TABLE]
        keywords = ["scale=None", *drops, *given, *sink, *[f"{p}=None" for p in self.pads]]
        d, dv = spec.head_dim, spec.value_dim
        kv = "GRID" if spec.program.same_grid else "KV_GRID"
        pq, pk = spec.program.queries.prefix, spec.program.keys.prefix
        n_q = "math.prod(GRID)" + (f" + {pq}" if pq else "")
        n_k = f"math.prod({kv})" + (f" + {pk}" if pk else "")
        lines = [f"def attention(q, k, v, *, {', '.join(keywords)}):"]
        lines.append(
            f'    """out [B, H, N, {dv}] of q [B, H, N, {d}], k [B, HK, M, {d}] and v [B, HK, M, {dv}] (N may be *grid)."""'
        )
        lines.append(f'    for name, t, n, width in (("q", q, {n_q}, {d}), ("k", k, {n_k}, {d}), ("v", v, {n_k}, {dv})):')
        lines.append("        if t.dim() < 4 or math.prod(t.shape[2:-1]) != n or t.shape[-1] != width:")
        lines.append('            raise ValueError(f"{name} has shape {tuple(t.shape)}; this module wants [B, H, {n}, {width}]")')
        lines.append(
            "    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[0] > 65535:"
        )
        text = "q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: one batch (at most 65535) and matching heads are wanted"
        lines.append(f'        raise ValueError(f"{text}")')
        lines += self.run_checks()
        kinds = {4: ["float32"], 2: ["float16", "bfloat16"]}[spec.itemsize]
        shown = " or ".join(kinds)
        listed = ", ".join(f"torch.{k}" for k in kinds) + ("," if len(kinds) == 1 else "")
        lines.append(f"    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in ({listed}):")
        lines.append(f'        raise ValueError(f"dtypes {{q.dtype}}, {{k.dtype}}, {{v.dtype}}; this module wants {shown}")')
        others = "".join(f", {n}" for n in (*given, *sink))
        where = f'", ".join(sorted({{str(t.device) for t in (q, k, v{others})}}))'
        told = "tensors on {where}; this module wants all of them on one GPU (TRITON_INTERPRET=1 serves a CPU)"
        lines.append(f"    if any(t.device != q.device for t in (k, v{others})) or not (q.is_cuda or INTERPRETED.value):")
        lines += [f"        where = {where}", f'        raise ValueError(f"{told}")']
        if not spec.wide:
            lines.append(f"    for t, first in ((q, 1), (k, 1), (v, 1){''.join(f', ({n}, 0)' for n in given)}):")
            lines.append("        if sum(s * (n - 1) for n, s in zip(t.shape[first:], t.stride()[first:])) >= 2**31:")
            told = "a tensor of strides {t.stride()} spans 2**31 elements; this module wants less of a batch item and of a table"
            lines.append(f'            raise ValueError(f"{told}")')
        lines.append(f"    scale = {d} ** -0.5 if scale is None else float(scale)")
        positive = spec.plain and spec.bias is not None
        lines.append(f"    if not {'0' if positive else '-math.inf'} < scale < math.inf:")
        lines.append(f'        raise ValueError(f"scale={{scale}}; this module wants a finite {"positive " * positive}one")')
        for name in given:
            lines += self.table_checks(name)
        if drops:
            lines.append("    if not 0 <= dropout_p < 1:")
            lines.append('        raise ValueError(f"dropout_p={dropout_p}; this module wants a number from 0 to less than 1")')
            lines.append(f"    {TABLE} = seed_table(dropout_p, {TABLE}, q.device)")
        for name, width in (("pad_k", d), ("pad_v", dv)) if self.pads else ():
            lines.append(f"    if {name} is None:")
            lines.append(f"        {name} = q.new_zeros(k.shape[1], {width})")
            lines.append(f"    if {name}.dim() != 2 or {name}.shape[0] not in (1, k.shape[1]) or {name}.shape[1] != {width}:")
            lines.append(
                f'        raise ValueError(f"{name} has shape {{tuple({name}.shape)}}; this module wants [HK or 1, {width}]")'
            )
        for name in sink:
            lines.append(f"    if {name}.dim() != 1 or {name}.shape[0] not in (1, q.shape[1]):")
            lines.append(f'        raise ValueError(f"{name} has shape {{tuple({name}.shape)}}; this module wants [H or 1]")')
        rest = "".join(f", {n}" for n in (*self.tables, *self.pads))
        call, sizes = f"_Attention.apply(q, k, v, scale{rest})", (g.q_grid, g.k_grid)
        lines += [f"    {line}" for line in around.lines(spec.program, self.whole, sizes, call, "{}")]
        return "\n".join(lines)

    def run_checks(self) -> list[str]:
        """Lines that refuse heads which the runs of heads with statements of their own do not divide."""
        runs = sorted({h.spec.run for h in self.hosts if h.spec.run})
        if not runs:
            return []
        heads = runs[-1][1]
        told = "{q.shape[1]} heads on {k.shape[1]} of keys; this module wants " + f"{heads}, and key heads that no two of "
        told += f"{', '.join(f'{a} to {b - 1}' for a, b in runs)} share: repeat k and v along their heads"
        tests = " or ".join(f"{b} * k.shape[1] % {heads}" for _, b in runs[:-1])
        return [f"    if q.shape[1] != {heads} or {tests}:", f'        raise ValueError(f"{told}")']

    def table_checks(self, name: str) -> list[str]:
        spec, g = self.spec, self.spec.geometry
        assert g is not None
        rank = spec.attend.table_rank(name)
        node = next(
            (
                n
                for e in (spec.score, spec.residual, *([spec.post] if spec.post else []))
                for n in ir.walk(e)
                if n.op == "load" and n.args[0] == name
            ),
            None,
        )
        tests, wants = [f"{name}.dim() != {rank}"], ["?"] * rank
        if node is not None:
            for d, e in enumerate(node.children):
                if e == ir.HEAD:
                    tests.append(f"{name}.shape[{d}] not in (1, q.shape[1])")
                    wants[d] = "H or 1"
                elif (least := longest_index(g, e)) is not None:
                    tests.append(f"1 < {name}.shape[{d}] < {least}")
                    wants[d] = f">= {least}"
        text = f"    if {' or '.join(tests)}:"
        return [
            text,
            f'        raise ValueError(f"{name} has shape {{tuple({name}.shape)}}; this module wants [{", ".join(wants)}]")',
        ]


def longest_index(g: Geometry, e: ir.Expr) -> int | None:
    """The length a table's dimension needs, where its index depends on one axis: the greatest index over allowed pairs, plus 1."""
    axes = {n.args[1] for n in ir.walk(e) if n.op == "coord"}
    if len(axes) != 1 or any(n.op in ("load", "batch", "head") for n in ir.walk(e)):
        return None
    (axis,) = axes
    a = g.axes[axis]
    most = -1
    for c in range(a.before_queries, a.before_queries + a.real_queries):
        r, j = c % a.split, c // a.split
        keys = np.arange(a.lo[r, j], a.hi[r, j] + 1) * a.split + r
        if keys.size:
            leaves = {**g.sizes, ir.coord("q", axis): c, ir.coord("k", axis): keys}
            most = max(most, int(np.max(evaluate(e, leaves, np))))
    return most + 1 if most >= 0 else None
