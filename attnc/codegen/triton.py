"""Prints a stand-alone Triton module: kernels, their launches, and a differentiable `attention`.

The text depends on the statement, the tiles and the head dimensions; with concrete sizes also on the grid. attnc's own Triton
backend loads the same text with sizes as arguments.
"""

from __future__ import annotations

import hashlib
import math
import pprint
import re
import textwrap
from dataclasses import replace
from typing import Any

from attnc import ir
from attnc.analysis.structure import analyse
from attnc.codegen import around
from attnc.codegen.triton_face import PLACE
from attnc.codegen.triton_host import Host
from attnc.codegen.triton_kernels import Kernel, can_fuse
from attnc.codegen.triton_plan import LARGE, Spec, check, dense_spec, tile_text
from attnc.codegen.triton_shapes import Module
from attnc.codegen.triton_tables import table_kernel
from attnc.schedule.geometry import geometry
from attnc.schedule.split import split
from attnc.schedule.tiles import Tiles, tiles
from attnc.schedule.walks import issued

HEAD = """\
import math
import os

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""


def make_spec(
    program: ir.Program,
    q_grid: tuple[int, ...],
    k_grid: tuple[int, ...],
    *,
    head_dim: int,
    value_dim: int,
    itemsize: int = 2,
    symbolic: bool = False,
    plain: bool = True,
    chosen: Tiles | None = None,
    part: bool = False,
    target: str = "cuda:80",
    wide: bool = False,
    listed: bool = False,
    filled: bool = False,
    adds: int = 0,
) -> Spec:
    """The printer's input. Tiles are chosen at these sizes; `symbolic` leaves the sizes open in the text.

    listed: its tiles, which are `chosen`, walk lists of chunks; filled: none of which needs a mask.
    part: the statement is a part of a union, whose output and LSE its backward gets; no group of it holds all keys of a row.
    adds: it goes on from what earlier parts wrote, see `Spec`.
    wide: offsets have 64 bits, for batch items or tables of 2**31 elements and more.
    """
    check(program)
    g = geometry(program, q_grid, k_grid)
    assert isinstance(program.attend, ir.Attend)
    padded = program.keys.pad is not None or program.keys.pad_multiple is not None
    structure = analyse(program.attend, program.same_grid, padded)
    chosen = chosen or tiles(g, head_dim, value_dim, itemsize, target)
    return Spec(
        program, structure, chosen, head_dim, value_dim, None if symbolic else g, plain, part, itemsize=itemsize, wide=wide,
        listed=listed, filled=filled, adds=adds,
    )  # fmt: skip


def kernels_of(spec: Spec, module: Module, fuse: bool | None = None) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels of a statement, and the plain ones that prefix tokens need. fuse: all gradients in one; None: if so can be."""
    t = spec.tiles
    kernels = [Kernel(spec, "forward", t.forward, module)]
    fused = can_fuse(spec, t.dq, module) if fuse is None else fuse
    if not fused:
        kernels.append(Kernel(spec, "backward_dq", t.dq, module))
    kernels.append(Kernel(spec, "backward_dkv", t.dq if fused else t.dkv, module, fused=fused))
    if spec.learned and not kernels[1].registers:
        kernels.append(Kernel(spec, "backward_table", t.dq, module))
    flat: list[Kernel] = []
    if spec.prefix:
        dense = dense_spec(spec)
        if spec.program.queries.prefix:
            flat += [Kernel(dense, k, t.flat, module, "prefix_") for k in ("forward", "backward_dq")]
        if spec.program.keys.prefix:
            flat.append(Kernel(dense, "backward_dkv", t.flat, module, "prefix_"))
    return kernels, flat


def printed(spec: Spec, parts: tuple[Spec, ...] = ()) -> tuple[Module, list[tuple[Spec, list[Kernel], list[Kernel]]]]:
    """What a module prints: device functions, and the kernels of its statement, or of the parts of a union in their order."""
    module = Module()
    every = parts or (spec,)
    fuse = all(can_fuse(s, s.tiles.dq, Module()) for s in every) if parts else None
    return module, [(s, *kernels_of(s, module, fuse)) for s in every]


def source(
    spec: Spec,
    *,
    parts: tuple[Spec, ...] = (),
    heads: int | None = None,
    dtype: str = "",
    target: str = "",
    whole: ir.Attend | None = None,
    tuned: Any = None,
    alone: bool = True,
) -> str:
    """The module's text. parts: those of a union, which run one after the other (see `part_specs`). whole: the statement with the
    row maps and the sink that its `attention` puts around the kernels. tuned: what was measured of it, data that it carries.
    alone: it has an `attention` and an operator of its own, for which its sizes are known; else the launches of its kernels."""
    module, every = printed(spec, parts)
    hosts = [Host(s, kernels, flat, module, whole, alone) for s, kernels, flat in every]
    kernels, flat = [k for _, mine, _ in every for k in mine], [k for _, _, mine in every for k in mine]
    extra = [
        table_kernel(s, k, module)
        for s, mine, _ in every
        for k in [k for k in mine if s.learned and k.kind != "forward" and k.registers][:1]
    ]
    host = hosts[0]
    host.hosts = tuple(hosts)
    host_text = host.text()  # adds to the module the kernels that it launches besides
    grids = ""
    if spec.geometry is not None:
        grids = f"GRID = {spec.geometry.q_grid!r}\n"
        if not spec.program.same_grid:
            grids += f"KV_GRID = {spec.geometry.k_grid!r}\n"
    if tuned is not None:
        grids += f"# what was measured, on which devices and at which shapes\nTUNED = {pprint.pformat(tuned, width=124)}\n"
    last = "import triton.language as tl\n"
    head = HEAD.replace(last, last + host.imports)
    texts = [docstring(spec, parts, heads, dtype, target, whole) + "\n\n" + head + grids]
    texts += module.functions.values()
    texts += [k.text(static=spec.geometry is not None) for k in kernels]
    texts += extra
    texts += [k.text(static=False) for k in flat]
    texts.append(host_text)
    text = "\n\n".join(p.strip("\n") + "\n" for p in texts)
    slug = re.sub(r"\W+", "_", spec.attend.name).strip("_").lower()[:40]
    return text.replace(PLACE, f"{slug}_{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def docstring(
    spec: Spec, parts: tuple[Spec, ...], heads: int | None, dtype: str, target: str, whole: ir.Attend | None = None
) -> str:
    """What the module computes, for which shapes, how it is tiled and what that wastes."""
    a, g = spec.attend, spec.geometry
    axes = ir.AXES.get(a.rank)
    lines = [f"Attention with the pattern `{a.name}`, generated by attnc.", ""]
    lines += [f"relation: {ir.show(a.relation, axes)}", f"score:    {ir.show(a.score, axes)}"]
    lines += [f"weights:  {text}" for text in around.described(whole or a)]
    if g is not None:
        shape = "x".join(map(str, g.q_grid))
        keys = "" if g.q_grid == g.k_grid and spec.program.same_grid else f", keys on {'x'.join(map(str, g.k_grid))}"
        what = ", ".join(x for x in (f"{heads} heads" if heads else "", dtype, f"compiled for {target}" if target else "") if x)
        lines.append(
            f"grid:     {shape}{keys}; head dimension {spec.head_dim}, values {spec.value_dim}{'; ' if what else ''}{what}"
        )
    else:
        lines.append(f"grid:     any; head dimension {spec.head_dim}, values {spec.value_dim}")
    if any(p.adds for p in parts):
        lines.append(f"parts:    {len(parts)}, each key in one of them; each goes on from the output and LSE of those before it")
    for part in parts or (spec,):
        if part.run and not part.adds:
            lines.append(f"heads:    {', '.join(map(str, range(*part.run)))}")
        forms = ", ".join(f"{n}: {f.kind}" for n, f in zip(part.axes, part.structure.axes, strict=True))
        lines.append(f"strategy: {part.structure.strategy} ({forms})")
        t = part.tiles
        shown: dict[str, list[str]] = {}
        for name, tile in (("forward", t.forward), ("dq", t.dq), ("dk, dv", t.dkv)):
            shown.setdefault(f"{tile_text(tile)}, {tile.warps} warp{'s' if tile.warps > 1 else ''}", []).append(name)
        lines += [f"tile:     {', '.join(names)}: {text}" for text, names in shown.items()]
    every = [p for p in parts or (spec,) if p.geometry is not None]
    if heads and not any(n.op in ("load", "batch") for p in every for n in ir.walk(p.structure.residual)):
        allowed = sum(p.geometry.allowed(p.heads(heads)) for p in every if p.geometry is not None)
        sent = sum(p.heads(heads) * issued(p.geometry, "q", p.tiles.forward) for p in every if p.geometry is not None)
        if allowed:
            lines.append(f"waste:    {sent / allowed:.2f} score elements issued for each one allowed")
    wrapped: list[str] = []
    for line in lines:
        wrapped += textwrap.wrap(line, 124, subsequent_indent=" " * 10) or [""]
    return '"""' + "\n".join(wrapped).replace("\\", "\\\\") + '\n"""'


def emit_triton(
    program: ir.Program,
    q_grid: tuple[int, ...],
    k_grid: tuple[int, ...],
    *,
    heads: int,
    head_dim: int,
    value_dim: int,
    dtype: str,
    target: str,
    chosen: Tiles | None = None,
    tuned: Any = None,
) -> str:
    """The source of a stand-alone module exposing `attention(q, k, v, *, scale=None, **tables)` on this grid. chosen: tiles that
    were measured, in place of the model's; tuned: the table they come from."""
    if isinstance(program.attend, ir.Channel):
        from attnc.codegen.triton_channel import emit_channel

        return emit_channel()
    itemsize = 4 if dtype == "float32" else 2
    core = around.core_program(program)
    sizes: dict[str, Any] = {"head_dim": head_dim, "value_dim": value_dim, "itemsize": itemsize}
    tokens = max(math.prod(q_grid) + program.queries.prefix, math.prod(k_grid) + program.keys.prefix)
    sizes["wide"] = 3 * heads * tokens * max(head_dim, value_dim) >= LARGE  # of one batch item, q, k and v in one tensor
    spec = make_spec(core, q_grid, k_grid, **sizes, chosen=chosen, target=target)
    parts = part_specs(core, q_grid, k_grid, heads, **sizes, target=target)
    return source(spec, parts=parts, heads=heads, dtype=dtype, target=target, whole=program.attend, tuned=tuned)


def part_specs(
    core: ir.Program,
    q_grid: tuple[int, ...],
    k_grid: tuple[int, ...],
    heads: int,
    *,
    head_dim: int,
    value_dim: int,
    itemsize: int,
    target: str,
    wide: bool = False,
) -> tuple[Spec, ...]:
    """The statements that one module runs one after the other: of heads that have their own, and parts of unions; () where the
    statement runs whole.

    It does where its parts gain nothing, where tables learn, keys are virtual or some heads have no key.
    """
    runs = split(core, q_grid, k_grid, heads, heads)
    if sum(len(r.parts) for r in runs) < 2 or any(r.cut or not r.parts for r in runs):
        return ()
    sizes: dict[str, Any] = {"head_dim": head_dim, "value_dim": value_dim, "itemsize": itemsize, "wide": wide}
    parts = []
    for r in runs:
        each = [make_spec(p, q_grid, k_grid, **sizes, part=len(r.parts) > 1, target=target) for p in r.parts]
        run = (r.first, r.last) if len(runs) > 1 else None
        parts += [replace(s, run=run, adds=3 * bool(i)) for i, s in enumerate(each)]
    if any(s.learned or s.padded for s in parts) or len({s.structure.flat for s in parts}) > 1:
        return ()
    return tuple(replace(s, suffix=f"_{i + 1}" if i else "") for i, s in enumerate(parts))
