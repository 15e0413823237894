"""The Triton backend: the modules that `codegen.triton` prints, loaded from the build cache."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnc import ir
from attnc.codegen.cpp_host import strides_in_order
from attnc.codegen.triton import make_spec, source
from attnc.codegen.triton_plan import LARGE
from attnc.errors import BuildError, UnsupportedError
from attnc.runtime import cache, device, triton_choice, triton_lists, tuner
from attnc.runtime.call import Call, empty_like_order, known_tables
from attnc.runtime.triton_choice import Choice, target_of, tiles
from attnc.schedule.list_choice import Known
from attnc.schedule.tiles import Tiles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CONTINUES = DTYPES  # in which gradients are added to another's; outputs go on as well
# grids that a statement's kernels have as constants, in the order in which a process meets them; kernels for all others take sizes
# as arguments: nothing is compiled for one more grid, but masks stay where constants would prove that no pair needs one. Counted
# for sm_90, 64 channels: 1.03 (causal) to 2.8 times the instructions, 1.3 in the middle, and registers that spill.
CONSTANT_GRIDS = 8


def load(text: str) -> ModuleType:
    """Import a generated module. Its file stays in the build cache, where Triton reads the source from."""

    def build(folder: Path) -> None:
        (folder / "module.py").write_text(text, encoding="utf-8")

    path = cache.entry("triton", text, build, ("module.py",)) / "module.py"
    return load_file(path)


def load_file(path: Path) -> ModuleType:
    """Import a generated module from a file, anew each time."""
    name = f"attnc_triton_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BuildError(f"the generated module {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        sys.modules.pop(name, None)
        raise BuildError(f"the generated module {path} does not load: {type(e).__name__}: {e}") from e
    return module


@lru_cache(maxsize=256)
def _module(text: str) -> ModuleType:
    return load(text)


@lru_cache(maxsize=1024)
def text_for(
    program: ir.Program,
    q_grid: tuple[int, ...],
    k_grid: tuple[int, ...],
    head_dim: int,
    value_dim: int,
    itemsize: int,
    plain: bool,
    chosen: Tiles | None = None,
    part: bool = False,
    target: str = "cuda:80",
    wide: bool = False,
    listed: bool = False,
    filled: bool = False,
    constant: bool = False,
    adds: int = 0,
) -> str:
    """The module of a program, as text. Grids decide the tiles; unless they are constants of the text, two with the same tiles
    share it and its kernels."""
    dims: dict[str, Any] = {"head_dim": head_dim, "value_dim": value_dim, "itemsize": itemsize, "plain": plain}
    dims |= {"chosen": chosen, "listed": listed, "filled": filled}
    spec = make_spec(program, q_grid, k_grid, **dims, symbolic=not constant, part=part, target=target, wide=wide, adds=adds)
    return source(spec, alone=False)


@lru_cache(maxsize=1024)
def _constants(program: ir.Program) -> set[Any]:
    """The grids that are constants of a program's kernels."""
    return set()


def constant(call: Call) -> bool:
    """Whether a call's grid is, or becomes, a constant of its kernels."""
    grids, found = (call.geometry.q_grid, call.geometry.k_grid), _constants(call.program)
    if len(found) < CONSTANT_GRIDS:
        found.add(grids)
    return grids in found


def _runnable(name: str, device: torch.device) -> None:
    """Refuse where no kernel can be launched: tensors elsewhere, or no driver (and no interpreter in its place)."""
    hint = "use backend='cpp' or 'torch'"
    try:
        from triton import knobs
        from triton.runtime.driver import driver
    except ImportError as e:
        raise UnsupportedError(f"{name}: triton is not installed ({e}); pip install triton, or {hint}") from e
    if knobs.runtime.interpret:
        return
    try:
        driver.active  # noqa: B018
    except RuntimeError as e:
        hint += ", or set TRITON_INTERPRET=1 before the start to interpret the kernels (slowly)"
        raise UnsupportedError(
            f"{name}: triton finds no GPU driver on this machine, and the tensors are on {device}; {hint}"
        ) from e


def _large(call: Call, *rows: Tensor) -> bool:
    """An offset inside a batch item of these tensors, of what is made like them, or inside a table may pass 2**31."""
    tables = call.tables.values()
    if all(t.numel() < LARGE and t.untyped_storage().nbytes() < 2 * LARGE for t in (*rows, *tables)):
        return False  # no two elements lie so far apart

    def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
        return sum(s * (n - 1) for n, s in zip(shape, strides, strict=True))

    width = max(t.shape[-1] for t in rows)
    made = ((shape := (*t.shape[:-1], width), strides_in_order(shape, t.stride())) for t in rows)
    of_rows = [*((t.shape, t.stride()) for t in rows), *made]
    return max([span(shape[1:], s[1:]) for shape, s in of_rows] + [span(t.shape, t.stride()) for t in tables]) >= LARGE


def _prepare(call: Call, *rows: Tensor, backward: bool) -> tuple[ModuleType, tuple[Any, ...]]:
    """The module that runs a call, kept beside the statement, and the grids its launches take. rows: q, k, v and other inputs."""
    q, k, v = rows[:3]
    where, large = device.of(q.device), _large(call, *rows)
    adds = call.continues if backward else 3 * call.continues  # one text of both directions where one is enough
    key = backward, q.dtype, q.shape[-1], v.shape[-1], call.scale > 0, where, tuner.version(), call.choice, large, adds
    found = call.kept.get(key)
    if found is None:
        _check(call, q)
        tables, target = known_tables(call), target_of(where)
        lists = _lists(call, q, v, target, tables)
        more: tuple[Any, ...] = ()
        if lists is None:
            text = text_of(call, (q, k, v), _choice(call, (q, k, v), backward), target, large, adds)
        else:
            text = _text(call, (q, k, v), lists.tiles, target, large, adds, listed=True, filled=lists.filled)
            more = (triton_lists.on(lists, q.device),)
        found = _module(text), more
        if not tables:  # or the next call's tables may hold other numbers
            call.kept[key] = found
    module, more = found
    g = call.geometry
    return module, (*((g.q_grid,) if call.program.same_grid else (g.q_grid, g.k_grid)), *more)


def _lists(call: Call, q: Tensor, v: Tensor, target: str, tables: Known) -> triton_lists.Lists | None:
    """The lists that a call walks, None where it walks boxes."""
    return triton_lists.of(call.geometry, triton_lists.Kernels(*_widths(q, v), target), q.shape[1], q.shape[0], tables)


def _widths(q: Tensor, v: Tensor) -> tuple[int, int, int]:
    return q.shape[-1], v.shape[-1], q.element_size()


def text_of(call: Call, rows: tuple[Tensor, ...], choice: Choice | None, target: str, wide: bool = False, adds: int = 0) -> str:
    """The text of the module that runs a choice, or the model's own. wide: offsets have 64 bits. adds: see `Spec`."""
    return _text(call, rows, None if choice is None else tiles(call, rows, choice, target), target, wide, adds)


def _text(
    call: Call,
    rows: tuple[Tensor, ...],
    chosen: Tiles | None,
    target: str,
    wide: bool,
    adds: int,
    listed: bool = False,
    filled: bool = False,
) -> str:
    q, _, v = rows
    sizes = call.geometry.q_grid, call.geometry.k_grid, *_widths(q, v), call.scale > 0
    return text_for(call.program, *sizes, chosen, call.part, target, wide, listed, filled, not listed and constant(call), adds)


def _choice(call: Call, rows: tuple[Tensor, ...], backward: bool) -> Choice | None:
    """The call's own, else a measured winner, else None: the model's."""
    if call.choice is not None:
        own: Choice = call.choice
        return own
    q, k, v = rows
    kept = tunable(call, q, k, v, backward)
    if tuner.winner(kept.like) is None:
        return None
    found: Choice = tuner.chosen(kept).choice
    return found


def tunable(call: Call, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> tuner.Tunable:
    """What `attnc.tune` may measure of a call."""
    _check(call, q)
    where = device.of(q.device)
    found = triton_choice.tunable(call, (q, k, v), backward, where, _interpreted())
    lists = _lists(call, q, v, target_of(where), known_tables(call))
    return found if lists is None else tuner.by_lists(found.like, triton_choice.shown(lists.tiles.forward))


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _check(call: Call, q: Tensor) -> None:
    _runnable(f"pattern {call.attend.name}", q.device)
    if q.dtype not in DTYPES:
        raise UnsupportedError(
            f"pattern {call.attend.name}: triton takes float16, bfloat16 and float32, not {q.dtype}; use backend='cpp' or 'eager'"
        )
    if q.shape[0] > 65535:
        raise UnsupportedError(
            f"pattern {call.attend.name}: batch {q.shape[0]} is more than one launch holds (65535); split the batch"
        )


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """See runtime.call.Call."""
    if call.into is not None:
        return _forward_into(call, q, k, v, *call.into)
    module, grids = _prepare(call, q, k, v, backward=False)
    out, lse = module.run_forward(q, k, v, call.tables, call.scale, *grids)
    wanted = empty_like_order(q, v.shape[-1])  # where a grid did not collapse to one axis, rows were copied
    return (out if out.stride() == wanted.stride() else wanted.copy_(out)), lse


def _forward_into(call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    module, grids = _prepare(call, q, k, v, out, backward=False)
    rows = lse.contiguous()  # of a run of heads it is a slice; the kernels walk it as [B, H, N]
    written, _ = module.run_forward(q, k, v, call.tables, call.scale, *grids, into=(out, rows))
    _put(out, written)
    _put(lse, rows)
    return out, lse


def _put(place: Tensor, written: Tensor) -> None:
    """What was written, in its place: a copy where kernels could not be given that."""
    if written.data_ptr() != place.data_ptr():
        place.copy_(written)


def backward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """See runtime.call.Call."""
    module, grids = _prepare(call, q, k, v, out, grad_out, *(call.into or ()), backward=True)
    lse = lse.contiguous()  # a run of heads hands over a slice; the kernels walk it as [B, H, N]
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    given = q, k, v, out, lse, grad_out, grad_lse, call.tables, call.scale, *grids
    dq, dk, dv, found = module.run_backward(*given, into=call.into)
    if call.into is not None:
        for place, written in zip(call.into, (dq, dk, dv), strict=True):
            _put(place, written)
        dq, dk, dv = call.into
    flat = {n: torch.zeros_like(t) for n, t in call.tables.items() if t.is_floating_point() and n not in found}  # decide, no more
    return dq, dk, dv, {**flat, **found}


def _channel(q: Tensor, k: Tensor, v: Tensor) -> ModuleType:
    from attnc.codegen.triton_channel import emit_channel

    _runnable("channel", q.device)
    if q.dtype not in DTYPES:
        raise UnsupportedError(
            f"channel: the triton backend takes float16, bfloat16 and float32, not {q.dtype}; use 'cpp' or 'eager'"
        )
    if not (q.shape == k.shape == v.shape):
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise UnsupportedError(f"channel: the triton backend wants q, k and v of one shape, not {shapes}; use backend='eager'")
    return _module(emit_channel())


def channel_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Channel attention (DaViT): q [B, H, N, D] or [B, H, *grid, D], k and v alike."""
    out: Tensor = _channel(q, k, v).run_forward(q, k, v, scale)[0]
    return out


def channel_backward(q: Tensor, k: Tensor, v: Tensor, scale: float, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of channel attention; the weights (D x D per head) are computed anew."""
    module = _channel(q, k, v)
    dq, dk, dv = module.run_backward(q, k, v, module.run_forward(q, k, v, scale)[1], grad_out, scale)
    return dq, dk, dv
