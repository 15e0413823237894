"""attnc.draw: pictures of one to three axes, padding, other grids, heads, large grids; and its refusals."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnc
from attnc import patterns
from attnc.errors import DeclarationError, ShapeError
from attnc.report import draw as drawing
from attnc.report.subject import subject


@attnc.pattern
def disk(q: Any, k: Any, *, radius: int) -> Any:
    """A relation that is no product of axes."""
    return (q.y - k.y) ** 2 + (q.x - k.x) ** 2 <= radius**2


@attnc.pattern
def near_on_coarse(q: Any, k: Any) -> Any:
    """Queries on a grid, keys on one of half the size."""
    return (abs(q.y // 2 - k.y) <= 1) & (abs(q.x // 2 - k.x) <= 1)


@attnc.pattern
def flat_causal(q: Any, k: Any) -> Any:
    """Causal in row-major order."""
    return q.index >= k.index


@attnc.pattern
def documents(q: Any, k: Any, *, ids: attnc.Table) -> Any:
    """A relation that reads a runtime table."""
    return ids[q.x] == ids[k.x]


PICTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "window": (patterns.window(4, shift=2), {"grid": (12, 10), "query": (0, 9)}),
    "residual": (disk(radius=3), {"grid": (12, 12)}),
    "one_axis": (patterns.band(10, 4), {"grid": 200, "query": 7}),
    "three_axes": (patterns.neighborhood(3), {"grid": (8, 6, 7)}),
    "padded": (patterns.window(7), {"grid": (10, 12), "pad": "multiple", "query": (9, 11)}),
    "cross_grid": (near_on_coarse(), {"grid": (12, 12), "kv_grid": (6, 6)}),
    "flat": (flat_causal(), {"grid": (9, 7)}),
    "union": (patterns.cross(3), {"grid": (12, 12)}),
    "head": (patterns.per_head([patterns.window(4), patterns.grid(4)]), {"grid": (12, 12), "heads": 4, "head": 3}),
    "large": (patterns.neighborhood(13, dilation=2), {"grid": (128, 200)}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_written(name: str, tmp_path: Path) -> None:
    p, options = PICTURES[name]
    path = attnc.draw(p, path=tmp_path / "p.png", **options)
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert width > 1000
    assert height > 400
    if name == "window":
        assert attnc.draw(p, path=tmp_path / "again.png", **options).read_bytes() == data


def test_the_keys_drawn_are_those_of_the_mask() -> None:
    for p, grid, at in (
        (patterns.neighborhood(5), (9, 11), (0, 10)),
        (disk(radius=3), (8, 8), (3, 4)),
        (flat_causal(), (5, 6), (2, 3)),
    ):
        s = subject(p, grid=grid)
        assert s.geometry is not None
        keys = drawing._keys_of(s.geometry, at, 0, 1)
        row = attnc.mask(p, grid=grid)[0, np.ravel_multi_index(at, grid)].numpy()
        assert ((keys.ravel() == 2) == row).all()
        visited, owned = drawing._visited(s.geometry, at)
        assert (visited[keys == 2] > 0).all()
        assert owned[at]


@pytest.mark.parametrize(
    "p, options, error, says",
    [
        (
            patterns.window(2),
            {"grid": (4, 4), "query": (4, 0)},
            DeclarationError,
            r"query=\(4, 0\) does not lie on the grid \(4, 4\)",
        ),
        (patterns.window(2), {"grid": (4, 4), "query": 3}, DeclarationError, "query=3 does not lie"),
        (patterns.window(2), {"grid": (4, None)}, ShapeError, "needs a grid with known lengths"),
        (patterns.window(2), {"grid": (4, 4), "head": 2}, DeclarationError, "head=2 of heads=1"),
        (patterns.window(2), {"grid": dict.fromkeys("tzyx", 3)}, DeclarationError, "one to three axes"),
        (documents(), {"grid": 8}, ShapeError, "runtime tables"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    p: Any, options: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        attnc.draw(p, path=tmp_path / "p.png", **options)
    assert not list(tmp_path.iterdir())
