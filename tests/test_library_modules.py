"""Every module that `attnc.emit` prints for the library: run where attnc cannot be imported, and counting what it computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import counting, issued
from library import EMITTED, LIBRARY, REFUSED, meaning, rows

import attnc
from attnc import patterns
from attnc.codegen.around import core_program
from attnc.codegen.triton import make_spec, part_specs, printed
from attnc.report.inspect import issued_by

DIM = 16
BUDGET = 3e-6  # float32's, of the largest value of a tensor
ALONE = """
import importlib.util, sys
from collections import defaultdict
from pathlib import Path

class Nobody:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attnc":
            raise ImportError("attnc is not here")

sys.meta_path.insert(0, Nobody())
import torch

for path in sorted(Path(sys.argv[1]).glob("*.py")):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.COUNTED = defaultdict(lambda: torch.zeros(1, dtype=torch.int64))
    given = torch.load(path.with_suffix(".pt"))
    cotangent, scale = given.pop("cotangent"), given.pop("scale")
    leaves = {n: t.requires_grad_() for n, t in given.items()}
    tables = {n: t for n, t in leaves.items() if n not in ("q", "k", "v")}
    out = module.attention(leaves["q"], leaves["k"], leaves["v"], scale=scale, **tables)
    found = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    grads = {"d" + n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found)}
    counted = {name: int(n) for name, n in module.COUNTED.items()}
    torch.save({"out": out.detach(), **grads, "counted": counted}, path.with_suffix(".found"))
assert not any(name.partition(".")[0] == "attnc" for name in sys.modules)
"""


def test_every_name_of_the_library_is_here() -> None:
    assert {name.partition(",")[0].partition(" ")[0] for name in LIBRARY} == set(patterns.__all__)
    for name, words in REFUSED.items():
        s = LIBRARY[name]
        with pytest.raises(attnc.UnsupportedError, match=words):
            attnc.emit(s.pattern, grid=s.grid, heads=s.heads, head_dim=DIM, **s.options)


def said(name: str) -> tuple[dict[str, int], int]:
    """Score elements that the report gives each kernel of a module, and its forward."""
    s = EMITTED[name]
    if name == "channel":
        return {}, 0
    op = attnc.compile(s.pattern, grid=s.grid, heads=s.heads, **s.options)
    sizes: dict[str, Any] = {"head_dim": DIM, "value_dim": DIM, "itemsize": 4, "target": "cuda:90"}
    program = core_program(op.program(len(s.grid)))
    spec = make_spec(program, s.grid, s.keys, **sizes)
    parts = part_specs(program, s.grid, s.keys, s.heads, **sizes)
    counts: dict[str, int] = {}
    for each, mine, _ in printed(spec, parts)[1]:
        assert each.geometry is not None
        counts |= issued([(each.geometry, k) for k in mine], each.heads(s.heads), s.batch)
    return counts, issued_by(spec, parts, s.heads) * s.batch


@pytest.mark.slow
@pytest.mark.interpret
def test_modules_stand_alone_and_compute_what_the_report_says(tmp_path: Path) -> None:
    """One process imports them all from a folder; outputs and gradients are held to the float64 meaning, computed here. Each kernel
    counts the elements of the chunks that it computes, which are those that the report calls issued."""
    generator = torch.Generator().manual_seed(0)
    wanted = {}
    for i, (name, s) in enumerate(EMITTED.items()):
        sizes: dict[str, Any] = {"heads": s.heads, "head_dim": DIM, "dtype": "float32"}
        path = tmp_path / f"m{i}.py"
        text, counts = counting(attnc.emit(s.pattern, grid=s.grid, **sizes, **s.options))
        path.write_text(text)
        given = rows(s, DIM, generator)
        torch.save({**given, "scale": s.scale}, path.with_suffix(".pt"))
        wanted[name] = path.with_suffix(".found"), counts, meaning(s, given)
    environment = {n: x for n, x in os.environ.items() if n != "PYTHONPATH"} | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    wrong: dict[str, Any] = {}
    for name, (path, counts, true) in wanted.items():
        found = torch.load(path)
        counted = found.pop("counted")
        assert set(found) == set(true), name
        gaps = {n: float((found[n].double() - t).abs().max() / t.abs().max().clamp(min=1)) / BUDGET for n, t in true.items()}
        wrong |= {f"{name}: {n}": gap for n, gap in gaps.items() if not gap <= 1}
        sent, forward = said(name)
        assert set(counted) == set(counts), name
        assert name == "channel" or {"forward", "backward_dkv"} <= set(counted), name
        wrong |= {f"{name}: {n}": (count, sent[n]) for n, count in counted.items() if count != sent[n]}
        assert sum(n for kernel, n in counted.items() if kernel.startswith("forward")) == forward, name
    assert not wrong
