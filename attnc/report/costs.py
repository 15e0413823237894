"""The cost model's section of `attnc.explain`: what kernels would do on GPUs whose facts are public. Nothing of it was measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from attnc import ir
from attnc.codegen import triton_plan
from attnc.codegen.around import core_program
from attnc.codegen.triton import kernels_of, make_spec
from attnc.codegen.triton_shapes import Module
from attnc.errors import UnsupportedError
from attnc.report.subject import Subject
from attnc.schedule import cost, tiles
from attnc.schedule.chips import Chip, chips
from attnc.schedule.cost import Sizes, Time, Work
from attnc.schedule.geometry import Geometry
from attnc.schedule.walks import Tile

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx1100")
DIM, DTYPE = 32, "float16"  # what a statement does not say, and a cost needs
KINDS = {"forward": ("forward",), "backward": ("dq", "dkv", "fused")}


@dataclass(frozen=True)
class Modelled:
    """One direction on one chip: its kernels' work, and their times one after the other."""

    direction: str
    chip: Chip
    works: tuple[Work, ...]
    time: Time


def modelled(s: Subject, chip: Chip, *, head_dim: int = DIM, dtype: str = DTYPE, batch: int = 1) -> tuple[Modelled, ...]:
    """Forward and backward of a statement at known sizes on a chip, over all its parts (pairs of prefix tokens aside).

    Raises:
        UnsupportedError: the Triton printer does not lower a part.
    """
    out = []
    for direction, kinds in KINDS.items():
        works, times = [], []
        for p in s.parts:
            assert p.geometry is not None
            sizes = Sizes(p.heads, p.heads, batch, head_dim, head_dim, dtype)
            for kind, tile in _kernels(core_program(p.program), p.geometry, sizes, tiles.alike(chip.target), s.union):
                if kind in kinds:
                    works.append(cost.of_geometry(p.geometry, kind, tile, sizes, chip.target))
                    times.append(cost.roofline(works[-1], sizes, chip))
        out.append(Modelled(direction, chip, tuple(works), cost.total(times)))
    return tuple(out)


@lru_cache(maxsize=256)
def _kernels(program: ir.Program, g: Geometry, sizes: Sizes, target: str, part: bool) -> tuple[tuple[str, Tile], ...]:
    """Kinds and tiles of the kernels that a module of the program has."""
    dims: dict[str, Any] = {"head_dim": sizes.head_dim, "value_dim": sizes.value_dim, "itemsize": sizes.itemsize}
    spec = make_spec(program, g.q_grid, g.k_grid, **dims, target=target, part=part)
    names = {"forward": "forward", "backward_dq": "dq", "backward_dkv": "dkv"}
    found = [k for k in kernels_of(spec, Module())[0] if k.kind in names]
    return tuple(("fused" if k.fused else names[k.kind], k.tile_choice) for k in found)


def section(s: Subject) -> list[str]:
    """Lines for people; none where sizes are open, nothing is seen, or the Triton printer refuses (which is said elsewhere)."""
    if s.geometry is None or not s.parts:
        return []
    try:
        for p in s.parts:
            triton_plan.check(core_program(p.program))
        by_chip = [modelled(s, next(c for c in chips() if c.target == t)) for t in TARGETS]
    except UnsupportedError:
        return []
    size = "x".join(map(str, s.geometry.q_grid))
    heads = f"{s.heads} head{'' if s.heads == 1 else 's'}"
    lines = [f"Cost on GPUs at {size}, {heads} of {DIM}, batch 1, {DTYPE}: a model, not a measurement"]
    for m in by_chip[0]:
        least, moved, flops = (sum(float(getattr(w, n)) for w in m.works) for n in ("least", "loaded", "flops"))
        elements = sum(w.issued for w in m.works)
        lines.append(f"  {m.direction:11} {_si(flops)}FLOP on {elements:,} score elements; {_si(least)}B if each tensor moves")
        lines.append(f"  {'':11} once, {_si(moved)}B as programs load rows; {flops / least:.0f} FLOP a byte")
        for w in m.works:
            shown = f"{'x'.join(map(str, w.tile.rows))} rows, chunks of {'x'.join(map(str, w.tile.chunk))}"
            warps = f"{w.tile.warps} warp{'s' * (w.tile.warps > 1)}"
            lines.append(f"  {'':11} {w.programs:,} programs of {shown}, {warps}, about {w.shared / 1024:.0f} KiB shared")
    for both in by_chip:
        told = ", ".join(f"{m.direction} {_si(m.time.seconds)}s ({m.time.bound}, {m.time.waves:.2g} waves)" for m in both)
        lines.append(f"  {both[0].chip.target:11} {told}")
    return lines


def _si(x: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("u", 1e-6)):
        if x >= scale:
            return f"{x / scale:.3g} {unit}"
    return f"{x / 1e-9:.3g} n"
