"""What users pass as `grid=` and `pad=`, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from attnc import ir
from attnc.analysis.dropout import kept_words
from attnc.errors import DeclarationError, ShapeError, UnsupportedError
from attnc.runtime.layout import Layout

GridLike = int | Sequence[int | None] | Mapping[str, int | None] | None
PadLike = Literal["multiple"] | Sequence[tuple[int, int]] | None


def axes_and_sizes(grid: GridLike, layout: Layout | None) -> tuple[tuple[str, ...] | None, tuple[int | None, ...] | None]:
    """Axis names and lengths that `grid=` and `layout=` tell; None where they leave it open."""
    if grid is None:
        return (layout.axes, None) if layout else (None, None)
    if isinstance(grid, Mapping):
        names, sizes = tuple(grid), tuple(grid.values())
        for name in names:
            if not isinstance(name, str) or not name.isidentifier() or name.startswith("__") or name in ("index", "size", "axes"):
                raise DeclarationError(
                    f"grid {grid!r}: {name!r} cannot name an axis; q.index, q.size and q.axes mean something else"
                )
        if not names:
            raise DeclarationError("grid {}: at least one axis")
    else:
        sizes = (grid,) if isinstance(grid, int) else tuple(grid)
        names = layout.axes if layout else ir.AXES.get(len(sizes), ())
        if not names:
            raise DeclarationError(f"grid {grid!r}: {len(sizes)} axes need names: pass a dict, e.g. {{'a': 4, 'b': 5, ...}}")
    if layout and names != layout.axes:
        raise DeclarationError(f"layout {layout.text!r} has the axes {layout.axes}, grid= has {names}")
    for n in sizes:
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise DeclarationError(f"grid {grid!r}: axis lengths are positive ints (or None where a call tells)")
    return names, sizes


def call_sizes(grid: GridLike, axes: tuple[str, ...] | None, name: str) -> tuple[int, ...] | None:
    """Lengths given with a call, in the order of the operator's axes."""
    if grid is None:
        return None
    if isinstance(grid, Mapping):
        expected = axes or ir.AXES.get(len(grid), ())
        if set(grid) != set(expected):
            raise ShapeError(f"{name}: grid={dict(grid)!r}, but the axes are ({', '.join(expected)})")
        values = tuple(grid[a] for a in expected)
    else:
        values = tuple(grid) if isinstance(grid, Sequence) else (grid,)
    if not values or any(n is None or isinstance(n, bool) or not isinstance(n, int | torch.SymInt) or n < 1 for n in values):
        raise ShapeError(f"{name}: grid={grid!r}: a call gives every axis its length, a positive int")
    return tuple(n for n in values if n is not None)


def pad_of(pad: PadLike, attend: ir.Attend, same_grid: bool) -> dict[str, Any]:
    """The padding fields of ir.Tokens. "multiple" reads the block length of each axis off the proof."""
    if pad is None:
        return {}
    if pad != "multiple":
        pairs = tuple((int(a), int(b)) for a, b in pad)
        if len(pairs) != attend.rank or any(a < 0 or b < 0 for a, b in pairs):
            raise DeclarationError(f"pad={pad!r}: ((before, after), ...) with one pair of non-negative ints per axis")
        return {"pad": pairs}
    from attnc.analysis.structure import analyse

    multiples = []
    for axis, form in enumerate(analyse(attend, same_grid, True).axes):
        parts = [form.split, *([form.block] if form.block is not None else [])]
        if any(p.op != "const" for p in parts) or not form.equivalence:
            raise UnsupportedError(
                f"pattern {attend.name}: pad='multiple' needs blocks of a constant length; axis {axis} is a {form.kind}: "
                "give pad=((before, after), ...)"
            )
        n = 1
        for p in parts:
            n *= int(p.args[0])
        multiples.append(n)
    return {"pad_multiple": tuple(multiples)}


def check_dropout(name: str, p: float, seed: int | None) -> None:
    """Refuse a probability outside [0, 1) and a seed that is no 64-bit integer."""
    if isinstance(p, bool | Tensor) or not isinstance(p, float | int | torch.SymFloat) or not 0 <= p < 1:
        raise ShapeError(f"{name}: dropout_p={p!r}: the probability of dropping a weight, a number from 0 to less than 1")
    if seed is not None and (not isinstance(seed, int | torch.SymInt) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64):
        raise ShapeError(f"{name}: seed={seed!r}: a 64-bit integer, or None to draw one from torch's default generator")


def seed_table(p: float, seed: int | None, device: torch.device) -> Tensor:
    """What dropout reads at run time (see analysis.dropout): int64 [3], each a signed 32-bit number. Nothing waits for the device."""
    kept = torch.tensor([kept_words(p)], device=device)
    if seed is None:
        return torch.cat((torch.randint(-(2**31), 2**31, (2,), device=device), kept))
    halves = [(seed // 2 ** (32 * i) + 2**31) % 2**32 - 2**31 for i in range(2)]
    return torch.cat((torch.tensor(halves, device=device), kept))
