"""Measured choices: the candidates of one call timed in turns, and the winner kept in the cache for every later call of its like.

A backend takes part with, beside `forward` and `backward` (which run a call's `choice` where it has one),

    tunable(call, q, k, v, backward) -> Tunable

The store (`runtime.winners`) is data: a winner is a small JSON object, and it counts only if it still is one of the call's own
candidates. How calls are timed is the device's affair (`runtime.device`), so the whole tuner runs with a clock of anyone's own.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnc.errors import BuildError
from attnc.runtime import device, winners
from attnc.runtime.call import Call

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
    """What may be chosen about a call: candidates, the model's choice first. like: all that a winner's worth depends on.

    flaw: why a candidate is not worth measuring, found without running it (registers that spill, say), or None; it is asked of
    those that the model would measure. fixed: nothing can be chosen, the one candidate is timed for whoever asks and not kept.
    """

    like: str
    candidates: tuple[Candidate, ...]
    flaw: Callable[[Candidate], str | None] | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Trial:
    """A candidate with its measured time (median seconds) and the model's cost, relative to the model's choice."""

    choice: str
    seconds: float
    predicted: float


@dataclass(frozen=True)
class Race:
    """What was measured for one call in one direction: trials, the kept one first; `untuned` is what the model alone takes.

    dropped: candidates that were not measured, each with the reason.
    """

    statement: str
    direction: str  # "forward" or "backward"
    shape: str
    trials: tuple[Trial, ...]
    untuned: str
    dropped: tuple[tuple[str, str], ...] = ()

    @property
    def winner(self) -> Trial:
        """What was kept: the fastest, or the model's choice where that is as fast."""
        return self.trials[0]

    @property
    def gain(self) -> float:
        """Time of the model's choice over that of the kept one (1 where it did not fit the device)."""
        untuned = (t.seconds for t in self.trials if t.choice == self.untuned)
        return next(untuned, self.winner.seconds) / self.winner.seconds


_lock = threading.RLock()
_winners: dict[str, Any] = {}  # what this process has read or measured
_version = 0
_heard: list[Callable[[Race], None]] = []  # who wants to know of every race


def version() -> int:
    """Grows with every new winner: what was derived from an older one is stale."""
    return _version


def winner(like: str) -> Any:
    """The JSON form of the choice kept for calls like this, or None."""
    with _lock:
        if like not in _winners:
            kept = winners.kept(like)
            _winners[like] = None if kept is None else kept["choice"]
        return _winners[like]


def forget() -> None:
    """Winners are read from the cache again: it has changed (an import)."""
    global _version
    with _lock:
        _winners.clear()
        _version += 1


def chosen(tunable: Tunable) -> Candidate:
    """The kept winner if it is one of the candidates, else the model's choice."""
    kept = winner(tunable.like)
    return next((c for c in tunable.candidates if c.data == kept), tunable.candidates[0])


def by_lists(like: str, tiles: str) -> Tunable:
    """Of a call that walks lists of blocks, whose tiles come with the lists."""
    return Tunable(like, (Candidate(None, None, f"{tiles}, by lists", 1.0),), fixed=True)


@contextmanager
def racing(told: Callable[[Race], None] | None = None) -> Iterator[list[Race]]:
    """Inside, calls that tune measure again whatever was kept; gives the list that their races are added to, and tells of each."""
    races: list[Race] = []

    def heard(found: Race) -> None:
        races.append(found)
        if told is not None:
            told(found)

    _heard.append(heard)
    try:
        yield races
    finally:
        _heard.remove(heard)


def settle(module: ModuleType, call: Call, rows: tuple[Tensor, ...], rest: tuple[Any, ...] = ()) -> None:
    """Measure the candidates of a call and keep the winner, unless one is kept. rest: what `backward` takes after q, k and v."""
    if rows[0].is_cuda and torch.cuda.is_current_stream_capturing():  # a graph holds one way to run, and none waits in it
        return
    backward = bool(rest)
    run = module.backward if backward else module.forward
    tunable = module.tunable(call, *rows, backward)
    with _lock:  # one race at a time: two would measure each other
        if not _heard and (tunable.fixed or winner(tunable.like) is not None):
            return
        field, dropped = _field(tunable)
        timed = device.of(rows[0].device).race or race
        times = timed({name: _runner(run, replace(call, choice=c.choice), (*rows, *rest)) for name, c in field.items()})
        dropped += [(name, "does not fit the device") for name in field if name not in times]
        first = tunable.candidates[0]
        if not times:
            raise BuildError(
                f"pattern {call.attend.name}: none of the {len(field)} candidates fits {rows[0].device}; leave tune= out, and say "
                f"so with {first.shown!r}"
            )
        scale = times[first.shown] / first.cost if first.shown in times and first.cost else 0.0
        order = sorted(times, key=lambda n: times[n] * (MARGIN if n == first.shown else 1))
        trials = tuple(Trial(n, times[n], field[n].cost * scale) for n in order)
        shape = f"{'x'.join(map(str, call.geometry.q_grid))}, {rows[0].shape[0]}x{rows[0].shape[1]} heads of {rows[0].shape[-1]}"
        direction = "backward" if backward else "forward"
        found = Race(call.attend.name, direction, shape, trials, first.shown, tuple(dropped))
        if not tunable.fixed:
            _keep(tunable.like, field[order[0]].data, found)
        for heard in list(_heard):
            heard(found)


def _field(tunable: Tunable) -> tuple[dict[str, Candidate], list[tuple[str, str]]]:
    """Who takes part in a race: the cheapest by the model that nothing speaks against, and its own choice in any case."""
    field: dict[str, Candidate] = {}
    dropped = []
    for n, c in enumerate(tunable.candidates):
        if len(field) == KEPT:
            break
        flaw = tunable.flaw(c) if tunable.flaw is not None and n else None
        if flaw is None:
            field[c.shown] = c
        else:
            dropped.append((c.shown, flaw))
    return field, dropped


def _runner(run: Callable[..., Any], call: Call, args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: run(call, *args)


def _keep(like: str, data: Any, found: Race) -> None:
    global _version
    trials = [{"choice": t.choice, "seconds": t.seconds, "predicted": t.predicted} for t in found.trials]
    about = {"statement": found.statement, "shape": found.shape, "untuned": found.untuned, "measured": winners.now()}
    winners.keep(like, {"choice": data, "trials": trials} | about)
    _winners[like] = data
    _version += 1


def race(runners: device.Runners, clock: Callable[[], float] = time.perf_counter) -> device.Times:
    """Median seconds of each; they take turns, so that a slow moment of the machine falls on all, and stragglers leave early."""
    for run in runners.values():  # builds what there is to build, warms caches
        run()
    times: dict[str, list[float]] = {name: [] for name in runners}
    running, rounds, start = list(runners), 0, clock()
    while rounds < ROUNDS or (len(running) > 1 and clock() - start < SECONDS):
        for name in running:
            begin = clock()
            runners[name]()
            times[name].append(clock() - begin)
        rounds += 1
        if rounds == 2:
            best = min(min(t) for t in times.values())
            running = [name for name in running if min(times[name]) <= BEHIND * best]
    return {name: statistics.median(t) for name, t in times.items()}
