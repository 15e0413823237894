"""Prints the kernels of one statement. They are one walk with different arithmetic: a program owns a tile of rows (queries; keys in
backward_dkv), visits the box of columns they see chunk by chunk, and masks by comparing column indices with the ends of each row.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from attnc import ir
from attnc.analysis.dropout import TABLE
from attnc.codegen.triton_plan import AxisPlan, Spec, lanes, listed_axis, order, plan_axis, symmetric, tile_invariant, tiled_bias
from attnc.codegen.triton_scores import READ_AGAIN, Kind
from attnc.codegen.triton_shapes import INF, Module, mentions
from attnc.codegen.triton_steps import Steps
from attnc.schedule.walks import Side, Tile

DOCS = {
    "forward": "One tile of queries: online softmax over the box of keys it sees.",
    "weighted": "One tile of queries: the weighted values in the box of keys it sees.",
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
    "Less",
    "DQ",
    "DK",
    "DV",
    "Partial",
    "Size",
    "Unit",
    "DPad_k",
    "DPad_v",
    "Bias",
    "Offset",
    "Full",
    "Place",
]
SCALARS = ["scale", "c", "B", "H", "N", "P", "parts", "GROUP", "PER", "PRECISION"]
CONSTANT = ("GROUP", "PRECISION")


class Kernel(Steps):
    """One kernel's text and what its launch needs to know."""

    def __init__(self, spec: Spec, kind: Kind, tile: Tile, module: Module, prefix: str = "", fused: bool = False) -> None:
        self.kind, self.tile_choice, self.prefix, self.fused = kind, tile, prefix, fused
        self.name = prefix + kind + spec.suffix
        side: Side = "k" if kind == "backward_dkv" and not fused else "q"
        plans = tuple(plan_axis(spec, a, side, tile) for a in range(spec.rank))
        if spec.listed:
            plans = tuple(map(listed_axis, plans))
        super().__init__(spec, side, plans, tile.bm, tile.bn, module)
        self.outer, self.inner = order(plans, tile.inner)
        whole = all(p.single for p in plans)
        self.with_prefix = bool(spec.program.keys.prefix if side == "q" else spec.program.queries.prefix)
        self.hoist = whole  # geometry, mask and bias once, before rows are loaded
        self.batched = whole and side == "q" and not self.with_prefix and tile.batch > 1 and not spec.uses("batch")
        # table gradients stay in registers where a tile is a group and entries depend on places inside the group alone
        small = len(spec.learned) == 1 and self.bm * self.bn <= 64 * 64 and side == "q" and not spec.uses("batch")
        self.registers = small and whole and all(p.group for p in plans) and tile_invariant(spec, plans)
        makes = kind in ("forward", "backward_dq") or fused
        self.tiled = makes and whole and side == "q" and self.bm * self.bn <= 64 * 64 and tiled_bias(spec, plans)
        self.reach = self.ok = self.how = ""
        self.seen = False
        # every query of a group sees itself, and its score is finite
        self.certain = whole and spec.program.same_grid and all(p.group for p in plans) and self.raw and self.residual == ir.TRUE
        # where a group does not hold all keys of its rows, its weights do not say what delta is
        self.given = fused and spec.part and spec.softmax
        self.tensors = {
            "forward": ("q", "k", "v", "o"),
            "backward_dq": ("q", "k", "v", *(("o",) if spec.softmax else ()), "g", "dq"),
            "backward_table": ("q", "k", "v", "g"),
            "backward_dkv": ("q", "k", "v", *(("o",) if self.given else ()), "g", *(("dq",) if fused else ()), "dk", "dv"),
        }[kind]
        self.body()

    # ------------------------------------------------------------------------------------------------------------------ the walk
    def body(self) -> None:
        """The whole kernel."""
        spec = self.spec
        if self.tensors:
            self.put(f"{', '.join(f'{t}_st' for t in self.tensors)} = st")
        which = "hk" if self.side == "k" else "h"
        # surplus columns repeat the last one where a chunk is known to lie inside: they are masked, and need no predicated load
        self.repeats = self.vector and self.chunk_count() != self.bn and all(p.exact for p in self.plans)
        arange = f"tl.arange(0, {self.bn})"
        columns = f"tl.minimum({arange}, {self.chunk_count() - 1})" if self.repeats else arange
        batch = [] if self.batched else [("b", "tl.program_id(2).to(tl.int64)")]
        self.together([(which, "tl.program_id(1)"), *batch, ("n", columns)], 120)
        self.tile()
        if spec.attend.dropout is not None:
            self.put(f"last = tl.load({TABLE}_table + 2 * {TABLE}_st[0]).to(tl.int32)")
        self.box()
        if spec.padded:
            for t, part in [(x, part) for x in ("k", "v") for part in self.parts(x)]:
                which = f"tl.arange(0, {part.lanes})"
                which = f"({part.first} + {which})" if part.first else which
                at = f"pad_{t}_table + ({self.head('k')}) * pad_{t}_st[0] + {which} * pad_{t}_st[1]"
                less = self.channels(t, part).removesuffix("[None, :]")
                self.put(f"pad_{t}{part.suffix} = {self.load(at, less)}.to({t.upper()}.dtype.element_ty)[None, :]")
        if self.hoist:
            self.together([(f"c{p.name}", self.single_origin(p)) for p in self.plans])
            for p in self.plans:
                self.pass_over(p)
            self.geometric = self.mask(full=False)
            if self.side == "q" or not self.per_pair:
                self.how = self.score(self.geometric)
        if self.fused:
            self.fused_program()
        elif self.side == "k":
            self.keys_program()
        else:
            self.queries_program()

    def keeps_from(self, p: AxisPlan) -> bool:
        """The first column of the box is needed by name."""
        return not p.single or (self.from_tile(p) and not p.wrap)

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

    def walk_list(self) -> None:
        """The chunks that the tile is told to visit: those that all its rows see whole, then the others."""
        self.put("first, beyond = tl.load(Offset + tl.program_id(0)), tl.load(Offset + tl.program_id(0) + 1)")
        loops = [(True, "first", "beyond")]
        if not self.spec.filled:
            self.put("middle = first + tl.load(Full + tl.program_id(0))")
            loops = [(True, "first", "middle"), (False, "middle", "beyond")]
        for full, begin, end in loops:
            with self.block(f"for i in tl.range({begin}, {end}, num_stages={self.tile_choice.stages}):"):
                self.put(f"{'place' if len(self.plans) > 1 else f'c{self.plans[0].name}'} = tl.load(Place + i)")
                self.together([(f"c{p.name}", self.part_of_place(p)) for p in self.plans if len(self.plans) > 1], 120)
                self.allowed = full
                self.chunk(full=full)
                self.allowed = False

    def part_of_place(self, p: AxisPlan) -> str:
        """A chunk's first column along an axis, from the bits of its place that hold it."""
        bits, after = 64 // len(self.plans), len(self.plans) - 1 - p.axis
        part = f"(place >> {bits * after})" if after else "place"
        return f"{part}.to(tl.int32)" + (f" & {2**bits - 1}" if bits < 32 else "")

    def walk_columns(self) -> None:
        """Loops over chunks, outer axes first."""
        if self.spec.listed:
            self.walk_list()
            return
        depth = self.depth
        self.moved_chunks([p for p in (*self.outer, self.inner) if not p.single and self.needs_moving(p)])
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
        assert not any(x.odd for x in self.outer)  # the inner axis has the most chunks
        if p.odd:
            self.odd_chunk(p)
            steps = f"({n}_to - {n}_from) // {k}"
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
        n, stages = p.name, f"num_stages={self.tile_choice.stages}"
        if p.exact and (p.paired or (p.lies_apart and not p.odd)):  # past the block, a chunk is where the next would be
            left, skip, last = (f"{n}_pair", p.chunk, f" - {p.odd}") if p.paired else (f"{n}_own", f"{n}_skip", "")
            with self.block(f"for {n}_at in tl.range({n}_from, {n}_to{last}, {p.chunk}, {stages}):"):
                self.put(f"c{n} = tl.where({n}_at < {left}, {n}_at, {n}_at + {skip})")
                yield
            return
        with self.block(f"for i{n} in tl.range({begin}, {end}, {stages}):"):
            self.put(f"c{n} = {n}_from{f' + {p.odd}' if p.odd else ''} + i{n} * {p.chunk}")
            self.pass_over(p)
            yield

    def odd_chunk(self, p: AxisPlan) -> None:
        """The columns that fill no whole chunk, as a chunk of their own: before the others, whose registers it then needs not."""
        plans, bn = self.plans, self.bn
        few = replace(p, chunk=p.odd, odd=0)
        self.plans, self.bn, self.lane = (*plans[: p.axis], few, *plans[p.axis + 1 :]), bn // p.chunk * p.odd, "few"
        self.put(f"few = tl.arange(0, {self.bn})")
        with self.block(f"for i{p.name} in tl.range(0, 1):  # the columns that fill no whole chunk"):
            if p.paired:
                self.put(f"c{p.name} = 2 * {p.name}_pair + {p.odd} - {p.name}_own  # the other block of the pair")
            else:
                self.put(f"c{p.name} = {p.name}_from")
                self.pass_over(few)
            self.chunk(full=True)
        self.plans, self.bn, self.lane = plans, bn, "n"
        if self.kind == "forward" and self.spec.tiles.sync:
            again = self.module.use("read_again", READ_AGAIN)
            self.put(f"q = {again}({self.own('q')}, {self.channels('q') or 'None'})")

    def moved_chunks(self, plans: list[AxisPlan]) -> None:
        """Print how many chunks axes have, and where the first of them begins so that the last ends inside the axis."""
        steps, begin = [], []
        for p in plans:
            n, (low, beyond) = p.name, self.bound(p, self.other)
            steps.append((f"{n}_steps", f"tl.cdiv({n}_to - {n}_from, {p.chunk})"))
            begin.append((f"{n}_at", f"tl.maximum(tl.minimum({n}_from, {beyond} - {n}_steps * {p.chunk}), {low})"))
        self.together(steps)
        self.together(begin, 120)

    def open_axis(self, p: AxisPlan, stages: int) -> None:
        """Start walking an axis."""
        n, k = p.name, p.chunk
        if p.single:
            self.put(f"c{n} = {self.single_origin(p)}")
            self.pass_over(p)
            return
        steps, begin = f"tl.cdiv({n}_to - {n}_from, {k})", f"{n}_from"
        if self.needs_moving(p):
            steps, begin = f"{n}_steps", f"{n}_at"
        self.put(f"for i{n} in tl.range(0, {steps}{f', num_stages={stages}' if stages else ''}):")
        self.depth += 1
        self.put(f"c{n} = {begin} + i{n} * {k}" if k > 1 else f"c{n} = {begin} + i{n}")
        self.pass_over(p)

    # ------------------------------------------------------------------------------------------------------------------- programs
    @contextmanager
    def items(self) -> Iterator[None]:
        """The loop over batch items of one program, where it walks several."""
        if not self.batched:
            yield
            return
        self.put("first = tl.program_id(2) * PER")
        with self.block(f"for item in tl.range(first, tl.minimum(first + PER, B), num_stages={self.tile_choice.stages}):"):
            # B >> 31 is 0, which no compiler knows: else each lane's pointer to each row would be a variable of the loop
            self.put("b = tl.cast(item ^ (B >> 31), tl.int64)")
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
            self.words(of_rows=True)
            if self.kind != "forward":
                self.put(f"g = {self.load(self.own('g'), self.channels('g'))}")
                if self.spec.softmax:
                    self.put(f"token = (b * H + h) * N + {self.row_token()}")
                if self.kind == "backward_table" and self.spec.softmax:
                    self.put("lse, less = tl.load(Lse2 + token)[:, None], tl.load(Less + token)[:, None]")
                elif self.kind == "backward_dq":
                    if self.spec.softmax:
                        self.less()
                    self.put(f"dq = tl.zeros([{self.bm}, {lanes(self.spec.head_dim)}], tl.float32)")
            elif not self.hoist or self.with_prefix:
                state = [("m_i", f"tl.full([{self.bm}], -1e30, tl.float32)"), ("l_i", f"tl.zeros([{self.bm}], tl.float32)")]
                state = state if self.spec.softmax else []
                sums = [(f"acc{part.suffix}", f"tl.zeros([{self.bm}, {part.lanes}], tl.float32)") for part in self.parts("o")]
                self.together([*state, *sums], 120)
            if self.with_prefix and self.kind != "backward_table":
                self.prefix_columns()
            if self.hoist:
                self.chunk(full=False)
            else:
                self.walk_columns()
            if self.kind == "forward" and not self.spec.softmax:
                for part in self.parts("o"):
                    self.store(self.own("o", part), f"acc{part.suffix}", "o", "live[:, None]", part)
            elif self.kind == "forward":
                self.output()
            elif self.kind == "backward_dq":
                self.store(self.own("dq"), "dq * scale", "dq", "live[:, None]")
        if tables:
            self.store_partial()

    def output(self) -> None:
        """The rows' output and LSE; merged with those of earlier parts where the statement is a later part of a union."""
        total = "l_i" if self.certain else "total"
        if not self.certain:
            self.put("total = tl.where(l_i > 0, l_i, 1.0)  # rows without keys: 0, and lse -inf")
        lse = f"m_i * scale + tl.log({total})" if self.raw else f"(m_i + tl.log2({total})) / LOG2E"
        lse = lse if self.certain else f"tl.where(l_i > 0, {lse}, {INF})"
        place = f"Lse + (b * H + h) * N + {self.row_token()}"
        if not self.spec.adds:
            for part in self.parts("o"):
                self.store(self.own("o", part), f"acc{part.suffix} * (1.0 / {total})[:, None]", "o", "live[:, None]", part)
            self.put(f"lse = {lse}", f"tl.store({place}, lse, mask=live)")
            return
        self.put(f"lse = {lse}", f"before = tl.load({place}, mask=live, other=0.0)")
        self.put("top = tl.maximum(tl.maximum(lse, before), -1e30)")
        self.put("mine, theirs = tl.exp(lse - top), tl.exp(before - top)", "both = mine + theirs")
        self.put("share = 1.0 / tl.where(both > 0, both, 1.0)")
        for part in self.parts("o"):
            own, acc = self.own("o", part), f"acc{part.suffix}"
            self.put(f"o = {self.load(own, 'live[:, None]', self.channels('o', part))}.to(tl.float32)")
            value = f"{acc} * (mine * share / {total})[:, None] + o * (theirs * share)[:, None]"
            masks = " & ".join(m for m in ("live[:, None]", self.channels("o", part)) if m)
            self.put(f"tl.store({own}, ({value}).to(O.dtype.element_ty), mask={masks})")
        self.put(f"tl.store({place}, tl.where(both > 0, top + tl.log(both), {INF}), mask=live)")

    def less(self) -> None:
        """grad_lse - rowsum(out * grad_out) of each row, what ds has beside dp, and its LSE in base 2: the next read both."""
        self.put(f"o = {self.load(self.own('o'), self.channels('o'))}")
        self.put("less, lse = -tl.sum(o.to(tl.float32) * g.to(tl.float32), 1), tl.load(Lse + token)")
        with self.block("if GLse is not None:"):
            self.put("less += tl.load(GLse + token)")
        self.put(f"lse = tl.where(lse > {INF}, lse * LOG2E, 0.0)  # a row without keys")
        self.put("tl.store(Less + token, less, mask=live)", "tl.store(Lse2 + token, lse, mask=live)")

    def store_partial(self) -> None:
        """A program's share of a table gradient, or its bound."""
        self.put("part = (tl.program_id(2) * H + h).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)")
        if self.registers:
            size, value = self.bm * self.bn, "grad"
            place = f"(tl.arange(0, {self.bm}) * {self.bn})[:, None] + tl.arange(0, {self.bn})[None, :]"
            if self.tile_choice.stages > 1:  # beside a pipeline's addresses no row's place has a register: in one row, one is kept
                place, value = f"tl.arange(0, {size})", f"grad.reshape({size})"
            self.put(f"tl.store(Partial + part * {size} + {place}, {value})")
        else:
            self.put("tl.store(Size + part, tl.sum(size, 0))")

    def keys_program(self) -> None:
        """Rows are keys."""
        real = ""
        if self.spec.padded:
            self.put(f"real = live & {self.real_keys([f'k{p.name}' for p in self.plans])}")  # vectors, also of one row
            real = "real[:, None]"
        for t in ("k", "v"):
            value = self.load(self.own(t), real, self.channels(t))
            self.put(f"{t} = tl.where({real}, {value}, pad_{t})" if real else f"{t} = {value}")
        self.together([(f"d{t}", f"tl.zeros([{self.bm}, {lanes(self.dim(t))}], tl.float32)") for t in ("k", "v")])
        with self.block("for group in tl.range(0, GROUP):  # the query heads that share this key head"):
            self.put("h = hk * GROUP + group")
            self.words(of_rows=True)
            if self.with_prefix:
                self.prefix_columns()
            if self.hoist:
                if self.per_pair:
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
        tests = ["seen[:, None]"] if self.seen else []
        if any(p.split != ir.ONE for p in self.plans):  # tiles are counted for the longest class
            self.put(f"count = tl.sum(live.to(tl.int32), 0) + tl.zeros([{self.bn}], tl.int32)")
            self.put("some = count > 0  # a tile past the end of its class has no keys of its own")
            tests.append("some[:, None]")
        self.there = " & ".join(tests)
        with self.items():
            self.put(f"q = {self.load(self.own('q'), self.reach, self.channels('q'))}")
            self.words(of_rows=True)
            if self.spec.softmax:
                self.put(f"token = (b * H + h) * N + {self.row_token()}")
                some = "live[:, None]" if self.certain else f"live[:, None] & (lse > {INF})"
                self.put("lse = tl.load(Lse + token)[:, None]")
                self.put(f'lse = tl.where({some}, lse * LOG2E, float("inf"))  # no weight in rows beyond the group')
            self.chunk(full=False)
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
        head = textwrap.wrap(", ".join(params) + ",", 124, break_long_words=False, break_on_hyphens=False)
        sign = "\n".join(f"    {line}" for line in head).replace(joint, " ")
        lines = self.lines
        if self.with_prefix:
            columns = ("q", "g") if self.side == "k" else ("k", "v")
            lines = [lines[0], f"    {', '.join(f'{t}p_st' for t in columns)} = pst", *lines[1:]]
        doc = DOCS["fused" if self.fused else "weighted" if self.kind == "forward" and not self.spec.softmax else self.kind]
        return f'@triton.jit\ndef {self.name}(\n{sign}\n):\n    """{doc}"""\n' + "\n".join(lines) + "\n"


def can_fuse(spec: Spec, tile: Tile, module: Module) -> bool:
    """All gradients of a group in one program: it is one tile, it sees itself alone, and tables stay in registers."""
    if (
        spec.listed
        or spec.padded
        or spec.prefix
        or not spec.program.same_grid
        or tile.bm > 64
        or tile.bm != tile.bn
        or tile != spec.tiles.dkv
    ):
        return False
    plans = tuple(plan_axis(spec, a, "q", tile) for a in range(spec.rank))
    if not all(p.group and p.single for p in plans):
        return False
    kinds = ("full", "residue")
    if not all(symmetric(f) or f.kind.split(" of ")[-1] in kinds for f in spec.structure.axes):
        return False
    return not spec.learned or Kernel(spec, "backward_dq", tile, Module()).registers
