"""Measured choices: the candidates of one call timed in turns, and the winner kept in the cache for every later call of its like.

A backend takes part with, beside `forward` and `backward` (which run a call's `choice` where it has one),

    tunable(call, q, k, v, backward) -> Tunable

The store is data: a winner is a small JSON object, and it counts only if it still is one of the call's own candidates.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import Tensor

from attnc.runtime.cache import read_json, write_json
from attnc.runtime.call import Call

KIND = "tuned"
KEPT = 10  # candidates of the cost model that are measured
ROUNDS = 7  # least number of measured calls of one that stays in the race
SECONDS = 0.5  # after so long a race ends, once every runner had its rounds
BEHIND = 1.3  # a runner so much slower than the first after two rounds leaves the race
MARGIN = 0.97  # share of its time that another must take for the model's choice to be given up


@dataclass(frozen=True)
class Candidate:
    """One way to run a call. data: its JSON form, what the cache keeps. cost: the model's, in any unit."""

    choice: Any
    data: Any
    shown: str
    cost: float


@dataclass(frozen=True)
class Tunable:
    """What may be chosen about a call: candidates, the model's choice first. like: all that a winner's worth depends on."""

    like: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Trial:
    """A candidate with its measured time (median seconds) and the model's cost, relative to the model's choice."""

    choice: str
    seconds: float
    predicted: float


@dataclass(frozen=True)
class Race:
    """What was measured for one call in one direction: trials, the kept one first; `untuned` is what the model alone takes."""

    statement: str
    direction: str  # "forward" or "backward"
    shape: str
    trials: tuple[Trial, ...]
    untuned: str

    @property
    def winner(self) -> Trial:
        """What was kept: the fastest, or the model's choice where that is as fast."""
        return self.trials[0]

    @property
    def gain(self) -> float:
        """Time of the model's choice over that of the kept one."""
        return next(t.seconds for t in self.trials if t.choice == self.untuned) / self.winner.seconds


_lock = threading.RLock()
_winners: dict[str, Any] = {}  # what this process has read or measured
_version = 0
_heard: list[list[Race]] = []  # who wants to know of every race


def version() -> int:
    """Grows with every new winner: what was derived from an older one is stale."""
    return _version


def winner(like: str) -> Any:
    """The JSON form of the choice kept for calls like this, or None."""
    with _lock:
        if like not in _winners:
            kept = read_json(KIND, like)
            _winners[like] = kept.get("choice") if isinstance(kept, dict) else None
        return _winners[like]


def chosen(tunable: Tunable) -> Candidate:
    """The kept winner if it is one of the candidates, else the model's choice."""
    kept = winner(tunable.like)
    return next((c for c in tunable.candidates if c.data == kept), tunable.candidates[0])


@contextmanager
def racing() -> Iterator[list[Race]]:
    """Inside, calls that tune measure again whatever was kept; gives the list that their races are added to."""
    races: list[Race] = []
    _heard.append(races)
    try:
        yield races
    finally:
        _heard.remove(races)


def settle(module: ModuleType, call: Call, rows: tuple[Tensor, ...], rest: tuple[Any, ...] = ()) -> None:
    """Measure the candidates of a call and keep the winner, unless one is kept. rest: what `backward` takes after q, k and v."""
    backward = bool(rest)
    run = module.backward if backward else module.forward
    tunable = module.tunable(call, *rows, backward)
    with _lock:  # one race at a time: two would measure each other
        if not _heard and winner(tunable.like) is not None:
            return
        field = {c.shown: c for c in tunable.candidates[:KEPT]}
        times = race({name: _runner(run, replace(call, choice=c.choice), (*rows, *rest)) for name, c in field.items()})
        first = tunable.candidates[0]
        scale = next((times[n] / c.cost for n, c in field.items() if c is first and c.cost), 0.0)
        order = sorted(times, key=lambda n: times[n] * (MARGIN if n == first.shown else 1))
        trials = tuple(Trial(n, times[n], field[n].cost * scale) for n in order)
        shape = f"{'x'.join(map(str, call.geometry.q_grid))}, {rows[0].shape[0]}x{rows[0].shape[1]} heads of {rows[0].shape[-1]}"
        found = Race(call.attend.name, "backward" if backward else "forward", shape, trials, first.shown)
        _keep(tunable.like, field[order[0]].data, found)
        for races in _heard:
            races.append(found)


def _runner(run: Callable[..., Any], call: Call, args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: run(call, *args)


def _keep(like: str, data: Any, found: Race) -> None:
    global _version
    trials = [{"choice": t.choice, "seconds": t.seconds, "predicted": t.predicted} for t in found.trials]
    about = {"statement": found.statement, "direction": found.direction, "shape": found.shape, "untuned": found.untuned}
    write_json(KIND, like, {"choice": data, "trials": trials, **about})
    _winners[like] = data
    _version += 1


def race(runners: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a slow moment of the machine falls on all, and stragglers leave early."""
    for run in runners.values():  # builds what there is to build, warms caches
        run()
    times: dict[str, list[float]] = {name: [] for name in runners}
    running, rounds, start = list(runners), 0, time.perf_counter()
    while rounds < ROUNDS or (len(running) > 1 and time.perf_counter() - start < SECONDS):
        for name in running:
            begin = time.perf_counter()
            runners[name]()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
        if rounds == 2:
            best = min(min(t) for t in times.values())
            running = [name for name in running if min(times[name]) <= BEHIND * best]
    return {name: statistics.median(t) for name, t in times.items()}
