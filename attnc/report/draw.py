"""`attnc.draw`: a pattern as a picture. Left the mask, in the middle the keys of one query, right the tiles visited for it."""

from __future__ import annotations

import math
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc import ir
from attnc.arguments import GridLike, PadLike
from attnc.errors import DeclarationError, ShapeError
from attnc.lang.pattern import Pattern
from attnc.report import boxes
from attnc.report.subject import Subject, subject
from attnc.schedule.geometry import Geometry

INK, PALE, GRID = "#1b2733", "#eef1f4", "#cfd6dd"
KEY, PARTIAL, QUERY, TILE = "#2a78b5", "#9dc6e6", "#e4572e", "#f4a58a"
VIRTUAL = "#f7e3b0"
PALETTE = (PALE, PARTIAL, KEY)
MOST_TOKENS = 4096  # of queries times keys drawn one by one
SLICES = 6  # of a 3-D grid


def draw(
    p: Pattern,
    *,
    grid: GridLike,
    kv_grid: GridLike = None,
    pad: PadLike = None,
    query: tuple[int, ...] | int | None = None,
    path: str | Path = "p.png",
    heads: int = 1,
    head: int = 0,
) -> Path:
    """Draw a pattern into a PNG (or whatever the ending of `path` says) and return its path.

    Args:
        p: a pattern.
        grid, kv_grid, pad: as for `attnc.compile`, all lengths known; one to three axes.
        query: the query whose keys are shown, by its coordinates; default: off the centre of the grid.
        path: file to write; its folder exists.
        heads: heads to count score elements for.
        head: the head that is drawn.

    Raises:
        DeclarationError: the query does not lie on the grid, the head is not one of `heads`, or the grid has four axes or more.
        ShapeError: a length of the grid is open, or the relation reads runtime tables.
    """
    s = subject(p, grid=grid, kv_grid=kv_grid, pad=pad, heads=heads)
    g = s.geometry
    if g is None:
        raise ShapeError(f"{p.name}: draw needs a grid with known lengths, not {grid!r}")
    if len(g.q_grid) > 3:
        raise DeclarationError(f"{p.name}: draw shows grids of one to three axes, not {g.q_grid}")
    if not 0 <= head < heads:
        raise DeclarationError(f"{p.name}: head={head} of heads={heads}: one from 0 to {heads - 1}")
    at = _query(p.name, g, query)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: nothing global, no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 5.2), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    widths, top = ((1.0, 1.0, 1.0), 0.80) if len(g.q_grid) < 3 else ((0.95, 1.2, 1.2), 0.74)
    outer = figure.add_gridspec(1, 3, width_ratios=widths, left=0.045, right=0.985, top=top, bottom=0.16, wspace=0.16)
    _mask(figure.add_subplot(outer[0]), s, g, head, heads)
    keys = _keys_of(g, at, head, heads)
    _on_grid(figure, outer[1], s, g, keys, at, "keys of one query", None)
    mine = [part.geometry for part in s.parts if part.first <= head < part.last and part.geometry is not None]
    tiles = [_visited(part, at) for part in mine] or [(0 * keys, np.zeros(g.q_grid, bool))]
    visited, owned = np.maximum.reduce([t[0] for t in tiles]), np.logical_or.reduce([t[1] for t in tiles])
    _on_grid(figure, outer[2], s, g, visited, at, "what its tile visits", owned)
    _title(figure, s, g, heads, head)
    _legend(figure, g, s)
    out = Path(path)
    _save(figure, out, p.name)
    return out


def _save(figure: Any, out: Path, name: str) -> None:
    try:
        figure.savefig(out, metadata={"Software": None} if out.suffix == ".png" else None)
    except (OSError, ValueError) as e:  # no such folder; an ending that matplotlib has no format for
        raise DeclarationError(f"{name}: path={str(out)!r}: {e}; give a file such as pattern.png in a folder that exists") from e


def thumbnail(
    p: Pattern,
    *,
    grid: GridLike,
    query: tuple[int, ...],
    path: str | Path,
    kv_grid: GridLike = None,
    heads: int = 1,
    head: int = 0,
) -> Path:
    """A small picture for tables: the keys of one query of a 2-D grid, without text. Arguments as for `draw`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    s = subject(p, grid=grid, kv_grid=kv_grid, heads=heads)
    g = s.geometry
    assert g is not None
    figure = Figure(figsize=(1.3, 1.3), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    _grid_panel(ax, g, _keys_of(g, _query(p.name, g, query), head, heads), None, s)
    y, x = ((c + 0.5) * m / n - 0.5 for c, n, m in zip(query, g.q_grid, g.k_grid, strict=True))  # its place among the keys
    ax.plot([x], [y], marker="o", markersize=4.5, color=QUERY, markeredgecolor="white", markeredgewidth=0.7, zorder=5)
    ax.set_xticks([])
    ax.set_yticks([])
    out = Path(path)
    _save(figure, out, p.name)
    return out


# ---------------------------------------------------------------------------------------------------------------------- facts
def _query(name: str, g: Geometry, query: tuple[int, ...] | int | None) -> tuple[int, ...]:
    if query is None:
        return tuple(min(n - 1, round(n * 0.4)) for n in g.q_grid)
    at: tuple[Any, ...] = (query,) if isinstance(query, int) else tuple(query)
    inside = (isinstance(c, Integral) and 0 <= int(c) < n for c, n in zip(at, g.q_grid, strict=False))
    if len(at) != len(g.q_grid) or not all(inside):
        raise DeclarationError(f"{name}: query={query!r} does not lie on the grid {g.q_grid}")
    return tuple(map(int, at))


def _extents(g: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Extended key grid, and how far the real queries' origin lies in it (both 0 where the grid is flat)."""
    if g.structure.flat:
        return g.k_grid, (0,) * len(g.k_grid)
    return tuple(a.keys for a in g.axes), tuple(a.before_keys for a in g.axes)


def _keys_of(g: Geometry, at: tuple[int, ...], head: int, heads: int) -> NDArray[np.int8]:
    """0 or 2 for each extended key: whether the query sees it."""
    shape, _ = _extents(g)
    allowed = g.mask(_coordinates(g, at), _all_keys(g), heads)[head]
    return np.where(allowed[0], 2, 0).astype(np.int8).reshape(shape)


def _coordinates(g: Geometry, at: tuple[int, ...]) -> NDArray[np.int64]:
    """[rank, 1] extended coordinates of a real query."""
    if g.structure.flat:
        return np.array([[np.ravel_multi_index(at, g.q_grid)]])
    return np.array([[c + a.before_queries] for c, a in zip(at, g.axes, strict=True)])


def _all_keys(g: Geometry) -> NDArray[np.int64]:
    return np.stack([c.ravel() for c in np.meshgrid(*[np.arange(a.keys) for a in g.axes], indexing="ij")])


def _visited(g: Geometry, at: tuple[int, ...]) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """For each extended key 0, 1 (in a partial chunk) or 2 (full) of the query's tile; and which tokens the tile owns."""
    flat = _coordinates(g, at)[:, 0]
    real = tuple(int(c) - a.before_queries for c, a in zip(flat, g.axes, strict=True))
    sides = boxes.tile_sides(g)
    per_axis = []
    owned = np.ones([a.queries for a in g.axes], bool)
    for i, (a, (r, first, stop), side) in enumerate(zip(g.axes, boxes.tile_of(g, real), sides, strict=True)):
        classes = np.zeros(a.keys, np.int8)
        for start, end, full in boxes.chunks_of(a, r, first, stop, side):
            classes[boxes.coordinates(a, r, start, end)] = 2 if full else 1
        mine = np.zeros(a.queries, bool)
        mine[boxes.coordinates(a, r, first, stop)] = True
        view = [None] * len(g.axes)
        per_axis.append(classes)
        owned &= mine[tuple(slice(None) if d == i else v for d, v in enumerate(view))]
    out = per_axis[0]
    for c in per_axis[1:]:
        out = np.minimum(out[..., None], c)
    if g.structure.residual != ir.TRUE:
        out = np.minimum(out, 1)
    shape, _ = _extents(g)
    q_shape = g.q_grid if g.structure.flat else owned.shape
    return out.reshape(shape), owned.reshape(q_shape)


# --------------------------------------------------------------------------------------------------------------------- panels
def _shades() -> tuple[Any, Any]:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    return ListedColormap(PALETTE), BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3)


def _mask(axes: Any, s: Subject, g: Geometry, head: int, heads: int) -> None:
    """Nq x Nk where that is small, else one cell per pair of row bands, from the per-axis ends alone."""
    nq, nk = math.prod(g.q_grid), math.prod(_extents(g)[0])
    cmap, norm = _shades()
    if nq <= MOST_TOKENS and nk <= 2 * MOST_TOKENS:
        found = np.concatenate([_mask_rows(g, head, heads, rows) for rows in np.array_split(np.arange(nq), max(1, nq // 256))])
        style = {"interpolation": "antialiased", "interpolation_stage": "rgba"}  # finer than a pixel: shades, no moire
        axes.imshow(_shrunk(found, 512), cmap=cmap, norm=norm, aspect="auto", extent=(0, nk, nq, 0), **style)
        axes.set_title("mask", fontsize=11, color=INK, pad=7)
    else:
        first = g.axes[0]
        found = _bands(first)
        axes.imshow(found, cmap=cmap, norm=norm, interpolation="nearest", aspect="auto", extent=(0, first.keys, first.queries, 0))
        axes.set_title(f"mask along {'index' if g.structure.flat else s.axes[0]}, in tiles", fontsize=11, color=INK, pad=7)
    axes.set_xlabel("key, padding included" if g.padded else "key", fontsize=9, color=INK)
    axes.set_box_aspect(1)
    axes.set_anchor("N")
    axes.set_ylabel("query", fontsize=9, color=INK)
    _plain(axes)


def _mask_rows(g: Geometry, head: int, heads: int, rows: NDArray[np.int64]) -> NDArray[np.int8]:
    if g.structure.flat:
        q = rows[None]
    else:
        q = np.stack(np.unravel_index(rows, g.q_grid)) + np.array([[a.before_queries] for a in g.axes])
    return np.where(g.mask(q, _all_keys(g), heads)[head], 2, 0).astype(np.int8)


def _shrunk(mask: NDArray[np.int8], most: int) -> NDArray[np.int8]:
    """At most `most` cells a side: a cell that holds allowed and excluded pairs is partial."""
    for axis in (0, 1):
        step = -(-mask.shape[axis] // most)
        if step > 1:
            starts = np.arange(0, mask.shape[axis], step)
            high, low = np.maximum.reduceat(mask, starts, axis), np.minimum.reduceat(mask, starts, axis)
            mask = np.where(high == low, high, np.where(high > 0, 1, 0)).astype(np.int8)
    return mask


def _bands(a: Any) -> NDArray[np.int8]:
    """0, 1 or 2 for tiles of queries against tiles of keys on one axis of at most 256 tiles a side, from its ends."""
    n, m = min(a.queries, 256), min(a.keys, 256)
    q = np.arange(a.before_queries, a.before_queries + a.real_queries)
    lo, hi = a.lo[q % a.split, q // a.split], a.hi[q % a.split, q // a.split]
    cell_q = (q - q[0]) * n // len(q)
    edges = np.arange(m + 1) * a.keys // m
    out = np.zeros((n, m), np.int8)
    for i in range(n):
        rows = cell_q == i
        if not rows.any():
            continue
        low, high = lo[rows] * a.split + q[rows] % a.split, hi[rows] * a.split + q[rows] % a.split
        seen = (edges[1:] > low.min()) & (edges[:-1] <= high.max())
        full = (edges[:-1] >= low.max()) & (edges[1:] - 1 <= high.min()) & (a.split == 1)
        out[i] = np.where(full, 2, np.where(seen, 1, 0))
    return out


def _on_grid(
    figure: Any, cell: Any, s: Subject, g: Geometry, values: NDArray[np.int8], at: tuple[int, ...], title: str, owned: Any
) -> None:
    """Key classes on the grid, with the query (and its tile's tokens) marked. 1-D grids wrap into rows, 3-D ones are sliced."""
    _, before = _extents(g)
    same = s.program.same_grid
    scale = [k / q for q, k in zip(g.q_grid, g.k_grid, strict=True)]
    place = tuple(c + b if same else (c + 0.5) * f - 0.5 + b for c, b, f in zip(at, before, scale, strict=True))
    where = f"({', '.join(map(str, at))})"
    if values.ndim == 1:
        ax = figure.add_subplot(cell)
        columns = _columns(len(values))
        _grid_panel(
            ax, g, _wrapped(values, columns), None if owned is None or not same else _wrapped(owned, columns), s, wrap=columns
        )
        i = round(place[0])
        _star(ax, i // columns, i % columns)
        ax.set_title(f"{title}  {where}", fontsize=11, color=INK, pad=7)
        ax.set_ylabel(f"{s.axes[0]}, in rows of {columns}" if columns < len(values) else s.axes[0], fontsize=9, color=INK)
        return
    if values.ndim == 2:
        ax = figure.add_subplot(cell)
        _grid_panel(ax, g, values, owned if same else None, s)
        _star(ax, place[0], place[1])
        ax.set_title(f"{title}  {where}", fontsize=11, color=INK, pad=7)
        ax.set_ylabel(s.axes[0], fontsize=9, color=INK)
        ax.set_xlabel(s.axes[1], fontsize=9, color=INK)
        return
    depth = values.shape[0]
    centre = round(place[0])
    start = max(0, min(centre - SLICES // 2, depth - SLICES))
    shown = range(start, min(start + SLICES, depth))
    inner = cell.subgridspec(2, math.ceil(len(shown) / 2), wspace=0.12, hspace=0.32)
    for n, t in enumerate(shown):
        ax = figure.add_subplot(inner[n])
        mine = owned[t] if owned is not None and same and t < owned.shape[0] else None
        _grid_panel(ax, g, values[t], mine, s)
        if t == centre:
            _star(ax, place[1], place[2])
        ax.set_title(f"{s.axes[0]} = {t - before[0]}", fontsize=8, color=QUERY if t == centre else INK, pad=3)
        ax.set_xticks([])
        ax.set_yticks([])
    box = cell.get_position(figure)
    figure.text((box.x0 + box.x1) / 2, box.y1 + 0.055, f"{title}  {where}", ha="center", fontsize=11, color=INK)


def _columns(n: int) -> int:
    """Tokens in a row of a wrapped 1-D grid."""
    return n if n <= 16 else 1 << round(math.log2(math.sqrt(n)))


def _wrapped(values: NDArray[Any], columns: int) -> NDArray[np.int8]:
    """[n] in rows; -1 where there is no token."""
    rows = -(-len(values) // columns)
    out = np.full(rows * columns, -1, np.int8)
    out[: len(values)] = values
    return out.reshape(rows, columns)


def _grid_panel(ax: Any, g: Geometry, values: NDArray[np.int8], owned: Any, s: Subject, wrap: int = 0) -> None:
    from matplotlib.patches import Rectangle

    cmap, norm = _shades()
    h, w = values.shape
    ax.imshow(np.ma.masked_less(values, 0), cmap=cmap, norm=norm, interpolation="nearest", extent=(-0.5, w - 0.5, h - 0.5, -0.5))
    ax.set_anchor("N")
    if max(h, w) <= 64:
        ax.set_xticks(np.arange(-0.5, w, 1), minor=True)
        ax.set_yticks(np.arange(-0.5, h, 1), minor=True)
        ax.grid(which="minor", color="white", linewidth=0.6 if max(h, w) <= 32 else 0.3)
    if owned is not None:
        _outline(ax, owned == 1)
    if not wrap and g.padded:
        y, x = g.axes[-2], g.axes[-1]
        corner = (x.before_keys - 0.5, y.before_keys - 0.5)
        ax.add_patch(Rectangle(corner, x.real_keys, y.real_keys, fill=False, edgecolor=INK, linewidth=1.2, linestyle=(0, (4, 2))))
    _plain(ax)


def _outline(ax: Any, mine: NDArray[np.bool_]) -> None:
    """The border of the tokens a tile owns."""
    h = len(mine)
    padded = np.pad(mine, 1)
    lines = []
    for y in range(h):
        for x in np.flatnonzero(mine[y]):
            for dy, dx, segment in (
                (-1, 0, ((x - 0.5, y - 0.5), (x + 0.5, y - 0.5))),
                (1, 0, ((x - 0.5, y + 0.5), (x + 0.5, y + 0.5))),
                (0, -1, ((x - 0.5, y - 0.5), (x - 0.5, y + 0.5))),
                (0, 1, ((x + 0.5, y - 0.5), (x + 0.5, y + 0.5))),
            ):
                if not padded[y + 1 + dy, x + 1 + dx]:
                    lines.append(segment)
    from matplotlib.collections import LineCollection

    ax.add_collection(LineCollection(lines, colors=QUERY, linewidths=1.3, capstyle="projecting", clip_on=False))


def _star(ax: Any, y: float, x: float) -> None:
    ax.plot([x], [y], marker="o", markersize=7, color=QUERY, markeredgecolor="white", markeredgewidth=1.1, zorder=5)


def _plain(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for scale in (ax.xaxis, ax.yaxis):
        scale.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.tick_params(labelsize=8, colors=INK, length=2.5, width=0.6)
    ax.tick_params(which="minor", length=0)
    for side in ax.spines.values():
        side.set_color(GRID)
        side.set_linewidth(0.8)


def _title(figure: Any, s: Subject, g: Geometry, heads: int, head: int) -> None:
    sizes = " × ".join(map(str, g.q_grid)) + ("" if g.q_grid == g.k_grid else " over " + " × ".join(map(str, g.k_grid)))
    figure.text(0.045, 0.945, s.attend.name, fontsize=15, fontweight="bold", color=INK, va="center")
    parts = [f"grid {sizes}", f"strategy {s.strategy}", _share(s)]
    if any(n.op == "head" for n in ir.walk(s.attend.relation)):
        parts.append(f"head {head} of {heads} shown")
    figure.text(0.045, 0.893, "   ·   ".join(p for p in parts if p), fontsize=10.5, color="#51606f", va="center")


def _share(s: Subject) -> str:
    dense, allowed = s.dense(), s.allowed()
    if allowed is None:
        return ""
    return f"{allowed:,} of {dense:,} score elements allowed ({100 * allowed / dense:.3g} %)"


def _legend(figure: Any, g: Geometry, s: Subject) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Any] = [
        Patch(facecolor=KEY, label="allowed / full chunk, no mask"),
        Patch(facecolor=PARTIAL, label="partly allowed / partial chunk, masked"),
        Patch(facecolor=PALE, edgecolor=GRID, label="not allowed / never visited"),
        Line2D([], [], marker="o", linestyle="", markersize=7, color=QUERY, label="the query"),
    ]
    if s.program.same_grid:
        marks.append(Line2D([], [], color=QUERY, linewidth=1.3, label="queries of its tile"))
    if g.padded:
        marks.append(Line2D([], [], color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label="real tokens; outside: padding"))
    figure.legend(handles=marks, loc="lower center", ncol=len(marks), frameon=False, fontsize=9, bbox_to_anchor=(0.5, 0.015))
