"""What the kernel printer needs to know before it prints: the statement sorted into cases, and per axis and side how tiles lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import sympy as sp

from attnc import ir
from attnc.analysis.algebra import FloorDiv, FloorMod, NotAlgebraic, symbol, to_sympy
from attnc.analysis.axis import AxisForm, I, J
from attnc.analysis.derivative import derivative, loads
from attnc.analysis.evaluate import evaluate
from attnc.analysis.structure import Blocks, Structure, analyse
from attnc.codegen import around
from attnc.errors import UnsupportedError
from attnc.schedule.geometry import Geometry
from attnc.schedule.tiles import Tiles
from attnc.schedule.walks import Side, Tile, passes_over, walks

CONSTANT_KINDS = ("full", "residue")
LARGE = 2**31  # elements that offsets of 32 bits do not reach over


@dataclass(frozen=True)
class Sizes:
    """Lengths of one axis: extended and real, for rows of queries and of keys, as names of kernel arguments."""

    queries: str
    keys: str
    real_queries: str
    real_keys: str


@dataclass(frozen=True)
class Spec:
    """Everything a module's text depends on."""

    program: ir.Program
    structure: Structure
    tiles: Tiles
    head_dim: int
    value_dim: int
    geometry: Geometry | None  # concrete sizes, or None: sizes are arguments
    plain: bool = True  # scale > 0, so that the maximum may be taken before it multiplies
    part: bool = False  # one of several statements that share their queries: a group does not hold all keys of a row
    suffix: str = ""  # of the names of its kernels, where one module holds several statements
    itemsize: int = 2  # bytes of an element that tiles were chosen for
    adds: int = 0  # its kernels go on from what earlier parts wrote: output, LSE and gradients of queries (1), of keys (2)
    wide: bool = False  # a batch item or a table may span 2**31 elements: offsets have 64 bits
    lengths: tuple[str, ...] = ()  # real lengths of another statement's grids that its dropout reads
    listed: bool = False  # tiles walk lists of chunks, which launches are given, and no box
    filled: bool = False  # and these hold chunks alone that their tiles see whole, which have all of their rows
    run: tuple[int, int] | None = None  # the heads that it is of, first and past the last, where other heads have their own

    def heads(self, every: int) -> int:
        """How many heads it is of."""
        return every if self.run is None else self.run[1] - self.run[0]

    @property
    def attend(self) -> ir.Attend:
        """The statement."""
        assert isinstance(self.program.attend, ir.Attend)
        return self.program.attend

    @property
    def softmax(self) -> bool:
        """Weights are divided by a sum; otherwise nothing is known of a row but its sum of weighted values."""
        return self.attend.normalizer.kind == "softmax"

    @property
    def rank(self) -> int:
        """Axes of the geometry: 1 where a grid was flattened."""
        return len(self.structure.axes)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names in variables."""
        return ir.AXES[self.rank] if self.rank <= 3 else tuple(f"a{i}" for i in range(self.rank))

    @property
    def padded(self) -> bool:
        """Some keys may be virtual."""
        return self.program.keys.pad is not None or self.program.keys.pad_multiple is not None

    @property
    def prefix(self) -> bool:
        """Some tokens precede the grid."""
        return bool(self.program.queries.prefix or self.program.keys.prefix)

    def before(self, axis: int, side: Side) -> int:
        """Virtual rows before an axis."""
        pad = (self.program.queries if side == "q" else self.program.keys).pad
        return pad[axis][0] if pad is not None else 0

    @cached_property
    def names(self) -> tuple[Sizes, ...]:
        """Names of size arguments per axis."""
        out = []
        for axis in self.axes:
            a = axis.upper()
            keys = f"N{a}" if self.program.same_grid else f"M{a}"
            rq = f"R{a}" if self.padded else f"N{a}"
            rk = rq if self.program.same_grid else f"S{a}" if self.padded else keys
            out.append(Sizes(f"N{a}", keys, rq, rk))
        return tuple(out)

    @cached_property
    def size_names(self) -> dict[ir.Expr, str]:
        """Size leaves of the ends as text."""
        out = {}
        for i, s in enumerate(self.names):
            out[ir.size("q", i)], out[ir.size("k", i)] = s.queries, s.keys
        return out

    @cached_property
    def score(self) -> ir.Expr:
        """The score with indices written as coordinates of the geometry."""
        return guarded(self.lowered(self.attend.score))

    @cached_property
    def post(self) -> ir.Expr | None:
        """The post-factor."""
        return None if self.attend.post is None else guarded(self.lowered(self.attend.post))

    @cached_property
    def residual(self) -> ir.Expr:
        """The predicate that no axis explains."""
        terms = ir.conjuncts(self.lowered(self.structure.residual))
        plain = ir.all_of(tuple(t for t in terms if not _reads_tables(t)))
        return ir.all_of(tuple(guarded(t, plain) if _reads_tables(t) else t for t in terms))

    def lowered(self, e: ir.Expr) -> ir.Expr:
        """Without `index` leaves."""
        if self.structure.flat:
            return ir.rewrite(e, lambda n: ir.coord(n.args[0], 0) if n.op == "index" else None)
        return ir.flatten_index(e, self.attend.rank, self.program.same_grid)

    @cached_property
    def bias(self) -> ir.Expr | None:
        """B where the score is SCORE + B, which then rides on the product: ZERO for the plain score, None for others."""
        if not self.plain or self.attend.post is not None:
            return None
        parts = terms(self.score)
        rest = [(sign, t) for sign, t in parts if not (t == ir.SCORE and sign > 0)]
        if len(rest) != len(parts) - 1 or any(n == ir.SCORE for _, t in rest for n in ir.walk(t)):
            return None
        out = ir.ZERO
        for sign, t in rest:
            out = t if out == ir.ZERO and sign > 0 else ir.make("add" if sign > 0 else "sub", out, t)
        return out

    @cached_property
    def slope(self) -> ir.Expr:
        """d score / d SCORE."""
        return derivative(self.score, ir.SCORE)

    @cached_property
    def learned(self) -> tuple[ir.Expr, ...]:
        """Loads of the score and post-factor that these have a slope in: those that only decide conditions have none."""
        spoken = (self.score,) if self.post is None else (self.score, self.post)
        read = dict.fromkeys(n for e in spoken for n in loads(e))
        return tuple(n for n in read if any(derivative(e, n) != ir.const(0.0) for e in spoken))

    @property
    def scored(self) -> bool:
        """Something besides the relation is evaluated for each pair: tables, or a score of its own."""
        return self.bias != ir.ZERO or self.attend.post is not None or self.attend.dropout is not None

    def others(self, tile: Tile) -> tuple[Blocks | None, ...]:
        """Per axis the blocks of which a tile passes over its own."""
        found = self.structure.others if self.program.same_grid and not self.padded and not self.listed else ()
        return found if passes_over(found, tile.rows[: len(found)]) else (None,) * self.rank

    def uses(self, op: str) -> bool:
        """Whether the statement mentions a leaf."""
        spoken = (self.score, self.residual, *((self.post,) if self.post is not None else ()))
        return any(n.op == op for e in spoken for n in ir.walk(e))


def _reads_tables(e: ir.Expr) -> bool:
    return any(n.op == "load" for n in ir.walk(e))


def guarded(e: ir.Expr, guard: ir.Expr = ir.TRUE) -> ir.Expr:
    """Table indices are 0 where a choice around them falls on its other side: kernels load for both, and an index that only some
    pairs have may lie outside of the table for the others."""
    if e.op == "where":
        test, yes, no = e.args
        known = not any(n.op == "score" for n in ir.walk(test))
        sides = (ir.make("and", guard, t) if known else guard for t in (test, ir.make("not", test)))
        return ir.make("where", guarded(test, guard), *(guarded(x, g) for x, g in zip((yes, no), sides, strict=True)))
    if not e.children:
        return e
    args = tuple(guarded(a, guard) if isinstance(a, ir.Expr) else a for a in e.args)
    if e.op != "load":
        return ir.make(e.op, *args)
    moves = [isinstance(a, ir.Expr) and guard != ir.TRUE and any(n.op == "coord" for n in ir.walk(a)) for a in args]
    safe = [ir.make("where", guard, a, ir.ZERO) if m else a for a, m in zip(args, moves, strict=True)]
    return ir.Expr(e.op, tuple(safe), e.kind)


def terms(e: ir.Expr, sign: int = 1) -> list[tuple[int, ir.Expr]]:
    """The terms of a sum with their signs."""
    if e.op == "add":
        return terms(e.args[0], sign) + terms(e.args[1], sign)
    if e.op == "sub":
        return terms(e.args[0], sign) + terms(e.args[1], -sign)
    return [(sign, e)]


@dataclass(frozen=True)
class AxisPlan:
    """One axis of one kernel. Ends and bounds are IR expressions over the row's index (var j), the residue and sizes."""

    axis: int
    name: str
    rows: int
    chunk: int
    split: ir.Expr
    lo: ir.Expr
    hi: ir.Expr
    columns: bool  # no inverse in closed form: columns' own ends are compared
    one_box: bool  # all rows of a tile share one interval
    exact: bool  # and chunks never leave it
    single: bool  # the box is at most one chunk
    overruns: bool  # a chunk may reach beyond the axis
    full: bool  # chunks without a mask exist
    partial: bool  # chunks with one follow those without
    start: ir.Expr  # first row of the first tile
    group: bool  # a tile is a whole group: its box of columns begins where its rows begin
    passes: bool = True  # a chunk that is not moved may reach beyond the axis
    wrap: bool = False  # the tile before the first row takes the last rows too: two groups in one tile
    others: Blocks | None = None  # blocks, of which the tile passes over its own: columns are counted without them
    odd: int = 0  # columns of the box that fill no whole chunk and come first, as a chunk of their own

    @property
    def lies_apart(self) -> bool:
        """Chunks lie before or behind a block that is passed over."""
        return self.others is not None and all(n % self.chunk == 0 for n in self.others)

    @property
    def paired(self) -> bool:
        """Chunks are pairs of blocks: what the pair of the block that is passed over has beside it is the odd one."""
        return self.others is not None and self.others == (self.odd, 0) and self.chunk == 2 * self.odd

    @property
    def cut(self) -> bool:
        """Chunks may lie around it."""
        return self.others is not None and not self.lies_apart and not self.paired


def listed_axis(p: AxisPlan) -> AxisPlan:
    """An axis whose tiles and chunks lie on lattices from 0 on, whichever chunks a tile is told to visit."""
    alike = p.rows == 1 or not any(n == J for e in (p.lo, p.hi) for n in ir.walk(e))  # (a block's border may cut a tile)
    return replace(
        p,
        one_box=p.one_box and alike,
        exact=False,
        single=False,
        overruns=True,
        full=False,
        partial=True,
        start=ir.ZERO,
        group=False,
        odd=0,
    )


def widest(form: AxisForm, rows: int) -> int | None:
    """Columns that `rows` neighbouring rows see at most, where that follows from the ends: some bound above minus some bound
    below is constant, and neither moves by more than one from a row to the next. None where nothing follows."""
    try:
        low, high = to_sympy(form.lo), to_sympy(form.hi)
    except NotAlgebraic:
        return None
    gaps = [sp.expand(a - b) for a in sp.Min.make_args(high) for b in (low, *sp.Max.make_args(low)) if _slow(a) and _slow(b)]
    found = [int(gap) for gap in gaps if gap.is_Integer]
    return rows + min(found) if found else None


def _slow(e: sp.Expr) -> bool:
    """Proved to grow by at most one when the row does."""
    j = symbol(J)
    if not e.has(j) or e == j:
        return True
    if isinstance(e, sp.Min | sp.Max):
        return all(_slow(a) for a in e.args)
    return bool(e.is_Add) and sum(a.has(j) for a in e.args) == 1 and all(_slow(a) for a in e.args)


def symmetric(form: AxisForm) -> bool:
    """Queries of a key are the keys of a query: the same blocks seen from the other side."""
    if form.inverse_lo is None or form.inverse_hi is None:
        return False
    back = [ir.substitute(e, {I: J}) for e in (form.inverse_lo, form.inverse_hi)]
    return back == [form.lo, form.hi]


def plan_axis(spec: Spec, axis: int, side: Side, tile: Tile) -> AxisPlan:
    """How one axis is tiled. With concrete sizes the facts are counted, with symbolic ones they must follow from the form."""
    form, name = spec.structure.axes[axis], spec.axes[axis]
    rows, chunk = tile.rows[axis], tile.chunk[axis]
    columns = side == "k" and form.inverse_lo is None
    lo, hi = (form.lo, form.hi) if side == "q" or columns else (form.inverse_lo, form.inverse_hi)
    assert lo is not None and hi is not None
    if side == "k" and not columns:
        lo, hi = ir.substitute(lo, {I: J}), ir.substitute(hi, {I: J})
    # tiles begin at block borders, perhaps before 0
    first = spec.before(axis, side) if side == "q" else 0  # virtual keys are rows, virtual queries are not
    at = ir.make("floordiv", ir.const(first), form.split)
    off = ir.ZERO
    if form.block is not None and form.shift != ir.ZERO:
        off = ir.make("sub", form.block, form.shift)
    begin = ir.make("sub", at, ir.make("mod", ir.make("add", at, off), ir.const(rows)))
    if at == ir.ZERO and begin != ir.ZERO:
        begin = ir.make("neg", begin.args[1]) if begin.op == "sub" else begin
    kind = form.kind.split(" of ")[-1]
    others = spec.others(tile)[axis]
    if others is not None:
        seen = None if spec.geometry is None else walks(spec.geometry, side, tile)[axis]
        return AxisPlan(
            axis, name, rows, chunk, form.split, lo, hi, columns=False, one_box=True, exact=seen is not None and seen.exact,
            single=seen is not None and seen.most <= 1, overruns=seen is None or seen.overruns, full=seen is None or seen.full > 0,
            partial=seen is None or (seen.partial > 0 and not seen.exact), start=ir.ZERO, group=False,
            passes=seen is None or seen.passes, others=others, odd=0 if seen is None else seen.odd,
        )  # fmt: skip
    group = rows == chunk and kind in (*CONSTANT_KINDS, "point", "block", "shifted block") and not columns
    if tile.wrapped(axis):
        return AxisPlan(
            axis, name, rows, chunk, form.split, lo, hi, columns=False, one_box=True, exact=True, single=True, overruns=False,
            full=False, partial=False, start=begin, group=group, wrap=True,
        )  # fmt: skip
    if spec.geometry is not None:
        begin = ir.const(int(evaluate(begin, _sizes(spec.geometry, axis), None)))
        w = walks(spec.geometry, side, tile)[axis]
        return AxisPlan(
            axis,
            name,
            rows,
            chunk,
            form.split,
            lo,
            hi,
            columns,
            w.one_box,
            w.exact,
            w.most <= 1,
            w.overruns,
            w.full > 0,
            w.partial > w.left and not w.exact,
            begin,
            w.one_box and group,
            w.passes,
            odd=w.odd,
        )
    block = int(form.block.args[0]) if form.block is not None and form.block.op == "const" else 0
    same = side == "q" or symmetric(form)
    inside = bool(block) and block % rows == 0 and same
    whole = spec.padded and side == "k"  # columns are cut to the real queries
    alike = not any(n == J for e in (lo, hi) for n in ir.walk(e))
    one_box = not columns and (rows == 1 or kind in CONSTANT_KINDS or inside or alike)
    # a block's keys are its own tokens only where it is an equivalence: overlapping windows and strides see more
    single = one_box and ((kind == "point" and same) or (inside and form.equivalence and chunk >= block))
    most = widest(form, rows) if side == "q" else None
    single = single or (most is not None and most <= chunk)
    # (of a virtual key's own place there is no query, and a key grid may have none there: a loop sees that, one chunk is masked)
    exact = one_box and chunk == 1 and not whole and (spec.program.same_grid or not single)
    full = not single and (kind in (*CONSTANT_KINDS, "causal") or exact) and not columns
    return AxisPlan(
        axis,
        name,
        rows,
        chunk,
        form.split,
        lo,
        hi,
        columns,
        one_box,
        exact,
        single,
        not exact or whole,
        full,
        not exact,
        begin,
        one_box and group,
    )


def _sizes(g: Geometry, axis: int) -> dict[ir.Expr, int]:
    a = g.axes[axis]
    return {ir.size("q", axis): a.queries, ir.size("k", axis): a.keys}


def dense_spec(spec: Spec) -> Spec:
    """The plain kernel between prefix tokens and all tokens: one axis, every key, its own two lengths."""
    dropout = spec.attend.dropout
    lengths: tuple[str, ...] = ()
    if dropout is not None:
        dropout = ir.substitute(dropout, {ir.index(r): _number(spec, r) for r in ir.ROLES})
        lengths = tuple(dict.fromkeys(n.args[0] for n in ir.walk(dropout) if n.op == "var"))
    a = ir.Attend(spec.attend.name, 1, normalizer=spec.attend.normalizer, dropout=dropout)
    program = ir.Program(a, ir.Tokens((None,)), ir.Tokens((None,)), same_grid=False)
    tile = spec.tiles.flat
    flat = Tiles(tile, tile, tile, tile)
    return Spec(
        program, analyse(a, same_grid=False), flat, spec.head_dim, spec.value_dim, None, spec.plain, wide=spec.wide, lengths=lengths
    )


def _number(spec: Spec, role: ir.Role) -> ir.Expr:
    """`index` on the grid, from that on the one axis, which counts the prefix tokens and no virtual ones; of those negative."""
    tokens = spec.program.queries if role == "q" else spec.program.keys
    at = ir.make("sub", ir.index(role), ir.const(tokens.prefix))
    if not spec.padded:
        return at
    real = [ir.var(s.real_queries if role == "q" else s.real_keys) for s in spec.names]
    out, place, after = ir.ZERO, ir.make("max", at, ir.ZERO), ir.ONE
    step = ir.ONE
    for axis in reversed(range(spec.rank)):
        n = real[axis]
        position = ir.make("floordiv", place, after)
        position = position if axis == 0 else ir.make("mod", position, n)
        before = ir.const(spec.before(axis, role))
        out = ir.make("add", out, ir.make("mul", step, ir.make("add", position, before)))
        after = ir.make("mul", after, n)
        if tokens.pad is not None:
            extended = ir.make("add", n, ir.const(sum(tokens.pad[axis])))
        else:
            assert tokens.pad_multiple is not None
            m = ir.const(tokens.pad_multiple[axis])
            extended = ir.make("mul", ir.make("floordiv", ir.make("add", n, ir.make("sub", m, ir.ONE)), m), m)
        step = ir.make("mul", step, extended)
    return ir.make("where", ir.make("lt", at, ir.ZERO), at, out)


def check(program: ir.Program) -> None:
    """Refuse what these kernels do not do, naming what does."""
    a = program.attend
    assert isinstance(a, ir.Attend)
    where = f"pattern {a.name}: the triton backend does not lower"
    assert a == around.core(a), "row maps and sinks surround the kernels"
    if a.normalizer.over == "queries":
        raise UnsupportedError(
            f"{where} softmax over queries in a kernel; an operator (attnc.compile, any backend=) runs it by the kernels of the "
            "statement with queries and keys exchanged"
        )


def lanes(dim: int) -> int:
    """Channels in registers."""
    return max(16, 1 << (dim - 1).bit_length())


def order(plans: tuple[AxisPlan, ...], inner: int) -> tuple[list[AxisPlan], AxisPlan]:
    """Outer axes, slowest first, and the inner one."""
    return [p for p in plans if p.axis != inner], plans[inner]


def tile_text(tile: Tile) -> str:
    """For docstrings."""
    rows, chunk = ("x".join(map(str, t)) for t in (tile.rows, tile.chunk))
    return f"{rows} rows ({tile.bm} in registers) by chunks of {chunk} ({tile.bn})"


def _in_class(e: ir.Expr, plans: tuple[AxisPlan, ...]) -> sp.Expr:
    """An index with coordinates written as split * j + r."""
    mapping: dict[ir.Expr, ir.Expr] = {}
    for p in plans:
        r = ir.var(f"r{p.axis}")
        for role, v in (("q", J), ("k", I)):
            j = ir.var(f"{v.args[0]}{p.axis}")
            whole = ir.make("mul", p.split, j)
            mapping[ir.coord(role, p.axis)] = whole if p.split == ir.ONE else ir.make("add", whole, r)  # type: ignore[arg-type]
    out = to_sympy(ir.substitute(e, mapping))
    for p in plans:
        if p.split != ir.ONE:
            r, m = symbol(ir.var(f"r{p.axis}")), to_sympy(p.split)
            out = out.xreplace({FloorDiv(r, m): sp.Integer(0), FloorMod(r, m): r})
    return out


def tiled_bias(spec: Spec, plans: tuple[AxisPlan, ...]) -> bool:
    """The bias of a group depends on places inside the group and on the head alone, so that one tile per head serves them all."""
    if spec.bias in (None, ir.ZERO) or spec.residual != ir.TRUE or spec.uses("batch"):
        return False
    kinds = [spec.structure.axes[p.axis].kind.split(" of ")[-1] for p in plans]
    if not all(p.group and k in ("block", "shifted block", "point") for p, k in zip(plans, kinds, strict=True)):
        return False
    assert spec.bias is not None
    outside = ir.rewrite(spec.bias, lambda n: ir.ZERO if n.op == "load" else None)
    return not any(n.op == "coord" for n in ir.walk(outside)) and tile_invariant(spec, plans, loads(spec.bias))


def tile_invariant(spec: Spec, plans: tuple[AxisPlan, ...], nodes: tuple[ir.Expr, ...] | None = None) -> bool:
    """Every learned table is read at indices that depend on places inside the tile alone, and on the head by itself."""
    for n in spec.learned if nodes is None else nodes:
        for e in n.children:
            if e == ir.HEAD:
                continue
            try:
                here = _in_class(e, plans)
            except NotAlgebraic:
                return False
            if any(x.name.startswith("var_r") or x.name in ("head", "batch") for x in here.free_symbols):
                return False
            moved = here
            for p in plans:
                j, i = symbol(ir.var(f"j{p.axis}")), symbol(ir.var(f"i{p.axis}"))
                moved = moved.subs({j: j + p.rows, i: i + p.rows}, simultaneous=True)
            if sp.expand(moved - here) != 0:
                return False
    return True
