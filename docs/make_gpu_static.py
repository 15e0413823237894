"""Writes docs/gpu-static.md from kernels compiled for GPUs that nobody needs to have: `python docs/make_gpu_static.py`.

Reports are kept in docs/gpu-static.json with a digest of the module they are of; a run compiles what is missing or has changed, and
writes both files. `--page` writes the page alone, `--minutes N` stops compiling after that long, and words choose patterns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

import attnc
from attnc import patterns
from attnc.codegen.around import core_program
from attnc.codegen.triton import make_spec, part_specs
from attnc.codegen.triton_plan import Spec
from attnc.report.inspect import lists_of
from attnc.schedule.tiles import Kind, Tiles, per_pair, shared_bytes, shared_limit
from attnc.schedule.walks import padded

HERE = Path(__file__).parent
KEPT, PAGE, PEER = HERE / "gpu-static.json", HERE / "gpu-static.md", HERE / "flex-static.json"
BATCH = 8
# the call as a user writes it, the pattern, grid, heads, options
LIBRARY: list[tuple[str, Any, tuple[int, ...], int, dict[str, Any]]] = [
    ("neighborhood(7)", patterns.neighborhood(7), (56, 56), 4, {}),
    ('window(7, bias="relative")', patterns.window(7, bias="relative"), (56, 56), 3, {}),
    ("neighborhood(7, dilation=4)", patterns.neighborhood(7, dilation=4), (56, 56), 4, {}),
    ('axial("y") | axial("x")', patterns.axial("y") | patterns.axial("x"), (64, 64), 8, {}),
    ("causal(), one axis", patterns.causal(), (4096,), 16, {}),
    ("full(), one axis", patterns.full(), (4096,), 16, {}),
    ("window(7)", patterns.window(7), (56, 56), 4, {}),
    ("window(7, shift=3)", patterns.window(7, shift=3), (56, 56), 4, {}),
    ('window(7, shift=3, bias="relative")', patterns.window(7, shift=3, bias="relative"), (56, 56), 4, {}),
    ("window(8)", patterns.window(8), (64, 64), 4, {}),
    ("blocks((14, 4))", patterns.blocks((14, 4)), (56, 56), 4, {}),
    ("grid(7)", patterns.grid(7), (56, 56), 4, {}),
    ('axial("x")', patterns.axial("x"), (56, 56), 4, {}),
    ('strip("y", 8)', patterns.strip("y", 8), (64, 64), 4, {}),
    ("cross(8)", patterns.cross(8), (64, 64), 4, {}),
    ("neighborhood(13)", patterns.neighborhood(13), (56, 56), 4, {}),
    ("neighborhood(7, stride=4)", patterns.neighborhood(7, stride=4), (56, 56), 4, {}),
    ("neighborhood(7, causal=True)", patterns.neighborhood(7, causal=True), (56, 56), 4, {}),
    ('neighborhood(7, bias="relative")', patterns.neighborhood(7, bias="relative"), (56, 56), 4, {}),
    ("dilated(5, 2)", patterns.dilated(5, 2), (56, 56), 4, {}),
    ("dilated_blocks(7, 8)", patterns.dilated_blocks(7, 8), (56, 56), 4, {}),
    ("overlapping_window(7, 11)", patterns.overlapping_window(7, 11), (56, 56), 4, {}),
    ("cross_scale(5)", patterns.cross_scale(5), (56, 56), 4, {"kv_grid": (14, 14)}),
    ("cross_scale(2)", patterns.cross_scale(2), (28, 28), 4, {"kv_grid": (56, 56)}),
    ("causal()", patterns.causal(), (56, 56), 4, {}),
    ("band(2, 5)", patterns.band(2, 5), (56, 56), 4, {}),
    ("full()", patterns.full(), (56, 56), 4, {}),
    ("per_head([window(7), grid(7)])", patterns.per_head([patterns.window(7), patterns.grid(7)]), (56, 56), 4, {}),
]
# thread-instructions per allowed score that sm_90 is held to, and 1.3 times as many on sm_80: forward, dq, dk and dv or the whole
# backward; at one head dimension, in float16
BARS: dict[str, tuple[str, int, float, float, float | None]] = {
    "neighborhood(7)": ("P1", 32, 42, 48, 58),
    'window(7, bias="relative")': ("P2", 32, 26, 36, None),
    "neighborhood(7, dilation=4)": ("P3", 32, 46, 46, 60),
    'axial("y") | axial("x")': ("P4", 64, 21, 28, None),
    "causal(), one axis": ("P5", 64, 8.5, 8.6, 11.5),
    "full(), one axis": ("P6", 64, 7.6, 7.7, 9.5),
}
# what is compiled, the most important first: dtype, head dimension, targets
HELD = ("cuda:90", "cuda:80")  # to the bars; the others of `attnc.emit` are compiled once
MATRIX = [
    ("float16", 64, HELD),
    ("float16", 64, ("cuda:100", "hip:gfx942", "hip:gfx1100")),
    *[("float16", d, HELD) for d in (32, 128)],
    *[("bfloat16", d, HELD) for d in (64, 32, 128)],
]
# chips whose tiles are checked by computed figures, which are above what is compiled for the targets of the matrix
SMALLER = ("cuda:75", "cuda:86", "cuda:89", "cuda:120")


def name_of(n: int, dtype: str, head_dim: int, target: str) -> str:
    """A report's key."""
    call, _, grid, _, _ = LIBRARY[n]
    return f"{call} {'x'.join(map(str, grid))} | {dtype} {head_dim} | {target}"


def wanted(words: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keys of the reports with what is needed to make them, those held to a bar first."""
    calls = [each[0] for each in LIBRARY]
    for target in ("cuda:90", "cuda:80"):
        for call, (_, dim, *_) in BARS.items():
            if not words or any(w in call for w in words):
                setting = {"n": calls.index(call), "dtype": "float16", "head_dim": dim, "target": target}
                yield name_of(**setting), setting
    for dtype, dim, targets in MATRIX:
        for target in targets:
            for n, call in enumerate(calls):
                if (not words or any(w in call for w in words)) and not (
                    dtype == "float16" and target in ("cuda:90", "cuda:80") and BARS.get(call, ("", 0))[1] == dim
                ):
                    setting = {"n": n, "dtype": dtype, "head_dim": dim, "target": target}
                    yield name_of(**setting), setting


def options(n: int, dtype: str, head_dim: int, target: str) -> dict[str, Any]:
    """Arguments of `emit` and `inspect` after the pattern."""
    _, _, grid, heads, more = LIBRARY[n]
    return {"grid": grid, "heads": heads, "head_dim": head_dim, "dtype": dtype, "target": target, **more}


def digest(setting: dict[str, Any]) -> str:
    """Of the compiler, the kernels of the module that a setting gives, its head, which names their tiles, and tiles of lists."""
    module = attnc.emit(LIBRARY[setting["n"]][1], **options(**setting))
    kernels = re.split(r"^def (?:strides|like|precision)\(", module, maxsplit=1, flags=re.MULTILINE)[0]
    walked = "".join(f"{lists}\n" for lists in tiles_of_lists(**setting))
    return hashlib.sha256(f"triton {metadata.version('triton')}\n{kernels}{walked}".encode()).hexdigest()[:12]


def specs(n: int, dtype: str, head_dim: int, target: str) -> tuple[Spec, ...]:
    """What is printed for a setting: its statement, or the parts of a union."""
    _, p, grid, heads, more = LIBRARY[n]
    program = core_program(attnc.compile(p, grid=grid, heads=heads, **more).program(len(grid)))
    sizes: dict[str, Any] = {"head_dim": head_dim, "value_dim": head_dim, "itemsize": 4 if dtype == "float32" else 2}
    grids = program, grid, more.get("kv_grid", grid)
    return part_specs(*grids, heads, **sizes, target=target) or (make_spec(*grids, **sizes, target=target),)


def tiles_of_lists(n: int, dtype: str, head_dim: int, target: str) -> list[Tiles]:
    """Tiles of the kernels that walk lists, where an operator's call does."""
    each = [lists_of(s, target, s.heads(LIBRARY[n][3]), BATCH) for s in specs(n, dtype, head_dim, target)]
    return [x.tiles for x in each if x is not None]


def shared(n: int, dtype: str, head_dim: int, target: str) -> dict[str, int]:
    """Shared memory of each kernel that walks the relation, as computed: an upper bound."""
    found = specs(n, dtype, head_dim, target)
    each = [lists_of(s, target, s.heads(LIBRARY[n][3]), BATCH) for s in found]
    every = [(s, s.tiles if x is None else x.tiles) for s, x in zip(found, each, strict=True)]
    kinds: dict[str, Kind] = {"forward": "forward", "backward_dq": "dq", "backward_dkv": "dkv"}
    return {
        name: max(
            shared_bytes(
                kind,
                getattr(tiles, kind),
                head_dim,
                s.itemsize,
                target,
                s.geometry is not None and per_pair(s.geometry, getattr(tiles, kind)),
            )
            for s, tiles in every
        )
        for name, kind in kinds.items()
    }


def measure(setting: dict[str, Any], module: str) -> dict[str, Any]:
    """One report, without what changes from run to run. module: its digest."""
    found = attnc.inspect(LIBRARY[setting["n"]][1], **options(**setting), batch=BATCH).to_dict()
    del found["compile_seconds"]
    for kernel in found["kernels"].values():
        del kernel["parts"]
        for loop in kernel["loops"]:
            if not loop["tile"]:
                del loop["tile"], loop["num_warps"]
        kernel["ti"], kernel["occupancy"] = round(kernel["ti"], 2), round(kernel["occupancy"], 3)
        kernel["global_loads"] = {str(k): v for k, v in kernel["global_loads"].items()}
    found["waste"] = round(found["waste"], 3)
    return {"module": module, **found}


def settled(job: tuple[str, dict[str, Any], str | None]) -> tuple[str, dict[str, Any] | None]:
    """A job's report, or None where the kept one is of the same module."""
    key, setting, known = job
    module = digest(setting)
    return key, None if known == module else measure(setting, module)


def save(reports: dict[str, Any]) -> None:
    """Write what is known, in the order of the matrix; one line for a report."""
    order = [key for key, _ in wanted([]) if key in reports]
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(reports[k], separators=(',', ':'))}" for k in order)
    KEPT.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def compile_all(reports: dict[str, Any], words: list[str], minutes: float, workers: int) -> None:
    """Bring `reports` up to date."""
    until = time.monotonic() + 60 * minutes
    jobs = [(key, setting, reports.get(key, {}).get("module")) for key, setting in wanted(words)]
    with ProcessPoolExecutor(workers) as pool:
        running = {}
        done = 0
        while jobs or running:
            while jobs and len(running) < workers and time.monotonic() < until:
                job = jobs.pop(0)
                running[pool.submit(settled, job)] = job[0]
            if not running:
                break
            for future in as_completed(list(running)):
                key = running.pop(future)
                try:
                    found = future.result()[1]
                except attnc.AttncError as e:
                    found = {"refused": f"{type(e).__name__}: {e}".splitlines()[0][:200]}
                done += 1
                if found is not None:
                    reports[key] = found
                    sys.stderr.write(f"{done} {key}\n")
                    save(reports)
                break


def faults(key: str, report: dict[str, Any]) -> list[str]:
    """What a report does not keep of what every kernel is held to."""
    target = key.rpartition("| ")[2]
    out = []
    for name, k in report.get("kernels", {}).items():
        if k["spill_bytes"] or k["local_accesses"]:
            out.append(f"{name} spills {k['spill_bytes']} bytes")
        if k["shared_bytes"] > shared_limit(target):
            out.append(f"{name} takes {k['shared_bytes']} bytes of shared memory")
        walks = name in ("forward", "backward_dq", "backward_dkv")
        if walks and not k["mma_instructions"]:
            out.append(f"{name} multiplies without tensor cores")
        if walks and "128" not in k["global_loads"]:
            out.append(f"{name} loads no 128 bits at once")
    return out


def dearer(key: str, reports: dict[str, Any]) -> list[str]:
    """Loops over full tiles that take more than the dense kernel's: instructions for a score (a tenth more is allowed), compares
    and selects for a score (as many, and two for a chunk, are allowed)."""
    setting = " | ".join(key.split(" | ")[-2:])
    dense = reports.get(f"full(), one axis 4096 | {setting}", {}).get("kernels", {})
    out = []
    for name, k in reports[key].get("kernels", {}).items():
        for x in k["loops"]:
            if x["kind"] != "full" or x["over"] != "chunks" or name not in dense:
                continue
            least = min(per_score(dense[name], y)[0] for y in dense[name]["loops"])
            masks = min(per_score(dense[name], y)[1] for y in dense[name]["loops"])
            found, tests = per_score(k, x)
            own = k | x  # of several kernels, the one that has the loop
            if found > 1.1 * least:
                out.append(f"{name}'s full loop takes {found:.1f} instructions a score, dense attention's {least:.1f}")
            if tests > masks + 2 * lanes_of(own) / scores_of(own):
                out.append(f"{name}'s full loop has {tests:.2f} selects a score, dense attention's {masks:.2f}")
    return out


def scores_of(k: dict[str, Any]) -> int:
    """Scores of one chunk of a kernel, in registers."""
    sides = [math.prod(map(int, side.split("x"))) for side in k["tile"].split("/")]
    return padded(sides[0]) * padded(sides[1])


def lanes_of(k: dict[str, Any]) -> int:
    """Threads of a program."""
    return 32 * int(k["num_warps"])


def per_score(k: dict[str, Any], loop: dict[str, Any]) -> tuple[float, float]:
    """Instructions of a loop, and compares and selects, that threads execute for a score."""
    own = k | loop  # a loop of one of several kernels says which tile it is of
    each = lanes_of(own) / scores_of(own) / loop["unrolled"]
    return loop["instructions"] * each, loop["mask_instructions"] * each


def cell(k: dict[str, Any] | None) -> str:
    """A kernel on one line: TI, registers, shared KiB, MMA, loads."""
    if k is None:
        return "-"
    spill = f", **{k['spill_bytes']} B spilled**" if k["spill_bytes"] else ""
    loads = "/".join(f"{n}x{bits}" for bits, n in k["global_loads"].items())
    loops = "/".join(f"{x['mask_instructions']}" for x in k["loops"] if x["kind"] == "full")
    masks = f", {loops} selects" if loops else ""
    shared, mma = f"{k['shared_bytes'] / 1024:.0f} KiB", f"{k['mma_instructions']} MMA"
    return f"{k['ti']:.1f} ({k['registers']} regs{spill}, {shared}, {mma}, {loads}{masks})"


def plain(call: str) -> str:
    """A call inside a table, whose columns a bar would end."""
    return call.replace("|", "\\|")


def page(reports: dict[str, Any]) -> str:
    """The document."""
    peer = json.loads(PEER.read_text(encoding="utf-8"))
    bars = []
    for call, (name, dim, *most) in BARS.items():
        n = next(n for n, each in enumerate(LIBRARY) if each[0] == call)
        for target, more in (("cuda:90", 1.0), ("cuda:80", 1.3)):
            report = reports.get(name_of(n, "float16", dim, target))
            if not report or "kernels" not in report:
                continue
            ks, flex = report["kernels"], peer["patterns"][name][target]
            whole = most[2] is None
            back = sum(k["ti"] for n, k in ks.items() if n.startswith("backward"))
            mine = [ks["forward"]["ti"] + sum(k["ti"] for n, k in ks.items() if n.endswith("_pre"))]
            mine += [back] if whole else [ks["backward_dq"]["ti"], ks["backward_dkv"]["ti"]]
            theirs = [flex["forward"]["ti"]]
            dq, dkv = flex["backward_dq"]["ti"], flex["backward_dkv"]["ti"]
            theirs += [dq + dkv] if whole else [dq, dkv]
            for step, value, bar, other in zip(
                ["forward", "whole backward"] if whole else ["forward", "dq", "dk, dv"], mine, most, theirs, strict=False
            ):
                asked = bar * more
                mark = "" if value <= asked + 0.05 else " (above)"
                bars.append(
                    f"| {name} `{plain(call)}`, dim {dim} | {target} | {step} | {value:.1f}{mark} | {asked:.1f} | {other:.1f} |\n"
                )
    rows = []
    for dtype, dim, targets in MATRIX:
        for n, (call, _, grid, _, _) in enumerate(LIBRARY):
            for target in targets:
                shape = "x".join(map(str, grid))
                report = reports.get(name_of(n, dtype, dim, target))
                if report is None:
                    continue
                head = f"| `{plain(call)}` {shape} | {dtype} | {dim} | {target}"
                if "refused" in report:
                    rows.append(f"{head} | - | - | refused: {report['refused']} | | |\n")
                    continue
                ks = report["kernels"]
                shown = [cell(ks.get(n)) for n in ("forward", "backward_dq", "backward_dkv")]
                rows.append(f"{head} | {report['waste']:.2f} | {report['key_rows_per_query']:.1f} | {' | '.join(shown)} |\n")
    wrong = [f"- {key}: {', '.join(found)}\n" for key, r in reports.items() if (found := faults(key, r))]
    slow = [f"- {key}: {'; '.join(found)}\n" for key in reports if (found := dearer(key, reports))]
    chips = []
    for target in SMALLER:
        each = [
            (most, f"`{plain(call)}`, {name}, dim {dim}")
            for dim in (32, 64, 128)
            for n, (call, *_) in enumerate(LIBRARY)
            for name, most in shared(n, "float16", dim, target).items()
        ]
        most, which = max(each)
        chips.append(f"| {target} | {shared_limit(target) / 1024:.0f} KiB | {most / 1024:.0f} KiB | {which} |\n")
    missing = sum(key not in reports for key, _ in wanted([]))
    return HEAD.format(
        bars="".join(bars), rows="".join(rows), wrong="".join(wrong) or "None.\n", slow="".join(slow) or "None.\n",
        chips="".join(chips), count=len(reports), missing=missing, batch=BATCH,
    )  # fmt: skip


HEAD = """# The Triton kernels as machine code

Written by `make gpu-static` (`python docs/make_gpu_static.py`), which compiles the modules of the library with triton's own ptxas
and reads the SASS. No GPU took part, so nothing here is a time. {count} reports, each of a forward and its backward at batch
{batch}; {missing} settings of the matrix are not compiled yet. The numbers are kept in [gpu-static.json](gpu-static.json).

**TI** is thread-instructions executed per allowed score element: whole kernels, prologue and epilogue once per program and loop
bodies times their trips. It is a floor on issue slots, and says nothing of latency, memory or overlap. *waste*: score elements
issued for each one allowed. *rows*: rows of K (and of V) that the forward loads for each query. In brackets: registers, bytes
spilled if any, shared memory, tensor-core instructions, global load instructions by the bits a lane loads, and compares and selects
in the loops over full tiles. "-" under dq: one kernel makes all gradients. A spill is memory: scalar registers of AMD's that
are kept in lanes of vector registers are none. Grids and strides are constants of these kernels, as in stand-alone modules and on
the first eight grids that an operator meets.

## Six patterns beside FlexAttention

float16. *asked*: what the project asks of itself. *FlexAttention*: its loops alone, the best of its block masks of 128 and 64
([what was compiled](flex-static.json)). Ours count everything, helper kernels included.

| pattern | target | step | TI | asked | FlexAttention |
|---|---|---|---|---|---|
{bars}
## What is not as it should be

Spills, local memory, shared memory beyond the chip's, products without tensor cores, rows not loaded 128 bits at a time:

{wrong}
Loops over full tiles that take over a tenth more instructions for a score than dense attention's of the same setting, or more
compares and selects:

{slow}
## Shared memory of smaller chips

A block's limit, and the most that any kernel of the library asks for with the tiles chosen for that chip, at head dimensions 32,
64 and 128 in float16 or bfloat16. Computed, from above: every kernel of the table below has less than the figure computed for it.

| target | limit | most | kernel |
|---|---|---|---|
{chips}
## All

| pattern | dtype | dim | target | waste | rows | forward | dq | dk, dv (or all gradients) |
|---|---|---|---|---|---|---|---|---|
{rows}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="patterns whose call contains one of these; all without")
    parser.add_argument("--page", action="store_true", help="compile nothing")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no compilation after that long")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    asked = parser.parse_args()
    reports = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    if not asked.page:
        compile_all(reports, asked.words, asked.minutes, asked.workers)
    PAGE.write_text(page(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
