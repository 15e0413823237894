"""Prints the host side of a module: launches, checks, and the differentiable `attention`."""

from __future__ import annotations

import textwrap

import numpy as np

from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.codegen import triton_expr
from attnc.codegen.triton_kernels import Kernel
from attnc.codegen.triton_plan import Spec, lanes
from attnc.codegen.triton_tables import DELTA_ROWS
from attnc.schedule.geometry import Geometry

STRIDES = '''\
def strides(t, grid):
    """Element strides: batch, head, one per axis, channel; of [B, H, N, D] or [B, H, *grid, D]."""
    if t.dim() == len(grid) + 3:
        return t.stride()
    batch, head, token, channel = t.stride()
    return (batch, head, *(token * math.prod(grid[i + 1 :]) for i in range(len(grid))), channel)
'''
FLAT_STRIDES = '''\
def strides(t, grid):
    """Element strides: batch, head, token, channel; of [B, H, N, D]."""
    return t.stride()
'''
LIKE = '''\
def like(t, channels):
    """An empty tensor whose dimensions lie in memory in the order of t's, with another number of channels."""
    order = sorted(range(t.dim()), key=lambda d: (-t.stride(d), d))
    shape = (*t.shape[:-1], channels)
    out = torch.empty([shape[d] for d in order], dtype=t.dtype, device=t.device)
    return out.permute([order.index(d) for d in range(t.dim())])
'''
PRECISION = '''\
def precision():
    """How float32 products are computed: IEEE, unless torch's own switch allows tf32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
'''
TABLE_STRIDES = '''\
def table_strides(t):
    """Element strides; a dimension of length 1 serves every index."""
    return tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride()))
'''


class Host:
    """Text of the functions that launch a module's kernels."""

    def __init__(self, spec: Spec, kernels: list[Kernel], flat: list[Kernel]) -> None:
        self.spec, self.kernels, self.flat = spec, {k.kind: k for k in kernels}, {k.kind: k for k in flat}
        self.rank_one = spec.rank == 1
        self.pads = ("pad_k", "pad_v") if spec.padded else ()
        self.tables = spec.attend.tables

    # ------------------------------------------------------------------------------------------------------------------- pieces
    def sizes(self) -> list[str]:
        """Lines that name the lengths kernels take."""
        spec, out = self.spec, []
        p = spec.program
        sides = [("grid", "q", p.queries)] + ([] if p.same_grid else [("kv_grid", "k", p.keys)])
        for source, side, tokens in sides:
            real = [s.real_queries if side == "q" else s.real_keys for s in spec.names]
            whole = [s.queries if side == "q" else s.keys for s in spec.names]
            if spec.structure.flat:
                out.append(f"{whole[0]} = math.prod({source})")
                continue
            out.append(f"{', '.join(real)}{',' if len(real) == 1 else ''} = {source}")
            if tokens.pad is not None:
                more = [f"{r} + {a + b}" for r, (a, b) in zip(real, tokens.pad, strict=True)]
            elif tokens.pad_multiple is not None:
                more = [f"{r} + -{r} % {m}" for r, m in zip(real, tokens.pad_multiple, strict=True)]
            elif spec.padded:
                more = list(real)
            else:
                continue
            out.append(f"{', '.join(whole)} = {', '.join(more)}")
        return out

    def parts(self, k: Kernel) -> str:
        """How many residues and tiles a kernel's program_id(0) counts."""
        out = []
        for what, p in k.digits():
            names, sizes = k.spec.names[p.axis], k.spec.size_names
            before = k.spec.before(p.axis, k.side)
            length = names.real_queries if k.side == "q" else names.keys
            if before and k.side == "q":
                length = f"({length} + {before})"
            split = triton_expr.text(p.split, sizes, host=True)
            if what == "class":
                out.append(f"min({split}, {length})")
                continue
            per = length if split == "1" else f"triton.cdiv({length}, {split})"
            start = triton_expr.text(p.start, sizes, host=True)
            if start != "0":
                per = f"{per} + {start[1:]}" if start.startswith("-") and start[1:].isalnum() else f"{per} - ({start})"
            out.append(per if p.rows == 1 else f"triton.cdiv({per}, {p.rows})")
        return f"({', '.join(out)}{',' if len(out) == 1 else ''})"

    def value(self, name: str, k: Kernel) -> str:
        """Host expression of a kernel argument."""
        grid = "kv_grid" if not self.spec.program.same_grid else "grid"
        tensors = {"q": "q", "k": "k", "v": "v", "o": "out", "g": "grad_out", "dq": "dq", "dk": "dk", "dv": "dv"}
        prefix = k.prefix != ""
        if name.lower() in tensors and name not in ("N",):
            t = tensors[name.lower()]
            if not self.spec.prefix:
                return t
            rows = {"forward": ("q", "o"), "backward_dq": ("q", "g", "dq"), "backward_dkv": ("k", "v", "dk", "dv")}.get(k.kind, ())
            return self.part(t, "all" if prefix and name.lower() not in rows else "prefix" if prefix else "grid")
        if name.endswith("_st"):
            stem = name.removesuffix("_st")
            if stem in tensors:
                side = grid if stem in ("k", "v", "dk", "dv") else "grid"
                return f"{tensors[stem]}.stride()" if prefix else f"strides({tensors[stem]}, {side})"
            if stem.endswith("p") and stem[:-1] in tensors:
                return f"{tensors[stem[:-1]]}.stride()"
            if stem.startswith("d_"):
                return f"table_strides({stem})"
            return f"table_strides(tables[{stem!r}])"
        if name in ("Kp", "Vp", "Qp", "Gp"):
            return self.part(tensors[name[0].lower()], "prefix")
        if name.endswith("_table"):
            return f"tables[{name.removesuffix('_table')!r}]"
        if self.spec.prefix and name in ("Lse", "Lse2", "Delta"):
            low = name.lower()
            if not prefix:
                return f"{low}[:, :, {self.spec.program.queries.prefix}:]"
            return low
        if name == "P":
            return str(self.spec.program.keys.prefix if k.side == "q" else self.spec.program.queries.prefix)
        if prefix and name == "NX":
            return str(self.spec.program.queries.prefix) if k.side == "q" else "q.shape[2]"
        if prefix and name == "MX":
            return "k.shape[2]" if k.side == "q" else str(self.spec.program.keys.prefix)
        return {
            "Lse": "lse", "Lse2": "lse2", "Delta": "delta", "c": "scale * math.log2(math.e)", "GROUP": "H // HK", "PRECISION": "precision()",
            "PER": f"{k.tile.batch}", "Size": "size", "Unit": "unit", "DPad_k": "dpad_k", "DPad_v": "dpad_v",
        }.get(name, name.lower() if name.startswith("Partial") else name)

    def part(self, t: str, which: str) -> str:
        """A tensor's rows: all, prefix tokens, or the grid."""
        p = self.spec.program
        n = p.keys.prefix if t in ("k", "v", "dk", "dv") else p.queries.prefix
        if which == "all" or (which == "grid" and not n):
            return t
        return f"{t}[:, :, {n}:]" if which == "grid" else f"{t}[:, :, :{n}]"

    def launch(self, k: Kernel) -> list[str]:
        """Lines that launch a kernel."""
        heads = "HK" if k.side == "k" else "H"
        batch = f"triton.cdiv(B, {k.tile.batch})" if k.batched else "B"
        parts = f"parts = {self.parts(k)}"
        if k.prefix:
            length = self.spec.program.queries.prefix if k.side == "q" else self.spec.program.keys.prefix
            parts = f"parts = ({-(-length // k.tile.rows[0])},)"
        values = [self.value(a, k) for a, _ in k.arguments()]
        call = f"{k.name}[(math.prod(parts), {heads}, {batch})]("
        body = textwrap.wrap(", ".join(values) + f", num_warps={k.tile.warps}, num_stages={k.tile.stages},", 96, break_long_words=False)
        return [parts, call, *[f"    {line}" for line in body], ")"]

    # ---------------------------------------------------------------------------------------------------------------- functions
    def text(self) -> str:
        """All functions."""
        parts = []
        spec = self.spec
        g = spec.geometry
        if g is not None:
            lines = [f"GRID = {g.q_grid!r}"]
            if not spec.program.same_grid:
                lines.append(f"KV_GRID = {g.k_grid!r}")
            parts.append("\n".join(lines))
        parts.append(FLAT_STRIDES if self.rank_one else STRIDES)
        parts += [LIKE, PRECISION]
        if self.tables or self.pads:
            parts.append(TABLE_STRIDES)
        parts += [self.forward(), self.backward(), self.function(), self.attention()]
        return "\n\n".join(p.strip("\n") + "\n" for p in parts)

    def signature(self, start: str) -> str:
        """Parameters: the grid has a default where it is known."""
        known = self.spec.geometry is not None
        grids = ["grid=GRID" if known else "grid"]
        if not self.spec.program.same_grid:
            grids.append("kv_grid=KV_GRID" if known else "kv_grid")
        return f"{start}, {', '.join(grids)}"

    def common(self) -> list[str]:
        """Lines that both directions begin with."""
        out = ["B, H, HK, N = q.shape[0], q.shape[1], k.shape[1], math.prod(q.shape[2:-1])"]
        out += self.sizes()
        if self.rank_one and not self.spec.prefix:
            out.append("q, k, v = (t.flatten(2, -2) for t in (q, k, v))")
        return out

    def forward(self) -> str:
        out = [f"def run_forward({self.signature('q, k, v, tables, scale')}):"]
        body = ['"""out, and lse (natural log, float32 [B, H, N], -inf for a row without keys)."""']
        shape = self.rank_one and not self.spec.prefix
        body += [f"out = like(q, {self.spec.value_dim})"] if not shape else [f"shaped = out = like(q, {self.spec.value_dim})"]
        body += self.common()
        if shape:
            body.append("out = out.view(B, H, N, -1) if out.dim() == 4 else out.flatten(2, -2)")
        body.append("lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)")
        body += self.launch(self.kernels["forward"])
        if "forward" in self.flat:
            body += self.launch(self.flat["forward"])
        body.append("return shaped, lse" if shape else "return out, lse")
        return "\n".join(out + [f"    {line}" for line in body])

    def backward(self) -> str:
        spec = self.spec
        out = [f"def run_backward({self.signature('q, k, v, out, lse, grad_out, grad_lse, tables, scale')}):"]
        body = ['"""Gradients of q, k, v and of the tables by name; grad_lse may be None."""']
        shape = self.rank_one and not spec.prefix
        if shape:
            body.append(f"gradients = dq, dk, dv = like(q, {spec.head_dim}), like(k, {spec.head_dim}), like(v, {spec.value_dim})")
        else:
            body.append(f"dq, dk, dv = like(q, {spec.head_dim}), like(k, {spec.head_dim}), like(v, {spec.value_dim})")
        body += self.common()
        if shape:
            body.append("out, grad_out, dq, dk, dv = (t.flatten(2, -2) for t in (out, grad_out, dq, dk, dv))")
        body.append("delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)")
        body.append("grad_lse = None if grad_lse is None else grad_lse.contiguous()")
        lengths = [] if spec.prefix else [s.real_queries for s in spec.names]
        st = (lambda t: f"{t}.stride()") if spec.prefix else (lambda t: f"strides({t}, grid)")
        extra = "".join(f", {n}" for n in lengths)
        body.append(f"backward_delta[(triton.cdiv(N, {DELTA_ROWS}), H, B)](")
        body.append(f"    out, grad_out, lse, grad_lse, delta, lse2, {st('out')}, {st('grad_out')}, H, N{extra},")
        body.append(")")
        dq = self.kernels["backward_dq"]
        device = "device=q.device"
        if spec.learned:
            programs = f"(triton.cdiv(B, {dq.tile.batch}), H, math.prod({self.parts(dq)})" if dq.batched else f"(B, H, math.prod({self.parts(dq)})"
            if dq.registers:
                body.append(f"partial_0 = torch.empty({programs}, {dq.bm * dq.bn}), {device})")
            else:
                body.append(f"size = torch.empty({programs}), {device})")
        body += self.launch(dq)
        if "backward_dq" in self.flat:
            body += self.launch(self.flat["backward_dq"])
        dkv = self.kernels["backward_dkv"]
        if spec.padded:
            body.append(f"programs = (B, HK, math.prod({self.parts(dkv)}))")
            body.append(f"dpad_k, dpad_v = (torch.empty(*programs, n, {device}) for n in ({spec.head_dim}, {spec.value_dim}))")
        body += self.launch(dkv)
        if "backward_dkv" in self.flat:
            body += self.launch(self.flat["backward_dkv"])
        body.append("found = {}")
        if spec.learned:
            body += self.register_tables(dq) if dq.registers else self.atomic_tables()
        if spec.padded:
            body.append("for name, part in ((\"pad_k\", dpad_k), (\"pad_v\", dpad_v)):")
            body.append("    found[name] = part.sum((0, 2)).sum_to_size(tables[name].shape)")
        body.append("return *gradients, found" if shape else "return dq, dk, dv, found")
        return "\n".join(out + [f"    {line}" for line in body])

    def register_tables(self, dq: Kernel) -> list[str]:
        (n,) = self.spec.learned
        name = n.args[0]
        sizes = [a for a in table_arguments(self.spec, dq)]
        head = next((d for d, e in enumerate(n.children) if e == ir.HEAD), None)
        shape = f"tables[{name!r}].shape"
        out = [f"shape = {shape}"]
        kept = "shape" if head is None else f"(*shape[:{head}], *shape[{head + 1}:])" if head else "shape[1:]"
        out.append(f"grad = torch.empty(H, *{kept}, {'device=q.device'})" if kept != "shape" else "grad = torch.empty(H, *shape, device=q.device)")
        st = "table_strides(grad[0])" if head is None else f"(*table_strides(grad[0])[:{head}], 0, *table_strides(grad[0])[{head}:])"
        out.append("entries = grad[0].numel()")
        out.append("backward_table[(triton.cdiv(entries, 32), H)](")
        out.append(f"    partial_0.sum((0, 2)), grad, {st}, entries{''.join(f', {s}' for s in sizes)},")
        out.append(")")
        if head is None:
            out.append(f"found[{name!r}] = grad.sum(0)")
        else:
            moved = "grad" if head == 0 else f"grad.movedim(0, {head})"
            out.append(f"found[{name!r}] = {moved}.sum_to_size(shape)")
        return out

    def atomic_tables(self) -> list[str]:
        """Fixed-point accumulation: integer addition has no order, so the sum is the same on every run."""
        names = list(dict.fromkeys(n.args[0] for n in self.spec.learned))
        out = ["# integers add up to the same sum in any order; `size` bounds what one entry can collect"]
        out.append("unit = 2.0**61 / size.sum().clamp(min=1e-30)")
        for name in names:
            out.append(f"d_{name} = torch.zeros(tables[{name!r}].shape, dtype=torch.int64, device=q.device)")
        out += self.launch(self.kernels["backward_table"])
        out += [f"found[{name!r}] = (d_{name}.double() / unit).float()" for name in names]
        return out

    def function(self) -> str:
        known = self.spec.geometry is not None
        grids = [] if known else ["grid"] + ([] if self.spec.program.same_grid else ["kv_grid"])
        extra = "".join(f", {g}" for g in grids)
        args = f"ctx, q, k, v, scale{extra}, names, *tables"
        none = ", ".join(["None"] * (2 + len(grids)))
        grids_tuple = f"({', '.join(grids)}{',' if len(grids) == 1 else ''})"
        pieces = f"*{grids_tuple}" if grids else ""
        sep = ", " if pieces else ""
        return f'''\
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward({args}):
        out, lse = run_forward(q, k, v, dict(zip(names, tables)), scale{sep}{pieces})
        ctx.save_for_backward(q, k, v, out, lse, *tables)
        ctx.rest = scale, names{f", {grids_tuple}" if grids else ""}
        return out

    @staticmethod
    def backward(ctx, grad_out):
        (q, k, v, out, lse, *tables), (scale, names{", grids" if grids else ""}) = ctx.saved_tensors, ctx.rest
        named = dict(zip(names, tables))
        dq, dk, dv, found = run_backward(q, k, v, out, lse, grad_out, None, named, scale{", *grids" if grids else ""})
        gradients = (found[n].to(t.dtype) if n in found else None for n, t in named.items())
        return dq, dk, dv, {none}, *gradients
'''

    def attention(self) -> str:
        spec = self.spec
        known = spec.geometry is not None
        same = spec.program.same_grid
        grids = [] if known else ["grid"] + ([] if same else ["kv_grid"])
        keywords = ["scale=None", *grids, *self.tables, *[f"{p}=None" for p in self.pads]]
        d, dv = spec.head_dim, spec.value_dim
        grid = "GRID" if known else "grid"
        kv = grid if same else "KV_GRID" if known else "kv_grid"
        pq, pk = spec.program.queries.prefix, spec.program.keys.prefix
        n_q = f"math.prod({grid})" + (f" + {pq}" if pq else "")
        n_k = f"math.prod({kv})" + (f" + {pk}" if pk else "")
        lines = [f"def attention(q, k, v, *, {', '.join(keywords)}):"]
        lines.append(f'    """out [B, H, N, {dv}] of q [B, H, N, {d}], k [B, HK, M, {d}] and v [B, HK, M, {dv}] (or [B, H, *grid, D]); differentiable."""')
        lines.append(f"    for name, t, n, width in ((\"q\", q, {n_q}, {d}), (\"k\", k, {n_k}, {d}), (\"v\", v, {n_k}, {dv})):")
        lines.append("        if t.dim() < 4 or math.prod(t.shape[2:-1]) != n or t.shape[-1] != width:")
        lines.append('            raise ValueError(f"{name} has shape {tuple(t.shape)}; this module wants [B, H, {n}, {width}]")')
        lines.append("    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:")
        lines.append('        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} differ in batch or heads")')
        lines.append("    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):")
        lines.append('        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype}; this module wants one of float16, bfloat16, float32")')
        lines.append("    if q.shape[0] > 65535:")
        lines.append('        raise ValueError(f"batch {q.shape[0]} is more than one launch holds (65535); split it")')
        lines.append(f"    scale = {d} ** -0.5 if scale is None else float(scale)")
        if spec.plain and spec.bias is not None:
            lines.append("    if not scale > 0:")
            lines.append('        raise ValueError(f"scale={scale}; this module wants a positive one")')
        for name in self.tables:
            lines += self.table_checks(name)
        for name, width in (("pad_k", d), ("pad_v", dv)) if self.pads else ():
            lines.append(f"    if {name} is None:")
            lines.append(f"        {name} = q.new_zeros(k.shape[1], {width})")
            lines.append(f"    if {name}.dim() != 2 or {name}.shape[0] not in (1, k.shape[1]) or {name}.shape[1] != {width}:")
            lines.append(f'        raise ValueError(f"{name} has shape {{tuple({name}.shape)}}; this module wants [HK or 1, {width}]")')
        names = [*self.tables, *self.pads]
        tuple_text = f"({', '.join(repr(n) for n in names)}{',' if len(names) == 1 else ''})"
        rest = "".join(f", {n}" for n in names)
        lines.append(f"    return _Attention.apply(q, k, v, scale{''.join(f', {x}' for x in grids)}, {tuple_text}{rest})")
        return "\n".join(lines)

    def table_checks(self, name: str) -> list[str]:
        spec = self.spec
        rank = spec.attend.table_rank(name)
        node = next((n for e in (spec.score, spec.residual, *([spec.post] if spec.post else []))
                     for n in ir.walk(e) if n.op == "load" and n.args[0] == name), None)
        tests, wants = [f"{name}.dim() != {rank}"], ["?"] * rank
        if node is not None:
            for d, e in enumerate(node.children):
                if e == ir.HEAD:
                    tests.append(f"{name}.shape[{d}] not in (1, q.shape[1])")
                    wants[d] = "H or 1"
                elif spec.geometry is not None:
                    least = longest_index(spec.geometry, e)
                    if least is not None:
                        tests.append(f"{name}.shape[{d}] != 1 and {name}.shape[{d}] < {least}" if len(tests) == 0 else f"1 < {name}.shape[{d}] < {least}")
                        wants[d] = f">= {least}"
        text = f"    if {' or '.join(tests)}:"
        return [text, f'        raise ValueError(f"{name} has shape {{tuple({name}.shape)}}; this module wants [{", ".join(wants)}]")']


def table_arguments(spec: Spec, dq: Kernel) -> list[str]:
    """Sizes that the table kernel takes, in its order."""
    from attnc.codegen.triton_tables import table_sizes

    return table_sizes(spec, dq)


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


__all__ = ["Host", "lanes", "longest_index"]
