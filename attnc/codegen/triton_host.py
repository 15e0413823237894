"""Prints the host side of a module: what it allocates and launches."""

from __future__ import annotations

import textwrap

from attnc import ir
from attnc.codegen import around, triton_expr
from attnc.codegen.triton_face import Face
from attnc.codegen.triton_kernels import Kernel
from attnc.codegen.triton_plan import Spec
from attnc.codegen.triton_shapes import Module
from attnc.codegen.triton_tables import bias_kernel, table_names, table_sizes

STRIDES = '''\
def strides(t, grid):
    """Element strides: batch, head, one per axis, channel; of [B, H, N, D] or [B, H, *grid, D]."""
    s, axes = t.stride(), range(len(grid))
    return s if t.dim() == len(grid) + 3 else (*s[:2], *(s[2] * math.prod(grid[i + 1 :]) for i in axes), s[3])
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
TABLE_LENGTHS = '''\
def table_lengths(t):
    """Lengths that an index stays below; no bound where one element serves every index."""
    return tuple(2**31 - 1 if n == 1 else n for n in t.shape)
'''


class Host(Face):
    """Text of the functions that launch a module's kernels, and of those around them."""

    def __init__(
        self,
        spec: Spec,
        kernels: list[Kernel],
        flat: list[Kernel],
        module: Module,
        whole: ir.Attend | None = None,
        alone: bool = True,
    ) -> None:
        self.module, self.alone = module, alone
        self.whole = whole or spec.attend  # with the row maps and the sink that surround the kernels
        self.sink = self.whole.normalizer.sink
        self.spec, self.kernels, self.flat = spec, {k.kind: k for k in kernels}, {k.kind: k for k in flat}
        self.hosts: tuple[Host, ...] = (self,)
        self.rank_one = spec.rank == 1
        self.pads = ("pad_k", "pad_v") if spec.padded else ()
        self.tables = spec.attend.tables
        self.given = {*self.tables, "pad_k", "pad_v"}

    @property
    def imports(self) -> str:
        """What the module imports beyond torch and triton."""
        return "from torch import Tensor\n" if around.texts(self.whole) else ""

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
            if p.wrap:
                out.append(f"{length} // {p.rows}")
                continue
            per = length if split == "1" else f"triton.cdiv({length}, {split})"
            start = triton_expr.text(p.start, sizes, host=True)
            if start != "0":
                per = f"{per} + {start[1:]}" if start.startswith("-") and start[1:].isalnum() else f"{per} - ({start})"
            out.append(per if p.rows == 1 else f"triton.cdiv({per}, {p.rows})")
        return f"({', '.join(out)}{',' if len(out) == 1 else ''})"

    def value(self, name: str, k: Kernel) -> str:
        """Host expression of a kernel argument."""
        tensors = {"Q": "q", "K": "k", "V": "v", "O": "out", "G": "grad_out", "DQ": "dq", "DK": "dk", "DV": "dv"}
        prefix = k.prefix != ""
        if name in tensors:
            t = tensors[name]
            if k.fused and t in ("dk", "dv"):
                return self.run(f"{t}_heads", keys=False)
            if self.spec.run:
                return self.run(t, keys=t in ("k", "v", "dk", "dv"))
            if not self.spec.prefix:
                return t
            mine = k.side == ("k" if t in ("k", "v", "dk", "dv") else "q")
            return self.part(t, "grid" if not prefix else "prefix" if mine else "all")
        if name == "st":
            shown = [tensors[t.upper()] for t in k.tensors]
            if k.fused:
                shown = [f"{t}_heads" if t in ("dk", "dv") else t for t in shown]
            if prefix or (self.spec.program.same_grid and self.rank_one):
                return f"tuple(t.stride() for t in ({', '.join(shown)}))"
            if self.spec.program.same_grid:
                return f"tuple(strides(t, grid) for t in ({', '.join(shown)}))"
            each = (f"strides({t}, {'kv_grid' if t in ('k', 'v', 'dk', 'dv') else 'grid'})" for t in shown)
            return f"({', '.join(each)})"
        if name == "pst":
            columns = ("q", "grad_out") if k.side == "k" else ("k", "v")
            return f"({', '.join(f'{t}.stride()' for t in columns)})"
        if self.spec.run and name in ("Lse", "Lse2", "Less"):  # from the run's first row on, with the strides of all heads
            return f"{name.lower()}[:, {self.spec.run[0]}:]"
        if self.spec.run and name == "GLse":
            return f"None if grad_lse is None else grad_lse[:, {self.spec.run[0]}:]"
        if name in ("Kp", "Vp", "Qp", "Gp"):
            return self.part(tensors[name[0]], "prefix")
        if name.endswith("_st"):
            stem = name.removesuffix("_st")
            return f'table_strides(tables["{stem}"])' if stem in self.given else f"table_strides({stem})"
        if name.removesuffix("_table") in self.given and name.endswith("_table"):  # not the gradient of a table called "table"
            return 'tables["' + name.removesuffix("_table") + '"]'
        if self.spec.prefix and name in ("Lse", "Lse2", "Less", "GLse"):
            low, n = name.lower(), self.spec.program.queries.prefix
            if name == "GLse":
                return f"None if grad_lse is None else grad_lse[:, :, {n}:]" if n and not prefix else "grad_lse"
            return f"{low}[:, :, {n}:]" if n and not prefix else low
        if name == "P":
            return str(self.spec.program.keys.prefix if k.side == "q" else self.spec.program.queries.prefix)
        if prefix and name == "NX":
            return str(self.spec.program.queries.prefix) if k.side == "q" else "q.shape[2]"
        if prefix and name == "MX":
            return "k.shape[2]" if k.side == "q" else str(self.spec.program.keys.prefix)
        known = {
            "Bias": "bias_tiles",
            **{n: f"lists[{int(k.side == 'k')}][{i}]" for i, n in enumerate(("Offset", "Full", "Place"))},
            "GLse": "grad_lse",
            "c": "scale * math.log2(math.e)",
            "GROUP": "H // HK",
            "PRECISION": "precision()",
        }
        lower = ("Lse", "Lse2", "Less", "Size", "Unit", "Partial", "DPad_k", "DPad_v")
        return known.get(name, "per" if name == "PER" else name.lower() if name in lower else name)

    def part(self, t: str, which: str) -> str:
        """A tensor's rows: all, prefix tokens, or the grid."""
        p = self.spec.program
        n = p.keys.prefix if t in ("k", "v", "dk", "dv") else p.queries.prefix
        if which == "all" or (which == "grid" and not n):
            return t
        return f"{t}[:, :, {n}:]" if which == "grid" else f"{t}[:, :, :{n}]"

    def run(self, t: str, *, keys: bool) -> str:
        """A tensor's heads, or key heads, that the statement is of."""
        if self.spec.run is None:
            return t
        first, last = (f"{n} * HK // H" if keys and n else str(n) for n in self.spec.run)
        return f"{t}[:, {first}:{last}]"

    def launch(self, k: Kernel) -> list[str]:
        """Lines that launch a kernel."""
        heads = "HK" if k.side == "k" else "H"
        if self.spec.run:
            n = self.spec.heads(0)
            heads = f"{n} * HK // H" if k.side == "k" else str(n)
        batch = "triton.cdiv(B, per)" if k.batched else "B"
        parts = f"parts = {self.parts(k)}"
        if k.prefix:
            length = self.spec.program.queries.prefix if k.side == "q" else self.spec.program.keys.prefix
            parts = f"parts = ({-(-length // k.tile_choice.rows[0])},)"
        values = [self.value(a, k) for a, _ in k.arguments()]
        call = f"{k.name}[(math.prod(parts), {heads}, {batch})]("
        body = textwrap.wrap(
            ", ".join(values) + f", num_warps={k.tile_choice.warps}, num_stages={k.tile_choice.stages},",
            124,
            break_long_words=False,
        )
        per = self.per(k) if k.batched and not (self.spec.learned and k.fused) else []
        return [*per, parts, call, *[f"    {line}" for line in body], ")"]

    # ---------------------------------------------------------------------------------------------------------------- functions
    def text(self) -> str:
        """All functions."""
        parts = []
        spec = self.spec
        if not (self.rank_one and self.spec.program.same_grid):
            parts.append(STRIDES)
        if spec.head_dim != spec.value_dim:
            parts.append(LIKE)
        parts.append(PRECISION)
        if self.tables or self.pads:
            parts.append(TABLE_STRIDES)
        if any(k.tiled for h in self.hosts for k in h.kernels.values()):
            parts.append(TABLE_LENGTHS)
        parts += [self.forward(), self.backward(), *around.texts(self.whole)]
        parts += [self.operator(), self.function(), self.attention()] if self.alone else []
        return "\n\n".join(p.strip("\n") + "\n" for p in parts)

    def signature(self, start: str) -> str:
        """Parameters: the grid has a default where it is known."""
        known = self.spec.geometry is not None
        grids = ["grid=GRID" if known else "grid"]
        if not self.spec.program.same_grid:
            grids.append("kv_grid=KV_GRID" if known else "kv_grid")
        grids += ["lists"] if self.spec.listed else []
        grids += [] if self.alone else ["into=None"]
        return f"{start}, {', '.join(grids)}"

    def common(self) -> list[str]:
        """Lines that both directions begin with."""
        first = "B, H, HK, N = q.shape[0], q.shape[1], k.shape[1], math.prod(q.shape[2:-1])"
        sizes = self.sizes()
        if len(sizes) == 1 and sizes[0].endswith(" = grid"):  # one line for all names
            left, right = first.split(" = ")
            first, sizes = f"{left}, ({sizes[0].removesuffix(' = grid')}) = {right}, grid", []
        return [first, *sizes]

    def forward(self) -> str:
        out = [f"def run_forward({self.signature('q, k, v, tables, scale')}):"]
        what = "natural log, float32 [B, H, N], -inf for a row without keys" if self.spec.softmax else "-inf: weights have no sum"
        body = [f'"""out, and lse ({what})."""']
        shape = self.rank_one and not self.spec.prefix
        body += self.common()
        if shape:
            body += ["shape = q.shape[2:-1]", "q, k, v = (t.flatten(2, -2) for t in (q, k, v))"]
        out_like, lse_like = self.empty("q", self.spec.value_dim), "torch.empty(B, H, N, device=q.device)"
        given = "(into[0].flatten(2, -2), into[1]) if into else" if shape else "into or"
        body += [f"out = {out_like}", f"lse = {lse_like}"] if self.alone else [f"out, lse = {given} ({out_like}, {lse_like})"]
        body += [] if self.spec.softmax else ['lse.fill_(float("-inf"))']
        for each in self.hosts:
            body += each.bias_tiles(each.kernels["forward"])
            body += each.launch(each.kernels["forward"])
        if "forward" in self.flat:
            body += self.launch(self.flat["forward"])
        body.append("return out.unflatten(2, shape), lse" if shape else "return out, lse")
        return "\n".join(out + [f"    {line}" for line in body])

    def backward(self) -> str:
        """The function that launches the backward kernels."""
        spec, device = self.spec, "device=q.device"
        out = [f"def run_backward({self.signature('q, k, v, out, lse, grad_out, grad_lse, tables, scale')}):"]
        body = ['"""Gradients of q, k, v and of the tables by name; grad_lse is contiguous or None."""']
        shape = self.rank_one and not spec.prefix
        fresh = ", ".join(self.empty(t, d) for t, d in (("q", spec.head_dim), ("k", spec.head_dim), ("v", spec.value_dim)))
        if shape:
            body.append("shapes = [t.shape[2:-1] for t in (q, k, v)]")
        body += self.common()
        if shape:
            body.append("q, k, v, out, grad_out = (t.flatten(2, -2) for t in (q, k, v, out, grad_out))")
        given = "(t.flatten(2, -2) for t in into) if into else" if shape else "into or"
        body.append(f"dq, dk, dv = {fresh}" if self.alone else f"dq, dk, dv = {given} ({fresh})")
        fused = self.kernels["backward_dkv"].fused
        dq = self.kernels["backward_dkv" if fused else "backward_dq"]
        if spec.learned:
            batch = "triton.cdiv(B, per)" if dq.batched else "B"
            if dq.batched:
                body += self.per(dq)
            name, last = ("partial", f", {dq.bm * dq.bn}") if dq.registers else ("size", "")
            body.append(f"{name} = torch.empty({batch}, H, math.prod({self.parts(dq)}){last}, {device})")
        body += self.bias_tiles(dq)
        if fused:
            body.append("# where query heads share a key head, each writes its own share first")
            body.append("dk_heads, dv_heads = dk, dv")
            goes_on = spec.adds & 2  # the first of a module's statements does where an operator runs each by itself
            with_heads = f"torch.{'zeros' if goes_on else 'empty'}(B, H, *t.shape[2:], dtype=torch.float32, device=q.device)"
            body += ["if H != HK:", f"    dk_heads, dv_heads = ({with_heads} for t in (dk, dv))"]
            for each in self.hosts:
                body += each.bias_tiles(each.kernels["backward_dkv"]) if each is not self else []
                body += each.launch(each.kernels["backward_dkv"])
            body += ["if H != HK:", "    for t, heads in ((dk, dk_heads), (dv, dv_heads)):"]
            total = "heads.unflatten(1, (HK, H // HK)).sum(2)"
            body.append(f"        t.add_({total})" if goes_on else f"        t.copy_({total})")
        else:
            if spec.softmax:
                body.append("less, lse2 = torch.empty_like(lse), torch.empty_like(lse)")
            for each in self.hosts:
                body += each.bias_tiles(each.kernels["backward_dq"]) if each is not self else []
                body += each.launch(each.kernels["backward_dq"])
            if "backward_dq" in self.flat:
                body += self.launch(self.flat["backward_dq"])
            dkv = self.kernels["backward_dkv"]
            if spec.padded:
                body.append(f"programs = (B, HK, math.prod({self.parts(dkv)}))")
                body.append(f"dpad_k, dpad_v = (torch.empty(*programs, n, {device}) for n in ({spec.head_dim}, {spec.value_dim}))")
            for each in self.hosts:
                body += each.launch(each.kernels["backward_dkv"])
            if "backward_dkv" in self.flat:
                body += self.launch(self.flat["backward_dkv"])
        found = "found"
        if spec.learned or spec.padded:
            body.append("found = {}")
        else:
            found = "{}"
        if spec.learned:
            body += self.register_tables(dq) if dq.registers else self.atomic_tables()
        if spec.padded:
            body.append('for name, part in (("pad_k", dpad_k), ("pad_v", dpad_v)):')
            body.append("    found[name] = part.sum((0, 2)).sum_to_size(tables[name].shape)")
        if shape:
            body.append("dq, dk, dv = (t.unflatten(2, shape) for t, shape in zip((dq, dk, dv), shapes))")
        body.append(f"return dq, dk, dv, {found}")
        return "\n".join(out + [f"    {line}" for line in without_repeats(body, "parts = ")])

    def bias_tiles(self, k: Kernel) -> list[str]:
        """Lines that make the tiles a kernel reads its bias from."""
        if not k.tiled:
            return []
        name, sizes = bias_kernel(self.spec, k, self.module)
        tables = table_names(self.spec)
        given = [f'tables["{t}"]' for t in tables]
        values = [*given, "bias_tiles", *[f"{f}({t})" for t in given for f in ("table_strides", "table_lengths")], "scale", *sizes]
        return [
            f"bias_tiles = torch.empty(H, {k.bm}, {k.bn}, device=q.device)",
            f"{name}[({k.bm // 16}, H)]({', '.join(values)})",
        ]

    def per(self, k: Kernel) -> list[str]:
        """How many batch items one program walks: several where that leaves programs enough."""
        return [
            f"per = max(1, min({k.tile_choice.batch}, B * H * math.prod({self.parts(k)}) // {768 // k.tile_choice.warps}))"
            "  # batch items of one program"
        ]

    def empty(self, t: str, dim: int) -> str:
        """A new tensor in the memory order of t."""
        have = self.spec.value_dim if t == "v" else self.spec.head_dim
        return f"torch.empty_like({t})" if have == dim else f"like({t}, {dim})"

    def register_tables(self, dq: Kernel) -> list[str]:
        (n,) = self.spec.learned
        name = n.args[0]
        sizes = table_sizes(self.spec, dq)
        head = next((d for d, e in enumerate(n.children) if e == ir.HEAD), None)
        shape = f'tables["{name}"].shape'
        out = [f"shape = {shape}"]
        kept = "shape" if head is None else f"(*shape[:{head}], *shape[{head + 1}:])" if head else "shape[1:]"
        out.append(
            f"grad = torch.empty(H, *{kept}, {'device=q.device'})"
            if kept != "shape"
            else "grad = torch.empty(H, *shape, device=q.device)"
        )
        st = (
            "table_strides(grad[0])"
            if head is None
            else (
                "(0, *table_strides(grad[0]))"
                if not head
                else f"(*table_strides(grad[0])[:{head}], 0, *table_strides(grad[0])[{head}:])"
            )
        )
        out.append("entries = grad[0].numel()")
        out.append("backward_table[(triton.cdiv(entries, 32), H)](")
        out.append(f"    partial.sum((0, 2)), grad, {st}, entries{''.join(f', {s}' for s in sizes)},")
        out.append(")")
        if head is None:
            out.append(f'found["{name}"] = grad.sum(0)')
        else:
            moved = "grad" if head == 0 else f"grad.movedim(0, {head})"
            out.append(f'found["{name}"] = {moved}.sum_to_size(shape)')
        return out

    def atomic_tables(self) -> list[str]:
        """Fixed-point accumulation: integer addition has no order, so the sum is the same on every run."""
        names = list(dict.fromkeys(n.args[0] for n in self.spec.learned))
        out = ["# integers add up to the same sum in any order; `size` bounds what one entry can collect"]
        out.append("unit = 2.0**61 / size.sum().clamp(min=1e-30)")
        for name in names:
            out.append(f'd_{name} = torch.zeros(tables["{name}"].shape, dtype=torch.int64, device=q.device)')
        out += self.launch(self.kernels["backward_table"])
        out += [f'found["{name}"] = (d_{name}.double() / unit).float()' for name in names]
        return out


def without_repeats(lines: list[str], start: str) -> list[str]:
    """Lines without assignments that would assign the same value again."""
    out, last = [], ""
    for line in lines:
        if line.startswith(start) and line == last:
            continue
        last = line if line.startswith(start) else last
        out.append(line)
    return out
