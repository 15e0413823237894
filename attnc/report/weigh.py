"""One compiled kernel weighed: its machine code with the counts of its tiles, as instructions executed per allowed score."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from attnc import ir
from attnc.codegen.triton_kernels import Kernel
from attnc.codegen.triton_plan import Spec
from attnc.report import sass
from attnc.schedule import walks as schedule
from attnc.schedule.lists import BlockLists

WARP = {"gfx942": 64}
# threads, registers, shared bytes, blocks an SM (or CU) holds; NVIDIA CUDA programming guide, AMD CDNA3 and RDNA3 ISA guides
LIMITS = {
    "cuda:75": (1024, 65536, 65536, 16), "cuda:80": (2048, 65536, 167936, 32), "cuda:86": (1536, 65536, 102400, 16),
    "cuda:89": (1536, 65536, 102400, 24), "cuda:90": (2048, 65536, 233472, 32), "cuda:100": (2048, 65536, 233472, 32),
    "cuda:120": (1536, 65536, 102400, 32), "hip:gfx942": (2048, 131072, 65536, 32), "hip:gfx1100": (1024, 98304, 65536, 32),
}  # fmt: skip


@dataclass(frozen=True)
class LoopReport:
    """A loop over chunks (or, of a program that has one chunk, over batch items or heads): instructions of its body, how often it
    runs in all programs together, and compares and selects in it."""

    kind: str
    instructions: int
    iterations: int
    mask_instructions: int = 0
    unrolled: int = 1  # chunks (or items) in one run of the body
    over: str = "chunks"  # or "items"
    tile: str = ""  # of a statement that runs as several kernels: the tile, and the warps, of the one that the loop is of
    num_warps: int = 0


@dataclass(frozen=True)
class KernelReport:
    """One compiled kernel. `ti`: thread-instructions executed per allowed score element."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    mma_instructions: int
    instructions: int
    loops: list[LoopReport]
    ti: float
    occupancy: float
    tile: str
    num_warps: int
    num_stages: int
    global_loads: dict[int, int] = field(default_factory=dict)  # load instructions by the bits that one lane loads
    local_accesses: int = 0  # loads and stores of local memory
    issued_elements: int = 0  # score elements computed for pairs on the grid; 0 of a kernel that walks no relation
    parts: list[KernelReport] = field(default_factory=list)  # where a union runs as several kernels, each of them


def together(reports: list[KernelReport]) -> KernelReport:
    """The kernels of a union's parts as one: what they execute and hold is added, what limits a program is the worst of them."""
    if len(reports) == 1:
        return reports[0]
    widths: dict[int, int] = {}
    for r in reports:
        for bits, n in r.global_loads.items():
            widths[bits] = widths.get(bits, 0) + n
    return KernelReport(
        registers=max(r.registers for r in reports),
        spill_bytes=max(r.spill_bytes for r in reports),
        shared_bytes=max(r.shared_bytes for r in reports),
        mma_instructions=sum(r.mma_instructions for r in reports),
        instructions=sum(r.instructions for r in reports),
        loops=[replace(x, tile=r.tile, num_warps=r.num_warps) for r in reports for x in r.loops],
        ti=sum(r.ti for r in reports),
        occupancy=min(r.occupancy for r in reports),
        tile=" + ".join(dict.fromkeys(r.tile for r in reports)),
        num_warps=max(r.num_warps for r in reports),
        num_stages=max(r.num_stages for r in reports),
        global_loads=dict(sorted(widths.items(), reverse=True)),
        local_accesses=sum(r.local_accesses for r in reports),
        issued_elements=sum(r.issued_elements for r in reports),
        parts=reports,
    )


@dataclass
class Launch:
    """A kernel as the module launched it."""

    name: str
    compiled: Any
    grid: tuple[int, ...]
    warps: int


def code_of(launch: Launch, target: str) -> sass.Code:
    """The machine code of a compiled kernel."""
    shared = int(launch.compiled.metadata.shared)
    if target.startswith("cuda"):
        return sass.nvidia(launch.compiled.asm["cubin"], shared)
    return sass.amd(launch.compiled.asm["amdgcn"], shared)


def occupancy(code: sass.Code, warps: int, target: str) -> float:
    """Share of an SM's threads that its registers, shared memory and block slots let live at once."""
    threads, registers, shared, most = LIMITS.get(target, LIMITS["cuda:90"])
    size = warps * WARP.get(target.partition(":")[2], 32)
    per_thread = max(8, -(-code.registers // 8) * 8)
    blocks = min(threads // size, registers // (per_thread * size), most)
    if code.shared_bytes:
        blocks = min(blocks, shared // (code.shared_bytes + 1024))
    return min(1.0, blocks * size / threads)


def kernel_report(
    spec: Spec,
    launch: Launch,
    code: sass.Code,
    printed: Kernel | None,
    allowed: int,
    heads: int,
    batch: int,
    target: str,
    lists: BlockLists | None = None,
) -> KernelReport:
    """What a kernel's machine code comes to, with the counts of its tiles, or of the blocks of the lists that it walks."""
    lanes = launch.warps * WARP.get(target.partition(":")[2], 32)
    programs = math.prod(launch.grid)
    executed = float(code.straight * programs)
    loops: list[LoopReport] = []
    tile, stages, sent = "-", 1, 0
    if printed is not None and launch.name == printed.name:
        t = printed.tile_choice
        tile, stages = f"{'x'.join(map(str, t.rows))}/{'x'.join(map(str, t.chunk))}", t.stages
        if lists is not None:
            executed, loops = _weigh_lists(spec, printed, lists, code, programs, heads * batch)
            sent = heads * batch * lists.visited * t.bm * t.bn
        else:
            executed, loops = _weigh(spec, printed, code, programs, heads, batch)
            if spec.geometry is not None and not printed.prefix:
                sent = heads * batch * schedule.issued(spec.geometry, printed.side, t)
    else:
        for loop in code.loops:
            executed += programs * loop.instructions
            loops.append(LoopReport("full", loop.instructions, programs, loop.masks))
    return KernelReport(
        code.registers, code.spill_bytes, code.shared_bytes, code.mma, code.instructions, loops, executed * lanes / max(allowed, 1),
        occupancy(code, launch.warps, target), tile, launch.warps, stages, code.global_loads, code.local, sent,
    )  # fmt: skip


def _weigh(spec: Spec, k: Kernel, code: sass.Code, programs: int, heads: int, batch: int) -> tuple[float, list[LoopReport]]:
    """Instructions executed by one lane of every program together, from the loop tree and the tile counts."""
    g = spec.geometry
    assert g is not None
    ws = schedule.walks(g, k.side, k.tile_choice)
    each = heads * batch
    chunks = each * math.prod(w.steps for w in ws)
    inner = ws[k.inner.axis]
    full = chunks * inner.full // max(inner.steps, 1) if k.has_full() else 0
    left = chunks * inner.left // max(inner.steps, 1) if k.has_full() else 0
    right = 0 if inner.odd else int(chunks) - full - left  # odd columns are no loop
    maskless = k.residual == ir.TRUE  # else every pair is asked, in tiles that the intervals fill as well
    outer_loops = [p for p in k.outer if not p.single and not k.hoist]
    expected = (
        []
        if k.hoist
        else _beside(spec, k, programs)
        + ([("partial", left)] if left else [])
        + ([("full" if maskless else "partial", full)] if full else [])
        + ([("partial", right)] if right else [])
    )
    loops: list[LoopReport] = []
    executed = float(code.straight * programs)

    def visit(found: tuple[sass.Loop, ...], depth: int, times: int) -> None:
        nonlocal executed
        leaves = [x for x in found if not x.inner]
        with_mma = [x for x in leaves if x.mma]
        for loop in found:
            if loop.inner:
                here = times
                if k.batched:
                    here = each // heads * programs // (-(-batch // k.tile_choice.batch))
                elif depth < len(outer_loops):
                    here = each * int(math.prod(w.steps for w in ws if w is not inner)) * inner.programs
                executed += loop.instructions * here
                visit(loop.inner, depth + 1, here)
            elif k.hoist:
                n = heads * batch * math.prod(w.programs for w in ws) if k.batched else times
                unroll = max(1, round(loop.mma / per_chunk)) if per_chunk else 1
                executed += loop.instructions * n / unroll
                kind = "full" if maskless and all(p.exact for p in k.plans) else "partial"
                loops.append(LoopReport(kind, loop.instructions, n, loop.masks, unroll, "items"))
            elif loop.mma:
                i = with_mma.index(loop)
                kind, n = expected[i] if i < len(expected) else ("partial", 0)
                unroll = max(1, round(loop.mma / per_chunk)) if per_chunk else 1
                executed += loop.instructions * n / unroll
                loops.append(LoopReport(kind, loop.instructions, n, loop.masks, unroll))
            else:
                executed += loop.instructions * times

    masses = sorted(x.mma for x in _leaves(code.loops) if x.mma)
    per_chunk = masses[0] if masses else 0
    visit(code.loops, 0, programs)
    return executed, loops


def _beside(spec: Spec, k: Kernel, programs: int) -> list[tuple[str, int]]:
    """The loop over prefix tokens, which comes first where there are any: how often it runs in all programs."""
    if not k.with_prefix:
        return []
    prefix = (spec.program.keys if k.side == "q" else spec.program.queries).prefix
    return [("partial", programs * -(-prefix // k.tile_choice.bn))]


def _weigh_lists(
    spec: Spec, k: Kernel, lists: BlockLists, code: sass.Code, programs: int, each: int
) -> tuple[float, list[LoopReport]]:
    """The same of a kernel that walks lists: one loop over full blocks, then one over those in part."""
    full = int(lists.full.sum())
    expected = [*_beside(spec, k, programs), ("full", each * full), ("partial", each * (lists.visited - full))]
    loops: list[LoopReport] = []
    executed = float(code.straight * programs)

    def visit(found: tuple[sass.Loop, ...]) -> None:
        nonlocal executed
        for loop in found:
            n = programs
            if loop.mma and not loop.inner:
                kind, n = expected[len(loops)] if len(loops) < len(expected) else ("partial", 0)
                loops.append(LoopReport(kind, loop.instructions, n, loop.masks))
            executed += loop.instructions * n
            visit(loop.inner)

    visit(code.loops)
    return executed, loops


def _leaves(loops: tuple[sass.Loop, ...]) -> list[sass.Loop]:
    return [y for x in loops for y in (_leaves(x.inner) if x.inner else [x])]
