"""The second stage of table gradients: from one summed tile per head to the table."""

from __future__ import annotations

from attnc import ir
from attnc.codegen import triton_expr
from attnc.codegen.triton_kernels import Kernel
from attnc.codegen.triton_plan import AxisPlan, Spec
from attnc.codegen.triton_shapes import Module, mentions


def _table_lines(spec: Spec, dq: Kernel, module: Module) -> tuple[list[str], list[str], list[str], list[str]]:
    """Coordinates of row m and columns n inside the first whole tile, and the terms of the entry that a pair reads."""
    (n,) = spec.learned
    names = dict(spec.size_names)
    rows: list[str] = []
    columns: list[str] = []
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
    return [s for s in dict.fromkeys(spec.size_names.values()) if mentions(s, spoken)]


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
