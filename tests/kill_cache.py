"""Kill -9 in the middle of tuning and of building, four processes at once on one cache: `python tests/kill_cache.py --times 20`.

Each round starts `--workers` processes that build entries and keep winners as fast as they can, all under the same few keys, and
kills them all at a random moment. Then a fresh look at the cache must find no entry and no winner that does not verify, none of
the winners that a worker said it had kept (a worker says so once it is on disk), and a new worker must get through. Prints one
line of JSON. With `--real` the workers are the C++ backend's: they build kernels with the system's compiler and tune patterns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from attnc.runtime import cache, winners

KEYS = 3  # of entries, and of winners: few, so that workers meet
GENERATIONS = 50
FILES = ("a.bin", "b.bin")
WORKERS = 4


def like(n: int) -> str:
    """The key of a winner."""
    found = {
        "backend": "none", "device": {"name": "none", "target": "cpu"}, "versions": winners.versions() | {"source": "0"},
        "pattern": {"name": f"p{n}", "hash": str(n)}, "direction": "forward", "dtype": "float32", "head_dim": 8, "value_dim": 8,
        "bucket": {"grid": [8], "kv_grid": [8], "items": 1},
    }  # fmt: skip
    return json.dumps(found, sort_keys=True)


def record(n: int, by: str, padding: int = 200) -> dict[str, Any]:
    """A winner large enough that writing it takes more than one call."""
    trials = [{"choice": f"{by} {i}", "seconds": 1.0 + i, "predicted": 1.0} for i in range(padding)]
    return {
        "choice": {"n": n}, "trials": trials, "statement": f"p{n}", "shape": "8", "untuned": f"{by} 0", "measured": winners.now()
    }  # fmt: skip


def work(root: str, log: str, seed: int, rounds: int | None = None) -> None:
    """Builds and keeps, until killed. A line in the log for each thing that is on disk."""
    os.environ["ATTNC_CACHE_DIR"] = root
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    chance = random.Random(seed)
    done = 0
    while rounds is None or done < rounds:
        n, generation = chance.randrange(KEYS), chance.randrange(GENERATIONS)

        def build(folder: Path, content: str = f"{n} {generation} {seed} {done}") -> None:
            for name in FILES:
                (folder / name).write_bytes(content.encode() * 20_000)
                time.sleep(0.0005)

        cache.entry("built", f"entry {n} {generation}", build, FILES)
        os.write(said, f"built {n} {generation}\n".encode())
        if chance.random() < 0.5:
            winners.keep(like(n), record(n, f"w{seed}"))
        else:
            cache.update_json(winners.KIND, like(n), lambda old, n=n: record(n, f"w{seed}"))
        os.write(said, f"kept {n}\n".encode())
        done += 1


def tune(root: str, log: str, seed: int, rounds: int | None = None) -> None:
    """As `work`, by the C++ backend: kernels are built and patterns tuned, over and over in a new process's state."""
    os.environ["ATTNC_CACHE_DIR"] = root
    import torch

    import attnc
    from attnc import patterns
    from attnc.codegen import cpp_host
    from attnc.runtime import cpp, tuner

    torch.set_num_threads(1)
    cpp_host.FLAGS[0] = "-O0"  # what is built is not the point
    tuner.KEPT, tuner.SECONDS, tuner.ROUNDS = 2, 0.0, 1
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(said, b"here\n")
    chance, done = random.Random(seed), 0
    while rounds is None or done < rounds:
        p = chance.choice(
            [patterns.window(2), patterns.window(3, 1), patterns.neighborhood(3), patterns.axial("x"), patterns.full()]
        )
        shape = {"grid": (6, 6), "head_dim": chance.choice((4, 8, 16)), "dtype": "float32"}
        for known in (cpp._function, cpp._kernel, cache._verified):
            known.clear() if isinstance(known, dict) else known.cache_clear()

        def told(race: Any, dim: int = shape["head_dim"]) -> None:
            os.write(said, f"kept {_named(race.statement, race.direction, dim)}\n".encode())

        attnc.tune(p, shape, told=told)
        done += 1


def _named(statement: str, direction: str, dim: int) -> str:
    return f"{statement}|{direction}|{dim}".replace(" ", "")


def look_real(root: Path, kept: set[str]) -> list[str]:
    """As `look`, after `tune`."""
    wrong = []
    cache._verified.clear()
    for folder in (root / "cpp").glob("[!.]*"):
        manifest = json.loads((folder / cache.MANIFEST).read_text())
        flaw = cache._flaw(folder, manifest["key"], tuple(manifest["files"]))
        if flaw is not None:
            wrong.append(f"entry {folder.name}: {flaw}")
    there = {_named(k["pattern"]["name"], k["direction"], k["head_dim"]) for k, _ in winners.every()}
    wrong += [f"lost winner {key}" for key in sorted(kept - there)]
    aside = root / "quarantine"
    if aside.exists() and any(aside.iterdir()):
        wrong.append(f"set aside: {[p.name for p in aside.iterdir()]}")
    return wrong


def start(root: Path, log: Path, seed: int, rounds: int | None = None, *, real: bool = False) -> Any:
    """A worker, forked from a server that has imported all it needs."""
    worker = _context().Process(target=tune if real else work, args=(str(root), str(log), seed, rounds))
    worker.start()
    return worker


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attnc.runtime.winners", "attnc.tuning", "attnc.runtime.cpp"])
    return context


def look(root: Path, kept: set[str], built: set[str]) -> list[str]:
    """What is wrong with the cache: entries that do not verify, winners that are lost or torn."""
    wrong = []
    aside = root / "quarantine"
    if aside.exists() and any(aside.iterdir()):
        wrong.append(f"set aside: {[p.name for p in aside.iterdir()]}")
    cache._verified.clear()
    for folder in (root / "built").glob("[!.]*"):
        key = json.loads((folder / cache.MANIFEST).read_text())["key"]
        flaw = cache._flaw(folder, key, FILES)
        if flaw is not None:
            wrong.append(f"entry {key!r}: {flaw}")
        elif len({(folder / name).read_bytes() for name in FILES}) != 1:
            wrong.append(f"entry {key!r}: of two builds")
        built.discard(key)
    wrong += [f"lost entry {key}" for key in sorted(built)]
    for n in sorted(kept):
        found = winners.kept(like(int(n)))
        if found is None:
            wrong.append(f"lost winner {n}")
        elif len({t["choice"].split()[0] for t in found["trials"]}) != 1:
            wrong.append(f"torn winner {n}")
    return wrong


def attack(root: Path, times: int, workers: int, seed: int = 0, *, real: bool = False) -> dict[str, Any]:
    """All rounds on one cache."""
    os.environ["ATTNC_CACHE_DIR"] = str(root)
    chance, kept, built, wrong = random.Random(seed), set[str](), set[str](), list[str]()
    writes, torn = 0, 0
    for n in range(times):
        logs = [root.with_name(f"log-{n}-{i}") for i in range(workers)]
        running = [start(root, log, 100 * n + i, real=real) for i, log in enumerate(logs)]
        while not all(log.exists() and log.stat().st_size for log in logs):  # all of them have begun
            assert all(p.is_alive() for p in running), "a worker died by itself"
            time.sleep(0.002)
        while real and not any("kept" in log.read_text() for log in logs):
            time.sleep(0.01)  # building takes most of the time: half of the kills fall into it all the same
        time.sleep(chance.uniform(0.0, 6.0 if real else 0.1))
        for p in chance.sample(running, len(running)):
            os.kill(p.pid, signal.SIGKILL)
        for p in running:
            p.join()
            assert p.exitcode == -signal.SIGKILL, p.exitcode
        for log in logs:
            lines = log.read_text().splitlines()
            writes += len(lines)
            kept |= {x.split()[1] for x in lines if x.startswith("kept")}
            built |= {f"entry {x.partition(' ')[2]}" for x in lines if x.startswith("built")}
        torn += sum(1 for kind in ("built", "cpp", winners.KIND) for _ in (root / kind).glob(".*"))
        wrong += look_real(root, kept) if real else look(root, kept, set(built))
    last = start(root, root.with_name("log"), 99, rounds=3, real=real)
    last.join(300)
    if last.exitcode != 0:
        wrong.append(f"a worker after the kills ends with {last.exitcode}")
    return {
        "rounds": times, "workers": workers, "killed": times * workers, "done before the kills": writes, "winners": len(kept),
        "entries": sum(1 for _ in (root / ("cpp" if real else "built")).glob("[!.]*")),
        "leftovers of torn writes seen": torn, "wrong": wrong,
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--real", action="store_true", help="build and tune with the C++ backend")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attnc-kill-") as folder:
        found = attack(Path(folder) / "cache", options.times, options.workers, real=options.real)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
