"""The IR: equality, folding against Python, printing that reads back, and JSON that is data and nothing else."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import strategies as draws
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnc
from attnc import CacheError, ir
from attnc.analysis.evaluate import evaluate
from attnc.lang.symbols import Point, Sym

Build = Callable[[Any, Any, Callable[..., Any], Callable[..., Any]], Any]
POINT = (Point.on_grid("q", ("y", "x"), "q"), Point.on_grid("k", ("y", "x"), "q"))


class Plain:
    """A point made of Python integers."""

    def __init__(self, y: int, x: int) -> None:
        self.y, self.x = y, x


def integers() -> st.SearchStrategy[Build]:
    """Integer expressions as functions of (q, k, min, max), for symbols and for Python integers alike."""
    leaves = st.one_of(
        st.sampled_from([lambda q, k, a, b: q.y, lambda q, k, a, b: q.x, lambda q, k, a, b: k.y, lambda q, k, a, b: k.x]),
        st.integers(-9, 9).map(lambda n: lambda q, k, a, b: n),
    )

    def grow(inner: st.SearchStrategy[Build]) -> st.SearchStrategy[Build]:
        def binary(op: str) -> Callable[[Build, Build], Build]:
            def join(f: Build, g: Build) -> Build:
                def made(q: Any, k: Any, low: Any, high: Any) -> Any:
                    x, y = f(q, k, low, high), g(q, k, low, high)
                    return {
                        "+": lambda: x + y,
                        "-": lambda: x - y,
                        "*": lambda: x * y,
                        "min": lambda: low(x, y),
                        "max": lambda: high(x, y),
                    }[op]()

                return made

            return join

        def divided(op: str, f: Build, n: int) -> Build:
            if op == "//":
                return lambda q, k, low, high: f(q, k, low, high) // n
            return lambda q, k, low, high: f(q, k, low, high) % n

        divisors = st.integers(-5, 5).filter(bool)
        return st.one_of(
            *(st.builds(binary(op), inner, inner) for op in ("+", "-", "*", "min", "max")),
            st.builds(divided, st.sampled_from(("//", "%")), inner, divisors),
            inner.map(lambda f: lambda q, k, low, high: -f(q, k, low, high)),
            inner.map(lambda f: lambda q, k, low, high: abs(f(q, k, low, high))),
        )

    return st.recursive(leaves, grow, max_leaves=8)


def conditions() -> st.SearchStrategy[Build]:
    """Comparisons of them, joined."""

    def compare(op: int, f: Build, g: Build) -> Build:
        def made(q: Any, k: Any, low: Any, high: Any) -> Any:
            x, y = f(q, k, low, high), g(q, k, low, high)
            return (lambda: x == y, lambda: x != y, lambda: x < y, lambda: x <= y, lambda: x > y, lambda: x >= y)[op]()

        return made

    atoms = st.builds(compare, st.integers(0, 5), integers(), integers())
    join = [lambda f, g: lambda *a: f(*a) & g(*a), lambda f, g: lambda *a: f(*a) | g(*a), lambda f, g: lambda *a: f(*a) == g(*a)]
    return st.recursive(atoms, lambda inner: st.one_of(*(st.builds(j, inner, inner) for j in join)), max_leaves=4)


def traced(f: Build) -> ir.Expr:
    found = f(*POINT, attnc.min, attnc.max)
    return found.expr if isinstance(found, Sym) else ir.const(found)


def leaves(q: Plain, k: Plain) -> dict[ir.Expr, Any]:
    return {
        ir.coord("q", 0): q.y,
        ir.coord("q", 1): q.x,
        ir.coord("k", 0): k.y,
        ir.coord("k", 1): k.x,
    }


values = st.builds(Plain, st.integers(-7, 40), st.integers(-7, 40))


@draws.examples(150)
@given(integers(), values, values)
def test_integers_mean_what_python_computes(f: Build, q: Plain, k: Plain) -> None:
    """Floor semantics included: numerators are negative as often as not."""
    expected = f(q, k, min, max)
    e = traced(f)
    assert e.kind == "int"
    assert evaluate(e, leaves(q, k), np) == expected
    for xp in (np, torch):
        arrays = {n: xp.asarray([x]) for n, x in leaves(q, k).items()}
        assert np.all(np.asarray(evaluate(e, arrays, xp)) == expected)


@draws.examples(60)
@given(integers(), values, values)
def test_constants_fold_to_what_python_computes(f: Build, q: Plain, k: Plain) -> None:
    e = ir.substitute(traced(f), {n: ir.const(x) for n, x in leaves(q, k).items()})
    assert e == ir.const(f(q, k, min, max))


@draws.examples(100)
@given(conditions(), values, values)
def test_what_is_shown_reads_back(f: Build, q: Plain, k: Plain) -> None:
    """Brackets where Python needs them, also in comparisons of comparisons."""
    e = traced(f)
    names = {"q": POINT[0], "k": POINT[1], "min": attnc.min, "max": attnc.max, "abs": abs}
    again = eval(ir.show(e, ("y", "x")), {"__builtins__": {}}, names)  # noqa: S307
    again = again.expr if isinstance(again, Sym) else ir.const(again)
    assert evaluate(again, leaves(q, k), np) == evaluate(e, leaves(q, k), np) == f(q, k, min, max)


def test_show_brackets_and_names() -> None:
    q, k = POINT
    shown = {
        "(q.y == k.y) == (q.x == k.x)": (q.y == k.y) == (q.x == k.x),
        "((q.y < 3) & (k.x < 4)) | ~(q.x == 2)": (q.y < 3) & (k.x < 4) | ~(q.x == 2),
        "q.y - (k.y - 1)": q.y - (k.y - 1),
        "-(q.y + 1) // 3": -(q.y + 1) // 3,
        "q.y // (k.y // 2 + 1)": q.y // (k.y // 2 + 1),
        "q.size.x - 1 - q.x": q.size.x - 1 - q.x,
        "min(q.x, max(k.x, 2))": attnc.min(q.x, attnc.max(k.x, 2)),
        "SCORE * 0.5 + bias[HEAD, q.y - k.y]": attnc.SCORE * 0.5 + attnc.Table("bias")[attnc.HEAD, q.y - k.y],
        "where(q.x == k.x, 1, 0)": attnc.where(q.x == k.x, 1, 0),
    }
    assert [ir.show(e.expr, ("y", "x")) for e in shown.values()] == list(shown)


def test_equality_is_by_structure_and_kind() -> None:
    a, b = ir.coord("q", 0), ir.coord("k", 0)
    assert ir.make("add", a, b) == ir.make("add", a, b) != ir.make("add", b, a)
    assert hash(ir.make("add", a, b)) == hash(ir.make("add", a, b))
    assert len({ir.const(1), ir.const(True), ir.const(1.0)}) == 3
    with pytest.raises(AttributeError):
        a.op = "size"  # type: ignore[misc]


def test_identities_keep_meaning() -> None:
    a, zero, one = ir.coord("q", 0), ir.ZERO, ir.ONE
    assert ir.make("add", a, zero) == ir.make("sub", a, zero) == ir.make("mul", one, a) == ir.make("floordiv", a, one) == a
    assert ir.make("mul", a, zero) == ir.make("mod", a, one) == zero
    assert ir.make("mul", ir.SCORE, ir.const(0.0)).op == "mul"  # infinities times zero are not zero
    assert ir.make("floordiv", ir.const(1), zero).op == "floordiv"  # no ZeroDivisionError while folding
    assert ir.make("eq", a, a) == ir.TRUE
    assert ir.make("lt", a, a) == ir.FALSE
    assert ir.make("not", ir.make("not", ir.make("lt", a, one))) == ir.make("lt", a, one)


def programs() -> list[ir.Program]:
    some: list[ir.Program] = [ir.Program(ir.Channel(), ir.Tokens((None,)), ir.Tokens((None,)))]
    patterns: list[attnc.Pattern] = [
        attnc.patterns.window(7, shift=3, bias="relative"),
        attnc.patterns.neighborhood(5, 2, causal=True),
        attnc.patterns.per_head([attnc.patterns.cross(2), attnc.patterns.full()]),
        draws.decay(),
        draws.documents(),
    ]
    for p in patterns:
        a = p.trace(("y", "x"))
        some.append(ir.Program(a, ir.Tokens((None, 4), 1), ir.Tokens((3, 4), 2), same_grid=False))
        norm = ir.Normalizer("softmax", "queries", "sink", 1)
        a = replace(a, normalizer=norm, post=ir.coord("q", 1), q_map=ir.RowMap(), k_map=ir.RowMap(eps=1e-6))
        some.append(ir.Program(a, ir.Tokens((8, 8), pad=((0, 1), (2, 3))), ir.Tokens((8, 8), pad_multiple=(7, 7))))
    return some


@pytest.mark.parametrize("program", programs(), ids=lambda p: p.attend.name)
def test_json_round_trip(program: ir.Program) -> None:
    text = ir.to_json(program)
    assert "\n" not in text
    assert ir.from_json(text) == program
    assert ir.to_json(ir.from_json(text)) == text
    assert hash(ir.from_json(text)) == hash(program)


@draws.examples(50)
@given(st.sampled_from((1, 2, 3)).flatmap(lambda rank: st.tuples(st.just(rank), draws.patterns(rank))))
def test_json_round_trip_of_the_algebra(drawn: tuple[int, attnc.Pattern]) -> None:
    rank, p = drawn
    tokens = ir.Tokens((None,) * rank)
    program = ir.Program(p.trace(ir.AXES[rank]), tokens, tokens)
    assert ir.from_json(ir.to_json(program)) == program


def edited(change: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads(ir.to_json(programs()[1]))
    change(data)
    return json.dumps(data)


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "an operation that does not exist": lambda d: d["attend"].update(relation=["system", "bool"]),
    "code where an expression stands": lambda d: d["attend"].update(relation="__import__('os').system('true')"),
    "too few arguments": lambda d: d["attend"].update(relation=["eq", "bool", ["const", "int", 1]]),
    "a kind that does not follow": lambda d: d["attend"].update(score=["neg", "int", ["score", "real"]]),
    "a condition as a number": lambda d: d["attend"].update(score=["neg", "int", ["eq", "bool", ["head", "int"], ["head", "int"]]]),
    "a floor division of reals": lambda d: d["attend"].update(score=["floordiv", "real", ["score", "real"], ["head", "int"]]),
    "a remainder of reals": lambda d: d["attend"].update(score=["mod", "real", ["head", "int"], ["score", "real"]]),
    "a relation of integers": lambda d: d["attend"].update(relation=["head", "int"]),
    "a number of another type": lambda d: d["attend"].update(score=["const", "int", 1.5]),
    "a truth value as an integer": lambda d: d["attend"].update(score=["const", "int", True]),
    "not a number": lambda d: d["attend"].update(score=["const", "real", float("nan")]),
    "an axis that the rank does not have": lambda d: d["attend"].update(score=["coord", "int", "q", 2]),
    "a negative axis": lambda d: d["attend"].update(score=["coord", "int", "q", -1]),
    "a third role": lambda d: d["attend"].update(score=["coord", "int", "v", 0]),
    "a table name that is code": lambda d: d["attend"].update(score=["load", "real", "a; import os", ["head", "int"]]),
    "a real table index": lambda d: d["attend"].update(score=["load", "real", "a", ["score", "real"]]),
    "a table of two ranks": lambda d: d["attend"].update(
        score=["add", "real", ["load", "real", "a", ["head", "int"]], ["load", "real", "a", ["head", "int"], ["head", "int"]]]
    ),
    "a proof's variable": lambda d: d["attend"].update(score=["var", "int", "j"]),
    "an unknown normaliser": lambda d: d["attend"].update(normalizer=["entmax", "keys", None, 1]),
    "a sink that is no name": lambda d: d["attend"].update(normalizer=["softmax", "keys", 3, 1]),
    "a power that is no integer": lambda d: d["attend"].update(normalizer=["relu", "keys", None, 1.5]),
    "an unknown row map": lambda d: d["attend"].update(maps=[["exec", 1.0], None]),
    "another statement": lambda d: d["attend"].update(op="shell"),
    "one token set": lambda d: d.update(tokens=d["tokens"][:1]),
    "tokens without a grid": lambda d: d["tokens"][0].pop("grid"),
    "a rank of zero": lambda d: d["attend"].update(rank=0),
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES.keys())
def test_json_that_no_declaration_wrote_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    ir.from_json(edited(lambda d: None))
    with pytest.raises(CacheError, match=r"not an? (attnc|normalizer)|unknown"):
        ir.from_json(edited(change))


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "1", '"x"', "{", '{"attend": {}}', "[" * 100_000, "__import__('os')"])
def test_text_that_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(CacheError, match="not an attnc program"):
        ir.from_json(text)


@draws.examples(60)
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda x: st.lists(x, max_size=4), max_leaves=9)
)
def test_garbage_never_passes_as_an_expression(data: Any) -> None:
    with pytest.raises(CacheError):
        ir.from_json(edited(lambda d: d["attend"].update(relation=data)))


def test_hashes_survive_pickles_between_processes() -> None:
    """Hashes of strings are salted per process, so a stored hash would make equal expressions unequal as dictionary keys."""
    e = attnc.patterns.window(3).trace(("y", "x")).relation
    assert copy.deepcopy(e) == e
    reader = """
import pickle, sys
from attnc import ir
e = pickle.load(sys.stdin.buffer)
again = ir.Expr(e.op, e.args, e.kind)
print(hash(e) == hash(again), {e: 1}.get(again), ir.walk(e).__next__() == again)
"""
    done = subprocess.run(
        [sys.executable, "-c", reader],
        input=pickle.dumps(e),
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    assert done.stdout.split() == [b"True", b"1", b"True"]


def test_flat_index_is_written_out_in_coordinates() -> None:
    e = ir.flatten_index(ir.index("k"), 3, same_grid=True)
    assert ir.show(e) == "(k.t * q.size.y + k.y) * q.size.x + k.x"
    assert ir.show(ir.flatten_index(ir.index("k"), 2, same_grid=False)) == "k.y * k.size.x + k.x"
