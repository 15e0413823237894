"""The static report of a Triton module: what it issues, what it needs, what its machine code looks like. No GPU is needed.

The module's own launches run on tensors without data while a stand-in driver names the target, so every kernel is compiled as it
would be on that device, and its machine code is read and weighed with the tile counts. Where an operator's call walks lists of
blocks, the report is on the kernels that walk them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attnc import ir
from attnc.codegen.around import core_program
from attnc.codegen.triton import make_spec, part_specs, printed, source
from attnc.codegen.triton_face import longest_index
from attnc.codegen.triton_kernels import Kernel
from attnc.codegen.triton_plan import Spec
from attnc.errors import BuildError, ShapeError, UnsupportedError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern
from attnc.report.weigh import WARP, KernelReport, Launch, code_of, kernel_report, together
from attnc.schedule import walks as schedule
from attnc.schedule.geometry import Geometry
from attnc.schedule.lists import BlockLists
from attnc.schedule.tiles import Tiles

if TYPE_CHECKING:
    from attnc.arguments import GridLike, PadLike
    from attnc.runtime.triton_lists import Lists

TARGETS = ("cuda:75", "cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx1100")


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
    key_rows_per_query: float = 0.0  # rows of K (and of V) that the forward loads for each query

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
            f"allowed (waste {self.waste:.2f}), {self.moved_bytes / 2**20:.1f} MiB moved (least {self.min_bytes / 2**20:.1f}), "
            f"{self.key_rows_per_query:.2f} rows of K and V loaded for each query"
        )
        shown = "tile warps regs spill local shared MMA instr. loops loads TI occupancy"
        table = Table("kernel", *shown.split(), box=None)
        for name, k in self.kernels.items():
            loops = ", ".join(f"{x.kind} {x.instructions} x {x.iterations}" for x in k.loops) or "-"
            loads = ", ".join(f"{n} x {bits} bit" for bits, n in k.global_loads.items()) or "-"
            held = (k.num_warps, k.registers, k.spill_bytes, k.local_accesses, k.shared_bytes, k.mma_instructions, k.instructions)
            table.add_row(name, k.tile, *map(str, held), loops, loads, f"{k.ti:.1f}", f"{k.occupancy:.0%}")
        console = Console(width=190, no_color=True)
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
    """A report on the kernels of a statement: strategy, work, and each kernel's machine code. No GPU is needed.

    They are those that `attnc.emit` would print, and an operator runs on the first grids of a process (those that it meets after
    eight share kernels that take sizes as arguments). Where an operator's calls walk lists of blocks, which a stand-alone module
    does not, they are the operator's, and the strategy ends in "by lists".

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
    chosen: Tiles | None = None,
) -> Report:
    """Compile a program's module for a target and report on it."""
    if target not in TARGETS:
        raise UnsupportedError(f"target {target!r}: one of {', '.join(TARGETS)}")
    kind = getattr(torch, dtype)
    itemsize = torch.empty(0, dtype=kind).element_size()
    sizes: dict[str, Any] = {"head_dim": head_dim, "value_dim": value_dim, "itemsize": itemsize}
    spec = make_spec(program, q_grid, k_grid, **sizes, chosen=chosen, target=target)
    parts = () if chosen else part_specs(program, q_grid, k_grid, heads, **sizes, target=target)
    every = parts or (spec,)
    lists = [None if chosen else lists_of(s, target, heads, batch) for s in every]
    modules = [_Module(spec, parts, (None,) * len(every), heads)]
    if any(x is not None for x in lists):  # an operator runs each part by itself
        modules = [_called(s, x, s.heads(heads), target) for s, x in zip(every, lists, strict=True)]
    most = sum(_geometry(s).allowed(s.heads(heads)) for s in every)
    found: dict[str, list[KernelReport]] = {}
    seconds, sent, rows = 0.0, 0, 0
    for m in modules:
        module = load_fresh(m.text(dtype, target))
        began = time.perf_counter()
        launches = compile_module(module, target, partial(_call, module, m, head_dim, value_dim, kind, batch))
        seconds += time.perf_counter() - began
        kernels = m.kernels()
        for launch in launches:
            owner, kernel = kernels.get(launch.name, (m.spec, None))
            blocks = None if kernel is None else m.blocks(kernel)
            mine = owner.heads(m.heads)
            report = kernel_report(owner, launch, code_of(launch, target), kernel, most * batch, mine, batch, target, blocks)
            found.setdefault(launch.name.removesuffix(owner.suffix), []).append(report)
        for s, x in zip(m.parts or (m.spec,), m.lists, strict=True):
            elements = s.heads(m.heads) * _elements(s, x)
            sent += elements + _prefix_elements(s, x, heads)
            rows += elements // s.tiles.forward.bm
    g, width = _geometry(spec), head_dim + value_dim
    statistics = batch * g.n_queries * 4
    least = batch * heads * itemsize * (g.n_queries + g.n_keys) * width + heads * statistics
    read = sum(s.heads(heads) for s in every)
    again = 2 * read - heads  # a later part reads its queries anew, and the output that it goes on from
    moved = batch * itemsize * (g.n_queries * (read * head_dim + again * value_dim) + rows * width)
    return Report(
        spec.attend.name, target, " + ".join(map(_strategy, every, lists)), most * batch, sent * batch, sent / max(most, 1),
        2 * width * most * batch, least, moved + again * statistics, round(seconds, 3),
        {name: together(each) for name, each in found.items()}, round(rows / heads / max(g.n_queries, 1), 3),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Module:
    """A module to compile; of each of its statements the lists that its tiles walk, None for boxes."""

    spec: Spec
    parts: tuple[Spec, ...]
    lists: tuple[Lists | None, ...]
    heads: int

    @property
    def printed(self) -> Spec:
        """What is printed: where lists are walked, sizes are arguments as in an operator's module."""
        return replace(self.spec, geometry=None) if self.spec.listed else self.spec

    def text(self, dtype: str, target: str) -> str:
        """The module."""
        return source(self.printed, parts=self.parts, heads=self.heads, dtype=dtype, target=target, alone=False)

    def kernels(self) -> dict[str, tuple[Spec, Kernel]]:
        """Its kernels by name, but for those of prefix tokens, with their statements."""
        found = printed(self.printed, self.parts)[1]
        return {k.name: (s if self.parts else self.spec, k) for s, mine, _ in found for k in mine}

    def blocks(self, k: Kernel) -> BlockLists | None:
        """What a kernel's tiles visit, where it walks lists."""
        found = self.lists[0]
        return None if found is None else found.keys if k.side == "k" else found.queries


def lists_of(s: Spec, target: str, heads: int, batch: int) -> Lists | None:
    """The lists that an operator's call on the target walks (the values of tables in its memory are not looked at)."""
    from attnc.runtime import triton_lists

    kernels = triton_lists.Kernels(s.head_dim, s.value_dim, s.itemsize, target)
    return triton_lists.of(_geometry(s), kernels, heads, batch, ())


def _called(s: Spec, lists: Lists | None, heads: int, target: str) -> _Module:
    """What an operator runs of one statement."""
    g = _geometry(s)
    sizes: dict[str, Any] = {"head_dim": s.head_dim, "value_dim": s.value_dim, "itemsize": s.itemsize, "target": target}
    chosen = s.tiles if lists is None else lists.tiles
    sizes |= {"listed": lists is not None, "filled": lists is not None and lists.filled}
    made = make_spec(s.program, g.q_grid, g.k_grid, **sizes, chosen=chosen, part=s.part)
    return _Module(made, (), (lists,), heads)


def _strategy(s: Spec, lists: Lists | None) -> str:
    return s.structure.strategy + (" by lists" if lists is not None else "")


def issued_by(spec: Spec, parts: tuple[Spec, ...], heads: int) -> int:
    """Score elements that the forward of a module computes for one batch item, those of prefix tokens included."""
    return sum(_elements(s, None) * s.heads(heads) + _prefix_elements(s, None, heads) for s in parts or (spec,))


def _elements(s: Spec, lists: Lists | None) -> int:
    """Score elements that the forward computes for a head's pairs on the grid."""
    t = s.tiles.forward
    return schedule.issued(_geometry(s), "q", t) if lists is None else lists.queries.visited * t.bm * t.bn


def _geometry(spec: Spec) -> Geometry:
    assert spec.geometry is not None
    return spec.geometry


def load_fresh(text: str) -> Any:
    """A module whose kernels nobody has compiled for another target yet."""
    from attnc.runtime.triton import load

    return load(text)


def _prefix_elements(spec: Spec, lists: Lists | None, heads: int) -> int:
    g = spec.geometry
    assert g is not None
    if not spec.prefix:
        return 0
    t, flat = spec.tiles.forward, spec.tiles.flat
    programs = math.prod(w.programs for w in schedule.walks(g, "q", t)) if lists is None else len(lists.queries.full)
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


def _call(module: Any, m: _Module, head_dim: int, value_dim: int, dtype: torch.dtype, batch: int) -> None:
    spec, g, heads = m.spec, _geometry(m.spec), m.heads

    def rows(n: int, d: int) -> torch.Tensor:
        return torch.empty(batch, heads, n, d, dtype=dtype, device="meta")

    q, k, v = rows(g.n_queries, head_dim), rows(g.n_keys, head_dim), rows(g.n_keys, value_dim)
    tables = _tables(spec, heads, heads, dtype)
    scale = head_dim**-0.5
    more: tuple[Any, ...] = ()
    if m.lists[0] is not None:
        from attnc.runtime import triton_lists

        more = ((g.q_grid,) if spec.program.same_grid else (g.q_grid, g.k_grid)) + (triton_lists.on(m.lists[0], q.device),)
    out, lse = module.run_forward(q, k, v, tables, scale, *more)
    module.run_backward(q, k, v, out, lse, rows(g.n_queries, value_dim), None, tables, scale, *more)
