"""Prints the kernels of one statement. They are one walk with different arithmetic: a program owns a tile of rows (queries; keys in
backward_dkv), visits the box of columns they see chunk by chunk, and masks by comparing column indices with the ends of each row.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from attnc import ir
from attnc.analysis.derivative import derivative
from attnc.codegen import triton_expr
from attnc.codegen.triton_plan import AxisPlan, Spec, lanes, order, plan_axis, symmetric, terms, tile_invariant
from attnc.codegen.triton_shapes import INF, Module, Shapes, mentions
from attnc.schedule.tiles import Side, Tile

Kind = Literal["forward", "backward_dq", "backward_dkv", "backward_table"]

READ = '''\
@triton.jit
def @@(pointers, mask):
    """Rows of a tensor, zeros where masked; float32 for bfloat16 in the interpreter, which multiplies that wrongly."""
    x = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)
    return x.to(tl.float32) if INTERPRETED and x.dtype == tl.bfloat16 else x
'''
DOCS = {
    "forward": "One tile of queries: online softmax over the box of keys it sees.",
    "backward_dq": "The gradient of one tile of queries.",
    "backward_dkv": "The gradients of one tile of keys and values, over the box of queries that see them.",
    "backward_table": "Table gradients as 64-bit fixed-point sums, whose order does not matter.",
    "fused": "One group: the gradients of its queries, keys and values, and of the tables.",
}
POINTERS = [
    "Q",
    "K",
    "V",
    "O",
    "G",
    "Qp",
    "Gp",
    "Kp",
    "Vp",
    "Lse",
    "GLse",
    "Lse2",
    "Delta",
    "DQ",
    "DK",
    "DV",
    "Partial",
    "Size",
    "Unit",
    "DPad_k",
    "DPad_v",
]
SCALARS = ["scale", "c", "B", "H", "N", "P", "parts", "GROUP", "PER", "PRECISION"]
CONSTANT = ("GROUP", "PRECISION")


def dot(a: str, b: str, acc: str = "") -> str:
    """A matrix product as text."""
    return f"tl.dot({a}, {b}{f', acc={acc}' if acc else ''}, input_precision=PRECISION)"


class Kernel(Shapes):
    """One kernel's text and what its launch needs to know."""

    def __init__(self, spec: Spec, kind: Kind, tile: Tile, module: Module, prefix: str = "", fused: bool = False) -> None:
        self.kind, self.tile_choice, self.prefix, self.fused = kind, tile, prefix, fused
        self.name = prefix + kind
        side: Side = "k" if kind == "backward_dkv" and not fused else "q"
        plans = tuple(plan_axis(spec, a, side, tile) for a in range(spec.rank))
        super().__init__(spec, side, plans, tile.bm, tile.bn, module)
        self.outer, self.inner = order(plans, tile.inner)
        whole = all(p.single for p in plans)
        self.with_prefix = bool(spec.program.keys.prefix if side == "q" else spec.program.queries.prefix)
        self.hoist = whole  # geometry, mask and bias once, before rows are loaded
        self.batched = whole and side == "q" and not self.with_prefix and tile.batch > 1 and not spec.uses("batch")
        # table gradients stay in registers where a tile is a group and entries depend on places inside the group alone
        small = len(spec.learned) == 1 and self.bm * self.bn <= 64 * 64 and side == "q" and not spec.uses("batch")
        self.registers = small and whole and all(p.group for p in plans) and tile_invariant(spec, plans)
        self.reach = self.ok = self.how = ""
        # every query of a group sees itself, and its score is finite
        self.certain = whole and spec.program.same_grid and all(p.group for p in plans) and self.raw and spec.residual == ir.TRUE
        self.tensors = {
            "forward": ("q", "k", "v", "o"),
            "backward_dq": ("q", "k", "v", "o", "g", "dq"),
            "backward_table": ("q", "k", "v", "g"),
            "backward_dkv": ("q", "k", "v", "g", *(("dq",) if fused else ()), "dk", "dv"),
        }[kind]
        self.body()

    # ------------------------------------------------------------------------------------------------------------------- pieces
    def dim(self, tensor: str) -> int:
        """Channels of a tensor."""
        return self.spec.value_dim if tensor in ("v", "o", "g", "dv") else self.spec.head_dim

    def channels(self, tensor: str) -> str:
        """Mask over channels in registers, "" where there are no more than the tensor has."""
        dim = self.dim(tensor)
        return "" if lanes(dim) == dim else f"(tl.arange(0, {lanes(dim)}) < {dim})[None, :]"

    def head(self, tensor: str) -> str:
        """The head whose rows are meant: keys may be shared by a group of query heads."""
        if tensor in ("dk", "dv"):
            return "h" if self.fused else "hk"
        if tensor not in ("k", "v"):
            return "h"
        return "hk" if self.side == "k" else "h // GROUP"

    def load(self, pointers: str, *masks: str) -> str:
        """A load of rows that reads zeros where masked."""
        some = [m for m in masks if m]
        return f"{self.module.use('read', READ)}({pointers}, {' & '.join(some) or 'None'})"

    def own(self, tensor: str) -> str:
        """Pointers to the tile's rows of a tensor."""
        return self.own_rows(tensor.upper(), f"{tensor}_st", self.head(tensor), lanes(self.dim(tensor)))

    def chunk_of(self, tensor: str) -> str:
        """Pointers to the chunk's rows of a tensor."""
        return self.chunk_rows(tensor.upper(), f"{tensor}_st", self.head(tensor), lanes(self.dim(tensor)))

    def store(self, pointers: str, value: str, tensor: str, mask: str) -> None:
        """Print a store of rows."""
        masks = " & ".join(m for m in (mask, self.channels(tensor)) if m)
        value = value if value.isidentifier() else f"({value})"
        masks = f", mask={masks}" if masks else ""
        self.put(f"tl.store({pointers}, {value}.to({tensor.upper()}.dtype.element_ty){masks})")

    @property
    def raw(self) -> bool:
        """Plain or affine score: kept unscaled until exp2."""
        return self.spec.bias is not None

    def has_full(self) -> bool:
        """Chunks without a mask exist and get a loop of their own."""
        fills = self.chunk_count() == self.bn
        return fills and self.inner.full and all(p.exact for p in self.outer) and not self.inner.columns and not self.hoist

    # ------------------------------------------------------------------------------------------------------------------ the walk
    def body(self) -> None:
        """The whole kernel."""
        spec = self.spec
        if self.tensors:
            self.put(f"{', '.join(f'{t}_st' for t in self.tensors)} = st")
        which = "hk" if self.side == "k" else "h"
        self.put(f"{which} = tl.program_id(1)" if self.batched else f"{which}, b = tl.program_id(1), tl.program_id(2).to(tl.int64)")
        self.tile()
        # surplus columns repeat the last one where a chunk is known to lie inside: they are masked, and need no predicated load
        self.repeats = self.vector and self.chunk_count() != self.bn and all(p.exact for p in self.plans)
        arange = f"tl.arange(0, {self.bn})"
        self.put(f"n = tl.minimum({arange}, {self.chunk_count() - 1})" if self.repeats else f"n = {arange}")
        self.box()
        if spec.padded:
            for t in ("k", "v"):
                at = f"pad_{t}_table + ({self.head('k')}) * pad_{t}_st[0] + tl.arange(0, {lanes(self.dim(t))}) * pad_{t}_st[1]"
                less = self.channels(t).removesuffix("[None, :]")
                self.put(f"pad_{t} = {self.load(at, less)}[None, :]")
        if self.hoist:
            self.together([(f"c{p.name}", self.single_origin(p)) for p in self.plans])
            self.geometric = self.mask(full=False)
            if self.side == "q" or not spec.per_pair:
                self.how = self.score(self.geometric)
        if self.fused:
            self.fused_program()
        elif self.side == "k":
            self.keys_program()
        else:
            self.queries_program()

    def from_tile(self, p: AxisPlan) -> bool:
        """A first group cut by the axis: columns are counted from the tile's origin, as the rows are."""
        return (self.registers or self.fused) and p.start != ir.ZERO

    def keeps_from(self, p: AxisPlan) -> bool:
        """The first column of the box is needed by name."""
        return not p.single or self.from_tile(p)

    def keeps_to(self, p: AxisPlan) -> bool:
        """The end of the box is needed by name: by a loop, or by the mask."""
        return not p.single or (p.one_box and not p.exact) or p.columns

    def needs_moving(self, p: AxisPlan) -> bool:
        """A chunk is moved back inside the axis where each row compares both of its ends anyway."""
        return not p.one_box and not self.has_full() and p.chunk > 1

    def single_origin(self, p: AxisPlan) -> str:
        """Where the only chunk of an axis begins."""
        if self.from_tile(p):
            return f"{p.name}0"
        low, beyond = self.bound(p, self.other)
        at = f"{p.name}_from" if self.keeps_from(p) else self.box_of(p)[0]
        return f"tl.maximum(tl.minimum({at}, {beyond} - {p.chunk}), {low})" if self.needs_moving(p) else at

    def walk_columns(self) -> None:
        """Loops over chunks, outer axes first."""
        depth = self.depth
        for p in self.outer:
            self.open_axis(p, 0)
        p, stages = self.inner, self.tile_choice.stages
        n, k = p.name, p.chunk
        if not self.has_full():
            self.open_axis(p, stages)
            self.chunk(full=False)
            self.depth = depth
            return
        steps = f"tl.cdiv({n}_to - {n}_from, {k})"
        if p.exact:
            with self.loop(p, "0", steps):
                self.chunk(full=True)
            self.depth = depth
            return
        first, last = self.first(p), f"{n}b" if p.rows > 1 else self.first(p)
        call, low, _ = self.ends(p, last)
        low = f"{call}[0]" if call else low
        call, _, high = self.ends(p, first)
        past = f"{call}[1] + 1" if call else high.removesuffix(" - 1") if high.endswith(" - 1") else f"{high} + 1"
        fixed = p.one_box or self.low_is_zero(p)
        begin = "0" if fixed else "skip"
        self.put(f"steps = {steps}")
        if not fixed:
            self.put(f"skip = tl.minimum(tl.cdiv(tl.maximum({low} - {n}_from, 0), {k}), steps)")
        count = f"({n}_to - {n}_from) // {k}" if p.one_box else f"tl.minimum(({past} - {n}_from) // {k}, steps)"
        self.put(f"full = tl.maximum({count}, {begin})")
        if not fixed:
            with self.loop(p, "0", "skip"):
                self.chunk(full=False)
        with self.loop(p, begin, "full"):
            self.chunk(full=True)
        if p.partial:
            with self.loop(p, "full", "steps"):
                self.chunk(full=False)
        self.depth = depth

    @contextmanager
    def loop(self, p: AxisPlan, begin: str, end: str) -> Iterator[None]:
        """A pipelined loop over chunks of the inner axis."""
        n = p.name
        with self.block(f"for i{n} in tl.range({begin}, {end}, num_stages={self.tile_choice.stages}):"):
            self.put(f"c{n} = {n}_from + i{n} * {p.chunk}")
            yield

    def open_axis(self, p: AxisPlan, stages: int) -> None:
        """Start walking an axis."""
        n, k = p.name, p.chunk
        if p.single:
            self.put(f"c{n} = {self.single_origin(p)}")
            return
        low, beyond = self.bound(p, self.other)
        steps, begin = f"tl.cdiv({n}_to - {n}_from, {k})", f"{n}_from"
        if self.needs_moving(p):
            self.put(f"{n}_steps = {steps}")
            self.put(f"{n}_at = tl.maximum(tl.minimum({n}_from, {beyond} - {n}_steps * {k}), {low})")
            steps, begin = f"{n}_steps", f"{n}_at"
        self.put(f"for i{n} in tl.range(0, {steps}{f', num_stages={stages}' if stages else ''}):")
        self.depth += 1
        self.put(f"c{n} = {begin} + i{n} * {k}" if k > 1 else f"c{n} = {begin} + i{n}")

    # ------------------------------------------------------------------------------------------------------- masks and scores
    def mask(self, full: bool) -> str:
        """Print what the chunk's mask needs. "" where all pairs are allowed, "bias" for an additive tile, else a condition."""
        spec, self.reach = self.spec, ""
        pairs = spec.per_pair or (spec.padded and self.side == "q")
        if full:
            if pairs:
                self.columns(self.plans)
            return ""
        if self.vector:
            open_ended = [p for p in self.plans if not p.exact]
            self.columns(self.plans if pairs else open_ended)
            tests = [f"({self.other}{p.name} >= {p.name}_from)" for p in self.plans if self.from_tile(p)]
            tests += [f"({self.other}{p.name} < {p.name}_to)" for p in open_ended]
            if self.chunk_count() != self.bn:
                index = f"tl.arange(0, {self.bn})" if self.repeats else "n"
                tests.append(f"({index} < {self.chunk_count()})" if tests else f"{index} < {self.chunk_count()}")
            if not tests:
                return ""
            self.put(f"seen = {' & '.join(tests)}")
            self.reach = "" if self.repeats else "seen[:, None]"
            return "seen[None, :]"
        over = [p for p in self.plans if p.overruns or (p is self.inner and self.has_full() and not p.exact)]
        self.columns(self.plans if pairs else over)
        if over:
            tests = [f"({self.other}{p.name} < {self.bound(p, self.other)[1]})" for p in over]
            self.put(f"reach = {' & '.join(tests)}")
            self.reach = "reach[:, None]"
        additive = spec.bias == ir.ZERO and spec.residual == ir.TRUE
        self.put(f"{'bias' if additive else 'ok'} = {self.mask_call(additive)}")
        return "bias" if additive else "ok"

    def score(self, ok: str) -> str:
        """Print tiles the product starts from. Gives "bias" (an accumulator), "seen" (masked after), "" or "general"."""
        spec = self.spec
        if self.fused and ok:  # rows beyond the group must not reach dk and dv
            self.put(f"ok = live[:, None] & {ok}")
            ok = "ok"
        if spec.residual != ir.TRUE:
            test = self.pair(spec.residual, ok)
            self.put(f"ok = {ok} & ({test})" if ok else f"ok = tl.broadcast_to({test}, [{self.bm}, {self.bn}])")
            ok = "ok"
        self.ok = ok
        if spec.bias is None:
            return "general"
        shape = f"[{self.bm}, {self.bn}]"
        if spec.bias != ir.ZERO:
            self.tables_at(spec.bias)
            value = f"({self.pair(spec.bias, ok)}) * (1.0 / scale)"
            if self.repeats and spec.residual == ir.TRUE:  # every load is in range: -inf is added, not selected
                value += f" + tl.where(seen, 0.0, {INF})[None, :]"
                self.put(f"bias = {value}" + (f" + tl.where(live, 0.0, {INF})[:, None]" if self.fused else ""))
                return "bias"
            self.put(f"bias = tl.where({ok}, {value}, {INF})" if ok else f"bias = tl.broadcast_to({value}, {shape})")
            return "bias"
        if ok in ("", "bias"):
            self.ok = "" if ok == "bias" else ok
            return ok
        if ok == "ok" or self.hoist:
            zero = "0.0" if ok == "ok" and not self.fused else f"tl.zeros({shape}, tl.float32)"
            self.put(f"bias = tl.where({ok}, {zero}, {INF})")
            return "bias"
        return "seen"

    def scores(self, rows: str, columns: str) -> None:
        """s: the masked scores of a chunk, unscaled; or t, log2 weights, of a score that is more than SCORE plus a bias."""
        product = dot(rows, f"{columns}.T", "bias" if self.how == "bias" else "")
        if self.how != "general":
            self.put(f"s = {product}")
            if self.how == "seen":
                self.put(f"s = tl.where({self.ok}, s, {INF})")
            return
        score = self.spec.score
        if any(n == ir.SCORE for n in ir.walk(score)):
            self.put(f"s = {product} * scale")
            value = self.pair(score, self.ok)
        else:
            value = f"tl.zeros([{self.bm}, {self.bn}], tl.float32) + ({self.pair(score, self.ok)})"
        t = f"({value}) * LOG2E"
        self.put(f"t = tl.where({self.ok}, {t}, {INF})" if self.ok else f"t = {t}")

    def pair_names(self) -> dict[ir.Expr, str]:
        """Coordinates of rows and columns as text that broadcasts to all pairs."""
        out = dict(self.spec.size_names) | {ir.HEAD: "h", ir.HEADS: "H", ir.BATCH: "b", ir.SCORE: "s"}
        for p in self.plans:
            row = f"{self.side}{p.name}[:, None]" if p.rows > 1 else self.first(p)
            out[ir.coord(self.side, p.axis)] = self.coordinate(row, p, self.side)
            out[ir.coord(self.other, p.axis)] = self.coordinate(f"{self.other}{p.name}[None, :]", p, self.other)
        return out

    def pair(self, e: ir.Expr, ok: str) -> str:
        """A score, predicate or slope over all pairs."""
        return self.module.scan(triton_expr.text(e, self.pair_names(), lambda n, _: self.table(n, ok)))

    def tables_at(self, e: ir.Expr) -> None:
        """Print the parts of a table's index that queries and keys decide apart, where the sum splits that way."""
        self.addresses: dict[ir.Expr, str] = {}
        for n in dict.fromkeys(x for x in ir.walk(e) if x.op == "load"):
            parts = self.address_parts(n, f"{n.args[0]}_st")
            if parts[""] or not parts["q"] or not parts["k"]:
                continue
            name = n.args[0] if len(self.addresses) == 0 else f"{n.args[0]}{len(self.addresses)}"
            for role, what in (("q", "query"), ("k", "key")):
                self.put(f"{name}_{what} = {' + '.join(parts[role])}")
            self.addresses[n] = f"{name}_query - {name}_key" if self.negative(n) else f"{name}_query + {name}_key"

    @staticmethod
    def negative(n: ir.Expr) -> bool:
        """Every key term of a table's index is subtracted (query - key, the usual form)."""
        signs = [s for e in n.children for s, t in terms(e) if any(m.op == "coord" and m.args[0] == "k" for m in ir.walk(t))]
        return all(s < 0 for s in signs)

    def address_parts(self, n: ir.Expr, strides: str) -> dict[str, list[str]]:
        """Terms of a table element's offset by who decides them: queries (and constants), keys, or both."""
        parts: dict[str, list[str]] = {"q": [], "k": [], "": []}
        names, flip = self.pair_names(), self.negative(n)
        for d, e in enumerate(n.children):
            split: dict[str, ir.Expr] = {}
            for sign, t in terms(e):
                roles = {m.args[0] for m in ir.walk(t) if m.op == "coord"}
                role = roles.pop() if len(roles) == 1 else "q" if not roles else ""
                sign = -sign if role == "k" and flip else sign
                have = split.get(role, ir.ZERO)
                split[role] = t if have == ir.ZERO and sign > 0 else ir.make("add" if sign > 0 else "sub", have, t)
            for role, x in split.items():
                if x != ir.ZERO:
                    text = self.module.scan(triton_expr.text(x, names))
                    text = f"({text})" if " " in text or text.startswith("-") else text
                    parts[role].append(f"{text} * {strides}[{d}]")
        return parts

    def address(self, n: ir.Expr, strides: str) -> str:
        """Offset of a table's element."""
        if strides == f"{n.args[0]}_st" and n in getattr(self, "addresses", {}):
            return self.addresses[n]
        parts = self.address_parts(n, strides)
        plus = " + ".join([*parts["q"], *parts[""]])
        keys = " + ".join(parts["k"])
        if not keys:
            return plus or "0"
        if not self.negative(n):
            return f"{plus} + ({keys})" if plus else keys
        return f"{plus} - ({keys})" if plus else f"-({keys})"

    def table(self, n: ir.Expr, ok: str) -> str:
        """The load of a table's element, masked where pairs outside the relation might read beyond the table."""
        roles = {m.args[0] for i in n.children for m in ir.walk(i) if m.op == "coord"}
        mask = ok if roles == {"q", "k"} and not self.repeats else ""
        if roles == {self.other} and self.reach:
            mask = self.reach.replace("[:, None]", "[None, :]")
        at = f"{n.args[0]}_table + {self.address(n, f'{n.args[0]}_st')}"
        out = f"tl.load({at}, mask={mask}, other=0)" if mask else f"tl.load({at})"
        return f"{out}.to(tl.float32)" if n.kind == "real" else out

    # ------------------------------------------------------------------------------------------------------------------ one chunk
    def chunk(self, *, full: bool) -> None:
        """Load the chunk's columns and do the kernel's arithmetic on them."""
        if not self.hoist:
            self.how = self.score(self.mask(full))
        reach = "" if full else self.reach
        columns = ("q", "g") if self.side == "k" else ("k", "v")
        real = ""
        if self.spec.padded and self.side == "q":
            real = "real[:, None]"
            count = f" & (n < {self.chunk_count()})" if self.chunk_count() != self.bn else ""
            self.put(f"real = {self.real_keys([f'k{p.name}' for p in self.plans])}{count}")
        for t in columns:
            value = self.load(self.chunk_of(t), real or reach, self.channels(t))
            self.put(f"{t} = tl.where({real}, {value}, pad_{t})" if real else f"{t} = {value}")
        if self.side == "k":
            origin = self.token([self.coordinate(f"c{p.name}", p, "q", real=True) for p in self.plans], "q")
            inside = []
            for part, p in zip(self.column_parts(), self.plans, strict=True):
                later = [self.spec.names[x.axis].real_queries for x in self.plans if x.axis > p.axis]
                if part != "0":
                    part = self.times_split(part, p)
                    inside.append(" * ".join([f"({part})" if later and " " in part and not part.startswith("(") else part, *later]))
            self.put(f"token = (b * H + h) * N + ({origin}) + {' + '.join(inside)}")
            mask = reach.removesuffix("[:, None]")
            mask = f", mask={mask}, other=0.0" if mask else ""
            self.put(f"lse, delta = tl.load(Lse2 + token{mask})[None, :], tl.load(Delta + token{mask})[None, :]")
        if self.kind == "forward":
            self.scores("q", "k")
            self.softmax_step(first=self.hoist and not self.with_prefix, post=True)
        elif self.side == "k":
            self.scores("k", "q")
            self.backward_step(plain=False)
        else:
            self.scores("q", "k")
            self.backward_step(plain=False)

    def softmax_step(self, *, first: bool, post: bool) -> None:
        """Online softmax over one more chunk (or the only one)."""
        s, c = ("s", " * c") if self.raw else ("t", "")
        if first:
            self.put(f"m_i = tl.max({s}, 1)" if self.certain else f"m_i = tl.maximum(tl.max({s}, 1), -1e30)")
            self.put(f"p = tl.exp2({s}{c} - (m_i{c})[:, None])", "l_i = tl.sum(p, 1)")
        else:
            self.put(f"m_new = tl.maximum(m_i, tl.max({s}, 1))", f"p = tl.exp2({s}{c} - (m_new{c})[:, None])")
            self.put(f"alpha = tl.exp2({'(m_i - m_new) * c' if c else 'm_i - m_new'})", "l_i = l_i * alpha + tl.sum(p, 1)")
        weight = self.weight() if post else "p"
        self.put(f"acc = {dot(f'{weight}.to(v.dtype)', 'v', '' if first else 'acc * alpha[:, None]')}")
        if not first:
            self.put("m_i = m_new")

    def weight(self) -> str:
        """Print the weight times its post-factor, where there is one."""
        if self.spec.post is None:
            return "p"
        value = f"p * ({self.pair(self.spec.post, self.ok)})"
        self.put(f"w = {f'tl.where({self.ok}, {value}, 0.0)' if self.ok else value}")
        return "w"

    def backward_step(self, *, plain: bool) -> None:
        """Gradients of one chunk. `plain`: pairs with a prefix token, whose score is the product alone."""
        spec, keys = self.spec, self.side == "k"
        row2, column, column2 = ("v", "q", "g") if keys else ("g", "k", "v")
        at = "[:, None]" if self.kind == "backward_dq" else ""
        self.put(f"p = tl.exp2({'s * c' if self.raw else 't'} - lse{at})")
        self.put(f"dp = {dot(row2, f'{column2}.T')}")
        weight = "p" if plain else self.weight()
        if keys:
            self.put(f"dv = {dot(f'{weight}.to(g.dtype)', 'g', 'dv')}")
        if self.fused:
            self.put(f"dv = {dot(f'{weight}.to(g.dtype).T', 'g')}")
            self.put(f"delta = tl.sum({weight} * dp, 1)[:, None]")
            with self.block("if GLse is not None:"):
                self.put("delta -= tl.load(GLse + token)[:, None]")
        self.put(f"ds = w * dp - p * delta{at}" if weight == "w" else f"ds = p * (dp - delta{at})")
        if not plain:
            self.table_gradients()
        slope = ir.const(1.0) if plain else spec.slope
        if self.kind == "backward_table":
            return
        d = "ds"
        if slope != ir.const(1.0):
            value = f"ds * ({self.pair(slope, self.ok)})"
            self.put(f"dt = {f'tl.where({self.ok}, {value}, 0.0)' if self.ok else value}")
            d = "dt"
        if self.fused:
            self.put(f"d = {d}.to(k.dtype)")
            self.put(f"dq, dk = {dot('d', 'k')}, {dot('d.T', 'q')}")
        else:
            grad = "dk" if keys else "dq"
            self.put(f"{grad} = {dot(f'{d}.to({column}.dtype)', column, grad)}")

    # ------------------------------------------------------------------------------------------------------------- table gradients
    def contributions(self) -> list[tuple[ir.Expr, str]]:
        """Each learned load, and what a pair adds to its element's gradient."""
        spec, out = self.spec, []
        for n in spec.learned:
            slope = derivative(spec.score, n)
            value = "" if slope == ir.const(0.0) else "ds" if slope == ir.const(1.0) else f"ds * ({self.pair(slope, self.ok)})"
            if spec.post is not None and derivative(spec.post, n) != ir.const(0.0):
                more = f"p * dp * ({self.pair(derivative(spec.post, n), self.ok)})"
                value = f"{value} + {more}" if value else more
            out.append((n, value))
        return out

    def table_gradients(self) -> None:
        """Add the chunk's share of table gradients."""
        if self.side == "k" or not self.spec.learned:
            return
        live = f"live[:, None]{f' & {self.ok}' if self.ok else ''}"
        for n, value in self.contributions():
            if self.kind == "backward_table":
                parts = self.address(n, f"d_{n.args[0]}_st")
                self.put(f"fixed = (({value}) * unit).to(tl.int64)")
                at = f"d_{n.args[0]} + (tl.zeros([{self.bm}, {self.bn}], tl.int32) + {parts})"
                self.put(f'tl.atomic_add({at}, fixed, mask={live}, sem="relaxed")')
            elif self.fused:
                self.put(f"grad += {value}")
            elif self.registers:
                self.put(f"grad += tl.where({live}, {value}, 0.0)")
            else:
                self.put(f"size += tl.sum(tl.where({live}, tl.abs({value}), 0.0), 1)")

    # ---------------------------------------------------------------------------------------------------------------- prefix tokens
    def prefix_columns(self) -> None:
        """Pairs with prefix tokens: every row sees them, with the plain score."""
        with self.block(f"for i in tl.range(0, tl.cdiv(P, {self.bn}), num_stages={self.tile_choice.stages}):"):
            self.put(f"inside = i * {self.bn} + n < P")
            columns = ("q", "g") if self.side == "k" else ("k", "v")
            for t in columns:
                text = (
                    "@triton.jit\ndef @@(base, st, b, h, x, dx, LANES: tl.constexpr):\n"
                    '    """Pointers to channels of the tokens dx away from token (x) of head h of batch item b."""\n'
                    "    token = base + (b * st[0] + h * st[1] + tl.cast(x, tl.int64) * st[2])\n"
                    "    return token + (dx * st[2])[:, None] + tl.arange(0, LANES)[None, :] * st[3]\n"
                )
                name = self.module.use("rows_flat", text)
                at = f"{name}({t.upper()}p, {t}p_st, b, {self.head(t)}, i * {self.bn}, n, {lanes(self.dim(t))})"
                self.put(f"{t} = {self.load(at, 'inside[:, None]', self.channels(t))}")
            if self.side == "k":
                self.put(f"token = (b * H + h) * N + i * {self.bn} + n - P")
                for what, pointer in (("lse", "Lse2"), ("delta", "Delta")):
                    self.put(f"{what} = tl.load({pointer} + token, mask=inside, other=0.0)[None, :]")
            row, column = ("k", "q") if self.side == "k" else ("q", "k")
            self.put(f"s = {dot(row, f'{column}.T')}")
            s, scaled = ("s", "s") if self.raw else ("t", "s * c")
            self.put(f"{s} = tl.where(inside[None, :], {scaled}, {INF})")
            if self.kind == "forward":
                self.softmax_step(first=False, post=False)
            else:
                self.backward_step(plain=True)

    # ------------------------------------------------------------------------------------------------------------------- programs
    @contextmanager
    def items(self) -> Iterator[None]:
        """The loop over batch items of one program, where it walks several."""
        if not self.batched:
            yield
            return
        self.put("first = tl.program_id(2) * PER")
        with self.block(f"for item in tl.range(first, tl.minimum(first + PER, B), num_stages={self.tile_choice.stages}):"):
            self.put("b = tl.cast(item, tl.int64)")
            yield

    def queries_program(self) -> None:
        """Rows are queries."""
        tables = bool(self.spec.learned) and self.kind == "backward_dq"
        if tables:
            self.put(
                f"grad = tl.zeros([{self.bm}, {self.bn}], tl.float32)"
                if self.registers
                else f"size = tl.zeros([{self.bm}], tl.float32)"
            )
        if self.kind == "backward_table":
            self.put("unit = tl.load(Unit)")
        with self.items():
            self.put(f"q = {self.load(self.own('q'), self.channels('q'))}")
            if self.kind != "forward":
                self.put(f"g = {self.load(self.own('g'), self.channels('g'))}", f"token = (b * H + h) * N + {self.row_token()}")
                if self.kind == "backward_table":
                    self.put("lse, delta = tl.load(Lse2 + token)[:, None], tl.load(Delta + token)[:, None]")
                else:
                    self.delta()
                    self.put(f"dq = tl.zeros([{self.bm}, {lanes(self.spec.head_dim)}], tl.float32)")
            elif not self.hoist or self.with_prefix:
                self.put(f"m_i, l_i = tl.full([{self.bm}], -1e30, tl.float32), tl.zeros([{self.bm}], tl.float32)")
                self.put(f"acc = tl.zeros([{self.bm}, {lanes(self.spec.value_dim)}], tl.float32)")
            if self.with_prefix and self.kind != "backward_table":
                self.prefix_columns()
            if self.hoist:
                self.chunk(full=False)
            else:
                self.walk_columns()
            if self.kind == "forward":
                total = "l_i" if self.certain else "total"
                if not self.certain:
                    self.put("total = tl.where(l_i > 0, l_i, 1.0)  # rows without keys: 0, and lse -inf")
                self.store(self.own("o"), f"acc * (1.0 / {total})[:, None]", "o", "live[:, None]")
                lse = f"m_i * scale + tl.log({total})" if self.raw else f"(m_i + tl.log2({total})) / LOG2E"
                self.put(f"lse = {lse}" if self.certain else f"lse = tl.where(l_i > 0, {lse}, {INF})")
                self.put(f"tl.store(Lse + (b * H + h) * N + {self.row_token()}, lse, mask=live)")
            elif self.kind == "backward_dq":
                self.store(self.own("dq"), "dq * scale", "dq", "live[:, None]")
        if tables:
            self.store_partial()

    def delta(self) -> None:
        """rowsum(out * grad_out) - grad_lse of each row, and its LSE in base 2, for this kernel and the next ones."""
        self.put(f"o = {self.load(self.own('o'), self.channels('o'))}")
        self.put("delta, lse = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1), tl.load(Lse + token)")
        with self.block("if GLse is not None:"):
            self.put("delta -= tl.load(GLse + token)")
        self.put(f"lse = tl.where(lse > {INF}, lse * LOG2E, 0.0)  # a row without keys")
        self.put("tl.store(Delta + token, delta, mask=live)", "tl.store(Lse2 + token, lse, mask=live)")

    def store_partial(self) -> None:
        """A program's share of a table gradient, or its bound."""
        self.put("part = (tl.program_id(2) * tl.num_programs(1) + h).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)")
        if self.registers:
            place = f"(tl.arange(0, {self.bm}) * {self.bn})[:, None] + tl.arange(0, {self.bn})[None, :]"
            self.put(f"tl.store(Partial + part * {self.bm * self.bn} + {place}, grad)")
        else:
            self.put("tl.store(Size + part, tl.sum(size, 0))")

    def keys_program(self) -> None:
        """Rows are keys."""
        real = ""
        if self.spec.padded:
            self.put(f"real = live & {self.real_keys([self.row(p) for p in self.plans])}")
            real = "real[:, None]"
        for t in ("k", "v"):
            value = self.load(self.own(t), real, self.channels(t))
            self.put(f"{t} = tl.where({real}, {value}, pad_{t})" if real else f"{t} = {value}")
        self.together([(f"d{t}", f"tl.zeros([{self.bm}, {lanes(self.dim(t))}], tl.float32)") for t in ("k", "v")])
        with self.block("for group in tl.range(0, GROUP):  # the query heads that share this key head"):
            self.put("h = hk * GROUP + group")
            if self.with_prefix:
                self.prefix_columns()
            if self.hoist:
                if self.spec.per_pair:
                    self.how = self.score(self.geometric)
                self.chunk(full=False)
            else:
                self.walk_columns()
        if real:
            self.put("virtual = (live & ~real)[:, None]")
            self.put("part = (b * tl.num_programs(1) + hk) * tl.num_programs(0) + tl.program_id(0)")
            for t, value in (("k", "dk * scale"), ("v", "dv")):
                less = self.channels(t).removesuffix("[None, :]")
                mask = f", mask={less}" if less else ""
                at = f"DPad_{t} + part * {self.dim(t)} + tl.arange(0, {lanes(self.dim(t))})"
                self.put(f"tl.store({at}, tl.sum(tl.where(virtual, {value}, 0.0), 0){mask})")
        for t, value in (("dk", "dk * scale"), ("dv", "dv")):
            self.store(self.own(t), value, t, real or "live[:, None]")

    def fused_program(self) -> None:
        """Rows and columns are one group: every gradient in one pass."""
        if self.spec.learned:
            self.put(f"grad = tl.zeros([{self.bm}, {self.bn}], tl.float32)")
        with self.items():
            for t in ("q", "g"):
                self.put(f"{t} = {self.load(self.own(t), self.channels(t))}")
            self.put(f"token = (b * H + h) * N + {self.row_token()}")
            self.put("lse = tl.load(Lse + token)[:, None]", f"lse = tl.where(lse > {INF}, lse * LOG2E, 0.0)")
            self.chunk(full=False)
            self.store(self.own("dq"), "dq * scale", "dq", "live[:, None]")
            for t, value in (("dk", "dk * scale"), ("dv", "dv")):
                self.store(self.chunk_of(t), value, t, "seen[:, None]" if self.geometric else "")
        if self.spec.learned:
            self.store_partial()

    # -------------------------------------------------------------------------------------------------------------------- assembly
    def arguments(self) -> list[tuple[str, bool]]:
        """Parameters in order, with whether each is a constexpr when sizes are known."""
        body = "\n".join(self.lines)
        tables = [*self.spec.attend.tables, *(("pad_k", "pad_v") if self.spec.padded else ())]
        names = [*POINTERS, *[f"{t}_table" for t in tables], *[f"d_{t}" for t in tables], "st"]
        names += ["pst"] if self.with_prefix else []
        names += [f"{t}_st" for t in tables] + [f"d_{t}_st" for t in tables] + SCALARS
        sizes = self.size_arguments()
        static = {*sizes, "parts", "st", *(f"{t}_st" for t in tables)}
        return [(n, n in static) for n in [*names, *sizes] if mentions(n, body) or n == "pst"]

    def text(self, static: bool) -> str:
        """The kernel. `static`: sizes and strides are compile-time constants."""
        joint = "\u00a0"
        params = [f"{n}:{joint}tl.constexpr" if n in CONSTANT or (fixed and static) else n for n, fixed in self.arguments()]
        head = textwrap.wrap(", ".join(params) + ",", 106, break_long_words=False, break_on_hyphens=False)
        sign = "\n".join(f"    {line}" for line in head).replace(joint, " ")
        lines = self.lines
        if self.with_prefix:
            columns = ("q", "g") if self.side == "k" else ("k", "v")
            lines = [lines[0], f"    {', '.join(f'{t}p_st' for t in columns)} = pst", *lines[1:]]
        doc = DOCS["fused" if self.fused else self.kind]
        return f'@triton.jit\ndef {self.name}(\n{sign}\n):\n    """{doc}"""\n' + "\n".join(lines) + "\n"


def can_fuse(spec: Spec, tile: Tile, module: Module) -> bool:
    """All gradients of a group in one program: it is one tile, it sees itself alone, and tables stay in registers."""
    if spec.padded or spec.prefix or not spec.program.same_grid or tile.bm > 64 or tile.bm != tile.bn or tile != spec.tiles.dkv:
        return False
    plans = tuple(plan_axis(spec, a, "q", tile) for a in range(spec.rank))
    if not all(p.group and p.single for p in plans):
        return False
    kinds = ("full", "residue")
    if not all(symmetric(f) or f.kind.split(" of ")[-1] in kinds for f in spec.structure.axes):
        return False
    return not spec.learned or Kernel(spec, "backward_dq", tile, Module()).registers
