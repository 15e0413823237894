"""`attnc.tune`: measure the candidates of a pattern at the shapes of a model, keep the winners, and show what was tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc.arguments import DTYPES, GridLike, PadLike
from attnc.compiler import Operator, compile
from attnc.errors import DeclarationError, ShapeError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern
from attnc.runtime import device as devices
from attnc.runtime import tuner, winners
from attnc.runtime.device import Device
from attnc.runtime.tuner import Race, Trial
from attnc.runtime.winners import Merged
from attnc.schedule.bounds import table_shapes

__all__ = ["Merged", "Race", "Shape", "Trial", "Tuning", "export_winners", "import_winners", "tune"]


@dataclass(frozen=True)
class Shape:
    """What a call looks like: sizes of q, k and v, and what `attnc.compile` is told. backward: its candidates are measured too."""

    grid: GridLike
    batch: int = 1
    heads: int = 1
    head_dim: int = 32
    value_dim: int | None = None
    kv_heads: int | None = None
    dtype: str | torch.dtype = "float32"
    kv_grid: GridLike = None
    prefix: int = 0
    pad: PadLike = None
    layout: str | None = None
    backward: bool = True

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype as torch's own."""
        found: Any = getattr(torch, str(self.dtype).removeprefix("torch."), None)
        if found not in DTYPES:
            raise DeclarationError(f"dtype={self.dtype!r}: one of float32, float16, bfloat16, float64")
        dtype: torch.dtype = found
        return dtype


@dataclass(frozen=True)
class Tuning:
    """What `attnc.tune` measured: a race for each statement, direction and shape. Prints as a table (`rich.print`, or str)."""

    pattern: str
    device: str
    threads: int | None  # None on a GPU
    races: tuple[Race, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    def __rich__(self) -> Any:
        """The table: every trial, the winner of each race marked, and the one that an untuned call takes."""
        from rich.table import Table

        note = "predicted: the cost model's, scaled to what its own choice took"
        out = Table(
            "shape", "pass", "choice", "ms", "predicted ms", "", caption=note, box=None, pad_edge=False, caption_justify="left"
        )
        for r in self.races:
            for n, t in enumerate(r.trials):
                marks = [*(["kept"] if n == 0 else []), *(["untuned"] if t.choice == r.untuned else [])]
                marks += [f"{r.gain:.2f}x the kept one's time"] if n and t.choice == r.untuned else []
                head = (r.shape, r.direction) if n == 0 else ("", "")
                out.add_row(*head, t.choice, f"{1e3 * t.seconds:.3f}", f"{1e3 * t.predicted:.3f}", ", ".join(marks))
            for choice, why in r.dropped:
                out.add_row("", "", choice, "-", "-", f"not measured: {why}")
        return out

    @property
    def title(self) -> str:
        """What was measured, and where."""
        return f"{self.pattern} on {self.device}" + (f", {self.threads} threads" if self.threads else "")

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, highlight=False, no_color=True)
        with console.capture() as text:
            console.print(self.title)
            console.print(self)
        return text.get()


def tune(
    p: Pattern | Mechanism,
    shapes: Shape | Mapping[str, Any] | Iterable[Shape | Mapping[str, Any]],
    device: str | Device = "cpu",
    *,
    graphs: bool = False,
    told: Callable[[Race], None] | None = None,
) -> Tuning:
    """Measure the candidates of a pattern at some shapes, forward and backward apart, and keep each winner in the cache.

    Every later call with the same statement, dtype, head dimensions and direction on this device (and number of threads, on a
    CPU) takes the winner, in any process, where its lengths and its number of (batch, head) pairs fall into the same bucket. A
    new version of the kernels, of torch or of triton is measured anew.

    Args:
        p: a pattern or a mechanism.
        shapes: one or several `attnc.Shape`, or their fields as a mapping: `{"grid": (56, 56), "batch": 8, "heads": 3}`.
        device: where to measure: "cpu" (with torch's number of threads), "cuda", "cuda:1" (ROCm, too), or a
            `runtime.device.Device`, which may bring a clock of its own.
        graphs: on a GPU, time launches captured in CUDA graphs, which leaves out the host's share.
        told: called with each race when it is over.

    Raises:
        UnsupportedError: there is no such device here, or it has no tuner.
        ShapeError: the lengths of a shape are open, or a runtime table's size does not follow from it.
        DeclarationError: a shape has an unknown field.
        BuildError: no candidate of a kernel fits the device.
    """
    if not isinstance(p, Pattern | Mechanism):
        raise DeclarationError(f"attnc.tune takes a pattern or a mechanism, not {type(p).__name__}")
    several = [shapes] if isinstance(shapes, Shape | Mapping) else list(shapes)
    asked = [s if isinstance(s, Shape) else _shape(p.name, s) for s in several]
    where = device if isinstance(device, Device) else devices.named(device, graphs=graphs)
    with devices.using(where), tuner.racing(told) as races:
        for s in asked:
            _call(p, s, where)
    return Tuning(p.name, where.name, torch.get_num_threads() if where.target == "cpu" else None, tuple(races))


def export_winners(path: str) -> int:
    """Write all winners of this cache to a JSON file for others to import; gives their number. Raises CacheError."""
    return winners.export_winners(path)


def import_winners(path: str) -> Merged:
    """Merge a file of `export_winners` into this cache: the faster at the same shape is kept, else the newer. Raises CacheError
    where the file is not one, has an unknown field or a value of the wrong type; then nothing is changed."""
    found = winners.import_winners(path)
    tuner.forget()
    return found


def _shape(name: str, fields: Mapping[str, Any]) -> Shape:
    known = [f.name for f in dataclasses.fields(Shape)]
    for field in fields:
        if field not in known:
            raise DeclarationError(f"{name}: a shape has no field {field!r}; it has {', '.join(known)}")
    if "grid" not in fields:
        raise ShapeError(f"{name}: a shape needs a grid: {{'grid': (56, 56), ...}}, not {dict(fields)!r}")
    return Shape(**fields)


def _call(p: Pattern | Mechanism, s: Shape, where: Device) -> None:
    """Forward and backward of one shape, by an operator that tunes."""
    if isinstance(p, Mechanism):  # channel attention has one way to run
        return
    options: dict[str, Any] = {"kv_grid": s.kv_grid, "prefix": s.prefix, "pad": s.pad, "layout": s.layout}
    backend = "cpp" if where.target == "cpu" else "triton"
    op = compile(p, grid=s.grid, heads=s.heads, backend=backend, tune=True, **options)
    if op.grid is None or None in (*op.grid, *(op.kv_grid or ())):
        raise ShapeError(f"{p.name}: tuning needs known lengths, not grid={s.grid!r}, kv_grid={s.kv_grid!r}")
    grids = [tuple(int(n) for n in g if n is not None) for g in (op.grid, op.kv_grid or op.grid)]
    tables: dict[str, Any] = {n: t.to(where.where).requires_grad_(s.backward) for n, t in _tables(op, s, *grids).items()}
    q, *rest = (t.to(where.where).requires_grad_(s.backward) for t in _rows(op, s, *grids))
    out = op(q, *rest, **tables)
    if s.backward:
        out.backward(torch.randn_like(out))


def _rows(op: Operator, s: Shape, q_grid: tuple[int, ...], k_grid: tuple[int, ...]) -> list[Tensor]:
    """Random q, k and v in the operator's layout, or one packed tensor."""
    kv_heads, values = s.kv_heads or s.heads, s.value_dim or s.head_dim
    shapes = [(s.heads, q_grid, s.head_dim), (kv_heads, k_grid, s.head_dim), (kv_heads, k_grid, values)]
    packed = op.layout is not None and op.layout.packed
    if packed and len(set(shapes)) != 1:
        raise ShapeError(f"{op.source.name}: the layout {s.layout!r} packs q, k and v, which then have one shape")
    made = []
    for heads, grid, width in shapes[:1] if packed else shapes:
        lengths = dict(zip(op.axes or (), grid, strict=True)) | {"b": s.batch, "h": heads, "d": width, "three": 3}
        groups = [("b",), ("h",), op.axes or (), ("d",)] if op.layout is None else op.layout.groups
        extra = s.prefix if grid is q_grid or s.kv_grid is None else 0
        sizes = []
        for g in groups:
            n = 1
            for name in g:
                n *= lengths[name]
            sizes.append(n + extra if set(g) & set(op.axes or ()) else n)
        made.append(torch.randn(sizes, dtype=s.torch_dtype))
    return made


def _tables(op: Operator, s: Shape, q_grid: tuple[int, ...], k_grid: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tables, as large as the pattern's indices ask for."""
    program = op.program(len(q_grid))
    found = {}
    for name, shape in table_shapes(program, q_grid, k_grid, s.heads, s.batch).items():
        if name in getattr(program.attend, "int_tables", ()):
            raise ShapeError(
                f"{op.source.name}: the relation reads the table {name!r}, whose values no shape tells: "
                "compile with tune=True and call the operator on your tensors"
            )
        found[name] = torch.randn(shape)
    return found
