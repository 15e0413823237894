"""Layout strings: how a tensor's dimensions name batch, heads, grid axes and channels, as views in both directions.

"b h (y x) d" is the default, the layout of scaled_dot_product_attention. "b (y x) (three h d)" is one packed qkv tensor.
Nothing here copies: a tensor whose strides do not allow the view is refused by torch itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from attnc.errors import DeclarationError, ShapeError

_AS_THEY_ARE = tuple(tuple(range(n)) for n in range(16))


@dataclass(frozen=True)
class Layout:
    """A parsed layout string. `groups` lists the names of each dimension; `axes` the grid axes in order.

    packed: q, k and v are one tensor (`three`). separate: each grid axis is a dimension of its own, so a tensor tells its grid.
    joint: the head is packed with something else in one dimension, so its number must be told. The rest is what every call would
    find anew: `splits` (dimension, names), the last first, then `inward`, the order that makes rows; `outward` is the order of
    rows' dimensions in the layout and how many make up each of its own, for rows with one dimension of tokens and with the grid's.
    """

    text: str
    groups: tuple[tuple[str, ...], ...]
    axes: tuple[str, ...]
    packed: bool
    separate: bool
    joint: bool
    splits: tuple[tuple[int, tuple[str, ...]], ...]
    inward: tuple[int, ...]
    outward: dict[bool, tuple[tuple[int, ...], tuple[int, ...]]] = field(compare=False)


def _layout(text: str, groups: tuple[tuple[str, ...], ...], axes: tuple[str, ...]) -> Layout:
    whole = len(axes) > 1 and axes in groups  # tokens stay one dimension
    packed = any("three" in g for g in groups)
    splits = [(d, g) for d, g in reversed(tuple(enumerate(groups))) if len(g) > 1 and not (whole and g == axes)]
    names = [n for g in groups for n in (("tokens",) if whole and g == axes else g)]
    rows = [*(["three"] if packed else []), "b", "h", *(["tokens"] if whole else axes), "d"]
    outward = {}
    for merged in (True, False):
        have = ["b", "h", *(["tokens"] if merged and len(axes) > 1 else axes), "d"]
        wanted = [tuple(n for n in g if n != "three") for g in groups]
        wanted = [("tokens",) if g == axes and "tokens" in have else g for g in wanted if g]
        if all(n in have for g in wanted for n in g):
            outward[merged] = tuple(have.index(n) for g in wanted for n in g), tuple(map(len, wanted))
    separate = all(len(g) == 1 for g in groups if set(g) & set(axes))
    joint = any("h" in g and len(g) > 1 for g in groups)
    inward = tuple(names.index(n) for n in rows)
    return Layout(text, groups, axes, packed, separate, joint, tuple(splits), inward, outward)


@lru_cache(maxsize=256)
def parse(text: str) -> Layout:
    """Parse a layout string. Raises DeclarationError that shows the string and what is wrong in it."""
    tokens = re.findall(r"\([^()]*\)|\w+", " ".join(text.split()))
    if " ".join(tokens) != " ".join(text.split()):
        raise DeclarationError(f"layout {text!r}: names separated by spaces, grouped by one level of brackets")
    groups = tuple(tuple(t.strip("()").split()) for t in tokens)
    names = [n for g in groups for n in g]
    if not all(groups) or not all(n.isidentifier() for n in names):
        raise DeclarationError(f"layout {text!r}: every dimension has a name or a bracketed group of names")
    if {"index", "size"} & set(names):
        raise DeclarationError(f"layout {text!r}: 'index' and 'size' cannot name an axis, q.index and q.size mean something else")
    if len(set(names)) != len(names):
        raise DeclarationError(f"layout {text!r}: a name occurs twice")
    for needed in ("b", "h", "d"):
        if needed not in names:
            raise DeclarationError(
                f"layout {text!r}: no {needed!r}; a layout names b, h, d, the grid's axes, and `three` where packed"
            )
    axes = tuple(n for n in names if n not in ("b", "h", "d", "three"))
    if not axes:
        raise DeclarationError(f"layout {text!r}: no grid axis")
    if "b" not in [g[0] for g in groups if len(g) == 1]:
        raise DeclarationError(f"layout {text!r}: the batch `b` is a dimension of its own")
    holders = [g for g in groups if set(g) & set(axes)]
    merged = any(len(g) > 1 for g in holders)
    if merged and not (len(holders) == 1 and holders[0] == axes):
        raise DeclarationError(f"layout {text!r}: the axes are either one group (y x), or each a dimension of its own")
    return _layout(text, groups, axes)


def default(axes: tuple[str, ...]) -> Layout:
    """b h (axes) d."""
    return parse(f"b h ({' '.join(axes)}) d")


def _split_sizes(layout: Layout, group: tuple[str, ...], length: int, heads: int | None, what: str) -> list[int]:
    known = {"three": 3, "h": heads}
    unknown = [n for n in group if known.get(n) is None]
    product = 1
    for n in group:
        product *= known.get(n) or 1
    if len(unknown) > 1:
        raise ShapeError(
            f"layout {layout.text!r}: {what} packs ({' '.join(group)}) in one dimension of {length}: pass heads= to compile"
        )
    if length % product or (not unknown and product != length):
        raise ShapeError(
            f"layout {layout.text!r}: {what} has a dimension of {length} that ({' '.join(group)}) with heads={heads} does not fit"
        )
    return [known.get(n) or length // product for n in group]


def to_rows(t: Tensor, layout: Layout, heads: int | None, what: str) -> Tensor:
    """A view [B, H, N, D] (axes in one group) or [B, H, *grid, D]; with a leading dimension of three of a packed tensor."""
    if t.dim() != len(layout.groups):
        raise ShapeError(f"{what} has shape {tuple(t.shape)}, but the layout {layout.text!r} has {len(layout.groups)} dimensions")
    if layout.splits:
        sizes = list(t.shape)
        for d, group in layout.splits:
            sizes[d : d + 1] = _split_sizes(layout, group, t.shape[d], heads, what)
        t = t.view(sizes)
    t = t.permute(layout.inward)
    if layout.packed and t.shape[0] != 3:
        raise ShapeError(f"layout {layout.text!r}: the dimension `three` of {what} has length {t.shape[0]}")
    return t


def from_rows(out: Tensor, layout: Layout) -> Tensor:
    """The user's layout (without `three`) from [B, H, N, D] or [B, H, *grid, D]."""
    order, counts = layout.outward[out.dim() == 4]
    if order != _AS_THEY_ARE[len(order)]:  # a view takes as long as a good part of a small call
        out = out.permute(order)
    if len(counts) == len(order):
        return out
    sizes, at = [], 0
    for count in counts:
        n = 1
        for d in range(at, at + count):
            n *= out.shape[d]
        sizes.append(n)
        at += count
    return torch.reshape(out, sizes)


def rows_of_out(out: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """The other way: the view of an output in the user's layout as rows of this shape."""
    order, _ = layout.outward[len(shape) == 4]
    return out.view([shape[d] for d in order]).permute(_inverse(order))


def rows_undone(rows: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """A tensor of the user's shape from what `to_rows` makes of one."""
    return rows.permute(_inverse(layout.inward)).reshape(shape)


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(d) for d in range(len(order))]


def three(rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, of three tensors or of one that holds them."""
    q, k, v = rows if len(rows) == 3 else rows[0].unbind(0)
    return q, k, v
