"""Library patterns are values: equal by the call that made them, also after a pickle or a copy, which hold that call alone."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
from library import LIBRARY

import attnc
from attnc import ir, patterns
from attnc.lang.mechanism import Mechanism

MADE = {
    **{name: small.pattern for name, small in LIBRARY.items()},
    "and": patterns.window(4) & patterns.causal(),
    "not": ~patterns.strip("x", 2),
    "shift": patterns.grid(2).shift(1, -1),
    "dilate": patterns.neighborhood(3).dilate(2),
    "heads": patterns.window(3).heads(h for h in (0, 2)),
    "on": patterns.causal().on("x"),
    "a generator of patterns": patterns.per_head(p for p in (patterns.window(2), patterns.full())),
}


@pytest.mark.parametrize("name", MADE)
def test_pickles_and_copies_are_equal(name: str) -> None:
    made = MADE[name]
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), copy.copy(made)):  # noqa: S301  our own bytes
        assert again == made and hash(again) == hash(made) and repr(again) == repr(made)
        if isinstance(made, Mechanism):
            assert again.trace().steps == made.trace().steps
        else:
            axes = ir.AXES[len(LIBRARY[name].grid) if name in LIBRARY else 2]
            same = name not in LIBRARY or "kv_grid" not in LIBRARY[name].options
            assert again.trace(axes, same_grid=same) == made.trace(axes, same_grid=same)
    assert {made: 1}[copy.deepcopy(made)] == 1


def test_different_calls_are_different() -> None:
    some = [patterns.window(7), patterns.window(8), patterns.window(7, 1), patterns.window(7, bias="relative"), patterns.grid(7)]
    some += [~some[0], some[0] | some[1], some[1] | some[0], some[0] & some[1], some[0].shift(1), some[0].shift(1, 1)]
    assert len(set(some)) == len(some)
    assert patterns.window(7) == patterns.window(size=7, shift=0) != patterns.window(7, 3)
    assert patterns.window(4) != patterns.blocks(4)  # of other names
    assert patterns.window(4) != "window(4)"


@pytest.mark.parametrize("name", MADE)
def test_a_pickle_names_functions_of_the_library_alone(name: str) -> None:
    """With the arguments, which are data: reading is a call of these."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, what: str) -> Any:
            named.append((module, what))
            return super().find_class(module, what)

    named: list[tuple[str, str]] = []
    assert Reader(io.BytesIO(pickle.dumps(MADE[name]))).load() == MADE[name]
    own = [x for x in named if x != ("functools", "partial")]
    assert own and all(
        m.startswith("attnc.patterns.") or (m, x.partition(".")[0]) == ("attnc.lang.pattern", "Pattern") for m, x in own
    )


def test_another_process_reads_it() -> None:
    """Where strings have other hashes."""
    made = [patterns.window(7), patterns.axial("y") | patterns.axial("x")]
    reader = """
import pickle, sys
made = pickle.load(sys.stdin.buffer)
from attnc import patterns
print(made == [patterns.window(7), patterns.axial("y") | patterns.axial("x")], {patterns.window(7): 1}.get(made[0]))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", reader], input=pickle.dumps(made), capture_output=True, check=True, env=environment
    )
    assert done.stdout.split() == [b"True", b"1"]


def test_a_function_of_the_user_s_is_itself_alone() -> None:
    @attnc.pattern
    def mine(q: Any, k: Any, *, reach: int) -> Any:
        return abs(q.x - k.x) <= reach

    a, b = mine(reach=2), mine(reach=2)
    assert a != b and a in (b, a) and len({a, b}) == 2
    assert copy.deepcopy(a).trace(("x",)) == a.trace(("x",))
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        pickle.dumps(a | patterns.window(3))
