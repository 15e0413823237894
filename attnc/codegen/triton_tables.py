"""Helper kernels of the backward pass: delta, and the second stage of table gradients."""

from __future__ import annotations

from attnc import ir
from attnc.codegen import triton_expr
from attnc.codegen.triton_kernels import Kernel, Module, used
from attnc.codegen.triton_plan import AxisPlan, Spec, lanes

DELTA_ROWS = 64


def delta_kernel(spec: Spec) -> str:
    """rowsum(out * grad_out) - grad_lse, and the LSE in base 2; over all tokens, prefix tokens included."""
    lengths = ["N"] if spec.prefix else [s.real_queries for s in spec.names]
    at, lines = "at", []
    for i in range(len(lengths) - 1, -1, -1):
        part = at
        lines.append((i, f"{part} % {lengths[i]}" if i else part))
        at = f"{at} // {lengths[i]}"
    offset = {t: " + ".join(f"({text}) * {t}_st[{i + 2}]" for i, text in sorted(lines)) for t in ("o", "g")}
    last, dim = len(lengths) + 2, spec.value_dim
    more = "" if lanes(dim) == dim else f" & (e < {dim})[None, :]"
    sizes = [n for n in dict.fromkeys(lengths) if n != "N"]
    params = ", ".join(["O", "G", "Lse", "GLse", "Delta", "Lse2", "o_st", "g_st", "H", "N", *sizes])
    return f'''\
@triton.jit
def backward_delta({params}):
    """delta = rowsum(out * grad_out) - grad_lse per row, and the LSE in base 2 (0 for a row without keys)."""
    at, e = tl.program_id(0) * {DELTA_ROWS} + tl.arange(0, {DELTA_ROWS}), tl.arange(0, {lanes(dim)})
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    live = at < N
    o_at = ({offset["o"]}).to(tl.int64)[:, None] + e[None, :] * o_st[{last}]
    g_at = ({offset["g"]}).to(tl.int64)[:, None] + e[None, :] * g_st[{last}]
    o = read(O + (b * o_st[0] + h * o_st[1]) + o_at, live[:, None]{more})
    g = read(G + (b * g_st[0] + h * g_st[1]) + g_at, live[:, None]{more})
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    token = (b * H + h) * N + at
    if GLse is not None:
        delta -= tl.load(GLse + token, mask=live, other=0.0)
    lse = tl.load(Lse + token, mask=live, other=0.0)
    tl.store(Delta + token, delta, mask=live)
    tl.store(Lse2 + token, tl.where(lse > float("-inf"), lse * LOG2E, 0.0), mask=live)
'''


def _table_lines(spec: Spec, dq: Kernel, module: Module) -> tuple[list[str], list[str], list[str], list[str]]:
    """Coordinates of row m and columns n inside the first whole tile, and the terms of the entry that a pair reads."""
    (n,) = spec.learned
    names, rows, columns = dict(spec.size_names), [], []
    for p in dq.plans:
        rest = 1
        for x in dq.plans[p.axis + 1 :]:
            rest *= x.rows
        start = "" if p.start == ir.ZERO else _first_whole(spec, p, module)
        for var, out in (("m", rows), ("n", columns)):
            place = var if rest == 1 else f"{var} // {rest}"
            if p.axis and p.rows > 1:
                place = f"{place} % {p.rows}"
            if p.rows == 1:
                place = "0"
            place = f"{start} + {place}" if start and place != "0" else start or place
            out.append(f"{'q' if var == 'm' else 'k'}{p.name} = {place if p.split == ir.ONE else _scaled(place, dq, p)}")
        names[ir.coord("q", p.axis)], names[ir.coord("k", p.axis)] = f"q{p.name}", f"k{p.name}"
    terms = []
    for d, e in enumerate(n.children):
        if e != ir.HEAD:
            text = module.scan(triton_expr.text(e, names))
            terms.append(f"({text}) * st[{d}]" if " " in text else f"{text} * st[{d}]")
    splits = [f"split_{p.name} = {dq.expr(p.split, {})}" for p in dq.plans if p.split.op != "const"]
    return rows, columns, terms, splits


def table_sizes(spec: Spec, dq: Kernel) -> list[str]:
    """Sizes that the table kernel takes, in its order."""
    spoken = " ".join(line for lines in _table_lines(spec, dq, Module()) for line in lines)
    return [s for s in dict.fromkeys(spec.size_names.values()) if used(s, spoken)]


def table_kernel(spec: Spec, dq: Kernel, module: Module) -> str:
    """Second stage: each entry of a table sums the pairs of a tile that read it. No atomics, one fixed order."""
    (n,) = spec.learned
    rows, columns, terms, splits = _table_lines(spec, dq, module)
    count = 1
    for p in dq.plans:
        count *= p.rows
    params = ", ".join(["Tile", "Grad", "st", "entries", *table_sizes(spec, dq)])
    return f'''\
@triton.jit
def backward_table({params}):
    """Each entry of `{n.args[0]}` gathers the pairs of a group that read it, in one fixed order."""
    h, n = tl.program_id(1), tl.arange(0, {dq.bn})
    entry = tl.program_id(0) * 32 + tl.arange(0, 32)
{"".join(f"    {line}{chr(10)}" for line in (*splits, *columns))}    total = tl.zeros([32], tl.float32)
    for m in tl.range(0, {count}):
{"".join(f"        {line}{chr(10)}" for line in rows)}        index = tl.where(n < {count}, {" + ".join(terms) or "0"}, -1)
        pairs = tl.load(Tile + (h * {dq.bm} + m) * {dq.bn} + n)
        total += tl.sum(tl.where(entry[:, None] == index[None, :], pairs[None, :], 0.0), 1)
    tl.store(Grad + h * entries + entry, total, mask=entry < entries)
'''


def _first_whole(spec: Spec, p: AxisPlan, module: Module) -> str:
    text = module.scan(triton_expr.text(p.start, spec.size_names))
    value = p.start.args[0] if p.start.op == "const" else None
    if value is not None:
        return str(value + p.rows) if value < 0 else str(value)
    return f"({text} + {p.rows})"


def _scaled(place: str, dq: Kernel, p: AxisPlan) -> str:
    return f"({place}) * {dq.split(p)}" if " " in place else f"{place} * {dq.split(p)}"
