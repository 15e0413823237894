"""Images of unlike sizes in one call (`sizes=`): the statement runs once for each run of neighbouring images of one size.

A batch item's image is the low corner of the call's grid. Packed images share a batch of one, where the tokens of each follow
those of the one before; a grid of zeros says so. Either way the rows of a run of images are views of the call's tensors, and what
is written goes into such views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from attnc import ir
from attnc.analysis.dropout import TABLE, factor
from attnc.codegen.around import first_places
from attnc.errors import ShapeError
from attnc.runtime.call import empty_like_order, lse_like, token_count
from attnc.schedule.split import shifted, tables_by

Size = tuple[int, ...]
INF = float("inf")


@dataclass(frozen=True)
class Place:
    """Where `count` neighbouring images of one size lie on one side (queries or keys) of a call, `prefix` tokens before each.

    grid: the call's, with images `first` and on as batch items; () where images are packed, from token `start` on.
    """

    first: int
    count: int
    size: Size
    prefix: int
    grid: Size
    start: int

    @property
    def tokens(self) -> int:
        """Of one image."""
        return self.prefix + math.prod(self.size)

    @property
    def whole(self) -> bool:
        """No token of these batch items lies outside the images."""
        return not self.grid or self.size == self.grid

    def views(self, t: Tensor) -> list[Tensor]:
        """[count, H, *tokens, D] of [B, H, N, D] or [B, H, *grid, D]; two where prefix and image have no strides in common."""
        batch, head, *axes, channel = t.stride()
        token, first = axes[-1], self.first * batch
        if not self.grid:
            batch, first = self.tokens * token, self.start * token

        def view(tokens: Size, steps: Sequence[int], start: int) -> Tensor:
            shape, strides = (self.count, t.shape[1], *tokens, t.shape[-1]), (batch, head, *steps, channel)
            return t.as_strided(shape, strides, t.storage_offset() + first + start)

        if not self.grid or (self.prefix and self.size[1:] == self.grid[1:]):
            return [view((self.tokens,), (token,), 0)]
        if self.whole:
            return [view(t.shape[2:-1], axes, 0)]
        if t.dim() == 4:
            axes = [token * math.prod(self.grid[d + 1 :]) for d in range(len(self.grid))]
        image = view(self.size, axes, self.prefix * token)
        return [view((self.prefix,), (token,), 0), image] if self.prefix else [image]

    def read(self, t: Tensor) -> Tensor:
        """The images' rows: a view, or prefix and image put together where they have no strides in common."""
        found = self.views(t)
        return found[0] if len(found) == 1 else torch.cat([x.flatten(2, -2) for x in found], 2)

    def write(self, t: Tensor, rows: Tensor) -> None:
        """Put the images' rows in place, unless they are there already."""
        found = self.views(t)
        if len(found) > 1:
            found[0].copy_(rows[:, :, : self.prefix])
            found[1].copy_(rows[:, :, self.prefix :].reshape(found[1].shape))
        elif rows.data_ptr() != found[0].data_ptr():
            found[0].copy_(rows.reshape(found[0].shape))

    def read_flat(self, t: Tensor | None) -> Tensor | None:
        """[count, H, tokens] of an lse or its gradient [B, H, N]."""
        return None if t is None else self.read(t[..., None]).flatten(2)


@dataclass(frozen=True)
class Run:
    """Neighbouring images of one size, on both sides."""

    q: Place
    k: Place

    @property
    def empty(self) -> bool:
        """Nothing attends, or nothing is attended to."""
        return not (self.q.tokens and self.k.tokens)

    @property
    def covers(self) -> bool:
        """Every token of these batch items is computed."""
        return self.q.whole and self.k.whole and not self.empty


def _runs(name: str, sizes: Tensor, q: Place, k: Place, same_grid: bool, tokens: tuple[int, int]) -> list[Run]:
    """The runs of a call, checked. q, k: where the first image would lie; tokens: those of the call on both sides."""
    runs, first, at = [], 0, [0, 0]
    for row, members in groupby(sizes.tolist()):
        count = len(list(members))
        rank = len(row) if same_grid else len(row) // 2
        mine = [tuple(row[:rank]), tuple(row[-rank:])]
        for what, side, size in zip(("", " of keys"), (q, k), mine, strict=True):
            for d, n in enumerate(size):
                most = side.grid[d] if side.grid else None
                if n < 0 or (most is not None and n > most):
                    limit = f"0 to {most}, the grid's length" if most is not None else "0 or more"
                    raise ShapeError(f"{name}: sizes[{first}] is {size}{what}: axis {d} is {n} long, expected {limit}")
        q, k = (replace(p, first=first, count=count, size=s, start=a) for p, s, a in zip((q, k), mine, at, strict=True))
        runs.append(Run(q, k))
        first += count
        at = [a + count * p.tokens for a, p in zip(at, (q, k), strict=True)]
    if not q.grid:
        for what, have, need, p in zip(("q", "k"), tokens, at, (q, k), strict=True):
            if have != need:
                beside = f" with {p.prefix} prefix tokens each" if p.prefix else ""
                raise ShapeError(
                    f"{name}: packed images: {what} has {have} tokens, the {first} images of sizes={sizes.tolist()[:8]}"
                    f"{'...' if first > 8 else ''}{beside} make {need}; for images in the corners of a larger grid give grid="
                )
    return runs


@lru_cache(maxsize=1024)
def _by_image(text: str) -> tuple[tuple[tuple[str, int], ...], bool]:
    """Tables with a dimension that the batch index alone selects, and whether the program reads that index anywhere else."""
    a = _statement(text)
    return tables_by(a, ir.BATCH), _from_image(text, 1) != _from_image(text, 2)


@lru_cache(maxsize=1024)
def _from_image(text: str, first: int) -> str:
    """The program for images `first` and on, which get their part of tables by image. Dropout's table says it at run time."""
    p, a = ir.from_json(text), _statement(text)
    cut, start = tables_by(a, ir.BATCH), ir.const(first)
    relation, score = (shifted(e, ir.BATCH, start, cut) for e in (a.relation, a.score))
    post = None if a.post is None else shifted(a.post, ir.BATCH, start, cut)
    return ir.to_json(replace(p, attend=replace(a, relation=relation, score=score, post=post, dropout=_drop(a.dropout))))


def _drop(dropout: ir.Expr | None) -> ir.Expr | None:
    """Dropout for images from the one on that its table's last number says."""
    return None if dropout is None else shifted(dropout, ir.BATCH, ir.load(TABLE, (ir.const(3),), "int"), ())


def _from(tables: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """The tables of a run of images, dropout's with the number of the first."""
    seed = tables.get(TABLE)
    return tables if seed is None else {**tables, TABLE: torch.cat([seed, seed.new_full((1,), first)])}


@lru_cache(maxsize=256)
def _prefix_alone(text: str) -> tuple[str, tuple[str, ...]]:
    """The program where one side has no image, only prefix tokens: every query sees every key. And its tables."""
    a = _statement(text)
    dropout = None if a.dropout is None else _drop(factor(0, 0))
    alone = replace(
        a, rank=1, relation=ir.TRUE, score=ir.SCORE, post=None, q_map=_unturned(a.q_map), k_map=_unturned(a.k_map), dropout=dropout
    )
    return ir.to_json(ir.Program(alone, ir.Tokens((None,)), ir.Tokens((None,)), same_grid=False)), alone.tables


def _unturned(m: ir.RowMap | None) -> ir.RowMap | None:
    """The row map of prefix tokens, which have no place to be turned by."""
    return None if m is None or m.kind == "rotary" else m


def _statement(text: str) -> ir.Attend:
    a = ir.from_json(text).attend
    assert isinstance(a, ir.Attend)
    return a


@dataclass(frozen=True)
class BySize:
    """One call whose images have sizes of their own. attend, attend_backward: the operators' (see runtime.operator).

    program: as `rest` has it in text; names: of the tables. rest: what follows scale in the operators' arguments: grids, the
    program's text, the backend, tune.
    """

    attend: Callable[..., tuple[Tensor, Tensor]]
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]
    program: ir.Program
    names: tuple[str, ...]
    tables: list[Tensor]
    scale: float
    rest: tuple[Any, ...]
    sizes: Tensor

    @property
    def name(self) -> str:
        """As errors say it."""
        return f"pattern {self.program.attend.name}"

    @property
    def _of_queries(self) -> bool:
        """The lse is one of queries, not of keys."""
        assert isinstance(self.program.attend, ir.Attend)
        return self.program.attend.normalizer.over == "keys"

    def _runs(self, q: Tensor, k: Tensor) -> list[Run]:
        p = self.program
        grids = tuple(map(int, self.rest[0])), tuple(map(int, self.rest[1]))
        first_q, first_k = (
            Place(0, 0, (), t.prefix, g if any(g) else (), 0) for t, g in zip((p.queries, p.keys), grids, strict=True)
        )
        found = _runs(self.name, self.sizes, first_q, first_k, p.same_grid, (token_count(q), token_count(k)))
        for n, d in _by_image(self.rest[2])[0]:
            have = self.tables[self.names.index(n)].shape
            if have[d] not in (1, len(self.sizes)):
                raise ShapeError(
                    f"{self.name}: the table {n!r} has shape {tuple(have)}; its dimension {d} counts images, of which "
                    f"this call has {len(self.sizes)}: it is that or 1"
                )
        return found

    def _views(self, run: Run, tables: list[Tensor]) -> tuple[dict[str, Tensor], tuple[Any, ...], bool]:
        """A run's tables by name; scale and what follows it; whether both sides have an image."""
        text, first, count = self.rest[2], run.q.first, run.q.count
        named = dict(zip(self.names, tables, strict=True))
        if not (math.prod(run.q.size) and math.prod(run.k.size)):
            alone, kept = _prefix_alone(text)
            grids: tuple[Size, ...] = ((run.q.tokens,), (run.k.tokens,))
            return _from({n: named[n] for n in kept}, first), (self.scale, *grids, alone, *self.rest[3:]), False
        cuts, more = _by_image(text)
        for n, d in cuts:
            if named[n].shape[d] > 1:
                named[n] = named[n].narrow(d, first, count)
        text = _from_image(text, first if more else 0)
        return _from(named, first), (self.scale, run.q.size, run.k.size, text, *self.rest[3:]), True

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out as q with Dv channels, and lse; zeros and -inf outside the images."""
        queries = self._of_queries
        out, lse = empty_like_order(q, v.shape[-1]), lse_like(q, q if queries else k)
        runs = self._runs(q, k)
        if not all(r.covers for r in runs):
            out.zero_()
            lse.fill_(-INF)
        for run in (r for r in runs if not r.empty):
            named, rest, images = self._views(run, self.tables)
            rows = run.q.read(q), run.k.read(k), run.k.read(v)
            if not images:
                rows = rows[0].flatten(2, -2), rows[1].flatten(2, -2), rows[2].flatten(2, -2)
            places = run.q.views(out)
            into = (places[0], lse_like(rows[0])) if images and len(places) == 1 and queries else None
            o, s = self.attend(*rows, list(named.values()), *rest, into=into)
            run.q.write(out, o)
            (run.q if queries else run.k).write(lse[..., None], s[..., None])
        return out, lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        into: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """dq, dk, dv (`into` three tensors or new ones) and the gradients of tables, summed over the images in their order."""
        dq, dk, dv = into or (empty_like_order(t, t.shape[-1]) for t in (q, k, v))
        runs = self._runs(q, k)
        for t in () if all(r.covers for r in runs) else (dq, dk, dv):
            t.zero_()
        wide = [t.to(lse.dtype) if t.is_floating_point() else t for t in self.tables]  # sums round once
        sums = [torch.zeros_like(t) for t in wide]
        for run in (r for r in runs if not r.empty):
            named, rest, images = self._views(run, wide)
            rows = [run.q.read(q), run.k.read(k), run.k.read(v), run.q.read(out), run.q.read(grad_out)]
            if not images:
                rows = [t.flatten(2, -2) for t in rows]
            logs = [(run.q if self._of_queries else run.k).read_flat(t) for t in (lse, grad_lse)]
            places = [run.q.views(dq), run.k.views(dk), run.k.views(dv)]
            one = images and all(len(p) == 1 for p in places)
            mine = tuple(p[0] for p in places) if one else None
            args = (*rows[:4], logs[0], rows[4], logs[1])
            *found, parts = self.attend_backward(*args[:3], list(named.values()), *args[3:], *rest, into=mine)
            for side, t, x in zip((run.q, run.k, run.k), (dq, dk, dv), found, strict=True):
                side.write(t, x)
            totals = self._views(run, sums)[0]
            for (n, t), part in zip(named.items(), parts, strict=True):
                if t.is_floating_point():
                    totals[n] += part
        return dq, dk, dv, dict(zip(self.names, sums, strict=True))


def inside(sizes: Tensor, grid: Size, prefix: int) -> Tensor:
    """bool [B, prefix + N]: tokens of the batch items' images in the low corners of a grid, prefix tokens among them."""
    found = torch.ones(sizes.shape[0], 1, dtype=torch.bool, device=sizes.device)
    for d, n in enumerate(grid):
        axis = torch.arange(n, device=sizes.device) < sizes[:, d : d + 1]
        found = (found[:, :, None] & axis[:, None]).flatten(1)
    return torch.cat([found.new_ones(sizes.shape[0], prefix), found], 1) if prefix else found


def known(
    sizes: Tensor, p: ir.Program, grids: tuple[Size, Size], rows: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...] | None, tuple[list[Tensor], ...] | None]:
    """What surrounds the kernels has to know of images: which tokens exist, or, where images are packed, their coordinates."""
    images = (sizes, sizes) if p.same_grid else sizes.chunk(2, 1)
    sides = list(zip(images, (p.queries, p.keys), grids, rows[:2], strict=True))
    if any(grids[0]):
        return tuple([inside(s.to(t.device), grid, side.prefix) for s, side, grid, t in sides]), None
    return None, tuple([places(s.to(t.device), side.prefix, first_places(side), t.shape[2]) for s, side, _, t in sides])


def places(sizes: Tensor, prefix: int, before: Size, tokens: int) -> list[Tensor]:
    """int [tokens] for each axis: coordinates of packed tokens, whose images start at `before`; 0 for prefix tokens."""
    lengths = sizes.prod(1) + prefix
    ends = lengths.cumsum(0)
    at = torch.arange(tokens, device=sizes.device)
    image = torch.searchsorted(ends, at, right=True).clamp(max=max(len(sizes) - 1, 0))
    at = at - (ends - lengths)[image] - prefix
    found: list[Tensor] = []
    rest = at
    for d in reversed(range(sizes.shape[1])):
        length = sizes[image, d].clamp(min=1)
        found.insert(0, torch.where(at >= 0, rest % length + before[d], 0))
        rest = rest // length
    return found
