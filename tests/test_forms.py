"""Normal forms are found from the expression: in any dress the same form, and never where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import strategies as draws
from hypothesis import given
from hypothesis import strategies as st

import attnc
from attnc import ir, patterns
from attnc.analysis import forms as rules
from attnc.analysis import structure as structures
from attnc.analysis.axis import AxisForm
from attnc.analysis.evaluate import evaluate
from attnc.analysis.structure import Structure, analyse

Body = Callable[[Any, Any], Any]


def structure(body: Body | attnc.Pattern, axes: tuple[str, ...] = ("x",), *, same_grid: bool = True) -> Structure:
    p = body if isinstance(body, attnc.Pattern) else attnc.pattern(body)()
    return analyse(p.trace(axes, same_grid=same_grid), same_grid)


def form(body: Body | attnc.Pattern) -> AxisForm:
    """The form of a 1-D statement that has no residual."""
    s = structure(body)
    assert s.residual == ir.TRUE, s.residual
    return s.axes[0]


def proven(body: Body | attnc.Pattern) -> bool:
    """Whether the whole statement became an interval."""
    s = structure(body)
    return s.residual == ir.TRUE


n = 1 << 40  # something greater than any axis
# a pattern of the library, and the same relation in other words: each must give the very same form
DRESSES: dict[str, tuple[attnc.Pattern, list[Body]]] = {
    "window": (
        patterns.window(7),
        [
            lambda q, k: q.x // 7 == k.x // 7,
            lambda q, k: k.x // 7 == q.x // 7,
            lambda q, k: (q.x // 7) - (k.x // 7) == 0,
            lambda q, k: (q.x + 7) // 7 == (k.x + 7) // 7,
            lambda q, k: q.x // 7 * 7 == k.x // 7 * 7,
            lambda q, k: (k.x >= q.x // 7 * 7) & (k.x < q.x // 7 * 7 + 7),
            lambda q, k: (k.x >= q.x // 7 * 7) & (k.x <= q.x // 7 * 7 + 6),
            lambda q, k: (k.x // 7 <= q.x // 7) & (k.x // 7 >= q.x // 7),
            lambda q, k: ~(k.x // 7 < q.x // 7) & ~(q.x // 7 < k.x // 7),
        ],
    ),
    "neighborhood": (
        patterns.neighborhood(7),
        [
            lambda q, k: (
                (k.x >= attnc.max(attnc.min(q.x - 3, q.size.x - 7), 0))
                & (k.x <= attnc.max(attnc.min(q.x - 3, q.size.x - 7), 0) + 6)
            ),
            lambda q, k: (
                (k.x >= attnc.max(0, attnc.min(q.size.x - 7, q.x - 3))) & (k.x - 7 < attnc.max(0, attnc.min(q.size.x - 7, q.x - 3)))
            ),
        ],
    ),
    "causal": (
        patterns.causal(),
        [
            lambda q, k: k.x <= q.x,
            lambda q, k: q.x >= k.x,
            lambda q, k: ~(k.x > q.x),
            lambda q, k: k.x < q.x + 1,
            lambda q, k: q.x - k.x >= 0,
            lambda q, k: -k.x >= -q.x,
            lambda q, k: 2 * k.x <= 2 * q.x + 1,
            lambda q, k: q.index >= k.index,
            lambda q, k: attnc.max(k.x, 0) <= q.x,
            lambda q, k: attnc.where(k.x <= q.x, attnc.SCORE),
        ],
    ),
    "band": (
        patterns.band(3, 3),
        [
            lambda q, k: abs(q.x - k.x) <= 3,
            lambda q, k: abs(k.x - q.x) <= 3,
            lambda q, k: abs(q.x - k.x) < 4,
            lambda q, k: ~(abs(q.x - k.x) >= 4),
            lambda q, k: (k.x - q.x <= 3) & (q.x - k.x <= 3),
            lambda q, k: attnc.max(q.x - k.x, k.x - q.x) <= 3,
            lambda q, k: (k.x >= attnc.max(q.x - 3, 0)) & (k.x <= attnc.min(q.x + 3, q.size.x - 1)),
        ],
    ),
    "residue": (
        patterns.full().dilate(4),
        [
            lambda q, k: q.x % 4 == k.x % 4,
            lambda q, k: (q.x - k.x) % 4 == 0,
            lambda q, k: (k.x - q.x) % 4 == 0,
            lambda q, k: (q.x + 3) % 4 == (k.x + 3) % 4,
            lambda q, k: (q.x + 1) % 4 == (k.x + 5) % 4,
            lambda q, k: (q.x - k.x + 8) % 4 == 0,
            lambda q, k: q.x % 4 - k.x % 4 == 0,
            lambda q, k: (q.x % 2 == k.x % 2) & (q.x % 4 == k.x % 4),
        ],
    ),
    "point": (
        patterns.band(0, 0),
        [lambda q, k: q.x == k.x, lambda q, k: k.x - q.x == 0, lambda q, k: abs(q.x - k.x) < 1, lambda q, k: 3 * q.x == 3 * k.x],
    ),
    "full": (
        patterns.full(),
        [lambda q, k: True, lambda q, k: k.x >= 0, lambda q, k: k.x < q.size.x, lambda q, k: (k.x >= -5) & (q.x == q.x)],
    ),
    "dilated blocks": (
        patterns.dilated_blocks(3, 2),
        [
            lambda q, k: (q.x % 2 == k.x % 2) & (q.x // 6 == k.x // 6),
            lambda q, k: ((q.x - k.x) % 2 == 0) & (q.x // 2 // 3 == k.x // 2 // 3),
        ],
    ),
    "grid": (
        patterns.grid(5),
        [
            lambda q, k: q.x % ((q.size.x + 4) // 5) == k.x % ((q.size.x + 4) // 5),
            lambda q, k: (q.x - k.x) % ((q.size.x + 4) // 5) == 0,
        ],
    ),
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, (_, bodies) in DRESSES.items() for i in range(len(bodies))])
def test_the_same_relation_in_any_dress_has_the_same_ends(name: str, number: int) -> None:
    library, bodies = DRESSES[name]
    mine, theirs = form(bodies[number]), form(library)
    for length in (1, 2, 5, 7, 8, 20, 29):
        assert ends(mine, length) == ends(theirs, length), (name, number, length)
    assert mine.split == theirs.split


def ends(f: AxisForm, length: int) -> list[tuple[int, int]]:
    """(lo, hi) of every query on an axis, cut to the axis as any user of the ends may."""
    out = []
    for c in range(length):
        split = int(evaluate(f.split, {ir.size("q", 0): length}, np))
        leaves = {ir.size("q", 0): length, ir.var("j"): c // split, ir.var("r"): c % split}
        lo, hi = int(evaluate(f.lo, leaves, np)), int(evaluate(f.hi, leaves, np))
        out.append((lo, hi) if lo <= hi else (0, -1))
    return out


@pytest.mark.parametrize("body", DRESSES["window"][1][:6], ids=range(6))
def test_a_users_window_is_exactly_the_librarys(body: Body) -> None:
    """Not only the same keys: the same form object, so that the same kernel follows."""
    assert form(body) == form(patterns.window(7))
    assert form(body).kind == "block"
    assert form(body).block == ir.const(7)


@pytest.mark.parametrize("shift", [1, 3, 6, -2])
def test_shifted_windows_in_other_words(shift: int) -> None:
    mine = form(lambda q, k: (q.x - shift) // 7 == (k.x - shift) // 7)
    assert mine.kind == "shifted block"
    assert (mine.block, mine.shift) == (ir.const(7), ir.const(shift % 7))
    assert form(patterns.window(7).shift(shift)) == mine
    other = form(lambda q, k: (q.x - shift + 70) // 7 == (k.x - shift + 70) // 7)
    for length in (5, 7, 8, 30):
        assert ends(mine, length) == ends(other, length)


def test_the_librarys_forms_by_name() -> None:
    kinds = {
        "full": patterns.full(),
        "block": patterns.window(7),
        "shifted block": patterns.window(7, shift=3),
        "causal": patterns.causal(),
        "band": patterns.band(2, 5),
        "clamped band": patterns.neighborhood(5),
        "residue 3 of clamped band": patterns.neighborhood(5, 3),
        "residue": patterns.full().dilate(2),
        "residue 2 of block": patterns.dilated_blocks(3, 2),
        "point": patterns.band(0, 0),
    }
    assert {name: form(p).kind for name, p in kinds.items()} == {name: name for name in kinds}
    s = structure(patterns.axial("y"), ("y", "x"))
    assert [f.kind for f in s.axes] == ["full", "point"]
    assert s.strategy == "grouped"
    assert structure(patterns.window(7), ("y", "x")).strategy == "grouped"
    assert structure(patterns.neighborhood(7), ("y", "x")).strategy == "banded"
    assert structure(patterns.full(), ("y", "x")).strategy == "dense"
    assert structure(lambda q, k: q.index >= k.index, ("y", "x")).flat


# statements that are not an interval with rising ends, or look like a form and are another
TRAPS: dict[str, Body] = {
    "reversed": lambda q, k: k.x == q.size.x - 1 - q.x,
    "falling upper end": lambda q, k: k.x <= q.size.x - 1 - q.x,
    "falling lower end": lambda q, k: k.x >= 10 - q.x,
    "falling both ends": lambda q, k: abs(q.x + k.x - 12) <= 2,
    "another residue": lambda q, k: (q.x - k.x) % 3 == 1,
    "another residue, two moduli": lambda q, k: q.x % 3 == (k.x + 1) % 3,
    "sum instead of difference": lambda q, k: (q.x + k.x) % 3 == 0,
    "sum, two moduli": lambda q, k: q.x % 3 == -k.x % 3,
    "two moduli that differ": lambda q, k: q.x % 3 == k.x % 4,
    "q on both sides": lambda q, k: q.x % 3 == (2 * q.x) % 3,
    "q on both sides of a window": lambda q, k: q.x // 3 == (q.x + 1) // 3,
    "k on both sides": lambda q, k: k.x % 3 == (k.x * k.x) % 3,
    "k twice": lambda q, k: k.x % 4 == 0,
    "a modulus that reads q": lambda q, k: (k.x - q.x) % (q.x + 1) == 0,
    "a modulus that reads q, swapped": lambda q, k: (q.x - k.x) % (q.x + 1) == 0,
    "a modulus that reads k": lambda q, k: (k.x - q.x) % (k.x + 1) == 0,
    "a block that reads q": lambda q, k: k.x // (q.x + 1) == 0,
    "a block that reads k": lambda q, k: q.x // (k.x + 1) == 0,
    "a block that reads q twice": lambda q, k: q.x // (q.x % 3 + 1) == k.x // (q.x % 3 + 1),
    "far instead of near": lambda q, k: abs(q.x - k.x) >= 2,
    "far, by not": lambda q, k: ~(abs(q.x - k.x) <= 1),
    "not equal": lambda q, k: q.x != k.x,
    "another window": lambda q, k: q.x // 3 != k.x // 3,
    "windows of two sizes": lambda q, k: q.x // 3 == k.x // 4,
    "windows of two shifts": lambda q, k: q.x // 3 == (k.x + 1) // 3,
    "next window": lambda q, k: q.x // 3 + 1 == k.x // 3,
    "a product": lambda q, k: q.x * k.x <= 20,
    "a product with an offset": lambda q, k: (q.x + 1) * k.x <= 20,
    "a square": lambda q, k: (q.x - k.x) ** 2 <= 5,
    "a square of k": lambda q, k: k.x * k.x <= q.x,
    "a rising quotient": lambda q, k: 3 * k.x <= 2 * q.x,
    "a rising quotient, equal": lambda q, k: 3 * k.x == 2 * q.x,
    "a falling product": lambda q, k: -2 * k.x <= q.x - 9,
    "min below": lambda q, k: attnc.min(k.x, q.x) <= 3,
    "min above": lambda q, k: attnc.min(k.x, 5) >= q.x,
    "max below": lambda q, k: attnc.max(k.x, 5) <= q.x,
    "max above": lambda q, k: attnc.max(k.x, q.x - 2) >= 4,
    "abs of k": lambda q, k: abs(k.x - 4) <= q.x,
    "abs, falling": lambda q, k: abs(k.x - 4) <= 6 - q.x,
    "abs equal": lambda q, k: abs(q.x - k.x) == 2,
    "a choice": lambda q, k: attnc.where(q.x > 5, k.x <= q.x, k.x >= q.x),
    "a union": lambda q, k: (k.x == q.x) | (k.x == 0),
    "no key": lambda q, k: k.x < 0,
    "no key either": lambda q, k: k.x > q.size.x,
    "some empty rows": lambda q, k: (k.x > q.x + 2) & (k.x < q.x + 5),
    "rows empty by residue": lambda q, k: (q.x % 5 == k.x % 5) & (k.x > q.x),
    "two residues": lambda q, k: (q.x % 4 == k.x % 4) & (q.x % 6 == k.x % 6),
    "a residue and a window": lambda q, k: (q.x % 2 == k.x % 2) & (q.x // 5 == k.x // 5),
    "a residue of the size and one of ours": lambda q, k: (q.x % 2 == k.x % 2) & ((q.x - k.x) % ((q.size.x + 2) // 3) == 0),
    "a residue and a symbolic clamp": lambda q, k: (q.x % 3 == k.x % 3) & (k.x <= attnc.min(q.x + 4, q.size.x - 4)),
    "a window of the size": lambda q, k: q.x // attnc.max(q.size.x // 2, 1) == k.x // attnc.max(q.size.x // 2, 1),
    "query only": lambda q, k: q.x % 2 == 0,
    "query only, beside a window": lambda q, k: (q.x // 4 == k.x // 4) & (q.x % 3 != 1),
    "key only": lambda q, k: (k.x >= 2) & (k.x < 9),
    "a far end": lambda q, k: k.x >= q.x + (1 << 40),
    "a far end below": lambda q, k: k.x <= q.x + (1 << 40),
    "a long residue": lambda q, k: q.x % (1 << 20) == k.x % (1 << 20),
    "negative divisors": lambda q, k: q.x // -3 == k.x // -3,
    "negative moduli": lambda q, k: q.x % -3 == k.x % -3,
    "negative numerators": lambda q, k: (q.x - 9) // 4 == (k.x - 9) // 4,
    "falling windows": lambda q, k: (9 - q.x) // 4 == (9 - k.x) // 4,
    "falling windows, one side": lambda q, k: (9 - q.x) // 4 == k.x // 4,
    "a clamp as a difference": lambda q, k: k.x <= q.x - attnc.max(q.x - 5, 0),
    "two clamps as differences": lambda q, k: k.x + attnc.max(q.x - 7, 0) <= 2 * q.x - attnc.min(q.x, 4),
    "a difference that falls": lambda q, k: k.x <= q.x - 2 * attnc.max(q.x - 5, 0),
    "a difference that falls at first": lambda q, k: k.x >= q.x - 2 * attnc.min(q.x, 4),
    "a difference of the size": lambda q, k: k.x >= q.x - 2 - attnc.max(q.x + 3 - q.size.x, 0),
}
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 12, 13, 19)


def evaluated(body: Body, length: int) -> np.ndarray[Any, Any]:
    return attnc.mask(attnc.pattern(body)(), grid=(length,))[0].numpy()


def from_geometry(p: attnc.Pattern, grid: tuple[int, ...], heads: int = 1) -> np.ndarray[Any, Any]:
    """The mask that the ends, the split and the residual make."""
    from attnc.schedule.geometry import geometry

    tokens = ir.Tokens((None,) * len(grid))
    g = geometry(ir.Program(p.trace(ir.AXES[len(grid)]), tokens, tokens), grid, grid)
    shape = (int(np.prod(grid)),) if g.structure.flat else grid
    coords = np.stack([c.ravel() for c in np.meshgrid(*[np.arange(m) for m in shape], indexing="ij")])
    return g.mask(coords, coords, heads)


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_traps_are_never_misread(name: str) -> None:
    """Whatever was recognised, the keys are those of the statement, at every small length."""
    for length in LENGTHS:
        found = from_geometry(attnc.pattern(TRAPS[name])(), (length,))[0]
        assert np.array_equal(found, evaluated(TRAPS[name], length)), (name, length)


def test_what_is_no_interval_stays_a_predicate() -> None:
    for name in ("reversed", "falling upper end", "another residue", "a product", "far instead of near", "a modulus that reads q"):
        assert not proven(TRAPS[name]), name
    for name in ("a difference that falls", "a difference that falls at first"):
        assert not proven(TRAPS[name]), name


def test_what_is_one_does_not_need_a_predicate() -> None:
    for name in ("a rising quotient", "some empty rows", "two residues", "a residue and a window", "key only", "a far end"):
        assert proven(TRAPS[name]), name
    for name in ("a clamp as a difference", "two clamps as differences", "a difference of the size"):
        assert proven(TRAPS[name]), name


FORMS: dict[str, attnc.Pattern] = {
    "window": patterns.window(3),
    "shifted window": patterns.window(4, shift=3),
    "neighborhood": patterns.neighborhood(5),
    "even neighborhood": patterns.neighborhood(4),
    "dilated neighborhood": patterns.neighborhood(3, 2),
    "widely dilated neighborhood": patterns.neighborhood(3, 5),
    "strided neighborhood": patterns.neighborhood(5, 1, 3),
    "strided dilated neighborhood": patterns.neighborhood(4, 2, 2),
    "causal neighborhood": patterns.neighborhood(4, causal=True),
    "strided causal dilated neighborhood": patterns.neighborhood(4, 2, 2, causal=True),
    "grid": patterns.grid(3),
    "dilated blocks": patterns.dilated_blocks(2, 3),
    "causal": patterns.causal(),
    "band": patterns.band(2, 4),
    "lopsided band": patterns.band(0, 3),
    "full": patterns.full(),
    "dilated window": patterns.window(2).dilate(3),
    "dilated causal": patterns.causal().dilate(2),
    "shifted neighborhood": patterns.neighborhood(3).shift(1),
    "window and band": patterns.window(4) & patterns.band(1, 1),
    "inward window": patterns.inward_window(2),
    "sliding window": patterns.sliding_window(5, 2),
}


def loops(name: str, length: int) -> np.ndarray[Any, Any]:
    """The same relations as plain Python, from the papers' words."""

    def allowed(i: int, j: int) -> bool:
        if name == "window":
            return i // 3 == j // 3
        if name == "shifted window":
            return (i - 3) // 4 == (j - 3) // 4 if length > 4 else True
        if "neighborhood" in name and "shifted" not in name:
            size = {"even": 4, "dilated": 3, "widely": 3, "strided": 5, "causal": 4}.get(name.partition(" ")[0], 5)
            step = 5 if name.startswith("widely") else 2 if "dilated" in name else 1
            stride = {"strided neighborhood": 3}.get(name, 2 if name.startswith("strided") else 1)
            size = 4 if name.startswith("strided ") and name != "strided neighborhood" else size
            if i % step != j % step:
                return False
            group = list(range(i % step, length, step))
            a, b, m = i // step, j // step, len(group)
            if "causal" in name:
                leader = min(a // stride * stride + stride - 1, m - 1)
                return b <= a and leader - b < size
            leader = min(a // stride * stride + stride // 2, m - 1)
            start = max(leader - size // 2, 0)
            if leader + (size - 1 - size // 2) >= m:
                start = max(m - size, 0)
            return start <= b < start + size
        if name == "grid":
            m = -(-length // 3)
            return i % m == j % m
        if name == "dilated blocks":
            return i % 3 == j % 3 and i // 6 == j // 6
        if name == "causal":
            return j <= i
        if name == "band":
            return -2 <= j - i <= 4
        if name == "lopsided band":
            return 0 <= j - i <= 3
        if name == "dilated window":
            return i % 3 == j % 3 and i // 6 == j // 6
        if name == "dilated causal":
            return i % 2 == j % 2 and j <= i
        if name == "shifted neighborhood":
            start = max(min(i - 1 - 1, length - 3), 0)
            return start <= j - 1 < start + 3
        if name == "inward window":
            return i - 2 - max(2 + i - length + 1, 0) <= j <= i + 2 + max(2 - i, 0)
        if name == "sliding window":
            return j - i in (-4, -2, 0, 2, 4)
        if name == "window and band":
            return i // 4 == j // 4 and abs(i - j) <= 1
        return True

    return np.array([[allowed(i, j) for j in range(length)] for i in range(length)])


@pytest.mark.parametrize("name", FORMS)
def test_the_library_means_what_the_papers_say_and_its_ends_are_exact(name: str) -> None:
    """Exhaustively at small lengths: the declared relation, the closed form's ends and plain loops agree."""
    for length in range(1, 24):
        truth = loops(name, length)
        assert np.array_equal(attnc.mask(FORMS[name], grid=(length,))[0].numpy(), truth), (name, length)
        assert np.array_equal(from_geometry(FORMS[name], (length,))[0], truth), (name, length)


@pytest.mark.parametrize("name", FORMS)
def test_inverses_are_the_transpose(name: str) -> None:
    """For a key, the queries that see it: closed form and searched tables, exhaustively, then at random large lengths."""
    from attnc.schedule.geometry import geometry

    f = form(FORMS[name])
    tokens = ir.Tokens((None,))
    program = ir.Program(FORMS[name].trace(("x",)), tokens, tokens)
    for length in (*range(1, 20), 97, 128, 251, 1000):
        axis = geometry(program, (length,), (length,)).axes[0]
        for r in range(axis.classes):
            count = axis.count(length, r)
            j, i = np.arange(count)[:, None], np.arange(count)[None]
            seen = (axis.lo[r, :count, None] <= i) & (i <= axis.hi[r, :count, None])
            assert (np.diff(axis.lo[r, :count]) >= 0).all()
            assert (np.diff(axis.hi[r, :count]) >= 0).all()
            transposed = (axis.inverse_lo[r, None, :count] <= j) & (j <= axis.inverse_hi[r, None, :count])
            assert np.array_equal(seen, transposed), (name, length, r)
            if f.inverse_lo is not None and f.inverse_hi is not None:
                leaves = {ir.size("q", 0): length, ir.var("r"): r, ir.var("i"): np.arange(count)}
                first, last = (np.broadcast_to(evaluate(e, leaves, np), (count,)) for e in (f.inverse_lo, f.inverse_hi))
                closed = (first[None] <= j) & (j <= last[None])
                assert np.array_equal(seen, closed), (name, length, r)


def test_the_named_forms_invert_in_closed_form() -> None:
    without = [name for name, p in FORMS.items() if form(p).inverse_lo is None]
    assert set(without) <= {"strided neighborhood", "strided dilated neighborhood", "strided causal dilated neighborhood"}


UNIONS: list[tuple[Body, bool]] = [  # intervals that meet are one; whether they do is proved or it stays a predicate
    (lambda q, k: (k.x < 5) | (k.x <= q.x), True),
    (lambda q, k: (k.x >= q.x) | (k.x > q.size.x - 4), True),
    (lambda q, k: ((k.x <= q.x) & (k.x >= q.x - 3)) | ((k.x >= q.x) & (k.x <= q.x + 2)), True),
    (lambda q, k: ((k.x < q.x) & (k.x >= q.x - 3)) | ((k.x >= q.x) & (k.x <= q.x + 2)), True),
    (lambda q, k: ((k.x > q.x) & (k.x <= q.x + 3)) | ((k.x > q.x + 1) & (k.x <= q.x + 6)), True),
    (lambda q, k: ((k.x <= q.x) & (k.x >= q.x - 3)) | ((k.x > q.x + 1) & (k.x <= q.x + 4)), False),
    (lambda q, k: (k.x < 5) | (k.x >= q.x), False),
    (lambda q, k: (k.x <= q.x) | (k.x >= q.x), False),
    (lambda q, k: (k.x <= q.x) | (q.x < 3), False),
    (lambda q, k: ((k.x >= q.x + 3) & (k.x <= q.x)) | ((k.x > q.x) & (k.x <= q.x + 2)), True),  # the first is empty
    (lambda q, k: (k.x < 5) | (k.x <= q.x) | (k.x <= q.x // 4 * 4 + 2), True),
    (lambda q, k: ((k.x >= 2) & (k.x <= q.x + 5)) | ((k.x >= q.x) & (k.x <= q.x + 9)), True),  # either may begin first
    (lambda q, k: ((k.x >= q.x) & (k.x <= q.x + 5)) | ((k.x >= q.x - 3) & (k.x <= 11)), False),  # they meet for some queries
]


@pytest.mark.parametrize("number", range(len(UNIONS)))
def test_unions_of_intervals(number: int) -> None:
    body, whole = UNIONS[number]
    assert proven(body) == whole
    for length in (1, 4, 7, 18):
        found = from_geometry(attnc.pattern(body)(), (length,))[0]
        assert np.array_equal(found, evaluated(body, length)), length


@draws.examples(120)
@given(st.lists(draws.conditions(1), min_size=1, max_size=4), st.integers(1, 33))
def test_random_conjunctions_on_an_axis(terms: list[Body], length: int) -> None:
    """Whatever conjunction a user writes, ends and residual together are the statement; counts are counts."""
    from attnc.schedule.geometry import geometry

    def body(q: Any, k: Any) -> Any:
        out = terms[0](q, k)
        for t in terms[1:]:
            out = out & t(q, k)
        return out

    p = attnc.pattern(body)()
    truth = attnc.mask(p, grid=(length,), heads=2).numpy()
    assert np.array_equal(from_geometry(p, (length,), 2), truth)
    tokens = ir.Tokens((None,))
    g = geometry(ir.Program(p.trace(("x",)), tokens, tokens), (length,), (length,))
    assert g.allowed(2) == truth.sum()


def test_another_key_grid_has_its_own_length() -> None:
    """Cross attention: the key axis ends where the keys end, and pooled maps are intervals."""
    for body in (
        lambda q, k: k.x == q.x * k.size.x // q.size.x,
        lambda q, k: abs(k.x * q.size.x - q.x * k.size.x) <= 2 * q.size.x,
        lambda q, k: (k.x >= q.x // 2 - 1) & (k.x <= q.x // 2 + 1),
        lambda q, k: q.x % 3 == k.x % 3,
        lambda q, k: q.x // 4 == k.x // 2,
        lambda q, k: k.x <= q.x,
    ):
        p = attnc.pattern(body)()
        for n_q, n_k in ((8, 4), (4, 8), (7, 3), (3, 7), (1, 5), (5, 1), (6, 6)):
            from attnc.schedule.geometry import geometry

            tokens = ir.Tokens((None,))
            g = geometry(ir.Program(p.trace(("x",), same_grid=False), tokens, tokens, same_grid=False), (n_q,), (n_k,))
            truth = attnc.mask(p, grid=(n_q,), kv_grid=(n_k,))[0].numpy()
            assert np.array_equal(g.mask(np.arange(n_q)[None], np.arange(n_k)[None], 1)[0], truth), (n_q, n_k)
            assert g.allowed() == truth.sum()
            axis = g.axes[0]
            seen = np.zeros((n_q, n_k), bool)
            for r in range(axis.classes):
                for i in range(axis.count(n_k, r)):
                    for j in range(axis.inverse_lo[r, i], axis.inverse_hi[r, i] + 1):
                        seen[j * axis.split + r, i * axis.split + r] = True
            assert (seen | ~truth).all()


def test_axes_alike_are_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each gets the proof of its own."""
    asked: list[int] = []
    recognise = rules.recognise

    def counted(terms: tuple[ir.Expr, ...], axis: int, roles: Any) -> Any:
        asked.append(axis)
        return recognise(terms, axis, roles)

    monkeypatch.setattr(structures, "_keeper", None)
    monkeypatch.setattr(rules, "recognise", counted)

    def near(axis: int, other: int) -> tuple[ir.Expr, ...]:
        """|q - k| <= the length of another axis; and k * k < 50 says no rule."""
        q, k = ir.coord("q", axis), ir.coord("k", axis)
        away, room = ir.make("abs", ir.make("sub", q, k)), ir.size("q", other)
        return ir.make("le", away, room), ir.make("lt", ir.make("mul", k, k), ir.const(50))

    for per_axis, times in (([near(0, 0), near(1, 1), near(2, 2)], 1), ([near(0, 1), near(1, 0), near(2, 0)], 2)):
        found, unknown = structures._recognise(per_axis, ("q", "q"))
        assert len(asked) == times
        asked.clear()
        for axis, terms in enumerate(per_axis):
            form, left = recognise(terms, axis, ("q", "q"))
            assert found[axis] == form
            assert unknown[axis] == left == terms[1:]
