"""Layout strings: how a tensor's dimensions name batch, heads, grid axes and channels, as views in both directions.

"b h (y x) d" is the default, the layout of scaled_dot_product_attention. "b (y x) (three h d)" is one packed qkv tensor.
Nothing here copies: a tensor whose strides do not allow the view is refused by torch itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnc.errors import DeclarationError, ShapeError


@dataclass(frozen=True)
class Layout:
    """A parsed layout string. `groups` lists the names of each dimension; `axes` the grid axes in order; packed: has `three`."""

    text: str
    groups: tuple[tuple[str, ...], ...]
    axes: tuple[str, ...]

    @property
    def packed(self) -> bool:
        """q, k and v are one tensor."""
        return any("three" in g for g in self.groups)

    @property
    def separate(self) -> bool:
        """Each grid axis is a dimension of its own, so a tensor tells its grid."""
        return all(len(g) == 1 for g in self.groups if set(g) & set(self.axes))

    @property
    def joint(self) -> bool:
        """The head is packed with something else in one dimension, so its number must be told."""
        return any("h" in g and len(g) > 1 for g in self.groups)


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
    return Layout(text, groups, axes)


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
    names: list[str] = []
    for group in reversed(layout.groups):
        d = t.dim() - 1 - len(names)
        if group == layout.axes and len(group) > 1:
            names.insert(0, "tokens")
        elif len(group) == 1:
            names.insert(0, group[0])
        else:
            t = t.unflatten(d, _split_sizes(layout, group, t.shape[d], heads, what))  # type: ignore[no-untyped-call]
            names[:0] = group
    order = ["b", "h", *(["tokens"] if "tokens" in names else layout.axes), "d"]
    if layout.packed:
        order.insert(0, "three")
        length = t.shape[names.index("three")]
        if length != 3:
            raise ShapeError(f"layout {layout.text!r}: the dimension `three` of {what} has length {length}")
    return t.permute([names.index(n) for n in order])


def from_rows(out: Tensor, layout: Layout) -> Tensor:
    """The user's layout (without `three`) from [B, H, N, D] or [B, H, *grid, D]."""
    rows = ["b", "h", *(["tokens"] if out.dim() == 4 and len(layout.axes) > 1 else layout.axes), "d"]
    groups = [tuple(n for n in g if n != "three") for g in layout.groups]
    groups = [("tokens",) if g == layout.axes and "tokens" in rows else g for g in groups if g]
    t = out.permute([rows.index(n) for g in groups for n in g])
    sizes, at = [], 0
    for g in groups:
        n = 1
        for _ in g:
            n *= t.shape[at]
            at += 1
        sizes.append(n)
    return t if len(sizes) == t.dim() else torch.reshape(t, sizes)
