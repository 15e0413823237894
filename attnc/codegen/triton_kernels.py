"""Prints the kernels of one statement: forward, backward_dq, backward_dkv and backward_table are one walk with different arithmetic.

A program owns a tile of rows (queries; keys in backward_dkv), walks the box of columns they see chunk by chunk, and masks by comparing
column coordinates with the two interval ends of each row. Names in the printed text: `qy, qx` index the tile's queries inside their
residue class, `ky, kx` a chunk's keys, `y0` the tile's origin, `ya, yb` its first and last row, `cy` a chunk's origin.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from attnc import ir
from attnc.analysis.derivative import derivative
from attnc.analysis.forms import J, R
from attnc.codegen import triton_expr
from attnc.codegen.triton_plan import AxisPlan, Spec, lanes, order, plan_axis, terms, tile_invariant, whole_groups
from attnc.schedule.tiles import Side, Tile

Kind = Literal["forward", "backward_dq", "backward_dkv", "backward_table"]
INF = 'float("-inf")'


@dataclass
class Module:
    """What all kernels of one module share: small device functions, printed once each in order of first use."""

    functions: dict[str, str] = field(default_factory=dict)

    def use(self, name: str, source: str = "") -> str:
        """Have a device function printed; gives its name."""
        self.functions.setdefault(name, source or triton_expr.FUNCTIONS.get(name, ""))
        return name

    def scan(self, text: str) -> str:
        """Note the helper functions that a printed expression calls."""
        for name in triton_expr.FUNCTIONS:
            if f"{name}(" in text:
                self.use(name)
        return text


class Kernel:
    """One kernel's text. `arguments` lists its parameters in order, with whether each is a constexpr."""

    def __init__(self, spec: Spec, kind: Kind, tile: Tile, module: Module, prefix: str = "") -> None:
        self.spec, self.kind, self.tile, self.module = spec, kind, tile, module
        self.name, self.prefix = prefix + kind, prefix
        self.side: Side = "k" if kind == "backward_dkv" else "q"
        self.other: Side = "q" if self.side == "k" else "k"
        self.plans = tuple(plan_axis(spec, a, self.side, tile) for a in range(spec.rank))
        self.outer, self.inner = order(self.plans, tile.inner)
        self.bm, self.bn = tile.bm, tile.bn
        self.whole = whole_groups(self.plans)
        self.with_prefix = bool(spec.program.keys.prefix if self.side == "q" else spec.program.queries.prefix)
        self.batched = self.whole and not self.with_prefix and tile.batch > 1 and not spec.uses("batch") and self.side == "q"
        self.vector = all(p.one_box for p in self.plans)  # one interval for all rows: a mask is one row of columns
        self.lines: list[str] = []
        self.depth = 1
        self.pieces: dict[int, tuple[AxisPlan, str, bool]] = {}
        plain = spec.bias == ir.ZERO and spec.residual == ir.TRUE
        self.last_outer = next((p for p in reversed(self.outer) if not p.exact), None)
        self.additive = plain and self.last_outer is not None and not self.vector
        self.reach = self.ok = self.how = ""
        # table gradients stay in registers where a tile holds whole groups and entries depend on places inside the group alone
        one = len(spec.learned) == 1 and self.bm * self.bn <= 64 * 64 and self.side == "q"
        self.registers = one and self.whole and not spec.uses("batch")
        self.registers = self.registers and all(p.group for p in self.plans) and tile_invariant(spec, self.plans)
        self.hoist = self.whole  # mask and bias are computed before rows are loaded
        self.print()

    # ------------------------------------------------------------------------------------------------------------------ writing
    def put(self, *lines: str) -> None:
        """Lines at the present depth."""
        for line in lines:
            self.lines.append("    " * self.depth + line if line else "")

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """An indented block."""
        self.put(head)
        self.depth += 1
        yield
        self.depth -= 1

    def expr(self, e: ir.Expr, names: dict[ir.Expr, str], level: bool = False) -> str:
        """An index expression over sizes, residue and the names given."""
        return self.module.scan(triton_expr.text(e, {**self.spec.size_names, **names}))

    # ------------------------------------------------------------------------------------------------------------------- pieces
    def residue(self, p: AxisPlan) -> str:
        """The residue class's variable, or "0"."""
        return "0" if p.split == ir.ONE else f"r{p.name}"

    def split(self, p: AxisPlan) -> str:
        """The split as text; an identifier where it is an expression of sizes."""
        return str(p.split.args[0]) if p.split.op == "const" else f"split_{p.name}"

    def times_split(self, what: str, p: AxisPlan) -> str:
        """An index inside the class as a coordinate, without its residue."""
        return what if p.split == ir.ONE else f"{what} * {self.split(p)}"

    def coordinate(self, what: str, p: AxisPlan, side: Side, *, real: bool = False) -> str:
        """Extended coordinate (or position on the real axis) of an index inside the class."""
        out = self.times_split(what, p) + ("" if p.split == ir.ONE else f" + {self.residue(p)}")
        before = self.spec.before(p.axis, side)
        return f"{out} - {before}" if real and before else out

    def bound(self, p: AxisPlan, side: Side) -> tuple[str, str]:
        """First and last index inside the class: real queries, all keys (virtual ones too)."""
        sizes, before = self.spec.names[p.axis], self.spec.before(p.axis, side)
        length = sizes.real_queries if side == "q" else sizes.keys
        if p.split == ir.ONE:
            return (str(before), f"{length} + {before - 1}") if side == "q" and before else ("0", f"{length} - 1")
        m, r = self.split(p), self.residue(p)
        less = f"{m} - 1" if p.split.op != "const" else str(p.split.args[0] - 1)
        if side == "q" and before:
            return f"({before} - {r} + {less}) // {m}", f"({length} + {before} - {r} + {less}) // {m} - 1"
        return "0", f"({length} - {r} + {less}) // {m} - 1"

    def end(self, p: AxisPlan, which: Literal["lo", "hi"], at: str, side: Side | None = None) -> str:
        """The first or last column that row `at` sees, as a call of a small function where it is more than a name."""
        side = side or self.side
        form = self.spec.structure.axes[p.axis]
        e = (form.lo if which == "lo" else form.hi) if p.columns else (p.lo if which == "lo" else p.hi)
        out = self._end(e, p, which, at, side)
        if self.spec.padded and self.side == "k" and not p.columns:
            first, last = self.bound(p, "q")
            if which == "hi":
                return f"tl.minimum({out}, {last})"
            return out if first == "0" else f"tl.maximum({out}, {first})"
        return out

    def _end(self, e: ir.Expr, p: AxisPlan, which: str, at: str, side: Side) -> str:
        if not any(n == J for n in ir.walk(e)):
            return self.expr(e, {R: self.residue(p)})
        if e == J:
            return at
        sees, who, var = ("key", "query", "j") if side == "q" else ("query", "key", "i")
        leaves = [n for n in dict.fromkeys(ir.walk(e)) if n.op == "size"]
        mine = {n: f"n{n.args[0] if not self.spec.program.same_grid else ''}" for n in leaves if n.args[1] == p.axis}
        rest = [("r", self.residue(p))] if any(n == R for n in ir.walk(e)) else []
        rest += list(dict.fromkeys((mine[n], self.spec.size_names[n]) for n in leaves if n in mine))
        rest += list(dict.fromkeys((self.spec.size_names[n],) * 2 for n in leaves if n not in mine))
        body = self.module.scan(triton_expr.text(e, {**self.spec.size_names, **mine, J: var, R: "r"}))
        stem = f"{'first' if which == 'lo' else 'last'}_{sees}"
        doc = f"The {'first' if which == 'lo' else 'last'} {sees} that {who} {var} sees on an axis"
        doc += "." if p.split == ir.ONE else ", counted inside the residue class."
        params = ", ".join([var, *[a for a, _ in rest]])
        for name in (stem, f"{stem}_{p.name}"):  # axes of one form share a function
            text = f'@triton.jit\ndef {name}({params}):\n    """{doc}"""\n    return {body}\n'
            if self.module.functions.get(name, text) == text:
                self.module.use(name, text)
                break
        return f"{name}({', '.join([at, *[b for _, b in rest]])})"

    def offset(self, tensor: str, parts: list[tuple[str, AxisPlan]]) -> str:
        """Sum of index * split * stride over axes, for what lies inside a tile."""
        terms = [f"{self.times_split(what, p)} * {tensor}_st[{p.axis + 2}]" for what, p in parts]
        return " + ".join(terms) if terms else "0"

    def place(self, tensor: str, origin: list[str]) -> str:
        """Element offset of one token, 64 bits wide."""
        name = "place" if not self.prefix else "place_flat"
        total = " + ".join(f"tl.cast({a}, tl.int64) * st[{i + 2}]" for i, a in enumerate(self.spec.axes))
        self.module.use(
            name,
            f"@triton.jit\ndef {name}({', '.join(self.spec.axes)}, st):\n"
            f'    """Element offset of a token from its batch item and head, 64 bits wide."""\n    return {total}\n',
        )
        return f"{name}({', '.join(origin)}, {tensor}_st)"

    def channels(self, value: bool) -> tuple[str, str, str]:
        """(arange variable, mask or "", size) of the channels of q and k, or of v."""
        dim = self.spec.value_dim if value else self.spec.head_dim
        var = "e" if value and self.spec.value_dim != self.spec.head_dim else "d"
        return var, "" if lanes(dim) == dim else f"({var} < {dim})[None, :]", str(dim)

    def rows_of(self, tensor: str) -> str:
        """Pointers to the tile's rows of a tensor."""
        return f"{tensor.upper()} + (b * {tensor}_st[0] + {tensor}_at) + {tensor}_tile"

    @staticmethod
    def masked(*masks: str) -> str:
        """The mask arguments of a load or store."""
        some = [m for m in masks if m]
        return f", mask={' & '.join(some)}" if some else ""

    def load(self, pointers: str, *masks: str) -> str:
        """A load of rows that reads zeros where masked."""
        self.module.use("read", READ)
        some = [m for m in masks if m]
        return f"read({pointers}, {' & '.join(some) if some else 'None'})"

    def unsigned(self) -> bool:
        """Plain or affine score: kept unscaled until exp2."""
        return self.spec.bias is not None

    # ------------------------------------------------------------------------------------------------------------------ prologue
    def digits(self) -> list[tuple[str, AxisPlan]]:
        """How program_id(0) is read, slowest first: residues, then tiles."""
        return [("class", p) for p in self.plans if p.split != ir.ONE] + [("tile", p) for p in self.plans]

    def prologue(self) -> None:
        spec, a = self.spec, self.side
        digits = self.digits()
        for p in self.plans:
            if p.split.op != "const":
                self.put(f"split_{p.name} = {self.expr(p.split, {})}")
        if a == "q":
            self.put("h = tl.program_id(1)", "hk = h // GROUP")
        else:
            self.put("hk = tl.program_id(1)")
        if not self.batched:
            self.put("b = tl.program_id(2).to(tl.int64)")
        self.put("pid = tl.program_id(0)")
        for n in range(len(digits) - 1, -1, -1):
            what, p = digits[n]
            digit = "pid" if n == 0 else f"pid % parts[{n}]"
            if what == "class":
                self.put(f"r{p.name} = {digit}")
            else:
                start = self.expr(p.start, {})
                scaled = digit if p.rows == 1 else f"{digit} * {p.rows}"
                self.put(f"{p.name}0 = {scaled}" if start == "0" else f"{p.name}0 = {start} + {scaled}")
            if n:
                self.put(f"pid = pid // parts[{n}]")
        self.put("m = tl.arange(0, BM)")
        live: list[str] = []
        count = 1
        for p in self.plans:
            count *= p.rows
        after = count
        for p in self.plans:
            after //= p.rows
            n, (first, last) = p.name, self.bound(p, a)
            below = first != "0" or p.start != ir.ZERO
            dead = p.split != ir.ONE
            if p.rows == 1:
                lead = f"{n}0"
                if below:
                    lead = f"tl.maximum({lead}, {first})"
                if dead:
                    lead = f"tl.minimum({lead}, {last})"
                    live.append(f"({n}0 <= {last})")
                self.put(f"{n}a = {lead}")
                continue
            self.put(f"{n}b = tl.minimum({n}0 + {p.rows - 1}, {last})")
            lead = f"tl.maximum({n}0, {first})" if below else f"{n}0"
            self.put(f"{n}a = {f'tl.minimum({lead}, {n}b)' if dead else lead}")
            part = "m" if after == 1 else f"m // {after}"
            if p is not self._first_long():
                part = f"{part} % {p.rows}"
            raw = f"{n}0 + {part}"
            inside = f"tl.minimum({raw}, {n}b)"
            self.put(f"{a}{n} = {f'tl.maximum({inside}, {n}a)' if below else inside}")
            live.append(f"({a}{n} == {raw})")
        if self._first_long() is None:
            live.append("(m < 1)")
        self.put(f"live = {' & '.join(live)}")

    def _first_long(self) -> AxisPlan | None:
        """The slowest axis along which a tile has several rows: rows beyond the tile run over its end and are dead."""
        return next((p for p in self.plans if p.rows > 1), None)

    def row_tensors(self) -> tuple[str, ...]:
        """Tensors read or written at the tile's rows."""
        return {
            "forward": ("q", "o"),
            "backward_dq": ("q", "g", "dq"),
            "backward_table": ("q", "g"),
            "backward_dkv": ("k", "v", "dk", "dv"),
        }[self.kind]

    def column_tensors(self) -> tuple[str, ...]:
        """Tensors read at columns."""
        return ("q", "g") if self.side == "k" else ("k", "v")

    @staticmethod
    def is_value(tensor: str) -> bool:
        """Has value_dim channels."""
        return tensor in ("v", "o", "g", "dv")

    def point_rows(self, tensor: str) -> None:
        var, _, _ = self.channels(self.is_value(tensor))
        head = "hk" if self.side == "k" else "h"
        origin = [self.coordinate(f"{p.name}0" if p.rows > 1 else f"{p.name}a", p, self.side, real=True) for p in self.plans]
        self.put(f"{tensor}_at = {head} * {tensor}_st[1] + {self.place(tensor, origin)}")
        inside = [(f"({self.side}{p.name} - {p.name}0)", p) for p in self.plans if p.rows > 1]
        offset = self.offset(tensor, inside)
        last = self.spec.rank + 2
        offset = f"({offset})[:, None]" if inside else "(m * 0)[:, None]"
        self.put(f"{tensor}_tile = {offset} + {var}[None, :] * {tensor}_st[{last}]")

    def token(self, parts: list[tuple[str, AxisPlan]], side: Side) -> str:
        """Row-major number of a token on the real grid."""
        out = ""
        for what, p in parts:
            at = self.coordinate(what, p, side, real=True)
            length = self.spec.names[p.axis].real_queries
            head = out if " " not in out else f"({out})"
            out = at if not out else f"{head} * {length} + {at}"
        return out

    def row_token(self) -> str:
        """Token numbers of the tile's rows."""
        return self.token([(f"{self.side}{p.name}" if p.rows > 1 else f"{p.name}a", p) for p in self.plans], self.side)

    # -------------------------------------------------------------------------------------------------------------------- columns
    def box(self) -> None:
        for p in self.plans:
            n = p.name
            first, last = (f"{n}a", f"{n}a") if p.rows == 1 else (f"{n}a", f"{n}b")
            if p.columns:
                low, high = self.bound(p, self.other)
            else:
                low, high = self.end(p, "lo", first), self.end(p, "hi", last)
            self.put(f"{n}_from = {low}", f"{n}_to = {high} + 1")
        rows = {p.name: (f"{self.side}{p.name}" if p.rows > 1 else f"{p.name}a") for p in self.plans}
        for p in self.plans:
            if not p.one_box and not p.columns:
                low = self.end(p, "lo", rows[p.name])
                if low != "0":
                    self.put(f"{p.name}_lo = {low}")
                self.put(f"{p.name}_hi = {self.end(p, 'hi', rows[p.name])}")
        for tensor in self.column_tensors():
            var, _, _ = self.channels(self.is_value(tensor))
            inside = self.offset(tensor, self.column_parts())
            self.put(f"{tensor}_tile = ({inside})[:, None] + {var}[None, :] * {tensor}_st[{self.spec.rank + 2}]")

    def column_parts(self) -> list[tuple[str, AxisPlan]]:
        """Index of each column inside its chunk, per axis that has several."""
        out, after = [], 1
        for p in self.plans:
            after *= p.chunk
        count = after
        for p in self.plans:
            after //= p.chunk
            if p.chunk == 1:
                continue
            part = "n" if after == 1 else f"n // {after}"
            if after * p.chunk != count:
                part = f"({part}) % {p.chunk}" if "//" in part else f"{part} % {p.chunk}"
            out.append((f"({part})" if " " in part else part, p))
        return out or [("n * 0", self.plans[0])]

    def counted(self) -> bool:
        """Columns in registers beyond the chunk's own number."""
        n = 1
        for p in self.plans:
            n *= p.chunk
        return n != self.bn

    def needs_moving(self, p: AxisPlan) -> bool:
        """A chunk is moved back inside the axis where each row compares both of its ends anyway."""
        return not p.one_box and not self.has_full() and p.chunk > 1

    def has_full(self) -> bool:
        """Chunks without a mask exist and get a loop of their own."""
        return self.inner.full and all(p.exact for p in self.outer) and not self.inner.columns

    def walk_columns(self) -> None:
        """Loops over chunks, outer axes first."""
        opened = 0
        for p in self.outer:
            opened += self.open_axis(p, stages=0)
        p = self.inner
        if not self.has_full():
            opened += self.open_axis(p, stages=self.tile.stages)
            self.chunk(full=False)
            self.depth -= opened
            return
        n, k = p.name, p.chunk
        if p.exact:
            with self.loop(p, "0", f"tl.cdiv({n}_to - {n}_from, {k})"):
                self.chunk(full=True)
            self.depth -= opened
            return
        self.put(f"steps = tl.cdiv({n}_to - {n}_from, {k})")
        last, first = (f"{n}a", f"{n}a") if p.rows == 1 else (f"{n}b", f"{n}a")
        low = self.end(p, "lo", last)
        constant_low = p.one_box or low == self.end(p, "lo", first)
        if not constant_low:
            self.put(f"skip = tl.minimum(tl.cdiv(tl.maximum({low} - {n}_from, 0), {k}), steps)")
        begin = "0" if constant_low else "skip"
        high = f"{n}_to" if p.one_box else f"{self.end(p, 'hi', first)} + 1"
        self.put(f"full = tl.maximum(tl.minimum(({high} - {n}_from) // {k}, steps), {begin})")
        if not constant_low:
            with self.loop(p, "0", "skip"):
                self.chunk(full=False)
        with self.loop(p, begin, "full"):
            self.chunk(full=True)
        if p.partial:
            with self.loop(p, "full", "steps"):
                self.chunk(full=False)
        self.depth -= opened

    @contextmanager
    def loop(self, p: AxisPlan, begin: str, end: str) -> Iterator[None]:
        """A pipelined loop over chunks of the inner axis."""
        n = p.name
        with self.block(f"for i{n} in tl.range({begin}, {end}, num_stages={self.tile.stages}):"):
            self.put(f"c{n} = {n}_from + i{n} * {p.chunk}")
            yield

    def from_tile(self, p: AxisPlan) -> bool:
        """A first group cut by the axis: columns are counted from the tile's origin, as the rows are."""
        return self.registers and p.start != ir.ZERO

    def open_axis(self, p: AxisPlan, stages: int) -> int:
        """Start walking an axis; gives the number of loops opened."""
        n, k = p.name, p.chunk
        low, last = self.bound(p, self.other)
        if p.single:
            at = f"{n}0" if self.from_tile(p) else f"{n}_from"
            if self.needs_moving(p):
                at = f"tl.maximum(tl.minimum({at}, {last.removesuffix(' - 1')} - {k if last.endswith(' - 1') else k - 1}), {low})"
            self.put(f"c{n} = {at}")
            if p is not self.inner:
                self.outer_piece(p)
            return 0
        steps, begin = f"tl.cdiv({n}_to - {n}_from, {k})", f"{n}_from"
        if self.needs_moving(p):
            beyond = last.removesuffix(" - 1") if last.endswith(" - 1") else f"{last} + 1"
            self.put(f"{n}_steps = {steps}")
            self.put(f"{n}_at = tl.maximum(tl.minimum({n}_from, {beyond} - {n}_steps * {k}), {low})")
            steps, begin = f"{n}_steps", f"{n}_at"
        extra = f", num_stages={stages}" if stages else ""
        self.put(f"for i{n} in tl.range(0, {steps}{extra}):")
        self.depth += 1
        self.put(f"c{n} = {begin} + i{n} * {k}" if k > 1 else f"c{n} = {begin} + i{n}")
        if p is not self.inner:
            self.outer_piece(p)
        return 1

    def expand(self, p: AxisPlan, rows: bool) -> str:
        """Index that lifts a [rows, chunk] (or [chunk]) piece of one axis to [rows, *chunks]."""
        many = self.spec.rank > 1
        if not many:
            return "" if rows else "[None, :]"
        mine = ["None"] * self.spec.rank
        mine[p.axis] = ":"
        return f"[{':' if rows else 'None'}, {', '.join(mine)}]"

    def interval(self, p: AxisPlan) -> tuple[str, bool] | None:
        """Which columns along one axis rows see: a condition, and whether it has a dimension of rows. None where all do."""
        if p.exact:
            return None
        n = p.name
        column = f"{self.other}{n}_"
        if p.columns:
            across = "[None, :]" if p.rows > 1 else ""
            row = f"{self.side}{n}[:, None]" if p.rows > 1 else f"{n}a"
            low, high = self.end(p, "lo", column, "q"), self.end(p, "hi", column, "q")
            low, high = (f"({x}){across}" if column in x else x for x in (low, high))
            inside = f"({column} <= {self.bound(p, self.other)[1]}){across}"
            return f"({low} <= {row}) & ({row} <= {high}) & {inside}", p.rows > 1
        if p.one_box:
            return f"({column} < {n}_to)", False
        column = f"{column}[None, :]"
        low = self.end(p, "lo", f"{self.side}{n}")
        test = f"({column} <= {n}_hi[:, None])"
        return (test if low == "0" else f"({column} >= {n}_lo[:, None]) & {test}"), True

    def coordinates_1d(self, p: AxisPlan) -> None:
        """The columns' indices along one axis, as one short vector."""
        self.put(f"{self.other}{p.name}_ = c{p.name} + tl.arange(0, {p.chunk})")

    def outer_piece(self, p: AxisPlan) -> None:
        """What the mask needs from an outer axis; it stays the same along the inner loop."""
        self.pieces.pop(p.axis, None)
        if self.vector:
            return
        test = self.interval(p)
        if test is None:
            return
        self.coordinates_1d(p)
        condition, rows = test
        if self.additive and p is self.last_outer:
            self.put(f"{p.name}_bias = tl.where({condition}, 0.0, {INF})")
            self.pieces[p.axis] = (p, f"{p.name}_bias", rows)
        else:
            self.put(f"{p.name}_ok = {condition}")
            self.pieces[p.axis] = (p, f"{p.name}_ok", rows)

    # ----------------------------------------------------------------------------------------------------------------------- masks
    def mask(self, full: bool) -> str:
        """Print what the chunk's mask needs. Gives the name of a condition ([1, BN] or [BM, BN]), or "" where all pairs are allowed."""
        spec = self.spec
        names = {p.name: f"{self.other}{p.name}" for p in self.plans}
        pairs = spec.per_pair
        # the last chunk of an axis may reach past its end, unless the mask (a prefix of the columns) says so already
        self.reach = ""
        wants_full_coordinates = pairs or spec.padded
        if full:
            if wants_full_coordinates:
                self.columns_2d(self.plans)
            return ""
        if self.vector:
            self.columns_2d(self.plans if wants_full_coordinates else [p for p in self.plans if not p.exact])
            tests = [f"({names[p.name]} >= {p.name}_from)" for p in self.plans if self.from_tile(p)]
            tests += [f"({names[p.name]} < {p.name}_to)" for p in self.plans if not p.exact]
            if self.counted():
                count = 1
                for p in self.plans:
                    count *= p.chunk
                tests.append(f"(n < {count})")
            if not tests:
                return ""
            self.put(f"seen = {' & '.join(tests)}")
            self.reach = "seen[:, None]"
            return "seen[None, :]"
        over = [p for p in self.plans if p.overruns or (p is self.inner and self.has_full() and not p.exact)]
        self.columns_2d(self.plans if wants_full_coordinates else over)
        if over:
            tests = [f"({names[p.name]} <= {self.bound(p, self.other)[1]})" for p in over]
            self.put(f"reach = {' & '.join(tests)}")
            self.reach = "reach[:, None]"
        inner = self.interval(self.inner)
        if inner is not None:
            self.coordinates_1d(self.inner)
        if spec.rank == 1:
            assert inner is not None
            self.put(f"ok = {inner[0]}")
            return "ok"
        pieces = dict(self.pieces)
        if inner is not None:
            self.put(f"{self.inner.name}_ok = {inner[0]}")
            pieces[self.inner.axis] = (self.inner, f"{self.inner.name}_ok", inner[1])
        lifted = [f"{name}{self.expand(p, rows)}" for _, (p, name, rows) in sorted(pieces.items()) if not name.endswith("_bias")]
        shape = ", ".join(["BM", *[str(p.chunk) for p in self.plans]])
        joined = " & ".join(lifted)
        if not self.additive:
            self.put(f"ok = tl.broadcast_to({joined}, [{shape}]).reshape(BM, BN)")
            return "ok"
        assert self.last_outer is not None
        p, name, rows = pieces[self.last_outer.axis]
        tile = f"{name}{self.expand(p, rows)}"
        if lifted:
            tile = f"tl.where({joined}, {tile}, {INF})"
        if not rows and not (inner is not None and inner[1]):
            tile = f"tl.broadcast_to({tile}, [{shape}])"
        elif p.chunk != self.bn and len(pieces) < spec.rank:
            tile = f"tl.broadcast_to({tile}, [{shape}])"
        self.put(f"bias = {tile}.reshape(BM, BN)")
        return "bias"

    def columns_2d(self, plans: list[AxisPlan] | tuple[AxisPlan, ...]) -> None:
        """Indices of all columns of the chunk along some axes."""
        parts = {p.name: text for text, p in self.column_parts()}
        for p in plans:
            inside = parts.get(p.name) if p.chunk > 1 else None
            self.put(f"{self.other}{p.name} = c{p.name} + {inside.strip('()') if inside and inside.count('(') == 1 else inside}"
                     if inside else f"{self.other}{p.name} = c{p.name} + n * 0")

    # ------------------------------------------------------------------------------------------------------------- score and tables
    def pair_names(self) -> dict[ir.Expr, str]:
        """Coordinates of rows and columns as text that broadcasts to [BM, BN]."""
        out = dict(self.spec.size_names)
        out |= {ir.HEAD: "h", ir.HEADS: "H", ir.BATCH: "b", ir.SCORE: "s"}
        for p in self.plans:
            row = f"{self.side}{p.name}[:, None]" if p.rows > 1 else f"{p.name}a"
            column = f"{self.other}{p.name}[None, :]"
            out[ir.coord(self.side, p.axis)] = self.coordinate(row, p, self.side)
            out[ir.coord(self.other, p.axis)] = self.coordinate(column, p, self.other)
        return out

    def pair(self, e: ir.Expr, ok: str) -> str:
        """A score, predicate or slope as text over [BM, BN]."""

        def load(n: ir.Expr, _: tuple[str, ...]) -> str:
            return self.table(n, ok)

        return self.module.scan(triton_expr.text(e, self.pair_names(), load))

    def address(self, n: ir.Expr, strides: str, names: dict[ir.Expr, str]) -> str:
        """Offset of a table's element, as a part that rows decide and a part that columns decide where it splits that way."""
        parts: dict[str, list[str]] = {"q": [], "k": [], "": []}
        for d, e in enumerate(n.children):
            split: dict[str, ir.Expr] = {}
            for sign, t in terms(e):
                roles = {m.args[0] for m in ir.walk(t) if m.op == "coord"}
                role = roles.pop() if len(roles) == 1 else "q" if not roles else ""
                split[role] = ir.make("add" if sign > 0 else "sub", split.get(role, ir.ZERO), t)
            for role, x in split.items():
                if x == ir.ZERO:
                    continue
                text = self.module.scan(triton_expr.text(x, names))
                parts[role].append(f"{self._whole(text)} * {strides}[{d}]")
        if parts[""] or not parts["k"]:
            return " + ".join([*parts["q"], *parts["k"], *parts[""]]) or "0"
        if not parts["q"]:
            return " + ".join(parts["k"])
        return f"({' + '.join(parts['q'])}) + ({' + '.join(parts['k'])})"

    @staticmethod
    def _whole(i: str) -> str:
        return f"({i})" if " " in i or i.startswith("-") else i

    def table(self, n: ir.Expr, ok: str) -> str:
        """The load of a table's element, masked where pairs outside the relation might read beyond the table."""
        name = n.args[0]
        roles = {m.args[0] for i in n.children for m in ir.walk(i) if m.op == "coord"}
        mask = ok if roles == {"q", "k"} else ""
        if not mask and self.other in roles and getattr(self, "reach", "") and self.side not in roles:
            mask = self.reach.replace("[:, None]", "[None, :]")
        cast = ".to(tl.float32)" if n.kind == "real" else ""
        other = ", other=0" if mask else ""
        return f"tl.load({name}_table + {self.address(n, f'{name}_st', self.pair_names())}{self.masked(mask)}{other}){cast}"

    def score(self, ok: str) -> str:
        """Print mask-dependent tiles ahead of the product. Gives the accumulator's name ("" none), or "general"."""
        spec = self.spec
        if spec.residual != ir.TRUE:
            test = self.pair(spec.residual, ok)
            self.put(f"ok = ({ok}) & ({test})" if ok else f"ok = tl.broadcast_to({test}, [BM, BN])")
            ok = "ok"
        self.ok = ok
        if spec.bias is None:
            return "general"
        if spec.bias != ir.ZERO:
            value = self.pair(spec.bias, ok)
            if ok:
                self.put(f"bias = tl.where({ok}, ({value}) * (1.0 / scale), {INF})")
            else:
                self.put(f"bias = tl.broadcast_to(({value}) * (1.0 / scale), [BM, BN])")
            return "bias"
        if ok in ("", "bias"):
            return ok
        if ok == "ok" or self.hoist:
            zeros = "tl.zeros([BM, BN], tl.float32)" if ok != "ok" else "0.0"
            self.put(f"bias = tl.where({ok}, {zeros}, {INF})")
            return "bias"
        return "seen"

    def scores(self, rows: str, columns: str, how: str) -> None:
        """s: the masked scores of a chunk; unscaled for a plain or affine score, else as log2 weights."""
        acc = ", acc=bias" if how == "bias" else ""
        product = f"tl.dot({rows}, {columns}.T{acc}, input_precision=PRECISION)"
        if how != "general":
            self.put(f"s = {product}")
            if how == "seen":
                self.put(f"s = tl.where({self.ok}, s, {INF})")
            return
        spec = self.spec
        if any(n == ir.SCORE for n in ir.walk(spec.score)):
            self.put(f"s = {product} * scale")
        value = self.pair(spec.score, self.ok)
        t = f"({value}) * LOG2E"
        shape = "" if any(n == ir.SCORE for n in ir.walk(spec.score)) else "full"
        if self.ok:
            self.put(f"t = tl.where({self.ok}, {t}, {INF})")
        else:
            self.put(f"t = {t}")
        if shape:
            self.put("t = tl.broadcast_to(t + tl.zeros([BM, BN], tl.float32), [BM, BN])")

    # ------------------------------------------------------------------------------------------------------------------ one chunk
    def chunk(self, *, full: bool) -> None:
        """Load the chunk's columns and do the kernel's arithmetic on them."""
        if not self.hoist:
            self.how = self.score(self.mask(full))
        self.load_columns(full)
        self.arithmetic()

    def load_columns(self, full: bool) -> None:
        reach = "" if full else self.reach
        real = ""
        if self.spec.padded and self.side == "q":
            real = self.real_columns()
        for tensor in self.column_tensors():
            _, dmask, _ = self.channels(self.is_value(tensor))
            origin = [self.coordinate(f"c{p.name}", p, self.other, real=True) for p in self.plans]
            head = "hk" if tensor in ("k", "v") else "h"
            at = f"b * {tensor}_st[0] + {head} * {tensor}_st[1] + {self.place(tensor, origin)}"
            pointers = f"{tensor.upper()} + ({at}) + {tensor}_tile"
            if real:
                self.put(f"{tensor} = tl.where(real[:, None], {self.load(pointers, 'real[:, None]', dmask)}, pad_{tensor})")
            else:
                self.put(f"{tensor} = {self.load(pointers, reach, dmask)}")
        if self.side == "k":
            origin = self.token([(f"c{p.name}", p) for p in self.plans], "q")
            inside = ""
            for what, p in self.column_parts():
                later = [self.spec.names[x.axis].real_queries for x in self.plans if x.axis > p.axis]
                term = " * ".join([self.times_split(what, p), *later])
                inside += f" + {term}"
            mask = reach.replace("[:, None]", "")
            mask = f", mask={mask}, other=0.0" if mask else ""
            self.put(f"token = (b * H + h) * N + ({origin}){inside}")
            self.put(f"lse = tl.load(Lse2 + token{mask})[None, :]", f"delta = tl.load(Delta + token{mask})[None, :]")

    def real_columns(self) -> str:
        """Keys of the chunk that exist; the others are virtual, with the rows pad_k and pad_v."""
        tests = []
        for p in self.plans:
            at = self.coordinate(f"k{p.name}", p, "k", real=True)
            if self.spec.before(p.axis, "k"):
                tests.append(f"({at} >= 0)")
            tests.append(f"({at} < {self.spec.names[p.axis].real_keys})")
        # of a chunk's surplus columns, those inside the axis are real keys that the mask hides
        self.put(f"real = {' & '.join(tests)}")
        if self.counted():
            self.put("real = real & " + f"(n < {self._chunk_count()})")
        return "real"

    def _chunk_count(self) -> int:
        n = 1
        for p in self.plans:
            n *= p.chunk
        return n

    def arithmetic(self) -> None:
        match self.kind:
            case "forward":
                self.softmax_step(self.how, first=self.whole and not self.with_prefix)
            case "backward_dkv":
                self.backward_step("k", "v", "q", "g", plain=False)
            case _:
                self.backward_step("q", "g", "k", "v", plain=False)

    def softmax_step(self, how: str, *, first: bool, post: bool = True) -> None:
        """Online softmax over one more chunk (or the only one)."""
        self.scores("q", "k", how)
        raw = self.unsigned()
        s, c = ("s", " * c") if raw else ("t", "")
        weight = "p"
        scaled = f"{s}{c} - (m_new{c})[:, None]"
        low = "m_i" if not first else "-1e30"
        self.put(f"m_new = tl.maximum({low}, tl.max({s}, 1))", f"p = tl.exp2({scaled})")
        if not first:
            scaled_alpha = f"(m_i - m_new){c}" if c else "m_i - m_new"
            self.put(f"alpha = tl.exp2({scaled_alpha})", "l_i = l_i * alpha + tl.sum(p, 1)")
        else:
            self.put("l_i = tl.sum(p, 1)")
        if post and self.spec.post is not None:
            self.put(f"w = {self.post()}")
            weight = "w"
        product = f"tl.dot({weight}.to(v.dtype), v"
        if first:
            self.put(f"acc = {product}, input_precision=PRECISION)", "m_i = m_new")
        else:
            self.put(f"acc = {product}, acc=acc * alpha[:, None], input_precision=PRECISION)", "m_i = m_new")

    def post(self) -> str:
        """The weight times its post-factor, where pairs are allowed."""
        assert self.spec.post is not None
        value = f"p * ({self.pair(self.spec.post, self.ok)})"
        return f"tl.where({self.ok}, {value}, 0.0)" if self.ok else value

    def backward_step(self, row: str, row2: str, column: str, column2: str, *, plain: bool) -> None:
        """Gradients of one chunk. `plain`: pairs with a prefix token, whose score is the product alone."""
        spec = self.spec
        self.scores(row, column, self.how)
        self.put("p = tl.exp2(s * c - lse)" if self.unsigned() else "p = tl.exp2(t - lse)")
        self.put(f"dp = tl.dot({row2}, {column2}.T, input_precision=PRECISION)")
        post = spec.post is not None and not plain
        weight = "p"
        if post:
            assert spec.post is not None
            self.put(f"w = {self.post()}")
            weight = "w"
        ds = "w * dp - p * delta" if post else "p * (dp - delta)"
        if self.side == "k":
            self.put(f"dv = tl.dot({weight}.to(g.dtype), g, acc=dv, input_precision=PRECISION)")
        self.put(f"ds = {ds}")
        if not plain:
            self.table_gradients()
        slope = spec.slope if not plain else ir.const(1.0)
        if self.kind == "backward_table" or slope == ir.const(0.0):
            return
        d = "ds"
        if slope != ir.const(1.0):
            value = f"ds * ({self.pair(slope, self.ok)})"
            self.put(f"dt = {f'tl.where({self.ok}, {value}, 0.0)' if self.ok else value}")
            d = "dt"
        grad = "dk" if self.side == "k" else "dq"
        self.put(f"{grad} = tl.dot({d}.to({column}.dtype), {column}, acc={grad}, input_precision=PRECISION)")

    # ------------------------------------------------------------------------------------------------------------- table gradients
    def contributions(self) -> list[tuple[ir.Expr, str]]:
        """Each learned load and what a pair adds to its element's gradient, as text over [BM, BN]."""
        spec, out = self.spec, []
        for n in spec.learned:
            slope = derivative(spec.score, n)
            value = "" if slope == ir.const(0.0) else "ds" if slope == ir.const(1.0) else f"ds * ({self.pair(slope, self.ok)})"
            if spec.post is not None:
                extra = derivative(spec.post, n)
                if extra != ir.const(0.0):
                    more = f"p * dp * ({self.pair(extra, self.ok)})"
                    value = f"{value} + {more}" if value else more
            out.append((n, value))
        return out

    def table_gradients(self) -> None:
        if self.kind not in ("backward_dq", "backward_table") or not self.spec.learned:
            return
        live = f"live[:, None]{f' & {self.ok}' if self.ok else ''}"
        for i, (n, value) in enumerate(self.contributions()):
            if self.kind == "backward_dq" and self.registers:
                self.put(f"grad_{i} += tl.where({live}, {value}, 0.0)")
            elif self.kind == "backward_dq":
                self.put(f"size += tl.sum(tl.where({live}, tl.abs({value}), 0.0), 1)")
            else:
                self.put(f"fixed = (({value}) * unit).to(tl.int64)")
                address = self.address(n, f"d_{n.args[0]}_st", self.pair_names())
                self.put(f"tl.atomic_add(d_{n.args[0]} + (tl.zeros([BM, BN], tl.int32) + {address}), fixed, mask={live}, sem=\"relaxed\")")

    # ---------------------------------------------------------------------------------------------------------------- prefix tokens
    def prefix_columns(self) -> None:
        """Pairs with prefix tokens: every row sees them, with the plain score."""
        self.put(f"for i in tl.range(0, tl.cdiv(P, BN), num_stages={self.tile.stages}):")
        self.depth += 1
        self.put("at = i * BN + n", "inside = at < P")
        keep_ok, self.ok = self.ok, "inside[None, :]"
        last = self.spec.rank + 2
        for tensor in self.column_tensors():
            var, dmask, _ = self.channels(self.is_value(tensor))
            head = "hk" if tensor in ("k", "v") else "h"
            start = f"b * {tensor}p_st[0] + {head} * {tensor}p_st[1]"
            pointers = f"{tensor.upper()}p + ({start}) + at[:, None] * {tensor}p_st[2] + {var}[None, :] * {tensor}p_st[3]"
            self.put(f"{tensor} = {self.load(pointers, 'inside[:, None]', dmask)}")
        if self.side == "k":
            self.put("token = (b * H + h) * N + at - P")
            for what, name in (("lse", "Lse2"), ("delta", "Delta")):
                self.put(f"{what} = tl.load({name} + token, mask=inside, other=0.0)[None, :]")
        row, column = ("k", "q") if self.side == "k" else ("q", "k")
        self.put(f"s = tl.dot({row}, {column}.T, input_precision=PRECISION)")
        if self.unsigned():
            self.put(f"s = tl.where({self.ok}, s, {INF})")
        else:
            self.put(f"t = tl.where({self.ok}, s * c, {INF})")
        keep, self.scores = self.scores, lambda *_: None  # type: ignore[assignment,method-assign]
        if self.kind == "forward":
            self.softmax_step("", first=False, post=False)
        elif self.side == "k":
            self.backward_step("k", "v", "q", "g", plain=True)
        else:
            self.backward_step("q", "g", "k", "v", plain=True)
        self.scores, self.ok = keep, keep_ok  # type: ignore[method-assign]
        self.depth -= 1

    # -------------------------------------------------------------------------------------------------------------------- assembly
    def arguments(self) -> list[tuple[str, bool]]:
        """Parameters in order, with whether each is a constexpr when sizes are known."""
        body = "\n".join(self.lines)
        tables = [*self.spec.attend.tables, *(("pad_k", "pad_v") if self.spec.padded else ())]
        names = [*ARGUMENTS[:19], *[f"{t}_table" for t in tables], *[f"d_{t}" for t in tables], *ARGUMENTS[19:31]]
        names += [f"{t}_st" for t in tables] + [f"d_{t}_st" for t in tables] + ARGUMENTS[31:]
        sizes = dict.fromkeys(s for n in self.spec.names for s in (n.queries, n.keys, n.real_queries, n.real_keys))
        static = {*sizes, "parts", "q_st", "k_st", "v_st", "o_st", "g_st", "dq_st", "dk_st", "dv_st"}
        return [(n, n in static) for n in [*names, *sizes] if used(n, body)]

    def text(self, static: bool) -> str:
        """The kernel. `static`: sizes and strides are compile-time constants."""
        params = [f"{n}: tl.constexpr" if n in CONSTANT or (fixed and static) else n for n, fixed in self.arguments()]
        head = textwrap.wrap(", ".join(params) + ",", 100, break_long_words=False, break_on_hyphens=False)
        sign = "\n".join(f"    {line}" for line in head)
        doc = DOCS[self.kind].format(axes=", ".join(self.spec.axes))
        return f'@triton.jit\ndef {self.name}(\n{sign}\n):\n    """{doc}"""\n' + "\n".join(self.lines) + "\n"

    def print(self) -> None:
        spec = self.spec
        self.put(f"BM: tl.constexpr = {self.bm}", f"BN: tl.constexpr = {self.bn}")
        self.prologue()
        self.put("n = tl.arange(0, BN)")
        for value in (False, True):
            var, _, dim = self.channels(value)
            if not value or var == "e":
                self.put(f"{var} = tl.arange(0, {lanes(int(dim))})")
        for tensor in self.row_tensors():
            self.point_rows(tensor)
        self.box()
        if spec.padded:
            for tensor in ("k", "v"):
                var, _, dim = self.channels(tensor == "v")
                mask = f"{var} < {dim}" if lanes(int(dim)) != int(dim) else ""
                self.put(f"pad_{tensor} = {self.load(f'pad_{tensor}_table + hk * pad_{tensor}_st[0] + {var} * pad_{tensor}_st[1]', mask)}[None, :]")
        if self.hoist:
            for p in [*self.outer, self.inner]:
                self.open_axis(p, stages=0)
            self.geometric = self.mask(full=False)
            if self.side == "q" or not spec.per_pair:
                self.how = self.score(self.geometric)
        match self.kind:
            case "backward_dkv":
                self.keys_program()
            case _:
                self.queries_program()

    def queries_program(self) -> None:
        learned = bool(self.spec.learned)
        if self.kind == "backward_dq" and learned:
            if self.registers:
                self.put(*[f"grad_{i} = tl.zeros([BM, BN], tl.float32)" for i in range(len(self.spec.learned))])
            else:
                self.put("size = tl.zeros([BM], tl.float32)")
        if self.kind == "backward_table":
            self.put("unit = tl.load(Unit)")
        if self.batched:
            self.put("first = tl.program_id(2) * PER")
            self.put(f"for item in tl.range(first, tl.minimum(first + PER, B), num_stages={self.tile.stages}):")
            self.depth += 1
            self.put("b = tl.cast(item, tl.int64)")
        self.one_item()
        if self.batched:
            self.depth -= 1
        if self.kind == "backward_dq" and learned:
            program = "(tl.program_id(2) * H + h) * tl.num_programs(0) + tl.program_id(0)"
            if self.registers:
                self.put(f"part = ({program}).to(tl.int64) * (BM * BN)")
                self.put(*[f"tl.store(Partial_{i} + part + m[:, None] * BN + n[None, :], grad_{i})" for i in range(len(self.spec.learned))])
            else:
                self.put(f"tl.store(Size + {program}, tl.sum(size, 0))")

    def one_item(self) -> None:
        _, dmask, _ = self.channels(False)
        _, emask, _ = self.channels(True)
        self.put(f"q = {self.load(self.rows_of('q'), dmask)}")
        if self.kind == "forward":
            if not (self.whole and not self.with_prefix):
                self.put("m_i = tl.full([BM], -1e30, tl.float32)", "l_i = tl.zeros([BM], tl.float32)")
                self.put(f"acc = tl.zeros([BM, {lanes(self.spec.value_dim)}], tl.float32)")
        else:
            self.put(f"g = {self.load(self.rows_of('g'), emask)}")
            self.put(f"token = (b * H + h) * N + {self.row_token()}" + ("" if any(p.rows > 1 for p in self.plans) else " + m * 0"))
            self.put("lse = tl.load(Lse2 + token)[:, None]", "delta = tl.load(Delta + token)[:, None]")
            if self.kind == "backward_dq":
                self.put(f"dq = tl.zeros([BM, {lanes(self.spec.head_dim)}], tl.float32)")
        if self.with_prefix and self.kind != "backward_table":
            self.prefix_columns()
        if self.hoist:
            self.chunk(full=False)
        else:
            self.walk_columns()
        if self.kind == "forward":
            self.finish_forward(emask)
        elif self.kind == "backward_dq":
            slope = "" if self.spec.slope == ir.const(0.0) and not self.with_prefix else " * scale"
            self.put(f"tl.store({self.rows_of('dq')}, (dq{slope}).to(DQ.dtype.element_ty){self.masked('live[:, None]', dmask)})")

    def finish_forward(self, emask: str) -> None:
        self.put("some = l_i > 0", "total = tl.where(some, l_i, 1.0)  # rows without keys: 0, and lse -inf")
        self.put(f"tl.store({self.rows_of('o')}, (acc / total[:, None]).to(O.dtype.element_ty){self.masked('live[:, None]', emask)})")
        self.put(f"token = (b * H + h) * N + {self.row_token()}" + ("" if any(p.rows > 1 for p in self.plans) else " + m * 0"))
        lse = "m_i * scale + tl.log(total)" if self.unsigned() else "(m_i + tl.log2(total)) / LOG2E"
        self.put(f"tl.store(Lse + token, tl.where(some, {lse}, {INF}), mask=live)")

    def keys_program(self) -> None:
        _, dmask, _ = self.channels(False)
        _, emask, _ = self.channels(True)
        real = ""
        if self.spec.padded:
            tests = []
            for p in self.plans:
                at = self.coordinate(f"k{p.name}" if p.rows > 1 else f"{p.name}a", p, "k", real=True)
                if self.spec.before(p.axis, "k"):
                    tests.append(f"({at} >= 0)")
                tests.append(f"({at} < {self.spec.names[p.axis].real_keys})")
            self.put(f"real = {' & '.join(tests)} & (m >= 0)")
            real = "real[:, None]"
        for tensor, mask in (("k", dmask), ("v", emask)):
            if real:
                self.put(f"{tensor} = tl.where({real}, {self.load(self.rows_of(tensor), real, mask)}, pad_{tensor})")
            else:
                self.put(f"{tensor} = {self.load(self.rows_of(tensor), mask)}")
        self.put(f"dk = tl.zeros([BM, {lanes(self.spec.head_dim)}], tl.float32)")
        self.put(f"dv = tl.zeros([BM, {lanes(self.spec.value_dim)}], tl.float32)")
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
        dk = "dk * scale"
        if real:
            self.put("virtual = live & ~real")
            self.put("part = (b * tl.num_programs(1) + hk) * tl.num_programs(0) + tl.program_id(0)")
            for tensor, value in (("k", dk), ("v", "dv")):
                var, _, dim = self.channels(tensor == "v")
                keep = f"tl.sum(tl.where(virtual[:, None], {value}, 0.0), 0)"
                less = f", mask={var} < {dim}" if lanes(int(dim)) != int(dim) else ""
                self.put(f"tl.store(DPad_{tensor} + part * {dim} + {var}, {keep}{less})")
            self.put("live = live & real")
        for tensor, value, mask in (("dk", dk, dmask), ("dv", "dv", emask)):
            kind = f"{tensor.upper()}.dtype.element_ty"
            self.put(f"tl.store({self.rows_of(tensor)}, ({value}).to({kind}){self.masked('live[:, None]', mask)})")


DOCS = {
    "forward": "One tile of queries: online softmax over the box of keys it sees.",
    "backward_dq": "The gradient of one tile of queries.",
    "backward_dkv": "The gradients of one tile of keys and values, over the box of queries that see them.",
    "backward_table": "Table gradients as 64-bit fixed-point sums, whose order does not matter.",
}
ARGUMENTS = ("Q K V O G Qp Gp Kp Vp Lse Lse2 Delta DQ DK DV Partial_0 Size DPad_k DPad_v Unit "
             "q_st k_st v_st o_st g_st qp_st gp_st kp_st vp_st dq_st dk_st dv_st scale c B H N P GROUP PER parts PRECISION").split()
CONSTANT = ("GROUP", "PRECISION", "PER")


READ = '''\
@triton.jit
def read(pointers, mask):
    """Rows of a tensor, zeros where masked. The interpreter computes with bfloat16 wrongly, so it gets float32."""
    if mask is None:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=mask, other=0.0)
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x
'''


def used(name: str, body: str) -> bool:
    """Whether a kernel's text mentions a name."""
    return re.search(rf"\b{re.escape(name)}\b", body) is not None
