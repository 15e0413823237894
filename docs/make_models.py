"""Writes docs/models.md from the registry, the goldens and the measurements: `python docs/make_models.py`."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from attnc import models, patterns
from attnc.compiler import Operator
from attnc.models import official, registry, timm_names
from attnc.models.accelerate import swap

HERE = Path(__file__).parent
ROOT = HERE.parent
HEAD = """# Models

Written by `python docs/make_models.py`: from the registry, the goldens in `tests/goldens`, and, where they were measured, the times
in `bench/results/*/models.json` (`python -m bench`). `attnc.models.create_model(name)` builds a variant; with timm installed it is
`timm.create_model("attnc_" + name)`, too.

- **goldens**: inputs, weights, outputs and gradients of the papers' code. The tests hold every backend to all of them.
- **official state dicts**: the official classes whose weights `attnc.models.load_official` loads, each key accounted for.
- **timm**: whether `attnc.models.from_timm` loads the weights of timm's port.
- **patterns**: what computes the attention, see [the library](patterns.md); a statement in *italics* is the model's own.

| paper | variants | parameters | goldens | official state dicts | timm | patterns |
|---|---|---|---|---|---|---|
"""
ACCELERATE = """
## What `attnc.accelerate` replaces

`model, report = attnc.accelerate(model)` turns these modules of timm and torchvision, wherever they are in a model, into ones that
compute the same with attnc: parameters, buffers and names stay, so checkpoints and optimizers go on working. `print(report)` says
what was replaced by which pattern, what was left alone and why, and in which calls the original's code still runs: where attention
weights are dropped in training, where a call masks tokens, and in timm's shifted Swin blocks on maps that windows do not divide
(timm rolls before it pads, which is another function than the paper's; torchvision pads first, and is replaced at every size).
Linear layers take the faster of PyTorch's two CPU libraries, and feed-forward layers whose activation is a GELU compute it in the
same pass over memory, where nobody differentiates; the report counts both.

| family | modules |
|---|---|
"""
SPEED = """
## Speed on a CPU

Forward in float32 of {batch} images on {threads} threads, medians of runs in turns, all with the same weights. *eager*: the
library's own code, or both models through `torch.compile`; ratios are its time over that of `attnc.accelerate` of the same model,
of attnc's own model, and of the attention part alone: eager blocks without the time of their layers (linear, convolutions, norms
and activations), partitions and residuals included. Rivals are networks that papers measured theirs against: beside our model with
its norms folded (`model.fuse()`) they run as timm has them, and, after the comma, with channels last. {machine}

| model | size | mode | eager, ms | accelerated | attnc's own | attention part |
|---|---|---|---|---|---|---|
"""
COUNTS = """
## Parameters

Counted on the meta device; the tests hold each number to the integer of its paper's specification.

"""


def files() -> dict[str, list[str]]:
    """Variants by the file that has them, in the order of names."""
    found: dict[str, list[str]] = {}
    for name in models.list_models():
        found.setdefault(registry._variants[name].build.__module__.rpartition(".")[2], []).append(name)
    return dict(sorted(found.items()))


@cache
def built(name: str) -> nn.Module:
    """A variant on the meta device."""
    with torch.device("meta"):
        return models.create_model(name)


def parameters(name: str) -> int:
    """Of a variant."""
    return sum(p.numel() for p in built(name).parameters())


def operators(value: object) -> Iterator[Operator]:
    """Those that an attribute holds."""
    if isinstance(value, Operator):
        yield value
    elif isinstance(value, tuple | list):
        for v in value:
            yield from operators(v)
    elif isinstance(value, dict):
        yield from operators(list(value.values()))


def used(names: list[str]) -> str:
    """The patterns of some variants, linked to their files."""
    found = {o.source.name for n in names for m in built(n).modules() for v in vars(m).values() for o in operators(v)}
    words = {w for text in found for w in re.findall(r"(\w+)\(", text)} - {"shift", "dilate", "heads", "on"}
    library = sorted(w for w in words if w in patterns.__all__)
    linked = [f"[{w}](../patterns/{Path(inspect.getfile(inspect.unwrap(getattr(patterns, w)))).name})" for w in library]
    return ", ".join([*linked, *(f"*{w}*" for w in sorted(words.difference(library)))])


def millions(n: int) -> str:
    """A number of parameters, in short."""
    return f"{n / 1e6:.1f} M"


def paper(module: ModuleType) -> str:
    """The first line of a file: title and reference."""
    return (inspect.getdoc(module) or "").splitlines()[0].rstrip(".")


def row(file: str, names: list[str]) -> str:
    """One line of the table of papers."""
    module = importlib.import_module(f"attnc.models.{file}")
    slug = file.replace("_", "-")
    counts = sorted(map(parameters, names))
    span = millions(counts[0]) if len(counts) == 1 else f"{millions(counts[0])} to {millions(counts[-1])}"
    goldens = len(list((ROOT / "tests" / "goldens" / slug).glob("*.json")))
    classes = ", ".join(f"`{c}`" for s, c in official._officials if s == slug)
    timm = "yes" if file in timm_names._rules else "-"
    cells = [f"[{paper(module)}](../models/{file}.py)", len(names), span, goldens or "-", classes or "-", timm, used(names)]
    return f"| {' | '.join(map(str, cells))} |\n"


def replaced() -> str:
    """What `accelerate` knows, by file."""
    for family in sorted(set(swap.FAMILIES.values())):
        importlib.import_module(f"{swap.PACKAGE}.{family}")
    found: dict[str, list[str]] = {}
    for original, replacement in swap._replacements.items():
        family = replacement.__module__.rpartition(".")[2]
        found.setdefault(family, []).append(original.__name__)
    lines = (
        f"| [{f.replace('_', ' ', 1)}](../models/accelerate/{f}.py) | {', '.join(f'`{c}`' for c in sorted(found[f]))} |\n"
        for f in sorted(found)
    )
    return "".join(lines)


def speed(report: dict[str, Any]) -> str:
    """The measured rows; nothing where nothing was measured."""
    rows = report.get("rows", [])
    if not rows:
        return ""
    machine = report["machine"]
    versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
    told = {"batch": rows[0]["batch"], "threads": rows[0]["threads"], "machine": f"{machine['processor']}; {versions}."}
    lines = []
    for r in rows:
        ratios = [f"{r['ratios'][n]:.2f}x" if n in r["ratios"] else "-" for n in ("accelerated", "attnc", "attention part")]
        name = f"{r['name']} against {r['peer']} (paper: {r['paper']:g}x)" if r["mode"] == "rival" else f"`{r['peer']}`"
        if "beside channels last" in r["ratios"]:
            ratios[1] += f", {r['ratios']['beside channels last']:.2f}x"
        eager = r["seconds"].get("eager", r["seconds"].get(r["peer"]))
        lines.append(f"| {' | '.join([name, r['size'], r['mode'], f'{1e3 * eager:.0f}', *ratios])} |\n")
    return SPEED.format(**told) + "".join(lines)


def measured() -> list[dict[str, Any]]:
    """What was measured, by kind of machine."""
    return [json.loads(p.read_text()) for p in sorted((ROOT / "bench" / "results").glob("*/models.json"))]


def counts(file: str, names: list[str]) -> str:
    """The exact numbers of a file's variants."""
    listed = ", ".join(f"`{n}` {parameters(n):,}" for n in names)
    return f"- {file}: {listed}\n"


def main() -> None:
    found = files()
    text = HEAD + "".join(row(*f) for f in found.items()) + "".join(map(speed, measured())) + ACCELERATE + replaced()
    text += COUNTS + "".join(counts(*f) for f in found.items())
    (HERE / "models.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
