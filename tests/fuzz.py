"""`make fuzz MINUTES=n`: random declared programs on every backend, held to the float64 meaning.

A statement is drawn, then some calls of it: other grids, dtypes, heads, strides, prefix tokens, padding, images. Where a kernel is
built for it, the calls of one statement share what a kernel fixes, so that it is built once. Prints for each backend how many calls
(no two alike) were tried, of how many statements; how many were refused with a typed error; and what was wrong. A call
that was wrong lands, as small as hypothesis could make it, in `tests/fuzzed/`: `test_fuzzed.py` runs it from then on.

Draws follow from numbered seeds: `--seed 300` goes on where a run that told "seeds 0 to 299" ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import strategies as draws
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from strategies import Problem

import attnc
from attnc import ir
from attnc.lang.pattern import Pattern, Statement
from attnc.runtime import triton

FOLDER = Path(__file__).parent / "fuzzed"
SIMULATOR = Path(__file__).resolve().parents[2] / "shared" / "tools" / "gpusim"


@dataclass(frozen=True)
class Leg:
    """How a backend is tried: most tokens of a grid, calls of one statement, whether kernels are built, share of the minutes, and
    whether a call has one head of one batch item more often than not."""

    tokens: int
    calls: int
    built: bool
    share: float
    alone: bool = False


LEGS = {
    "torch": Leg(24, 30, False, 0.25),
    "cpp": Leg(40, 24, True, 0.4),
    "triton": Leg(12, 8, True, 0.25, alone=True),  # interpreted, which takes as long as there are programs
    "gpusim": Leg(16, 5, True, 0.1, alone=True),  # compiled for sm_90, where a simulator of PTX lies beside the project
}
EXAMPLES = 10  # statements of one seed


@dataclass
class Kept:
    """A problem as data."""

    backend: str
    program: str
    problem: dict[str, Any]
    said: str

    @classmethod
    def of(cls, p: Problem, backend: str, said: str) -> Kept:
        """What to write down of a problem."""
        rank = len(p.grid)
        shapes = p.tables or draws.shapes(p.pattern, rank, p.reach, p.heads, p.batch)
        fields = asdict(replace(p, pattern=None, tables=shapes)) | {"dtype": str(p.dtype).removeprefix("torch.")}  # type: ignore[arg-type]
        del fields["pattern"]
        return cls(backend, ir.to_json(draws.replace_pads(p)), fields, said)

    def restored(self) -> Problem:
        """The problem again, its pattern from the traced statement."""
        a = ir.from_json(self.program).attend
        assert isinstance(a, ir.Attend)
        pattern = Pattern(a.name, lambda q, k: Statement(a.relation, a.score, a.normalizer, a.post, a.q_map, a.k_map))
        fields = dict(self.problem)
        fields["dtype"] = getattr(torch, fields["dtype"])
        fields["kv_grid"] = fields.get("kv_grid") and tuple(fields["kv_grid"])
        fields["grid"], fields["pad"] = tuple(fields["grid"]), fields["pad"] and tuple(map(tuple, fields["pad"]))
        fields["sizes"] = fields.get("sizes") and tuple(map(tuple, fields["sizes"]))
        fields["tables"] = {n: tuple(s) for n, s in fields["tables"].items()}
        return Problem(pattern, **fields)


PATTERNS = {rank: st.one_of(draws.patterns(rank), draws.patterns(rank), draws.weights(rank)) for rank in (1, 2, 3)}


@st.composite
def families(draw: st.DrawFn, backend: str) -> list[Problem]:
    """One statement and some calls of it."""
    leg = LEGS[backend]
    floats = (torch.float32, torch.float16, torch.bfloat16)
    dtypes = {"triton": floats[:1], "gpusim": floats[:2] * 2 + floats[2:]}.get(backend, (*floats, torch.float64))
    rank = draw(st.sampled_from((1, 2, 2, 2, 3)))
    pattern = draw(PATTERNS[rank])
    first = draw(draws.calls(pattern, rank, dtypes, leg.tokens, alone=leg.alone))
    others = draws.calls(pattern, rank, dtypes, leg.tokens, first, first if leg.built else None, alone=leg.alone)
    return [first, *draw(st.lists(others, min_size=leg.calls - 1, max_size=leg.calls - 1))]


def fuzz(backend: str, seconds: float, first: int = 0) -> Counter[str]:
    """Counts of calls tried, refused and wrong; "seeds" were used up, from `first` on."""
    counts: Counter[str] = Counter()
    held_to = "triton" if backend == "gpusim" else backend
    if backend == "cpp":  # what is sought is wrong meaning, which no optimisation makes
        from attnc.codegen import cpp_host

        cpp_host.FLAGS[0] = "-O0"
    end = time.monotonic() + seconds
    last: list[Kept] = []
    seen: set[str] = set()
    statements: set[str] = set()

    def search(family: list[Problem]) -> None:
        for p in family:
            if time.monotonic() > end:
                return
            kept = Kept.of(p, held_to, "")
            digest = hashlib.sha256(repr(kept).encode()).hexdigest()
            new = digest not in seen
            if not new and not last:  # while nothing failed: a failure is tried again and made smaller
                continue
            counts["tried"] += new
            seen.add(digest)
            statements.add(hashlib.sha256(repr(p.traced).encode()).hexdigest())
            try:
                draws.hold(p, held_to)
            except attnc.AttncError as e:
                counts["refused"] += new
                counts[f"refused: {type(e).__name__}"] += new
            except Exception as e:
                last.append(replace(kept, said=f"{type(e).__name__}: {e}"))
                raise

    chosen = settings(
        max_examples=EXAMPLES, deadline=None, database=None, phases=(Phase.generate, Phase.shrink), derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    while time.monotonic() < end:
        last.clear()
        triton.CONSTANT_GRIDS = 8 * (counts["seeds"] % 2)  # the grids of every other seed are arguments of kernels
        try:
            seed(first + counts["seeds"])(chosen(given(families(backend))(search)))()
        except Exception:  # hypothesis has shrunk it: the last one that failed is the smallest
            if not last:
                raise
            counts["wrong"] += 1
            FOLDER.mkdir(exist_ok=True)
            path = FOLDER / f"{held_to}-{hashlib.sha256(repr(last[-1]).encode()).hexdigest()[:8]}.json"
            path.write_text(json.dumps(asdict(last[-1]), indent=1) + "\n")
            print(f"WRONG, kept in {path}: {last[-1].said[:400]}", flush=True)
        counts["seeds"] += 1
    counts["statements"] = len(statements)
    return counts


def main() -> int:
    """Fuzz the backends, one process each, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all backends together")
    parser.add_argument("--backend", choices=LEGS, help="only this one, in this process")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--sim", type=Path, default=SIMULATOR, help="the folder of a simulator of PTX")
    options = parser.parse_args()
    if options.backend:
        if options.backend == "gpusim":
            from triton_cases import simulate

            simulate(str(options.sim), 90)
        counts = fuzz(options.backend, options.minutes * 60, options.seed)
        kinds = ", ".join(f"{n} {k.partition(': ')[2]}" for k, n in sorted(counts.items()) if ": " in k)
        print(
            f"{options.backend:7} seeds {options.seed} to {options.seed + counts['seeds'] - 1}: tried {counts['tried']} "
            f"of {counts['statements']} statements, refused {counts['refused']} "
            f"({kinds or '-'}), wrong {counts['wrong']}",
            flush=True,
        )
        return 1 if counts["wrong"] else 0
    failed = 0
    with tempfile.TemporaryDirectory() as cache:  # kernels and proofs of programs that nobody asks for again
        for backend, leg in LEGS.items():
            if backend == "gpusim" and not (options.sim / "simdriver.py").exists():
                print(f"gpusim  left out: no simulator of PTX in {options.sim}", flush=True)
                continue
            environment = os.environ | {"ATTNC_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
            environment |= {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
            words = [sys.executable, "-W", "ignore", __file__, "--backend", backend, "--seed", str(options.seed)]
            words += ["--minutes", str(options.minutes * leg.share), "--sim", str(options.sim)]
            failed |= subprocess.run(words, env=environment, check=False).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
