"""The static report of a Triton module: what it issues, what it needs, what its machine code looks like. No GPU is needed.

The module's own launches run on tensors without data while a stand-in driver names the target, so every kernel is compiled as it
would be on that device, and its machine code is read and weighed with the tile counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attnc import ir
from attnc.codegen.around import core_program
from attnc.codegen.triton import kernels_of, make_spec, source
from attnc.codegen.triton_host import longest_index
from attnc.codegen.triton_kernels import Kernel
from attnc.codegen.triton_plan import Spec
from attnc.codegen.triton_shapes import Module
from attnc.errors import BuildError, ShapeError, UnsupportedError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern
from attnc.report import sass
from attnc.schedule import tiles as schedule

if TYPE_CHECKING:
    from attnc.arguments import GridLike, PadLike

TARGETS = ("cuda:75", "cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx1100")
WARP = {"gfx942": 64}
# threads, registers, shared bytes, blocks an SM (or CU) holds; NVIDIA CUDA programming guide, AMD CDNA3 and RDNA3 ISA guides
LIMITS = {
    "cuda:75": (1024, 65536, 65536, 16), "cuda:80": (2048, 65536, 167936, 32), "cuda:86": (1536, 65536, 102400, 16),
    "cuda:89": (1536, 65536, 102400, 24), "cuda:90": (2048, 65536, 233472, 32), "cuda:100": (2048, 65536, 233472, 32),
    "cuda:120": (1536, 65536, 102400, 32), "hip:gfx942": (2048, 131072, 65536, 32), "hip:gfx1100": (2048, 98304, 65536, 32),
}  # fmt: skip


@dataclass(frozen=True)
class LoopReport:
    """A loop over chunks: instructions of its body, and how often it runs in all programs together."""

    kind: str
    instructions: int
    iterations: int


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


@dataclass(frozen=True)
class Report:
    """What `attnc.inspect` gives."""

    name: str
    target: str
    strategy: str
    allowed_elements: int
    issued_elements: int
    waste: float
    flops: int
    min_bytes: int
    moved_bytes: int
    compile_seconds: float
    kernels: dict[str, KernelReport] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in API.md."""
        out = asdict(self)
        del out["name"], out["target"]
        return out

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        head = (
            f"{self.name} for {self.target}: {self.strategy}, {self.issued_elements:,} scores issued for {self.allowed_elements:,} "
            f"allowed (waste {self.waste:.2f}), {self.moved_bytes / 2**20:.1f} MiB moved (least {self.min_bytes / 2**20:.1f})"
        )
        table = Table("kernel", "tile", "warps", "regs", "spill", "shared", "MMA", "instr.", "loops", "TI", "occupancy", box=None)
        for name, k in self.kernels.items():
            loops = ", ".join(f"{x.kind} {x.instructions} x {x.iterations}" for x in k.loops) or "-"
            cells = [
                name,
                k.tile,
                k.num_warps,
                k.registers,
                k.spill_bytes,
                k.shared_bytes,
                k.mma_instructions,
                k.instructions,
                loops,
            ]
            table.add_row(*map(str, cells), f"{k.ti:.1f}", f"{k.occupancy:.0%}")
        console = Console(width=150, no_color=True)
        with console.capture() as capture:
            console.print(head)
            console.print(table)
        return capture.get().rstrip()


class _Driver:
    """Names a target and owns no device."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def _pretending(target: str) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    kind, _, arch = target.partition(":")
    gpu = GPUTarget(kind, int(arch) if kind == "cuda" else arch, WARP.get(arch, 32))
    before = driver._active
    driver.set_active(_Driver(gpu))
    try:
        yield
    finally:
        driver._active = before


@dataclass
class Launch:
    """A kernel as the module launched it."""

    name: str
    compiled: Any
    grid: tuple[int, ...]
    warps: int


def compile_module(module: Any, target: str, call: Any) -> list[Launch]:
    """Run `call()`, which launches kernels of `module` on meta tensors; each is compiled for the target and none is run."""
    import triton

    if triton.knobs.runtime.interpret:
        raise UnsupportedError("inspect compiles kernels, and TRITON_INTERPRET=1 replaces the compiler; unset it")
    launches: list[Launch] = []

    def record(name: str, run: Any) -> Any:
        def stand_in(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            try:
                compiled = run(*args, grid=grid, warmup=True, **kwargs)
            except Exception as e:
                raise BuildError(f"kernel {name} does not compile for {target}: {type(e).__name__}: {e}") from e
            launches.append(Launch(name, compiled, tuple(grid), int(kwargs.get("num_warps", 4))))

        return stand_in

    for name, fn in list(vars(module).items()):
        if isinstance(fn, triton.runtime.JITFunction):
            fn.run = record(name, fn.run)
    with _pretending(target):
        call()
    return launches


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


def inspect(
    p: Pattern | Mechanism,
    *,
    grid: GridLike = None,
    kv_grid: GridLike = None,
    prefix: int = 0,
    pad: PadLike = None,
    heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: str | torch.dtype = "float16",
    target: str = "cuda:90",
    batch: int = 1,
) -> Report:
    """A report on the kernels that `attnc.emit` would print: strategy, work, and each kernel's machine code. No GPU is needed.

    Args:
        p: a pattern.
        grid, kv_grid, prefix, pad, heads, head_dim, value_dim, dtype, target: as for `attnc.emit`.
        batch: batch items of the launches that are weighed.

    Raises:
        UnsupportedError: the target is unknown, or the Triton printer does not lower the statement.
        ShapeError: a length of the grid is open.
        BuildError: a kernel does not compile for the target.
    """
    from attnc.compiler import compile

    if isinstance(p, Mechanism):
        raise UnsupportedError(f"mechanism {p.name}: inspect reports on patterns; inspect the patterns inside it")
    op = compile(p, grid=grid, kv_grid=kv_grid, prefix=prefix, pad=pad, heads=heads)
    if op.axes is None or op.grid is None or None in (*op.grid, *(op.kv_grid or ())):
        raise ShapeError(f"{p.name}: inspect needs a grid with known lengths, not grid={grid!r}, kv_grid={kv_grid!r}")
    q_grid = tuple(int(n) for n in op.grid if n is not None)
    k_grid = q_grid if op.kv_grid is None else tuple(int(n) for n in op.kv_grid if n is not None)
    kind = str(dtype).removeprefix("torch.")
    if kind not in ("float16", "bfloat16", "float32"):
        raise UnsupportedError(f"{p.name}: dtype={kind!r}; triton takes float16, bfloat16 and float32")
    return inspect_triton(
        core_program(op.program(len(op.axes))),
        q_grid,
        k_grid,
        heads=heads,
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        dtype=kind,
        target=target,
        batch=batch,
    )


def inspect_triton(
    program: ir.Program,
    q_grid: tuple[int, ...],
    k_grid: tuple[int, ...],
    *,
    heads: int,
    head_dim: int,
    value_dim: int,
    dtype: str,
    target: str,
    batch: int = 1,
    chosen: schedule.Tiles | None = None,
) -> Report:
    """Compile a program's module for a target and report on it."""
    from attnc.runtime.triton import load

    if target not in TARGETS:
        raise UnsupportedError(f"target {target!r}: one of {', '.join(TARGETS)}")
    kind = getattr(torch, dtype)
    itemsize = torch.empty(0, dtype=kind).element_size()
    spec = make_spec(
        program, q_grid, k_grid, head_dim=head_dim, value_dim=value_dim, itemsize=itemsize, chosen=chosen, target=target
    )
    g = spec.geometry
    assert g is not None
    module = load_fresh(source(spec, heads=heads, dtype=dtype, target=target), load)
    began = time.perf_counter()
    launches = compile_module(module, target, lambda: _call(module, spec, heads, head_dim, value_dim, kind, batch))
    seconds = time.perf_counter() - began
    most = _allowed(spec, heads)
    kernels: dict[str, KernelReport] = {}
    printed = {k.name: k for k in kernels_of(spec, Module())[0]}
    for launch in launches:
        code = code_of(launch, target)
        kernels[launch.name] = _kernel_report(spec, launch, code, printed.get(launch.name), most * batch, heads, batch, target)
    tile = spec.tiles.forward
    sent = schedule.issued(g, "q", tile) * heads + _prefix_elements(spec, heads)
    rows = (g.n_queries, g.n_keys)
    least = (
        batch * heads * itemsize * (rows[0] * (head_dim + value_dim) + rows[1] * (head_dim + value_dim))
        + batch * heads * rows[0] * 4
    )
    chunks = sent // tile.bm if tile.bm else 0
    moved = (
        batch * itemsize * (heads * rows[0] * (head_dim + value_dim) + chunks * (head_dim + value_dim))
        + batch * heads * rows[0] * 4
    )
    return Report(
        spec.attend.name, target, spec.structure.strategy, most * batch, sent * batch, sent / max(most, 1),
        2 * (head_dim + value_dim) * most * batch, least, moved, round(seconds, 3), kernels,
    )  # fmt: skip


def load_fresh(text: str, load: Any) -> Any:
    """A module whose kernels nobody has compiled for another target yet."""
    return load(text)


def _allowed(spec: Spec, heads: int) -> int:
    assert spec.geometry is not None
    return spec.geometry.allowed(heads)


def _prefix_elements(spec: Spec, heads: int) -> int:
    g = spec.geometry
    assert g is not None
    if not spec.prefix:
        return 0
    t, flat = spec.tiles.forward, spec.tiles.flat
    programs = math.prod(w.programs for w in schedule.walks(g, "q", t))
    grid_rows = programs * t.bm * -(-g.k_prefix // t.bn) * t.bn
    prefix_rows = -(-g.q_prefix // flat.rows[0]) * flat.bm * -(-g.n_keys // flat.bn) * flat.bn
    return heads * (grid_rows + prefix_rows)


def _tables(spec: Spec, heads: int, key_heads: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g, out = spec.geometry, {}
    assert g is not None
    relation = spec.attend.int_tables
    for name in spec.attend.tables:
        node = next(
            n
            for e in (spec.score, spec.residual, *([spec.post] if spec.post is not None else []))
            for n in ir.walk(e)
            if n.op == "load" and n.args[0] == name
        )
        shape = [heads if e == ir.HEAD else longest_index(g, e) or 64 for e in node.children]
        out[name] = torch.empty(shape, dtype=torch.int32 if name in relation else torch.float32, device="meta")
    if spec.padded:
        out["pad_k"] = torch.empty(key_heads, spec.head_dim, dtype=dtype, device="meta")
        out["pad_v"] = torch.empty(key_heads, spec.value_dim, dtype=dtype, device="meta")
    return out


def _call(module: Any, spec: Spec, heads: int, head_dim: int, value_dim: int, dtype: torch.dtype, batch: int) -> None:
    g = spec.geometry
    assert g is not None

    def rows(n: int, d: int) -> torch.Tensor:
        return torch.empty(batch, heads, n, d, dtype=dtype, device="meta")

    q, k, v = rows(g.n_queries, head_dim), rows(g.n_keys, head_dim), rows(g.n_keys, value_dim)
    tables = _tables(spec, heads, heads, dtype)
    scale = head_dim**-0.5
    out, lse = module.run_forward(q, k, v, tables, scale)
    module.run_backward(q, k, v, out, lse, rows(g.n_queries, value_dim), None, tables, scale)


def _kernel_report(
    spec: Spec, launch: Launch, code: sass.Code, printed: Kernel | None, allowed: int, heads: int, batch: int, target: str
) -> KernelReport:
    lanes = launch.warps * WARP.get(target.partition(":")[2], 32)
    programs = math.prod(launch.grid)
    executed = float(code.straight * programs)
    loops: list[LoopReport] = []
    tile, stages = "-", 1
    if printed is not None and launch.name == printed.name:
        t = printed.tile_choice
        tile, stages = f"{'x'.join(map(str, t.rows))}/{'x'.join(map(str, t.chunk))}", t.stages
        executed, loops = _weigh(spec, printed, code, programs, heads, batch)
    else:
        for loop in code.loops:
            executed += programs * loop.instructions
            loops.append(LoopReport("full", loop.instructions, programs))
    return KernelReport(
        code.registers, code.spill_bytes, code.shared_bytes, code.mma, code.instructions, loops, executed * lanes / max(allowed, 1),
        occupancy(code, launch.warps, target), tile, launch.warps, stages,
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
    right = chunks - full - left
    outer_loops = [p for p in k.outer if not p.single and not k.hoist]
    expected = (
        []
        if k.hoist
        else ([("partial", left)] if left else []) + ([("full", full)] if full else []) + ([("partial", right)] if right else [])
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
                    here = programs // ws[k.inner.axis].programs * inner.programs
                    here = each * math.prod(w.steps for w in ws if w is not inner) * inner.programs
                executed += loop.instructions * here
                visit(loop.inner, depth + 1, here)
            elif k.hoist:
                n = heads * batch * math.prod(w.programs for w in ws) if k.batched else times
                unroll = max(1, round(loop.mma / per_chunk)) if per_chunk else 1
                executed += loop.instructions * n / unroll
                loops.append(LoopReport("partial" if not all(p.exact for p in k.plans) else "full", loop.instructions, n))
            elif loop.mma:
                i = with_mma.index(loop)
                kind, n = expected[i] if i < len(expected) else ("partial", 0)
                unroll = max(1, round(loop.mma / per_chunk)) if per_chunk else 1
                executed += loop.instructions * n / unroll
                loops.append(LoopReport(kind, loop.instructions, n))
            else:
                executed += loop.instructions * times

    masses = sorted(x.mma for x in _leaves(code.loops) if x.mma)
    per_chunk = masses[0] if masses else 0
    visit(code.loops, 0, programs)
    return executed, loops


def _leaves(loops: tuple[sass.Loop, ...]) -> list[sass.Loop]:
    return [y for x in loops for y in (_leaves(x.inner) if x.inner else [x])]
