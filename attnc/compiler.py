"""`attnc.compile`: from a declared pattern to an operator on tensors. A call is checked here, before any kernel."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from attnc import ir
from attnc.analysis.dropout import TABLE
from attnc.arguments import (
    GridLike,
    PadLike,
    SizesLike,
    axes_and_sizes,
    check_dropout,
    check_rows,
    check_scale,
    check_tables,
    check_tensors,
    check_transforms,
    packs,
    pad_of,
    sizes_of,
)
from attnc.codegen import around
from attnc.errors import AttncError, DeclarationError, ShapeError, UnsupportedError
from attnc.lang.mechanism import Mechanism
from attnc.lang.pattern import Pattern
from attnc.runtime import device, direct, operator, regions, replay
from attnc.runtime import layout as layouts
from attnc.runtime.replay_attend import record_attend
from attnc.runtime.replay_channel import record_channel
from attnc.runtime.traced import Traced
from attnc.schedule import bounds
from attnc.tokens import Tokens

Backend = str  # "auto", "triton", "cpp", "torch" or "eager"
RESERVED = ("self", "q", "k", "v", "scale", "return_lse", "grid", "sizes", "dropout_p", "seed", "pad_k", "pad_v")
TUNED = ("cpp", "triton")  # backends with a tuner


def has_compiler() -> bool:
    """A C++ compiler is on the path."""
    return any(shutil.which(c) for c in ("g++", "c++", "clang++"))


@dataclass(frozen=True)
class Accepted:
    """What follows from the shapes, dtypes and devices of a call's tensors. traced: None for a mechanism."""

    scale: float  # the default
    backend: str
    layout: layouts.Layout
    q_grid: tuple[int, ...]  # zeros where images are packed
    k_grid: tuple[int, ...]
    traced: Traced | None


def _untuned(backend: str) -> str:
    return f'backend "{backend}" has no tuner yet (there is one for {", ".join(TUNED)}); leave tune= out, or give one of those'


def _compile_before_measuring() -> None:
    """The tuner of GPU kernels leaves out what spills: the static report, which looks at all of the package, tells it so."""
    from attnc.report import fit
    from attnc.runtime import triton_choice

    triton_choice.use_static(fit.flaw)


def _left_behind(*_: object) -> NoReturn:
    raise DeclarationError("this operator was unpickled: it runs, and its declaration cannot be traced again; declare it anew")


class Operator:
    """A compiled pattern: call it on tensors. See `attnc.compile`."""

    def __init__(
        self,
        source: Pattern | Mechanism,
        *,
        grid: GridLike = None,
        kv_grid: GridLike = None,
        prefix: int = 0,
        kv_prefix: int | None = None,
        pad: PadLike = None,
        heads: int | None = None,
        layout: str | None = None,
        backend: Backend = "auto",
        tune: bool = False,
        fallback: Literal["torch"] | None = None,
    ) -> None:
        if backend not in ("auto", *operator.BACKENDS):
            raise DeclarationError(f"backend={backend!r}: one of auto, {', '.join(operator.BACKENDS)}")
        if fallback not in (None, "torch"):
            raise DeclarationError(f"fallback={fallback!r}: None (raise) or 'torch' (warn once and go on)")
        for name, n in (("prefix", prefix), ("kv_prefix", kv_prefix or 0)):
            if not isinstance(n, int) or isinstance(n, bool) or n < 0:
                raise DeclarationError(f"{name}={n!r}: a non-negative int")
        if heads is not None and (not isinstance(heads, int) or isinstance(heads, bool) or heads < 1):
            raise DeclarationError(f"heads={heads!r}: the number of query heads, a positive int")
        if not isinstance(layout, str | None):
            raise DeclarationError(f"layout={layout!r}: a string that names each dimension, e.g. 'b (y x) (three h d)'")
        if tune and backend not in ("auto", *TUNED):
            raise UnsupportedError(f"{source.name}: tune=True: {_untuned(backend)}")
        self.source, self.heads, self.backend, self.tune, self.fallback = source, heads, backend, tune, fallback
        self.prefix, self.kv_prefix = prefix, prefix if kv_prefix is None else kv_prefix
        self.layout = layouts.parse(layout) if layout else None
        self.axes, self.grid = axes_and_sizes(grid, self.layout)
        self.same_grid = kv_grid is None
        self.kv_grid = None if kv_grid is None else axes_and_sizes(kv_grid, None)[1]
        if self.kv_grid is not None and (self.axes is None or len(self.axes) != len(self.kv_grid)):
            raise DeclarationError(
                f"{source.name}: kv_grid={kv_grid!r} beside grid={grid!r}: give both, with the same axes (lengths may be None)"
            )
        self._tokens = Tokens(source.name, heads, self.layout, self.axes, self.grid, self.kv_grid, self.prefix, self.kv_prefix)
        self._warned = False
        self._seen: dict[Any, Accepted] = {}
        self._replays: dict[Any, replay.Replay | None] = {}
        ranks = [self.axes] if self.axes else list(ir.AXES.values())
        self._layouts = {len(axes): self.layout or layouts.default(axes) for axes in ranks}
        if self.layout and (self.prefix or self.kv_prefix) and self.layout.separate and len(self.layout.axes) > 1:
            raise DeclarationError(f"layout {layout!r}: prefix tokens have no place in it; use one group, e.g. (y x)")
        self._programs: dict[int, Traced | AttncError] = {}
        if isinstance(source, Mechanism):
            if pad is not None:
                raise UnsupportedError(f"mechanism {source.name}: pad= belongs to patterns; pad inside the mechanism")
            self._graph = source.trace()
            return
        for names in ranks:
            try:
                attend = source.trace(names, same_grid=self.same_grid)
                for table in attend.tables:
                    if table in RESERVED:
                        raise DeclarationError(f"pattern {source.name}: {table!r} is a reserved keyword; rename the table")
                fields = pad_of(pad, attend, self.same_grid)
            except AttncError as e:  # a rank the pattern does not fit matters only if a call has it
                if self.axes:
                    raise
                self._programs[len(names)] = e
                continue
            unknown: tuple[int | None, ...] = (None,) * len(names)
            queries = ir.Tokens(unknown, self.prefix, **fields)
            # sizes stay symbols, so one kernel serves all grids; a separate key grid is told apart by its prefix field or `kv`
            keys = ir.Tokens(unknown, self.kv_prefix, **fields)
            text = ir.to_json(ir.Program(attend, queries, keys, self.same_grid))
            self._programs[len(names)] = Traced.of(text)

    def __deepcopy__(self, memo: dict[int, Any]) -> Operator:
        return self  # it holds no tensors, and nothing that changes

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: the traced programs as text. The declaration, a function, stays behind."""
        programs = {n: t.text if isinstance(t, Traced) else t for n, t in self._programs.items()}
        source = type(self.source)(self.source.name, _left_behind)
        return {**self.__dict__, "source": source, "_programs": programs, "_seen": {}, "_replays": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._programs = {n: Traced.of(t) if isinstance(t, str) else t for n, t in state["_programs"].items()}

    def __repr__(self) -> str:
        return f"<attnc operator {self.source.name} grid={self.grid} backend={self.backend}>"

    def program(self, rank: int) -> ir.Program:
        """The traced program on a grid of this rank."""
        if isinstance(self.source, Mechanism):
            raise UnsupportedError(
                f"mechanism {self.source.name}: its steps are no relation on a grid, so it has no mask and no picture; "
                "attnc.explain shows its steps"
            )
        return self._traced(rank).program

    def _traced(self, rank: int) -> Traced:
        found = self._programs.get(rank)
        if isinstance(found, AttncError):
            raise found
        if found is None:
            raise ShapeError(f"pattern {self.source.name}: compiled for the axes {self.axes}, called on a grid with {rank}")
        return found

    @overload
    def __call__(
        self, q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, return_lse: Literal[False] = ..., **options: Any
    ) -> Tensor: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, return_lse: Literal[True], **options: Any
    ) -> tuple[Tensor, Tensor]: ...
    def __call__(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        grid: GridLike = None,
        sizes: SizesLike = None,
        dropout_p: float = 0.0,
        seed: int | None = None,
        **tables: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out, in q's dtype and layout; with return_lse also lse float32 [B, Hq, Nq] (natural log, -inf for a row without keys).

        sizes: int [B, rank], where batch item b is an image of lengths sizes[b] in the low corner of the grid; without a grid int
        [images, rank], where the one batch item holds the tokens of all images one after the other. With a grid of keys, a pair.
        dropout_p: each weight is kept with probability 1 - p and then divided by it, lse and sums being those of all weights;
        which ones is decided by `seed` (any 64-bit integer) and logical indices alone, see `attnc.analysis.dropout`. Without a
        seed one is drawn from torch's default generator.
        """
        given: Any = (q, *tables.values()) if k is None and v is None else (q, k, v, *tables.values())
        past, key = direct.alone(given), None
        # what is asked before a replay is found is asked in each call, with cold caches: a device's name alone takes 30 us there
        if past and q.is_cpu and sizes is None and not dropout_p and seed is None and self._backend("cpu") == "cpp":
            key = replay.key(given, grid if grid is None or type(grid) is tuple else str(grid), scale, return_lse, *tables)
            known = self._replays.get(key)
            if known is None and key not in self._replays and torch.is_grad_enabled() and any(t.requires_grad for t in given):
                first: Callable[..., Any] = self.__call__
                with torch.no_grad():  # recorded before it counts: a checkpoint that runs it again must find as many tensors saved
                    first(q, k, v, scale=scale, return_lse=return_lse, grid=grid, **tables)
                known = self._replays.get(key)
            done = known(given, return_lse) if known is not None else None
            if done is not None:
                return done
        name = self.source.name
        sized = None if sizes is None else sizes_of(sizes, self.source, self.same_grid)
        if dropout_p or seed is not None:
            check_dropout(name, dropout_p, seed)
        check_tensors(name, q, k, v)
        if scale is not None:
            check_scale(name, scale)
        if not past:
            check_transforms(name, given)
        rows = self._tokens.rows(q, k, v)
        past = past and (sized is None or direct.alone((sized,)))
        if q.is_meta:  # shapes alone, but for a device that stands in for a GPU
            past = past and device.of(q.device).target != "meta"
        accepted = self._accepted(rows, grid, tables, sized, past)
        scale = accepted.scale if scale is None else float(scale)
        if isinstance(self.source, Mechanism):
            if return_lse or dropout_p:
                raise ShapeError(f"mechanism {name}: unexpected argument {'return_lse' if return_lse else 'dropout_p'}")
            values = list(layouts.three(rows))
            for _, (a, b, c) in self._graph.steps:
                values.append(direct.channel(past, values[a], values[b], values[c], scale, accepted.backend))
            out = layouts.from_rows(values[self._graph.result], accepted.layout)
            if key is not None:
                steps, layout = self._graph.steps, accepted.layout
                self._record(key, record_channel, given, self._tokens.rows, rows, steps, layout, out, scale, accepted.backend)
            return out
        traced = accepted.traced
        assert traced is not None
        weights = traced.attend.normalizer
        if return_lse and (weights.kind != "softmax" or weights.over == "queries"):
            what = "softmax over queries" if weights.kind == "softmax" else weights.kind
            raise ShapeError(f"{name}: return_lse=True, but weights by {what} have no log-sum-exp of a query")
        if dropout_p:
            traced = traced.dropped
            assert traced is not None
            accepted = replace(accepted, traced=traced)
            tables = {**tables, TABLE: around.seed_table(dropout_p, seed, rows[0].device)}
        ordered = [tables[s.name] if s.name in tables else _no_pad(s.name, rows) for s in traced.tables]
        whole = traced.core is None or accepted.backend == "eager"
        whole |= accepted.backend == "cpp" and sized is None and around.within(traced.attend)
        run = self._run if whole else self._surrounded
        out, lse = run(past, rows, ordered, scale, accepted, sized)
        shaped = layouts.from_rows(out, accepted.layout)
        if key is not None:
            read = {s.name: t for s, t in zip(traced.tables, ordered, strict=True)}
            rest = scale, accepted.q_grid, accepted.k_grid, traced.text, accepted.backend, self.tune, None
            recorder = record_attend if whole and not self._warned else _no_replay
            self._record(key, recorder, given, tuple(tables), self._tokens.rows, rows, read, accepted.layout, (shaped, lse), rest)
        return (shaped, lse) if return_lse else shaped

    # ----------------------------------------------------------------------------------------------------------------- pieces
    def _record(self, key: Any, recorder: Callable[..., replay.Replay | None], *args: Any) -> None:
        """Keep a call of a C++ kernel that has been run, so that calls like it skip all that is decided here."""
        if key not in self._replays:
            if len(self._replays) >= 1024:
                self._replays.clear()
            self._replays[key] = recorder(*args)

    def _accepted(
        self, rows: tuple[Tensor, ...], grid: GridLike, tables: dict[str, Tensor], sizes: Tensor | None, past: bool
    ) -> Accepted:
        """What a call comes to, its tensors checked: once for all calls that look alike, where nobody traces."""
        if not past:
            return self._accept(rows, grid, tables, sizes)
        given = grid if grid is None or isinstance(grid, int | tuple) else str(grid)
        key = (
            given,
            None if sizes is None else sizes.shape,
            *[(t.shape, t.dtype, t.device) for t in rows],
            *[(n, t.shape, t.dtype, t.device) for n, t in tables.items()],
        )
        found = self._seen.get(key)
        if found is None:
            if len(self._seen) >= 4096:
                self._seen.clear()
            found = self._seen[key] = self._accept(rows, grid, tables, sizes)
        return found

    def _accept(self, rows: tuple[Tensor, ...], grid: GridLike, tables: dict[str, Tensor], sizes: Tensor | None) -> Accepted:
        q, k, v = layouts.three(rows)
        name = self.source.name
        check_rows(name, self.heads, q, k, v)
        backend = self._backend(q.device.type)
        if self.tune and backend not in TUNED:
            raise UnsupportedError(f"{name}: tune=True: {_untuned(backend)}")
        if self.tune and backend == "triton":
            _compile_before_measuring()
        scale = q.shape[-1] ** -0.5
        if isinstance(self.source, Mechanism):
            if tables:
                raise ShapeError(f"mechanism {name}: unexpected argument {', '.join(tables)}")
            if grid is not None:
                raise ShapeError(f"mechanism {name}: grid={grid!r}: its tokens have no grid")
            if not (q.shape[:-1] == k.shape[:-1] == v.shape[:-1]) or k.shape[-1] != v.shape[-1]:
                shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
                raise ShapeError(f"mechanism {name}: q, k and v have the same heads, tokens and channels, here {shapes}")
            return Accepted(scale, backend, self._layouts[min(self._layouts)], (), (), None)
        rank = None if sizes is None else sizes.shape[1] // (1 if self.same_grid else 2)
        told = grid is not None or q.dim() > 4 or any(n is not None for n in self.grid or ())
        if sizes is not None and rank is not None and packs(name, sizes.shape[0], rank, q, self.axes, told):
            q_grid = k_grid = (0,) * rank
        else:
            q_grid, k_grid = self._tokens.grids(q, k, grid, rank)
            if sizes is not None and (sizes.shape[0], rank) != (q.shape[0], len(q_grid)):
                raise ShapeError(
                    f"{name}: sizes= has shape {(sizes.shape[0], rank)}, expected {(q.shape[0], len(q_grid))}: a row for each "
                    "batch item; packed images, one after the other in a batch of 1, are what a call without any grid= takes"
                )
        traced = self._traced(len(q_grid))
        check_tables(name, traced.tables, tables, q, k, v)
        sink = traced.attend.normalizer.sink
        if sink is not None:
            bounds.check_sink(traced.attend, tables[sink].shape, q.shape[1])
        maps = [m for m in (traced.attend.q_map, traced.attend.k_map) if m is not None and m.kind == "rotary"]
        if maps and q.shape[-1] < 2 * len(q_grid):
            raise ShapeError(
                f"{name}: rotary over {len(q_grid)} axes turns {2 * len(q_grid)} channels or more, and D is {q.shape[-1]}"
            )
        if traced.attend.k_map in maps and "pad_k" in tables and backend != "eager":
            raise UnsupportedError(
                f"{name}: pad_k= together with rotary keys: one row for all virtual keys cannot turn by their places; leave it out "
                "(zeros stay zeros), or give backend='eager'"
            )
        return Accepted(scale, backend, self._layouts[len(q_grid)], q_grid, k_grid, traced)

    def _run(
        self,
        past: bool,
        rows: tuple[Tensor, ...],
        tables: list[Tensor],
        scale: float,
        call: Accepted,
        sizes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        assert call.traced is not None
        args = rows, tables, scale, call.q_grid, call.k_grid, call.traced.text
        if self.fallback is None or call.backend in ("torch", "eager"):
            return direct.attend(past, *args, call.backend, self.tune, sizes)
        try:
            return direct.attend(past, *args, call.backend, self.tune, sizes)
        except UnsupportedError as e:
            if not self._warned:
                warnings.warn(f"{e} Falling back to backend='torch'.", stacklevel=3)
                self._warned = True
            if call.traced.core is not None:
                return self._surrounded(past, rows, tables, scale, replace(call, backend="torch"), sizes)
            return direct.attend(past, *args, "torch", False, sizes)

    def _surrounded(
        self,
        past: bool,
        rows: tuple[Tensor, ...],
        tables: list[Tensor],
        scale: float,
        call: Accepted,
        sizes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The kernels of the statement's core, with row maps before them and the sink after."""
        assert call.traced is not None and call.traced.core is not None
        core, inner = call.traced.core, replace(call, traced=call.traced.core)
        named = {s.name: t for s, t in zip(call.traced.tables, tables, strict=True)}
        grids, qkv = (call.q_grid, call.k_grid), layouts.three(rows)
        known = None if sizes is None else regions.known(sizes, core.program, grids, qkv)

        def run(r: tuple[Tensor, ...], t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return self._run(past, r, [t[s.name] for s in core.tables], scale, inner, sizes)

        return around.surround(call.traced.program, grids, qkv, named, run, *(known or ()))

    def _backend(self, device: str) -> str:
        if self.backend != "auto":
            return self.backend
        if device == "cuda":
            return "triton"
        return "cpp" if device == "cpu" and _COMPILER else "torch"


_COMPILER = has_compiler()


def _no_replay(*_: Any) -> None:
    """Nothing of a call is kept that is more than one kernel, or fell back to another backend."""


def _no_pad(name: str, rows: tuple[Tensor, ...]) -> Tensor:
    """The row of virtual keys where a call gives none."""
    t = rows[0] if len(rows) == 1 else rows[1 if name == "pad_k" else 2]
    return t.new_zeros(1, t.shape[-1])


def compile(
    p: Pattern | Mechanism | object,
    *,
    grid: GridLike = None,
    kv_grid: GridLike = None,
    prefix: int = 0,
    kv_prefix: int | None = None,
    pad: PadLike = None,
    heads: int | None = None,
    layout: str | None = None,
    backend: Backend = "auto",
    tune: bool = False,
    fallback: Literal["torch"] | None = None,
) -> Operator:
    """An operator `op(q, k, v, *, scale=None, return_lse=False, grid=None, **tables) -> out` from a pattern or mechanism.

    q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] unless `layout` says otherwise; the grid is row-major, `prefix`
    tokens come first, see all tokens and are seen by all. pad: virtual keys around the grid, which the relation gives to queries
    of the grid; prefix queries do not see them. tune=True: the first call of a shape that nothing is kept for measures the
    candidates of both directions and keeps the winners, see `attnc.tune`. Raises DeclarationError for a wrong statement,
    UnsupportedError for what cannot be lowered.
    """
    if not isinstance(p, Pattern | Mechanism):
        hint = " (call it with its hyper-parameters first)" if callable(p) else ""
        raise DeclarationError(f"attnc.compile takes a pattern or a mechanism, not {type(p).__name__}{hint}")
    options: dict[str, Any] = {
        "grid": grid,
        "kv_grid": kv_grid,
        "prefix": prefix,
        "kv_prefix": kv_prefix,
        "pad": pad,
    }
    return Operator(p, **options, heads=heads, layout=layout, backend=backend, tune=tune, fallback=fallback)


def reference(p: Pattern | Mechanism, **options: Any) -> Operator:
    """The same operator evaluated eagerly from the statement, float64-capable: the meaning every backend is held to."""
    return compile(p, **options, backend="eager")
