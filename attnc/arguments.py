"""What users pass to an operator and to its calls, read and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnc import ir
from attnc.errors import DeclarationError, ShapeError, UnsupportedError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern
from attnc.runtime.layout import Layout
from attnc.runtime.parts import TableSpec

GridLike = int | Sequence[int | None] | Mapping[str, int | None] | None
PadLike = Literal["multiple"] | Sequence[tuple[int, int]] | None
SizesLike = Tensor | tuple[Tensor, Tensor] | None
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
        given = [list(pair) if isinstance(pair, Sequence) else [] for pair in pad] if isinstance(pad, Sequence) else []
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for pair in given for n in pair)
        if len(given) != attend.rank or not whole or any(len(pair) != 2 for pair in given):
            raise DeclarationError(
                f'pad={pad!r}: "multiple", or ((before, after), ...) with one pair of non-negative ints for each axis'
            )
        return {"pad": tuple((a, b) for a, b in given)}
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


def check_tensors(name: str, q: Tensor, k: Tensor | None, v: Tensor | None) -> None:
    """Refuse what is no tensor, and tensors without strides."""
    for what, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) and (t is not None or what == "q"):
            raise ShapeError(f"{name}: {what} is a {type(t).__name__}, not a tensor")
        if t is not None and (t.is_nested or t.layout is not torch.strided):
            kind, out = ("nested", "pack its images and give sizes=") if t.is_nested else (str(t.layout), f"give {what}.to_dense()")
            raise ShapeError(f"{name}: {what} is a {kind} tensor, expected a strided one: {out}")


def check_scale(name: str, scale: Any) -> None:
    """Refuse a scale that is no finite number."""
    if isinstance(scale, Tensor):
        raise ShapeError(
            f"{name}: scale= is a number, and this is a tensor, which would get no gradient; "
            "make it a table of the pattern: attnc.SCORE * temperature[attnc.HEAD] with scale=1.0"
        )
    if isinstance(scale, torch.SymFloat | torch.SymInt):
        return
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise ShapeError(f"{name}: scale={scale!r}: a finite number, or None for D ** -0.5")


def check_transforms(name: str, given: Iterable[Any]) -> None:
    """Refuse forward-mode derivatives, which the operators would silently leave out, and torch.func's transforms of tensors."""
    if torch.compiler.is_compiling():
        return
    functorch: Any = torch._C._functorch
    tensors = [t for t in given if isinstance(t, Tensor)]
    if any(functorch.is_gradtrackingtensor(t) or functorch.is_batchedtensor(t) for t in tensors):
        raise UnsupportedError(
            f"{name}: attention has no rules for torch.func's transforms (grad, vjp, jvp, vmap, ...): take gradients by "
            "backward() or torch.autograd.grad, and more batch items in place of vmap"
        )
    unpack: Any = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and any(unpack(t).tangent is not None for t in tensors):
        raise UnsupportedError(
            f"{name}: forward-mode derivatives of attention are not lowered by any backend: take gradients by backward() or "
            "torch.autograd.grad, or write the attention in plain PyTorch where tangents are needed"
        )


def sizes_of(sizes: Tensor | tuple[Tensor, Tensor], source: Pattern | Mechanism, same_grid: bool) -> Tensor:
    """One int tensor [images, rank] (where keys have a grid of their own, [images, 2 rank]) of what a call gives as `sizes=`."""
    name = source.name
    if isinstance(source, Mechanism):
        raise UnsupportedError(f"mechanism {name}: sizes= belongs to patterns: its tokens have no grid")
    given: tuple[Any, ...] = (sizes,) if same_grid else sizes if isinstance(sizes, tuple) else ()
    if not given or len(given) != (1 if same_grid else 2):
        raise ShapeError(f"{name}: keys have a grid of their own: sizes= is a pair of int tensors, of queries and of keys")
    for t in given:
        if not isinstance(t, Tensor):
            raise ShapeError(
                f"{name}: sizes= holds a {type(t).__name__}, expected an int tensor [images, rank]: torch.tensor(sizes)"
            )
        if t.dim() != 2 or t.shape[1] == 0 or t.dtype == torch.bool or t.is_floating_point() or t.is_complex():
            raise ShapeError(f"{name}: sizes= is {t.dtype} {tuple(t.shape)}, expected an int tensor [images, rank]")
    if same_grid:
        only: Tensor = given[0]
        return only
    if given[0].shape != given[1].shape:
        raise ShapeError(
            f"{name}: sizes= of queries is {tuple(given[0].shape)}, of keys {tuple(given[1].shape)}; both have one shape"
        )
    return torch.cat(given, 1)


def packs(name: str, images: int, rank: int, q: Tensor, axes: tuple[str, ...] | None, told: bool) -> bool:
    """Whether sizes= says how packed tokens fall into images: where nothing told a grid.

    On one axis the tokens are a grid of their own; they are packed where the images are not as many as the batch items.
    """
    if told or (rank == 1 and images == q.shape[0]):
        return False
    if axes is not None and len(axes) != rank:
        raise ShapeError(f"{name}: sizes= has {rank} columns for each grid, the axes are ({', '.join(axes)})")
    if q.shape[0] != 1:
        raise ShapeError(
            f"{name}: sizes= without a grid is for packed images, one after the other in a batch of 1; here q has shape "
            f"{tuple(q.shape)}: give grid= for images in the low corners of a grid, one for each batch item"
        )
    return True


def check_rows(name: str, heads: int | None, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ShapeError where q, k and v, [B, H, N, D] or [B, H, *grid, D], do not fit together. heads: the operator's, if known."""
    if not (q.shape[0] == k.shape[0] == v.shape[0]):
        raise ShapeError(f"{name}: batch sizes differ: {_shapes(q, k, v)}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"{name}: {q.shape[1]} query heads over {k.shape[1]} key and {v.shape[1]} value heads: {_shapes(q, k, v)}")
    if heads is not None and q.shape[1] != heads:
        raise ShapeError(f"{name}: compiled for heads={heads}, called with {q.shape[1]}: {_shapes(q, k, v)}")
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(f"{name}: head dimensions of q and k differ: {_shapes(q, k, v)}")
    if k.shape[2:-1] != v.shape[2:-1]:
        raise ShapeError(f"{name}: k and v have different tokens: {_shapes(q, k, v)}")
    for what, d in (("D", q.shape[-1]), ("Dv", v.shape[-1])):
        if not 1 <= d <= 256:
            raise ShapeError(f"{name}: {what} = {d}; head dimensions go from 1 to 256")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in DTYPES:
        raise ShapeError(
            f"{name}: dtypes {q.dtype}, {k.dtype}, {v.dtype}: q, k and v share one of float32, float16, bfloat16, float64"
        )
    if not (q.device == k.device == v.device):
        raise ShapeError(f"{name}: devices {q.device}, {k.device}, {v.device} differ")


def check_tables(name: str, specs: tuple[TableSpec, ...], given: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ShapeError where the tables of a call are not those that the statement reads, by name, rank, kind and device."""
    names = [s.name for s in specs]
    for n in given:
        if n not in names:
            raise ShapeError(f"{name}: unknown table {n!r} (it reads: {', '.join(names) or 'none'})")
    for s in specs:
        n, t = s.name, given.get(s.name)
        if t is not None and not isinstance(t, Tensor):
            raise ShapeError(f"{name}: the table {n!r} is a {type(t).__name__}, not a tensor")
        if n in ("pad_k", "pad_v"):
            width = (k if n == "pad_k" else v).shape[-1]
            if t is None:
                continue
            if t.dim() != 2 or t.shape[0] not in (1, k.shape[1]) or t.shape[1] != width:
                raise ShapeError(f"{name}: {n} has shape {tuple(t.shape)}, expected [{k.shape[1]} or 1, {width}]")
        elif t is None:
            raise ShapeError(f"{name}: the table {n!r} is missing: pass {n}=tensor with {s.rank} dimensions")
        elif t.dim() != s.rank:
            raise ShapeError(f"{name}: the table {n!r} has shape {tuple(t.shape)}, the pattern indexes {s.rank} dimensions")
        if s.integer and (t.is_floating_point() or t.is_complex()):
            raise ShapeError(f"{name}: the table {n!r} is read by the relation and holds integers, not {t.dtype}")
        if not s.integer and not t.is_floating_point():
            raise ShapeError(f"{name}: the table {n!r} enters the score and holds floating-point numbers, not {t.dtype}")
        if t.device != q.device:
            raise ShapeError(f"{name}: the table {n!r} is on {t.device}, q on {q.device}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} (as [B, H, N, D] or [B, H, *grid, D])"
