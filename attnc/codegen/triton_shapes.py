"""Prints where a program's rows and columns lie: device functions for tiles, interval ends, row pointers and masks.

Names in the printed text: `y0, x0` are a tile's origin, `ya` and `yb` its first and last row, `cy, cx` a chunk's origin, `y_from`
and `y_to` the box of columns the tile sees; all are indices inside the residue class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from attnc import ir
from attnc.analysis.axis import J, R
from attnc.codegen import triton_expr
from attnc.codegen.triton_plan import AxisPlan, Spec
from attnc.schedule.walks import Side, whole

INF = 'float("-inf")'


@dataclass
class Module:
    """Small device functions that a module's kernels share, each printed once."""

    functions: dict[str, str] = field(default_factory=dict)

    def use(self, stem: str, text: str, *others: str) -> str:
        """A function whose text holds `@` for its name; one with the same text is shared, a different one gets another name."""
        for known, have in self.functions.items():
            if have == text.replace("@@", known):
                return known
        for name in (stem, *others, *(f"{stem}{i}" for i in range(2, 99))):
            if name not in self.functions:
                self.functions[name] = text.replace("@@", name)
                return name
        raise AssertionError(stem)

    def scan(self, text: str) -> str:
        """Note the helper functions that a printed expression calls."""
        for name, source in triton_expr.FUNCTIONS.items():
            if f"{name}(" in text:
                self.functions.setdefault(name, source)
        return text


def mentions(name: str, body: str) -> bool:
    """Whether printed text mentions a name."""
    return re.search(rf"\b{re.escape(name)}\b", body) is not None


def long(text: str, really: bool = True) -> str:
    """An integer in 64 bits, whose product with a stride may pass 2**31."""
    return f"tl.cast({text}, tl.int64)" if really else text


class Shapes:
    """The geometry half of a kernel printer: one side's rows, the other side's columns."""

    def __init__(self, spec: Spec, side: Side, plans: tuple[AxisPlan, ...], bm: int, bn: int, module: Module) -> None:
        self.spec, self.side, self.plans, self.bm, self.bn, self.module = spec, side, plans, bm, bn, module
        self.other: Side = "q" if side == "k" else "k"
        self.lines: list[str] = []
        self.depth = 1
        self.lane = "n"  # what numbers the columns of a chunk
        self.vector = all(p.one_box for p in plans) and not spec.listed  # one interval for all rows: a mask is one row of columns
        self.moves = any(p.start != ir.ZERO or p.split != ir.ONE or self.bound(p, side)[0] != "0" for p in plans)

    # ------------------------------------------------------------------------------------------------------------------ writing
    def put(self, *lines: str) -> None:
        """Lines at the present depth."""
        self.lines += ["    " * self.depth + line for line in lines]

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """An indented block."""
        self.put(head)
        self.depth += 1
        yield
        self.depth -= 1

    def expr(self, e: ir.Expr, names: dict[ir.Expr, str]) -> str:
        """An index expression over sizes and the names given."""
        return self.module.scan(triton_expr.text(e, {**self.spec.size_names, **names}))

    # -------------------------------------------------------------------------------------------------------------- coordinates
    @staticmethod
    def residue(p: AxisPlan) -> str:
        """The residue class's variable, or "0"."""
        return "0" if p.split == ir.ONE else f"r{p.name}"

    @staticmethod
    def split(p: AxisPlan) -> str:
        """The split as text; a variable where it is an expression of sizes."""
        return str(p.split.args[0]) if p.split.op == "const" else f"split_{p.name}"

    def times_split(self, what: str, p: AxisPlan) -> str:
        """An index inside the class as a distance on the axis."""
        if p.split == ir.ONE or what == "0":
            return what
        return f"({what}) * {self.split(p)}" if " " in what else f"{what} * {self.split(p)}"

    def coordinate(self, what: str, p: AxisPlan, side: Side, *, real: bool = False) -> str:
        """Extended coordinate (or position on the real axis) of an index inside the class."""
        out = self.times_split(what, p) + ("" if p.split == ir.ONE else f" + {self.residue(p)}")
        before = self.spec.before(p.axis, side)
        return f"{out} - {before}" if real and before else out

    def bound(self, p: AxisPlan, side: Side) -> tuple[str, str]:
        """First index inside the class and the one past the last: real queries, all keys (virtual ones too)."""
        sizes, before = self.spec.names[p.axis], self.spec.before(p.axis, side)
        length = sizes.real_queries if side == "q" else sizes.keys
        begin = side == "q" and before
        if p.split == ir.ONE:
            return (str(before), f"{length} + {before}") if begin else ("0", length)
        m, r = self.split(p), self.residue(p)
        less = f"{m} - 1" if p.split.op != "const" else str(p.split.args[0] - 1)
        if begin:
            return f"({before} - {r} + {less}) // {m}", f"({length} + {before} - {r} + {less}) // {m}"
        return "0", f"({length} - {r} + {less}) // {m}"

    def first(self, p: AxisPlan) -> str:
        """The tile's first row."""
        return f"{p.name}a" if self.moves else f"{p.name}0"

    def row(self, p: AxisPlan) -> str:
        """The tile's rows along an axis: a vector, or a scalar where there is one."""
        return f"{self.side}{p.name}" if p.rows > 1 else self.first(p)

    def digits(self) -> list[tuple[str, AxisPlan]]:
        """How program_id(0) is read, slowest first: residues, then tiles."""
        return [("class", p) for p in self.plans if p.split != ir.ONE] + [("tile", p) for p in self.plans]

    # --------------------------------------------------------------------------------------------------------------------- tiles
    def filled(self) -> bool:
        """Whether all rows of every tile exist, which is known where sizes are: no row is then moved back inside the axis."""
        if self.spec.filled:
            return True
        g = self.spec.geometry
        if g is None or self.spec.padded or self.moves or self.bm != math.prod(p.rows for p in self.plans):
            return False
        sides = zip(self.plans, g.axes, strict=True)
        return not any(p.wrap or (a.queries if self.side == "q" else a.keys) % p.rows for p, a in sides)

    def pushed(self) -> list[AxisPlan]:
        """Axes whose last tile begins earlier, so that it has all of its rows, where all axes' tiles then have (see `whole`)."""
        g = self.spec.geometry
        if g is None or self.filled() or self.spec.listed or self.bm != math.prod(p.rows for p in self.plans):
            return []
        axes = [(p, a, f) for p, a, f in zip(self.plans, g.axes, self.spec.structure.axes, strict=True)]
        if self.moves or any(p.wrap for p in self.plans) or not all(whole(a, f, self.side, p.rows) for p, a, f in axes):
            return []
        return [p for p, a, _ in axes if (a.queries if self.side == "q" else a.keys) % p.rows]

    def tile(self) -> None:
        """Print the call of a function that locates a program's tile."""
        digits = self.digits()
        put: list[str] = []
        for p in self.plans:
            if p.split.op != "const":
                put.append(f"split_{p.name} = {self.expr(p.split, {})}")
        put.append("pid, m = tl.program_id(0), tl.arange(0, BM)")
        for d in range(len(digits) - 1, -1, -1):
            what, p = digits[d]
            digit = f"pid % parts[{d}]" if d else "pid"
            if what == "class":
                put.append(f"r{p.name} = {digit}")
                if self.spec.padded and self.side == "q":
                    # of a class, or a tile, of virtual queries no row exists, and those that are read are another's
                    (first, beyond), n, before = self.bound(p, self.side), p.name, self.spec.before(p.axis, "q")
                    other, far = f"{before} % {self.expr(p.split, {})}", f"{self.spec.names[p.axis].real_queries} + {before}"
                    put.append(f"there = ({first} < {beyond}) & ({n}0 + T{n.upper()} > {first})")
                    put.append(f"r{n}, {n}0 = tl.where(there, r{n}, {other}), tl.where(there, {n}0, {far})")
            else:
                start, size = self.expr(p.start, {}), f"T{p.name.upper()}"
                put.append(f"{p.name}0 = {digit} * {size}" if start == "0" else f"{p.name}0 = {start} + {digit} * {size}")
            if d:
                put.append(f"pid = pid // parts[{d}]")
        if len(digits) <= 2 and all(what == "tile" for what, _ in digits):
            at = ["tl.program_id(0)"] if len(digits) == 1 else ["pid // parts[1]", "pid % parts[1]"]
            origins = []
            for text, (_, p) in zip(at, digits, strict=True):
                start, size = self.expr(p.start, {}), f"T{p.name.upper()}"
                origins.append(f"{text} * {size}" if start == "0" else f"{start} + {text} * {size}")
            put = ["pid, m = tl.program_id(0), tl.arange(0, BM)"] if len(digits) > 1 else ["m = tl.arange(0, BM)"]
            put.append(f"{', '.join(f'{p.name}0' for _, p in digits)} = {', '.join(origins)}")
        pushed = self.pushed()
        for p in pushed:
            put.append(f"{p.name}_first = {p.name}0")
            put.append(f"{p.name}0 = tl.minimum({p.name}0, {self.bound(p, self.side)[1]} - T{p.name.upper()})")
        live: list[str] = []
        filled = self.filled() or bool(pushed)
        ends, leads, inner = [], [], []
        wrapped: dict[str, str] = {}
        for i, p in enumerate(self.plans):
            n, t, (first, beyond) = p.name, f"T{p.name.upper()}", self.bound(p, self.side)
            ends.append((f"{n}b", f"tl.minimum({n}0 + {t}, {beyond}) - 1"))
            after = " * ".join(f"T{q.name.upper()}" for q in self.plans[i + 1 :])
            part = "m" if not after else f"m // {after}" if " " not in after else f"m // ({after})"
            raw = f"{n}0 + {part}" + (f" % {t}" if i else "")
            inside = raw if filled else f"tl.minimum({raw}, {n}b)"
            if p.wrap:
                leads.append((f"{n}a", f"{n}0"))
                wrapped[n] = self.around(n, p)
            elif self.moves:
                leads.append((f"{n}a", f"tl.minimum(tl.maximum({n}0, {first}), {n}b)"))
                inside = f"tl.maximum({inside}, {n}a)"
            inner.append((n, inside))
            live += [] if pushed and p not in pushed else [f"({n} >= {n}_first)" if pushed else f"({n} == {raw})"]
        for named in (ends, leads, inner):
            if named:
                put.append(f"{', '.join(a for a, _ in named)} = {', '.join(b for _, b in named)}")
        names = [p.name for p in self.plans]
        back = [f"r{p.name}" for p in self.plans if p.split != ir.ONE] + [f"{n}0" for n in names]
        back += [f"{n}a" for n in names] if self.moves else []
        back += [f"{n}b" for n in names]
        exist = "tl.full([BM], True, tl.int1)" if filled and not pushed else " & ".join(live)
        put.append(f"return {', '.join([*back, *[wrapped.get(n, n) for n in names], exist])}")
        body = "\n".join(f"    {line}" for line in put)
        sizes = [s for s in self.size_arguments() if mentions(s, body)]
        lengths = [f"T{n.upper()}" for n in names]
        params = ["parts", *sizes, *[f"{x}: tl.constexpr" for x in (*lengths, "BM")]]
        what = "origin, " + ("first, " if self.moves else "") + "last row and all rows per axis, and which rows exist"
        doc = f"This program's tile: {'residues, ' if len(back) > 3 * len(names) or any(b[0] == 'r' for b in back) else ''}{what}."
        text = f'@triton.jit\ndef @@({", ".join(params)}):\n    """{doc}"""\n{body}\n'
        name = self.module.use("tile", text, "key_tile")
        for p in self.plans:
            if p.split.op != "const":
                self.put(f"split_{p.name} = {self.expr(p.split, {})}")
        targets = [*back, *[f"{self.side}{n}" for n in names], "live"]
        values = ["parts", *sizes, *[str(p.rows) for p in self.plans], str(self.bm)]
        self.put(f"{', '.join(targets)} = {name}({', '.join(values)})")

    def size_arguments(self) -> list[str]:
        """Names of all lengths, once each."""
        own = (s for n in self.spec.names for s in (n.queries, n.keys, n.real_queries, n.real_keys))
        return list(dict.fromkeys([*own, *self.spec.lengths]))

    # ---------------------------------------------------------------------------------------------------------------------- ends
    def ends(self, p: AxisPlan, at: str, side: Side | None = None) -> tuple[str, str, str]:
        """(call of a function that gives both ends, lo, hi) of row `at`; the call is "" where the ends are plain text."""
        form = self.spec.structure.axes[p.axis]
        side = side or self.side
        low, high = (form.lo, form.hi) if p.columns else (p.lo, p.hi)
        if all(e == J or J not in ir.walk(e) for e in (low, high)):
            names = {R: self.residue(p), J: at}
            # where rows have intervals of their own, an end that is the same for every row still has a row's shape
            still = f" + 0 * {at}" if J in (low, high) or not p.one_box else ""
            shown = [self.expr(e, names) + ("" if e == J else still) for e in (low, high)]
            return "", shown[0], shown[1]
        leaves = [n for n in dict.fromkeys((*ir.walk(low), *ir.walk(high))) if n.op == "size"]
        own = [n for n in leaves if n.args[1] == p.axis]
        short = {n: "n" if len({self.spec.size_names[x] for x in own}) == 1 else self.spec.size_names[n] for n in own}
        args = [("r", self.residue(p))] if any(n == R for e in (low, high) for n in ir.walk(e)) else []
        args += dict.fromkeys((short.get(n, self.spec.size_names[n]), self.spec.size_names[n]) for n in leaves)
        names = {**self.spec.size_names, **short, J: "j", R: "r"}
        each = [self.module.scan(triton_expr.text(e, names)) for e in (low, high)]
        # an end that is the same for every row still has a row's shape
        each = [t if any(n == J for n in ir.walk(e)) else f"{t} + 0 * j" for t, e in zip(each, (low, high), strict=True)]
        body = ", ".join(each)
        mine, theirs = ("query", "key") if side == "q" else ("key", "query")
        inside = "" if p.split == ir.ONE else ", all inside its residue class"
        doc = (
            f"First and last {theirs} that {mine} j sees on an axis{inside}."
            if side == "q"
            else f"First and last {theirs} that sees {mine} j on an axis{inside}."
        )
        params = ", ".join(["j", *[a for a, _ in args]])
        if len(body) > 95:
            first, last = each
            last = last.replace(first, "first") if " " in first else last
            signature, end = f"@triton.jit\ndef @@({params}):\n", f"    first = {first}\n    return first, {last}\n"
        else:
            signature, end = f"@triton.jit\ndef @@({params}):\n", f"    return {body}\n"
        stem = "keys" if side == "q" else "queries"
        text = f'{signature}    """{doc}"""\n{end}'
        for known, have in self.module.functions.items():  # a symmetric relation needs one function for both sides
            if have.startswith(signature.replace("@@", known)) and have.endswith(end):
                return f"{known}({', '.join([at, *[b for _, b in args]])})", "", ""
        name = self.module.use(stem, text, f"{stem}_{p.name}")
        return f"{name}({', '.join([at, *[b for _, b in args]])})", "", ""

    def clipped(self, p: AxisPlan) -> bool:
        """Columns are real queries, while the ends count virtual ones too."""
        return self.spec.padded and self.side == "k" and not p.columns

    def own_block(self) -> None:
        """Print the block that the tile passes over along an axis: its first column, and how many columns it has."""
        for p in self.plans:
            if p.others is None:
                continue
            n, (size, shift), length, first = p.name, p.others, self.bound(p, self.other)[1], self.first(p)
            g, off = self.spec.geometry, (size - shift) % size
            begin = f"{first} // {size} * {size}" if not off else f"({first} + {off}) // {size} * {size} - {off}"
            begin = first if p.rows == size and not off else begin
            whole = g is not None and not off and g.axes[p.axis].queries % size == 0
            past = f"tl.minimum({n}_own + {size}, {length})"
            self.put(f"{n}_own = {begin}")
            if p.paired:
                self.put(f"{n}_pair = {n}_own // {p.chunk} * {p.chunk}")
            self.put(f"{n}_skip = {size if whole else f'{past} - tl.maximum({n}_own, 0)' if off else f'{past} - {n}_own'}")

    def pass_over(self, p: AxisPlan) -> None:
        """Print where a chunk's columns lie along an axis where the tile passes over its own block: all of them, or each."""
        n, part = p.name, self.column_parts()[p.axis]
        if p.lies_apart:
            self.put(f"c{n} += tl.where(c{n} < {n}_own, 0, {n}_skip)")
        elif p.others is not None:
            self.put(f"{n}_in = tl.where(c{n} + {part} < {n}_own, {part}, {part} + {n}_skip)")

    def box(self) -> None:
        """Print the columns that the tile sees, and the interval of each row where rows differ."""
        whole: list[tuple[str, str]] = []
        self.own_block()
        for p in self.plans:
            low, past = self.box_of(p)
            whole += [(f"{p.name}_from", low)] if self.keeps_from(p) else []
            whole += [(f"{p.name}_to", past)] if self.keeps_to(p) else []
        self.together(whole, 120)
        own = [(p, *self.ends(p, self.row(p))) for p in self.plans if not p.one_box and not p.columns]
        pairs = [(f"{p.name}_lo, {p.name}_hi", call or f"{low}, {high}") for p, call, low, high in own]
        if len(own) > 1 and all(call for _, call, _, _ in own):
            self.together([(f"({names})", call) for names, call in pairs])
        else:
            self.put(*[f"{names} = {value}" for names, value in pairs])
        for p, *_ in own:
            n = p.name
            if self.clipped(p):
                first, beyond = self.bound(p, self.other)
                self.put(f"{n}_lo, {n}_hi = tl.maximum({n}_lo, {first}), tl.minimum({n}_hi, {beyond} - 1)")

    def keeps_from(self, p: AxisPlan) -> bool:
        """The first column of the box is needed by name."""
        raise NotImplementedError

    def keeps_to(self, p: AxisPlan) -> bool:
        """The end of the box is needed by name."""
        raise NotImplementedError

    def together(self, named: list[tuple[str, str]], most: int = 104) -> None:
        """Print one assignment to several names, or one for each where it is longer than `most`."""
        if named:
            line = f"{', '.join(a for a, _ in named)} = {', '.join(b for _, b in named)}"
            if len(line) > most and len(named) > 1:
                self.put(*[f"{a} = {b}" for a, b in named])
            else:
                self.put(line)

    def box_of(self, p: AxisPlan) -> tuple[str, str]:
        """First column that the tile sees along an axis, and the one past the last."""
        low, beyond = self.bound(p, self.other)
        if p.columns:
            return low, beyond
        if p.others is not None:
            return low, f"{beyond} - {p.name}_skip"
        last = f"{p.name}b" if p.rows > 1 else self.first(p)
        call, low_text, _ = self.ends(p, self.first(p))
        call_last, _, high_text = self.ends(p, last)
        low_text, high_text = (f"{call}[0]", f"{call_last}[1]") if call else (low_text, high_text)
        past = high_text.removesuffix(" - 1") if high_text.endswith(" - 1") else f"{high_text} + 1"
        if self.clipped(p):
            past = f"tl.minimum({past}, {beyond})"
            low_text = low_text if low == "0" else f"tl.maximum({low_text}, {low})"
        return low_text, past

    def low_is_zero(self, p: AxisPlan) -> bool:
        """Rows see from the first column on."""
        return p.lo == ir.ZERO and not self.clipped(p)

    def high_is_last(self, p: AxisPlan) -> bool:
        """Rows see up to the last column, beyond which no chunk reaches."""
        last = ir.make("sub", ir.size(self.other, p.axis), ir.ONE)
        return not p.passes and p.hi == last and p.lo != ir.ZERO and not self.clipped(p) and not p.columns

    # -------------------------------------------------------------------------------------------------------------------- columns
    def column_parts(self) -> list[str]:
        """Index of each column inside its chunk along every axis."""
        out, after = [], 1
        for p in self.plans:
            after *= p.chunk
        for i, p in enumerate(self.plans):
            after //= p.chunk
            part = self.lane if after == 1 else f"{self.lane} // {after}"
            if any(q.chunk > 1 for q in self.plans[:i]):
                part += f" % {p.chunk}"
            out.append(part if p.chunk > 1 else "0")
        if all(x == "0" for x in out):
            out[-1] = f"{self.lane} * 0"
        return out

    def chunk_count(self) -> int:
        """Columns of a chunk, before they are padded to registers."""
        n = 1
        for p in self.plans:
            n *= p.chunk
        return n

    def columns(self, plans: tuple[AxisPlan, ...] | list[AxisPlan]) -> None:
        """Print indices of all columns of the chunk along some axes."""
        parts = self.column_parts()
        inside = {p.axis: f"{self.lane} * 0" if parts[p.axis] == "0" else parts[p.axis] for p in plans}
        inside |= {p.axis: f"{p.name}_in" for p in plans if p.cut}
        where = [(p, f"c{p.name} + {inside[p.axis]}") for p in plans]
        self.together([(f"{self.other}{p.name}", self.around(at, p) if p.wrap else at) for p, at in where])

    def around(self, at: str, p: AxisPlan) -> str:
        """An index that lies before the axis, as the one as far before its end."""
        text = (
            "@triton.jit\ndef @@(j, n):\n"
            '    """Rows before an axis of n are its last ones: its two cut groups share a tile."""\n'
            "    return tl.where(j < 0, j + n, j)\n"
        )
        return f"{self.module.use('around', text)}({at}, {self.spec.names[p.axis].real_queries})"

    def beside(self) -> str:
        """Condition that a row and a column of a tile that wraps belong to one group; "" where no axis wraps."""
        wrapped = [p for p in self.plans if p.wrap]
        if not wrapped:
            return ""
        for name, side in (("row_group", self.side), ("column_group", self.other)):
            parts = [f"({side}{p.name} > {p.name}b).to(tl.int32)" for p in wrapped]
            self.put(f"{name} = {' * 2 + '.join(parts)}")
        return "row_group[:, None] == column_group[None, :]"

    def mask_call(self, additive: bool) -> str:
        """Call of a function that compares a chunk's columns with the rows' intervals, axis by axis; None of them exact."""
        shown = [p for p in self.plans if not p.exact]
        body: list[str] = []
        params: list[str] = []
        rank = len(self.plans)
        body.append(
            f"{', '.join(p.name for p in shown)} = {', '.join(f'c{p.name} + tl.arange(0, K{p.name.upper()})' for p in shown)}"
        )
        pieces = []
        for p in shown:
            n = p.name
            lift = ["None"] * rank
            lift[p.axis] = ":"
            params.append(f"c{n}")
            if p.columns:
                row, across = (f"{n}_row[:, None]", "[None, :]") if p.rows > 1 else (f"{n}_row", "")
                call, low, high = self.ends(p, n, "q")
                low, high = (f"{call}[0]", f"{call}[1]") if call else (low, high)
                low, high = (f"{x}{across}" if mentions(n, x) else x for x in (low, high))
                test = f"({low} <= {row}) & ({row} <= {high}) & ({n} < {n}_to){across}"
                params += [f"{n}_row", f"{n}_to", *[s for s in self.size_arguments() if mentions(s, call or f"{low} {high}")]]
                rows = p.rows > 1
            elif p.one_box:
                test, rows = f"{n} < {n}_to", False
                params.append(f"{n}_to")
                if self.spec.listed and not self.low_is_zero(p):  # chunks do not begin where the box does
                    test = f"({n} >= {n}_from) & ({test})"
                    params.append(f"{n}_from")
            else:
                sides = [("lo", ">=", not self.low_is_zero(p)), ("hi", "<=", not self.high_is_last(p))]
                test = " & ".join(f"({n}[None, :] {sign} {n}_{end}[:, None])" for end, sign, asked in sides if asked)
                params += [f"{n}_{end}" for end, _, asked in sides if asked]
                rows = True
            pieces.append((p, test, f"[{':' if rows else 'None'}, {', '.join(lift)}]"))
        shape = "[BM, " + ", ".join(f"K{p.name.upper()}" for p in self.plans) + "]"
        last = len(pieces) - 1 if additive and len(pieces) > 1 else -1
        for i, (p, test, _) in enumerate(pieces):
            body.append(f"{p.name}_bias = tl.where({test}, 0.0, {INF})" if i == last else f"{p.name}_ok = {test}")
        lifted = " & ".join(f"{p.name}_ok{lift}" for i, (p, _, lift) in enumerate(pieces) if i != last)
        result = lifted
        if additive:
            inside = "0.0" if last < 0 else f"{pieces[last][0].name}_bias{pieces[last][2]}"
            result = f"tl.where({lifted}, {inside}, {INF})"
        spread = len(pieces) < rank or len([1 for p, _, lift in pieces if lift.startswith("[:")]) == 0
        if spread or len(pieces) == 1 or not additive:
            result = f"tl.broadcast_to({result}, {shape})"
        body.append(f"return {result}.reshape(BM, BN)")
        text = "\n".join(f"    {line}" for line in body)
        lengths = [f"K{p.name.upper()}" for p in self.plans]
        doc = (
            "0 where a chunk's columns lie in a row's interval on every axis, else -inf."
            if additive
            else "Whether a chunk's columns lie in a row's interval on every axis."
        )
        params += [self.residue(p) for p in shown if p.split != ir.ONE and mentions(self.residue(p), "\n".join(body))]
        params = list(dict.fromkeys(params))
        sign = [*params, *[f"{x}: tl.constexpr" for x in (*lengths, "BM", "BN")]]
        name = self.module.use(
            "mask" if additive else "visible",
            f'@triton.jit\ndef @@({", ".join(sign)}):\n    """{doc}"""\n{text}\n',
            "query_mask" if additive else "visible_queries",
        )
        at = {f"{p.name}_row": self.row(p) for p in self.plans}
        at |= {f"{p.name}_to": self.bound(p, self.other)[1] for p in self.plans if p.lies_apart}
        values = [at.get(x, x) for x in params] + [str(p.chunk) for p in self.plans] + [str(self.bm), str(self.bn)]
        return f"{name}({', '.join(values)})"

    # ----------------------------------------------------------------------------------------------------------------------- rows
    def rows(self, pointer: str, strides: str, head: str, origin: list[str], inside: list[str], lanes: int) -> str:
        """Pointers to rows of channels of one tensor."""

        def offset(names: list[str], wide: bool) -> str:
            return " + ".join(f"{long(x, wide)} * st[{i + 2}]" for i, x in enumerate(names))

        axes, wide = list(self.spec.axes), self.spec.wide
        far_rows = wide or any(p.wrap for p in self.plans)  # as far from the tile's origin as the axis is long
        far, near = offset(axes, wide or not self.spec.listed), offset([f"d{a}" for a in axes], far_rows)
        lane = f"{long('tl.arange(0, LANES)[None, :]', wide)} * st[{len(axes) + 2}]"
        first, rows = f" + {far}", f"({near})[:, None] + {lane}"
        if self.spec.listed and not wide:  # chunks begin at tokens that exist: one number of 32 bits a row, and none is kept
            first, rows = "", f"{lane} + ({far} + ({near}))[:, None]"
        elif any(p.others for p in self.plans) and not wide:  # origins that jump are no multiple of a loop's number
            first, rows = f" + ({offset(axes, wide=False)})", f"(({near})[:, None] + {lane})"
        text = (
            f"@triton.jit\ndef @@(base, st, b, h, {', '.join(axes)}, {', '.join(f'd{a}' for a in axes)}, LANES: tl.constexpr):\n"
            f'    """Channels of the tokens d{", d".join(axes)} away from token ({", ".join(axes)}) of head h of batch item b."""\n'
            f"    token = base + b * st[0] + {long('h', wide)} * st[1]{first}\n"
            f"    return token + {rows}\n"
        )
        name = self.module.use("rows", text, "rows_flat")
        return f"{name}({', '.join([pointer, strides, 'b', head, *origin, *inside, str(lanes)])})"

    def own_rows(self, pointer: str, strides: str, head: str, lanes: int) -> str:
        """Pointers to the tile's rows."""
        origin, inside = [], []
        for p in self.plans:
            origin.append(self.coordinate(f"{p.name}0" if p.rows > 1 else self.first(p), p, self.side, real=True))
            inside.append(self.times_split(f"{self.side}{p.name} - {p.name}0", p) if p.rows > 1 else "0")
        if all(x == "0" for x in inside):
            inside[-1] = f"tl.arange(0, {self.bm}) * 0"
        return self.rows(pointer, strides, head, origin, inside, lanes)

    def chunk_rows(self, pointer: str, strides: str, head: str, lanes: int) -> str:
        """Pointers to the chunk's rows."""
        origin = [self.coordinate(f"c{p.name}", p, self.other, real=True) for p in self.plans]
        inside = [
            f"{self.other}{p.name} - c{p.name}" if p.wrap else f"{p.name}_in" if p.cut else self.times_split(part, p)
            for part, p in zip(self.column_parts(), self.plans, strict=True)
        ]
        return self.rows(pointer, strides, head, origin, inside, lanes)

    def token(self, parts: list[str], side: Side) -> str:
        """Row-major number of a token on the real grid, from its coordinates per axis."""
        out = ""
        for at, p in zip(parts, self.plans, strict=True):
            length = self.spec.names[p.axis].real_queries
            head = out if " " not in out else f"({out})"
            out = at if not out else f"{head} * {length} + {at}"
        return out

    def row_token(self) -> str:
        """Token numbers of the tile's rows."""
        out = self.token([self.coordinate(self.row(p), p, self.side, real=True) for p in self.plans], self.side)
        return out if any(p.rows > 1 for p in self.plans) else f"{out} + tl.arange(0, {self.bm}) * 0"

    def real_keys(self, at: list[str]) -> str:
        """Condition that a key exists, from its indices; the others are virtual."""
        tests = []
        for what, p in zip(at, self.plans, strict=True):
            where = self.coordinate(what, p, "k", real=True)
            if self.spec.before(p.axis, "k"):
                tests.append(f"({where} >= 0)")
            tests.append(f"({where} < {self.spec.names[p.axis].real_keys})")
        return " & ".join(tests)
