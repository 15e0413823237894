"""attnc.explain: ten declared patterns as readable snapshots, and the facts they state checked against the mask."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import snapshot

import attnc
from attnc import patterns
from attnc.errors import DeclarationError
from attnc.report import boxes
from attnc.report.subject import subject
from attnc.schedule import plan as plans


@attnc.pattern
def same_block(q: Any, k: Any) -> Any:
    """Written out by a user: what window(7) says."""
    return (q.y // 7 == k.y // 7) & (q.x // 7 == k.x // 7)


@attnc.pattern
def disk(q: Any, k: Any, *, radius: int) -> Any:
    """A relation that is no product of axes: the predicate stays."""
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
def squares(q: Any, k: Any) -> Any:
    """Ends that resist a closed form: tables of one axis."""
    return (k.x * k.x <= q.x * q.x) & ((q.y - k.y) % 3 == 0)


@attnc.pattern
def documents(q: Any, k: Any, *, ids: attnc.Table) -> Any:
    """A relation that reads a runtime table."""
    return ids[q.x] == ids[k.x]


GRID: dict[str, Any] = {"grid": (56, 56)}
SNAPSHOTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "same_block": (same_block(), GRID),
    "shifted_window": (patterns.window(7, shift=3, bias="relative"), GRID | {"heads": 3}),
    "padded_window": (patterns.window(7), {"grid": (107, 160), "pad": "multiple", "heads": 3}),
    "band": (patterns.band(3, 3, bias="relative"), GRID | {"heads": 3}),
    "neighborhood": (patterns.neighborhood(7), GRID),
    "dilated": (patterns.dilated(7, 2), GRID),
    "axial": (patterns.axial("x"), GRID),
    "strip": (patterns.strip("y", 4), GRID),
    "causal": (flat_causal(), {"grid": (14, 14), "prefix": 1}),
    "grid": (patterns.grid(7), GRID),
    "union": (patterns.cross(7), GRID),
    "per_head": (patterns.per_head([patterns.window(7), patterns.neighborhood(7)]), GRID | {"heads": 4}),
    "disk": (disk(radius=5), {"grid": (28, 28)}),
    "cross_grid": (near_on_coarse(), {"grid": (56, 56), "kv_grid": (28, 28)}),
    "tables_per_axis": (squares(), {"grid": (12, 9)}),
    "symbolic_sizes": (patterns.neighborhood(7, stride=2), {}),
    "documents": (documents(), {"grid": 100}),
    "channel": (patterns.channel(), {}),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshot(name: str) -> None:
    p, options = SNAPSHOTS[name]
    text = attnc.explain(p, **options)
    assert text == attnc.explain(p, **options)
    assert not any(line != line.rstrip() for line in text.splitlines())
    snapshot.matches(f"explain_{name}.txt", text)


def test_a_user_s_own_block_reads_exactly_as_the_library_s_window() -> None:
    own, library = (attnc.explain(p, **GRID).splitlines() for p in (same_block(), patterns.window(7)))
    assert own[0].startswith("same_block()")
    assert library[0].startswith("window(7)")
    assert own[2:] == library[2:]


def test_wrong_statements_raise() -> None:
    @attnc.pattern
    def wrong(q: Any, k: Any) -> Any:
        return q.z == k.z

    with pytest.raises(DeclarationError, match="unknown axis `z`"):
        attnc.explain(wrong(), grid=(4, 4))


def test_refusals_are_told() -> None:
    text = attnc.explain(patterns.neighborhood(3), grid=(9, 9), pad="multiple")
    assert "Refused\n  pattern neighborhood(3): pad='multiple' needs blocks of a constant length" in text

    @attnc.pattern
    def columns(q: Any, k: Any) -> Any:
        return attnc.where(q.y == k.y, attnc.SCORE, normalizer=attnc.softmax(over="queries"))

    text = attnc.explain(columns(), grid=(4, 4))
    assert "no C++ kernel is printed for softmax over queries; an operator" in text.split("Refused")[1]
    assert "the same with queries and keys exchanged" in text.split("Plan")[1]


COUNTED = [
    (patterns.window(4, shift=1), (13, 10)),
    (patterns.neighborhood(5), (17, 11)),
    (patterns.neighborhood(3, dilation=2), (14, 19)),
    (patterns.neighborhood(5, stride=2), (17, 18)),
    (patterns.grid(4), (13, 12)),
    (patterns.axial("y"), (9, 20)),
    (patterns.strip("y", 3), (10, 11)),
    (patterns.causal(), (20, 9)),
    (patterns.band(3, 9), 150),
    (patterns.dilated_blocks(2, 3), (13, 14)),
    (patterns.neighborhood(3), (5, 9, 7)),
    (patterns.cross(3), (12, 12)),
    (disk(radius=3), (12, 9)),
]


@pytest.mark.parametrize("p, grid", COUNTED, ids=lambda x: getattr(x, "name", None))
def test_counts_agree_with_the_mask(p: Any, grid: Any) -> None:
    """Every allowed pair lies in a visited chunk, full chunks hold allowed pairs only, and the numbers add up."""
    s = subject(p, grid=grid)
    allowed = attnc.mask(p, grid=grid)[0]
    assert s.allowed() == int(allowed.sum())
    for part in s.parts:
        g = part.geometry
        assert g is not None
        c, rows = boxes.count(g), boxes.tile_sides(g)
        tiles = [boxes.tiles_of(a, side) for a, side in zip(g.axes, rows, strict=True)]
        owned = [sorted(int(x) for t in of for x in boxes.coordinates(a, *t)) for a, of in zip(g.axes, tiles, strict=True)]
        assert owned == [list(range(a.queries)) for a in g.axes]
        full = partial = 0
        visited: list[list[int]] = []
        for a, of, side in zip(g.axes, tiles, rows, strict=True):
            chunks = [boxes.chunks_of(a, *t, side) for t in of]
            visited.append([len(x) for x in chunks])
            for (r, first, stop), found in zip(of, chunks, strict=True):
                for start, end, is_full in found:
                    inside = [a.lo[r, j] <= i <= a.hi[r, j] for j in range(first, stop) for i in range(start, end)]
                    assert all(inside) or not is_full
        partial = c.partial
        full = c.full
        total = 1
        for counts in visited:
            total *= sum(counts)
        assert full + partial == total
        assert c.empty >= 0


def test_plan_is_a_graph_of_kernels_with_tensors_on_its_edges() -> None:
    s = subject(patterns.window(7, bias="relative"), grid=(14, 14), prefix=1)
    g = plans.plan(s.program)
    assert nx.is_directed_acyclic_graph(g)
    order = plans.ordered(g)
    assert order.index("forward") < order.index("backward_delta") < order.index("backward_dq") < order.index("backward_table")
    assert plans.reads(g, "forward") == ("q", "k", "v", "bias")
    assert plans.writes(g, "backward_table") == ("dbias",)
    assert set(plans.reads(g, plans.RESULTS)) == {"out", "lse", "dq", "dk", "dv", "dbias"}
    assert "forward_prefix" in g
    assert "merge" in plans.plan(subject(patterns.cross(3), grid=(28, 28)).program, union=True)


def test_plan_of_a_padded_pattern_gives_gradients_of_the_padding_rows() -> None:
    g = plans.plan(subject(patterns.window(7), grid=(10, 10), pad="multiple").program)
    assert {"dpad_k", "dpad_v"} <= set(plans.reads(g, plans.RESULTS))


def test_plan_of_a_sink_and_row_maps_surrounds_the_kernels() -> None:
    @attnc.pattern
    def sunk(q: Any, k: Any, *, extra: attnc.Table) -> Any:
        return attnc.where(q.y == k.y, attnc.SCORE, normalizer=attnc.softmax(sink=extra), k_map=attnc.l2norm)

    g = plans.plan(subject(sunk(), grid=(4, 4)).program)
    assert set(plans.reads(g, "sink")) == {"kernels' out", "kernels' lse", "extra"}
    assert plans.writes(g, "sink") == ("out", "lse") and "kernels' lse" in plans.reads(g, "backward_dq")
    assert plans.reads(g, "row_maps") == ("k",) and "mapped k" in plans.reads(g, "forward")
    assert set(plans.reads(g, plans.RESULTS)) == {"out", "lse", "dq", "dk", "dv", "dextra"}


def test_plan_without_softmax_has_no_delta() -> None:
    @attnc.pattern
    def gated(q: Any, k: Any) -> Any:
        return attnc.where(q.y == k.y, attnc.SCORE, normalizer=attnc.sigmoid())

    g = plans.plan(subject(gated(), grid=(4, 4)).program)
    assert "backward_delta" not in g
    assert plans.reads(g, plans.RESULTS) == ("out", "dq", "dk", "dv")
