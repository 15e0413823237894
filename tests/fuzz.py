"""`make fuzz MINUTES=n`: random declared programs on every backend, held to the float64 meaning.

Prints for each backend how many were tried, how many were refused with a typed error, and what was wrong. A program that was wrong
lands, as small as hypothesis could make it, in `tests/fuzzed/`: `test_fuzzed.py` runs it from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import strategies as draws
import torch
from hypothesis import HealthCheck, Phase, given, settings
from strategies import Problem

import attnc
from attnc import ir
from attnc.lang.pattern import Pattern, Statement

FOLDER = Path(__file__).parent / "fuzzed"
BACKENDS = {"torch": 40, "cpp": 40, "triton": 12}  # and most tokens: the interpreter is slow
SHARE = {"torch": 0.25, "cpp": 0.5, "triton": 0.25}  # of the minutes


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
        fields["grid"], fields["pad"] = tuple(fields["grid"]), fields["pad"] and tuple(map(tuple, fields["pad"]))
        fields["sizes"] = fields.get("sizes") and tuple(map(tuple, fields["sizes"]))
        fields["tables"] = {n: tuple(s) for n, s in fields["tables"].items()}
        return Problem(pattern, **fields)


def fuzz(backend: str, seconds: float) -> Counter[str]:
    """Counts of tried, refused and wrong programs."""
    counts: Counter[str] = Counter()
    if backend == "cpp":  # what is sought is wrong meaning, which no optimisation makes
        from attnc.codegen import cpp_host

        cpp_host.FLAGS[0] = "-O0"
    dtypes = (torch.float32,) if backend == "triton" else (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    end = time.monotonic() + seconds
    last: list[Kept] = []

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        derandomize=False,
    )
    @given(draws.problems(dtypes, most=BACKENDS[backend]))
    def search(p: Problem) -> None:
        if time.monotonic() > end:
            return
        counts["tried"] += 1
        try:
            draws.hold(p, backend)
        except attnc.AttncError as e:
            counts["refused"] += 1
            counts[f"refused: {type(e).__name__}"] += 1
        except Exception as e:
            last.append(Kept.of(p, backend, f"{type(e).__name__}: {e}"))
            raise

    while time.monotonic() < end:
        last.clear()
        try:
            search()
        except Exception:  # hypothesis has shrunk it: the last one that failed is the smallest
            if not last:
                raise
            counts["wrong"] += 1
            FOLDER.mkdir(exist_ok=True)
            path = FOLDER / f"{backend}-{hashlib.sha256(repr(last[-1]).encode()).hexdigest()[:8]}.json"
            path.write_text(json.dumps(asdict(last[-1]), indent=1) + "\n")
            print(f"WRONG, kept in {path}: {last[-1].said[:400]}", flush=True)
    return counts


def main() -> int:
    """Fuzz the backends, one process each, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all backends together")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one, in this process")
    options = parser.parse_args()
    if options.backend:
        counts = fuzz(options.backend, options.minutes * 60)
        kinds = ", ".join(f"{n} {k.partition(': ')[2]}" for k, n in sorted(counts.items()) if ": " in k)
        said = f"{options.backend:7} tried {counts['tried']}, refused {counts['refused']} ({kinds or '-'}), wrong {counts['wrong']}"
        print(said, flush=True)
        return 1 if counts["wrong"] else 0
    failed = 0
    for backend in BACKENDS:
        environment = os.environ | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if backend == "triton" else {})
        words = [sys.executable, __file__, "--backend", backend, "--minutes", str(options.minutes * SHARE[backend])]
        failed |= subprocess.run(words, env=environment, check=False).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
