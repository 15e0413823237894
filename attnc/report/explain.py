"""`attnc.explain`: what was declared, what was proved about it and from which words, what will run, and what was refused."""

from __future__ import annotations

import math

from attnc import ir
from attnc.analysis.derivative import learned
from attnc.arguments import GridLike, PadLike
from attnc.errors import ShapeError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern
from attnc.report import block_lists, boxes, costs, proof
from attnc.report.subject import Part, Subject, subject
from attnc.schedule import plan as plans
from attnc.schedule.geometry import LONGEST_TABLE, Geometry
from attnc.schedule.split import disjuncts


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
    s = subject(p, grid=grid, kv_grid=kv_grid, prefix=prefix, pad=pad, heads=heads)
    told = [_head(s), _statement(s)]
    if len(s.parts) == 1:
        told += [_axes(s, s.parts[0]), _strategy(s, s.parts[0])]
    else:
        told += [block for n in range(len(s.parts)) for block in _part(s, n)]
    if s.geometry is not None:
        told.append(_counts(s, s.geometry))
        told += [lines for lines in (costs.section(s),) if lines]
    told += [_plan(s.program, s.union), _refused(s)]
    return "\n\n".join("\n".join(lines) for lines in told) + "\n"


def _head(s: Subject) -> list[str]:
    where = "x".join(map(str, s.geometry.q_grid)) if s.geometry else ", ".join(s.axes)
    title = f"{s.attend.name} on ({where}): {s.strategy}"
    return [title, "=" * len(title)]


def _statement(s: Subject) -> list[str]:
    a = s.attend
    op, terms = "&", ir.conjuncts(a.relation) or (ir.TRUE,)
    if len(terms) == 1:
        op, terms = "|", disjuncts(terms[0])
    first, *rest = terms
    lines = ["Statement, as traced", f"  relation  {_bracketed(first, s.axes, bool(rest))}"]
    lines += [f"          {op} {_bracketed(c, s.axes, True)}" for c in rest]
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
        numbers = "integers, read by the relation" if t in a.int_tables else "reals, read by conditions"
        kind = "learned: gets a gradient" if t in learned(a) else numbers
        lines.append(f"  table     {t}, {_count(a.table_rank(t), 'dimension')} ({kind})")
    return lines


def _part(s: Subject, n: int) -> list[list[str]]:
    """A union or a run of heads: each part has a structure of its own."""
    p = s.parts[n]
    which = f"heads {p.first} .. {p.last - 1}" if p.heads < s.heads else "all heads"
    if p.heads == 1 < s.heads:
        which = f"head {p.first}"
    title = f"Part {n + 1} of {len(s.parts)}, {which}"
    conditions = [f"  {ir.show(c, s.axes)}" for c in ir.conjuncts(p.attend.relation)]
    return [[title, "-" * len(title), *conditions], _axes(s, p), _strategy(s, p)]


def _bracketed(c: ir.Expr, axes: tuple[str, ...], among: bool) -> str:
    text = ir.show(c, axes)
    return f"({text})" if among and c.op in ("and", "or", "eq", "ne", "lt", "le") else text


def _axes(s: Subject, p: Part) -> list[str]:
    same, structure = s.program.same_grid, p.structure
    roles: proof.Roles = ("q", "q") if same else ("q", "k")
    lines = ["Normal form, per axis: a query at j sees the keys i from lo(j) to hi(j), and both ends never fall"]
    if structure.flat:
        lines.append("  The statement speaks of q.index and k.index alone, so the whole grid is one axis, in row-major order.")
    blocks: list[tuple[str, list[str]]] = []
    names = [proof.axis_names(s.axes, i, f, flat=structure.flat, same_grid=same) for i, f in enumerate(structure.axes)]
    shown = ("index",) if structure.flat else s.axes
    for i, form in enumerate(structure.axes):
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
        elif proof.symmetric(form):
            body.append("    backward: the queries of a key i are the keys of a query i")
        else:
            body.append(f"    backward: a key i is seen from j = {n.show(form.inverse_lo)}")
            body.append(f"                               to j = {n.show(form.inverse_hi)}")
        if form.block is not None:
            at = "" if form.shift == ir.ZERO else f", borders at {n.show(form.shift)}"
            body.append(f"    both ends are constant on blocks of {n.show(form.block)}{at}")
        every = proof.steps(structure, i, roles, n, shown)
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


def _strategy(s: Subject, p: Part) -> list[str]:
    st, same = p.structure, s.program.same_grid
    names = ["index"] if st.flat else list(s.axes)
    lines = [f"Strategy: {st.strategy}"]
    bound = [n for n, f in zip(names, st.axes, strict=True) if not f.full]
    if st.strategy == "dense":
        lines.append("  No axis is bound on its own, so a tile of queries walks every key.")
    elif st.strategy == "grouped" and same and all(proof.equivalence(f) or f.full for f in st.axes):
        lines.append(
            f"  Tokens of one group see each other and nobody else (groups are cut on {_and(bound)}): tiles hold whole groups,"
        )
        inside = "nothing is masked" if st.residual == ir.TRUE else "only the predicate below masks"
        lines.append(f"  and inside one {inside}. Groups are found by index arithmetic; no tensor is moved.")
    elif st.strategy == "grouped":
        lines.append(
            f"  The keys depend on the query's block on {_and(bound)} alone: tiles hold whole blocks, whose queries share one box."
        )
    else:
        moving = [n for n, f in zip(names, st.axes, strict=True) if not f.full and not (same and proof.equivalence(f))]
        lines.append(f"  On {_and(moving)} the keys move with the query. A tile of queries a .. b walks the keys lo(a) .. hi(b);")
        lines.append("  those from lo(b) to hi(a) need no mask, the others two comparisons per axis.")
    if any(f.split != ir.ONE for f in st.axes):
        lines.append("  A tile lies in one residue class; strides step over the others.")
    if s.geometry is None and any(c.op == "or" for c in ir.conjuncts(st.residual)):
        lines.append("  At a known size a union may run as parts, each with a structure of its own: give grid= to see them.")
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


def _counts(s: Subject, g: Geometry) -> list[str]:
    sizes = "x".join(map(str, g.q_grid))
    over = "" if g.q_grid == g.k_grid else f" over {'x'.join(map(str, g.k_grid))} keys"
    beside = f", {_count(g.q_prefix, 'prefix token')}" if g.q_prefix else ""
    lines = [f"At {sizes}{over}{beside}, {_count(s.heads, 'head')}"]
    if g.padded:
        extended = "x".join(str(a.keys) for a in g.axes)
        lines.append(
            f"  padded to   {extended}: the added keys exist (rows pad_k, pad_v), the added queries do not; nothing is copied"
            + ("; prefix queries see the tokens alone" if g.q_prefix else "")
        )
    lines.append(f"  tokens      {g.n_queries:,} queries, {g.n_keys:,} keys")
    dense = s.dense()
    try:
        allowed = s.allowed()
        why = "not counted: too many pairs to ask"
    except ShapeError:
        reads = list(dict.fromkeys(n.args[0] for n in ir.walk(s.attend.relation) if n.op == "load"))
        allowed, why = None, f"known when it runs: the relation reads {_and(reads)}"
    if allowed is not None:
        why = f"{allowed:,} score elements, {100 * allowed / dense:.2f} % of the dense {dense:,}"
    lines.append(f"  allowed     {why}")
    visited = 0
    for n, p in enumerate(s.parts):
        assert p.geometry is not None
        c = boxes.count(p.geometry)
        rows, visited = "x".join(map(str, c.rows)), visited + p.heads * c.elements
        label, noun = ("tiles", "") if len(s.parts) == 1 else (f"part {n + 1}", "tiles ")
        lines.append(f"  {label:11} {c.tiles:,} {noun}of {rows} queries, keys in chunks of {rows}, per head:")
        lines.append(f"              {c.full:,} chunks full, {c.partial:,} partial; {c.empty:,} empty and never visited")
    share = 100 * visited / (s.heads * math.prod(g.q_grid) * math.prod(g.k_grid))
    lines.append(f"  visited     {visited:,} score elements in those boxes, {share:.2f} % of the dense")
    if allowed is not None and any(p.structure.residual != ir.TRUE for p in s.parts):
        beside_them = sum(p.heads for p in s.parts) * (g.q_prefix * g.n_keys + math.prod(g.q_grid) * g.k_prefix)
        lines.append(f"  residual    excludes {visited - (allowed - beside_them):,} of them, one evaluation each")
    lines += block_lists.lines(s, allowed)
    for p in s.parts:
        assert p.geometry is not None
        for name, f, a, left in zip(s.axes, p.structure.axes, p.geometry.axes, p.structure.unknown, strict=False):
            if left and max(a.queries, a.keys) > LONGEST_TABLE:
                lines.append(f"  {name}: longer than {LONGEST_TABLE}, so its predicate is evaluated on the whole axis ({f.kind})")
            elif left:
                lines.append(f"  {name}: its ends are two integer tables, evaluated on this axis alone and made monotone")
            if a.gap_lo is not None:
                lines.append(
                    f"  {name}: what it leaves out between them is one run of keys for each query; where queries of a tile share"
                )
                lines.append("     it, CPU kernels walk the two boxes beside it, without a mask")
            if a.others is not None:
                lines.append(
                    f"     (it is the query's own block of {a.others[0]}, which GPU kernels pass over in tiles that divide it)"
                )
    return lines


def _plan(program: ir.Program, union: bool = False) -> list[str]:
    g = plans.plan(program, union=union)
    names = plans.ordered(g)
    width = max(map(len, names))
    lines = ["Plan"]
    for n in names:
        lines.append(f"  {n:{width}}  {g.nodes[n]['does']}")
        lines.append(f"  {'':{width}}  {', '.join(plans.reads(g, n))} -> {', '.join(plans.writes(g, n))}")
    return lines


def _refused(s: Subject) -> list[str]:
    said = list(s.refused)
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
