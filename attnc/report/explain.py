"""`attnc.explain`: what was declared, what was proved about it and from which words, what will run, and what was refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnc import ir
from attnc.analysis.structure import Structure, analyse
from attnc.compiler import GridLike, Operator, PadLike, compile
from attnc.errors import AttncError, ShapeError, UnsupportedError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern
from attnc.report import boxes, proof
from attnc.schedule import plan as plans
from attnc.schedule.geometry import LONGEST_TABLE, Geometry, geometry

MOST_COUNTED = 1 << 29  # pairs a residual predicate is evaluated for, to count what it allows


@dataclass(frozen=True)
class Subject:
    """What is explained: a pattern's program on named axes, and its geometry where sizes are known."""

    program: ir.Program
    attend: ir.Attend
    structure: Structure
    axes: tuple[str, ...]
    geometry: Geometry | None
    refused: tuple[str, ...]

    @property
    def strategy(self) -> str:
        """dense, grouped or banded."""
        return self.structure.strategy


def subject(
    p: Pattern,
    *,
    grid: GridLike = None,
    kv_grid: GridLike = None,
    prefix: int = 0,
    pad: PadLike = None,
) -> Subject:
    """Trace and prove a pattern. Without a grid: on two axes, or on the first rank that the statement fits."""
    refused: list[str] = []

    def compiled(pad: PadLike) -> Operator:
        return compile(p, grid=grid, kv_grid=kv_grid, prefix=prefix, pad=pad)

    try:
        op = compiled(pad)
    except UnsupportedError as e:
        refused.append(str(e))
        op = compiled(None)
    if op.axes is None:
        program, axes = _first_fit(op)
    else:
        program, axes = op.program(len(op.axes)), op.axes
    attend = program.attend
    assert isinstance(attend, ir.Attend)
    padded = program.keys.pad is not None or program.keys.pad_multiple is not None
    s = analyse(attend, program.same_grid, padded)
    g = None
    if op.grid is not None and None not in op.grid and None not in (op.kv_grid or ()):
        q_grid = tuple(int(n) for n in op.grid if n is not None)
        k_grid = q_grid if op.kv_grid is None else tuple(int(n) for n in op.kv_grid if n is not None)
        g = geometry(program, q_grid, k_grid)
    return Subject(program, attend, s, axes, g, tuple(refused))


def _first_fit(op: Operator) -> tuple[ir.Program, tuple[str, ...]]:
    errors = []
    for rank in (2, 1, 3):
        try:
            return op.program(rank), ir.AXES[rank]
        except AttncError as e:
            errors.append(e)
    raise errors[0]


def explain(
    p: Pattern | Mechanism,
    *,
    grid: GridLike = None,
    kv_grid: GridLike = None,
    prefix: int = 0,
    pad: PadLike = None,
    heads: int = 1,
) -> str:
    """Readable text, the same for the same statement: normal form and proof per axis, strategy, counts, plan, refusals.

    Args:
        p: a pattern or a mechanism.
        grid, kv_grid, prefix, pad: as for `attnc.compile`; without a grid the counts are left out.
        heads: heads to count score elements for.

    Raises:
        DeclarationError: the statement itself is wrong.
    """
    if isinstance(p, Mechanism):
        return _mechanism(p)
    s = subject(p, grid=grid, kv_grid=kv_grid, prefix=prefix, pad=pad)
    parts = [_head(s), _statement(s), _axes(s), _strategy(s)]
    if s.geometry is not None:
        parts.append(_counts(s, s.geometry, heads))
    parts += [_plan(s.program), _refused(s)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _head(s: Subject) -> list[str]:
    where = "x".join(map(str, s.geometry.q_grid)) if s.geometry else ", ".join(s.axes)
    title = f"{s.attend.name} on ({where}): {s.strategy}"
    return [title, "=" * len(title)]


def _statement(s: Subject) -> list[str]:
    a = s.attend
    first, *rest = ir.conjuncts(a.relation) or (ir.TRUE,)
    lines = ["Statement, as traced", f"  relation  {_bracketed(first, s.axes, bool(rest))}"]
    lines += [f"          & {_bracketed(c, s.axes, True)}" for c in rest]
    lines.append(f"  score     {ir.show(a.score, s.axes)}")
    n = a.normalizer
    weights = f"softmax over {n.over}" if n.kind == "softmax" else n.kind + (f" to the power {n.power}" if n.power > 1 else "")
    lines.append(f"  weights   {weights}{f', with the sink {n.sink}' if n.sink else ''}")
    if a.post is not None:
        lines.append(f"  times     {ir.show(a.post, s.axes)}")
    for what, m in (("queries", a.q_map), ("keys", a.k_map)):
        if m is not None:
            lines.append(f"  {what:9} through {m.kind}")
    for t in a.tables:
        kind = "integers, read by the relation" if t in a.int_tables else "learned: gets a gradient"
        lines.append(f"  table     {t}, {_count(a.table_rank(t), 'dimension')} ({kind})")
    return lines


def _bracketed(c: ir.Expr, axes: tuple[str, ...], among: bool) -> str:
    text = ir.show(c, axes)
    return f"({text})" if among and c.op in ("or", "eq", "ne", "lt", "le") else text


def _axes(s: Subject) -> list[str]:
    same = s.program.same_grid
    roles: proof.Roles = ("q", "q") if same else ("q", "k")
    found = proof.conjuncts_of(s.structure, s.attend.relation, s.attend.rank, same)
    lines = ["Normal form, per axis: a query at j sees the keys i from lo(j) to hi(j), and both ends never fall"]
    if s.structure.flat:
        lines.append("  The statement speaks of q.index and k.index alone, so the whole grid is one axis, in row-major order.")
    blocks: list[tuple[str, list[str]]] = []
    names = [proof.axis_names(s.axes, i, f, flat=s.structure.flat, same_grid=same) for i, f in enumerate(s.structure.axes)]
    shown = ("index",) if s.structure.flat else s.axes
    for i, form in enumerate(s.structure.axes):
        n = names[i]
        body = [f"    {k} = {v}" for k, v in n.given]
        if form.split != ir.ONE:
            m, last = n.show(form.split), n.show(ir.make("sub", form.split, ir.ONE))
            body.append(f"    q.{n.axis} = {m} * j + r sees k.{n.axis} = {m} * i + r only, for r = 0 .. {last}, with")
        body += [f"    lo(j) = {n.show(form.lo)}", f"    hi(j) = {n.show(form.hi)}"]
        if form.full:
            pass  # nothing to invert
        elif form.inverse_lo is None or form.inverse_hi is None:
            body.append("    backward: the inverse has no closed form; two integer tables found by bisection of the ends")
        elif proof.equivalence(form):
            body.append("    backward: the queries of a key i are the keys of a query i")
        else:
            body.append(f"    backward: a key i is seen from j = {n.show(form.inverse_lo)}")
            body.append(f"                               to j = {n.show(form.inverse_hi)}")
        if form.block is not None:
            at = "" if form.shift == ir.ZERO else f", borders at {n.show(form.shift)}"
            body.append(f"    both ends are constant on blocks of {n.show(form.block)}{at}")
        every = proof.steps(s.structure, i, found[i], roles, n, shown)
        if every:
            body.append("    proof")
            body += [line for t in every for line in (f"      {t.conjunct}", f"        -> {t.gives}")]
        else:
            body.append("    no condition speaks of this axis alone")
        blocks.append((f"  {n.axis}: {form.kind}", body))
    return lines + _folded(blocks, [n.axis for n in names])


def _folded(blocks: list[tuple[str, list[str]]], axes: list[str]) -> list[str]:
    """Axes that read the same but for their name are told once."""
    lines: list[str] = []
    seen: dict[tuple[str, ...], str] = {}
    for (head, body), axis in zip(blocks, axes, strict=True):
        key = (head.split(": ", 1)[1], *(_nameless(line, axis) for line in body))
        if key in seen:
            lines.append(f"{head}, as {seen[key]} with {axis} for {seen[key]}")
            continue
        seen[key] = axis
        lines += [head, *body]
    return lines


def _nameless(line: str, axis: str) -> str:
    for before in ("q.", "k.", "size.", "splits "):
        line = line.replace(f"{before}{axis}", f"{before}@")
    for letter in "nm":
        line = line.replace(f"{letter}{axis}", f"{letter}@")
    return line


def _strategy(s: Subject) -> list[str]:
    st, same = s.structure, s.program.same_grid
    names = ["index"] if st.flat else list(s.axes)
    lines = [f"Strategy: {s.strategy}"]
    bound = [n for n, f in zip(names, st.axes, strict=True) if not f.full]
    if s.strategy == "dense":
        lines.append("  No axis is bound on its own, so a tile of queries walks every key.")
    elif s.strategy == "grouped" and same and all(proof.equivalence(f) or f.full for f in st.axes):
        lines.append(
            f"  Tokens of one group see each other and nobody else (groups are cut on {_and(bound)}): tiles hold whole groups,"
        )
        inside = "nothing is masked" if st.residual == ir.TRUE else "only the predicate below masks"
        lines.append(f"  and inside one {inside}. Groups are found by index arithmetic; no tensor is moved.")
    elif s.strategy == "grouped":
        lines.append(
            f"  The keys depend on the query's block on {_and(bound)} alone: tiles hold whole blocks, whose queries share one box."
        )
    else:
        moving = [n for n, f in zip(names, st.axes, strict=True) if not f.full and not (same and proof.equivalence(f))]
        lines.append(f"  On {_and(moving)} the keys move with the query. A tile of queries a .. b walks the keys lo(a) .. hi(b);")
        lines.append("  those from lo(b) to hi(a) need no mask, the others two comparisons per axis.")
    if any(f.split != ir.ONE for f in st.axes):
        lines.append("  A tile lies in one residue class; strides step over the others.")
    if st.residual != ir.TRUE:
        rest = ir.conjuncts(st.residual)
        lines.append(
            f"  Not explained by an axis, evaluated for each pair a tile visits ({_operations(st.residual)} operations a pair):"
        )
        lines += [f"    {ir.show(c, s.axes)}" for c in rest]
    return lines


def _operations(e: ir.Expr) -> int:
    """Distinct operations of an expression."""
    return len({n for n in ir.walk(e) if n.children})


def _counts(s: Subject, g: Geometry, heads: int) -> list[str]:
    sizes = "x".join(map(str, g.q_grid))
    over = "" if g.q_grid == g.k_grid else f" over {'x'.join(map(str, g.k_grid))} keys"
    beside = f", {_count(g.q_prefix, 'prefix token')}" if g.q_prefix else ""
    lines = [f"At {sizes}{over}{beside}, {_count(heads, 'head')}"]
    if g.padded:
        extended = "x".join(str(a.keys) for a in g.axes)
        lines.append(
            f"  padded to   {extended}: the added keys exist (rows pad_k, pad_v), the added queries do not; nothing is copied"
        )
    lines.append(f"  tokens      {g.n_queries:,} queries, {g.n_keys:,} keys")
    dense = heads * g.n_queries * g.n_keys
    c = boxes.count(g)
    residual = s.structure.residual != ir.TRUE
    allowed: int | None = None
    try:
        if residual and heads * c.elements > MOST_COUNTED:
            raise ShapeError("")
        allowed = g.allowed(heads)
        lines.append(f"  allowed     {allowed:,} score elements, {100 * allowed / dense:.2f} % of the dense {dense:,}")
    except ShapeError:
        tables = _and(list(s.attend.int_tables))
        why = f"known when it runs: the relation reads {tables}" if tables else f"not counted: {heads * c.elements:,} pairs to ask"
        lines.append(f"  allowed     {why}")
    rows = "x".join(map(str, c.rows))
    lines.append(f"  tiles       {c.tiles:,} of {rows} queries, keys in chunks of {rows}, per head:")
    lines.append(f"              {c.full:,} chunks full, {c.partial:,} partial; {c.empty:,} empty and never visited")
    grid_dense = math.prod(g.q_grid) * math.prod(g.k_grid)
    lines.append(
        f"  visited     {heads * c.elements:,} score elements in those boxes, {100 * c.elements / grid_dense:.2f} % of the dense"
    )
    if residual and allowed is not None:
        inside = allowed - heads * (g.q_prefix * g.n_keys + math.prod(g.q_grid) * g.k_prefix)
        lines.append(f"  residual    excludes {heads * c.elements - inside:,} of them, one evaluation each")
    for name, f, a, left in zip(s.axes, s.structure.axes, g.axes, s.structure.unknown, strict=False):
        if left and max(a.queries, a.keys) > LONGEST_TABLE:
            lines.append(f"  {name}: longer than {LONGEST_TABLE}, so its predicate is evaluated on the whole axis ({f.kind})")
        elif left:
            lines.append(f"  {name}: its ends are two integer tables, evaluated on this axis alone and made monotone")
    return lines


def _plan(program: ir.Program) -> list[str]:
    g = plans.plan(program)
    names = plans.ordered(g)
    width = max(map(len, names))
    lines = ["Plan"]
    for n in names:
        lines.append(f"  {n:{width}}  {g.nodes[n]['does']}")
        lines.append(f"  {'':{width}}  {', '.join(plans.reads(g, n))} -> {', '.join(plans.writes(g, n))}")
    return lines


def _refused(s: Subject) -> list[str]:
    said = list(s.refused)
    a = s.attend
    if a.normalizer.over == "queries":
        said.append("softmax over queries: no backend lowers it yet; normalise over keys")
    from attnc.report.emit import refusals

    said += refusals(s.program)
    return ["Refused", *(f"  {line}" for line in said)] if said else ["Refused: nothing"]


def _mechanism(m: Mechanism) -> str:
    graph = m.trace()
    title = f"{m.name}: a mechanism of {_count(len(graph.steps), 'step')}"
    lines = [title, "=" * len(title), "", "Statement, as traced"]
    name = dict(enumerate(("q", "k", "v")))
    for i, (_, (a, b, c)) in enumerate(graph.steps):
        name[3 + i] = "out" if 3 + i == graph.result else f"t{i}"
        lines.append(f"  {name[3 + i]} = channel_attend({name[a]}, {name[b]}, {name[c]})")
    lines += [
        "",
        "Channel attention: tokens are contracted, so there is no relation between them",
        "  S[i, j]   = scale * sum over tokens n of q[n, i] k[n, j]       [D, D] per head",
        "  out[n, i] = sum over j of softmax_j(S)[i, j] v[n, j]",
        "  cost: linear in the number of tokens; nothing of size N x N exists",
        "",
    ]
    channel = ir.Program(ir.Channel(), ir.Tokens((None,)), ir.Tokens((None,)))
    return "\n".join(lines + _plan(channel) + ["", "Refused: nothing"]) + "\n"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names)
