"""Tables as tiles of a group: the bias as one tile per head before the kernels, and from a summed tile back to the table after."""

from __future__ import annotations

import math

from attnc import ir
from attnc.codegen import triton_expr
from attnc.codegen.triton_kernels import Kernel
from attnc.codegen.triton_plan import AxisPlan, Spec
from attnc.codegen.triton_shapes import Module, long, mentions


def _places(spec: Spec, k: Kernel, module: Module) -> tuple[list[str], list[str], dict[ir.Expr, str], list[str]]:
    """Coordinates of rows m and columns n inside the first whole tile, the names they get, and lines that splits need."""
    names = dict(spec.size_names)
    rows: list[str] = []
    columns: list[str] = []
    for p in k.plans:
        rest = 1
        for x in k.plans[p.axis + 1 :]:
            rest *= x.rows
        start = "" if p.start == ir.ZERO else _first_whole(spec, p, module)
        for var, out in (("m", rows), ("n", columns)):
            place = var if rest == 1 else f"{var} // {rest}"
            if p.axis and p.rows > 1:
                place = f"{place} % {p.rows}"
            if p.rows == 1:
                place = "0"
            place = f"{start} + {place}" if start and place != "0" else start or place
            out.append(f"{'q' if var == 'm' else 'k'}{p.name} = {place if p.split == ir.ONE else _scaled(place, k, p)}")
        names[ir.coord("q", p.axis)], names[ir.coord("k", p.axis)] = f"q{p.name}", f"k{p.name}"
    splits = [f"split_{p.name} = {k.expr(p.split, {})}" for p in k.plans if p.split.op != "const"]
    return rows, columns, names, splits


def _table_lines(spec: Spec, dq: Kernel, module: Module) -> tuple[list[str], list[str], list[str], list[str]]:
    """Coordinates of row m and columns n inside the first whole tile, and the terms of the entry that a pair reads."""
    (n,) = spec.learned
    rows, columns, names, splits = _places(spec, dq, module)
    terms = []
    for d, e in enumerate(n.children):
        if e != ir.HEAD:
            text = module.scan(triton_expr.text(e, names))
            text = long(text, spec.wide)
            terms.append(f"({text}) * st[{d}]" if " " in text else f"{text} * st[{d}]")
    return rows, columns, terms, splits


def bias_kernel(spec: Spec, k: Kernel, module: Module) -> tuple[str, list[str]]:
    """Name of a kernel that writes the bias of a group as one tile per head, and the sizes it takes after tables and scale.

    The tile is in units of the product before its scale, and -inf in lanes without a key.
    """
    assert spec.bias is not None
    rows, columns, names, splits = _places(spec, k, module)
    for x, name in names.items():
        if x.op == "coord":
            names[x] = f"{name}[:, None]" if x.args[0] == "q" else f"{name}[None, :]"
    names |= {ir.HEAD: "h", ir.HEADS: "tl.num_programs(1)"}
    lines: list[str] = []

    def load(n: ir.Expr, _: object) -> str:
        name, terms, inside = n.args[0], [], []
        for d, e in enumerate(n.children):
            at = module.scan(triton_expr.text(e, names))
            if any(x.op == "coord" for x in ir.walk(e)):  # a group cut by the axis may ask for what its table does not have
                lines.append(f"i{len(lines)} = {at}")
                at = f"i{len(lines) - 1}"
                inside.append(f"({at} >= 0) & ({at} < {name}_n[{d}])")
            at = long(at, spec.wide)
            terms.append(f"{at} * {name}_st[{d}]" if " " not in at else f"({at}) * {name}_st[{d}]")
        mask = f", mask={' & '.join(inside)}, other=0.0" if inside else ""
        return f"tl.load({name}_table + {' + '.join(terms)}{mask}).to(tl.float32)"

    value = module.scan(triton_expr.text(spec.bias, names, load))
    count = math.prod(p.rows for p in k.plans)
    body = [*splits, f"m, n = tl.minimum(row, {count - 1}), tl.minimum(column, {count - 1})", *rows, *columns, *lines]
    body.append(f"bias = tl.broadcast_to(({value}) * (1.0 / scale), [16, {k.bn}])")
    body.append(f'bias = tl.where(column[None, :] < {count}, bias, float("-inf"))')
    body.append(f"tl.store(Bias + (h * {k.bm} + row)[:, None] * {k.bn} + column[None, :], bias)")
    tables = table_names(spec)
    sizes = [s for s in dict.fromkeys(spec.size_names.values()) if mentions(s, " ".join(body))]
    params = ", ".join(
        [*(f"{t}_table" for t in tables), "Bias", *(f"{t}{x}" for t in tables for x in ("_st", "_n")), "scale", *sizes]
    )
    text = (
        f"@triton.jit\ndef @@({params}):\n"
        f'    """The bias of a group as one tile per head, divided by the scale; -inf in columns without a key."""\n'
        f"    h, row, column = tl.program_id(1), tl.program_id(0) * 16 + tl.arange(0, 16), tl.arange(0, {k.bn})\n"
        + "".join(f"    {line}\n" for line in body)
    )
    return module.use("bias_pre", text), sizes


def table_names(spec: Spec) -> list[str]:
    """Tables that the bias reads, each once."""
    assert spec.bias is not None
    return list(dict.fromkeys(n.args[0] for n in ir.walk(spec.bias) if n.op == "load"))


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
    h, n = {long("tl.program_id(1)", spec.wide)}, tl.arange(0, {dq.bn})
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
