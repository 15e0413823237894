"""Runs of generated kernels, counted by the interpreter itself: `TRITON_INTERPRET=1 python tests/counted_run.py`, JSON lines.

The interpreter's own products, loads and stores are counted as they happen: multiply-adds of every `tl.dot`, score elements (the
first product of a chunk), and bytes of rows, which are those loads and stores whose last dimension is a head's channels.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import torch
from triton.runtime.interpreter import InterpreterBuilder

import attnc
from attnc import patterns
from attnc.runtime.call import Call
from attnc.runtime.triton import backward, forward
from attnc.schedule import cost, tiles
from attnc.schedule.geometry import geometry

DIM, VALUES, HEADS, KEY_HEADS, BATCH = 16, 32, 2, 2, 1
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "neighborhood": (lambda: patterns.neighborhood(3), (8, 8)),
    "neighborhood, odd": (lambda: patterns.neighborhood(3, dilation=2), (7, 9)),
    "window": (lambda: patterns.window(4), (8, 8)),
    "causal": (lambda: patterns.causal(), (40,)),
}
counted: dict[str, int] = {}


def _watch() -> None:
    """Wrap the interpreter's operations."""

    def wrap(name: str, count: Any) -> None:
        inner = getattr(InterpreterBuilder, name)

        def counting(self: Any, *args: Any, **named: Any) -> Any:
            count(*args)
            return inner(self, *args, **named)

        setattr(InterpreterBuilder, name, counting)

    def dot(a: Any, b: Any, *_: Any) -> None:
        counted["flops"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]

    def load(pointers: Any, mask: Any, *_: Any) -> None:
        if pointers.data.ndim == 2 and pointers.data.shape[-1] in (DIM, VALUES):
            counted["loaded"] += 4 * int(mask.data.sum())

    def store(pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        if pointers.data.ndim == 2 and pointers.data.shape[-1] in (DIM, VALUES):
            counted["stored"] += 4 * int(mask.data.sum())

    wrap("create_dot", dot)
    wrap("create_masked_load", load)
    wrap("create_masked_store", store)  # plain loads and stores come through here, too


def _fresh() -> dict[str, int]:
    counted.update(flops=0, loaded=0, stored=0)
    return counted


def main() -> None:
    """All cases, or those named."""
    _watch()
    sizes = cost.Sizes(HEADS, KEY_HEADS, BATCH, DIM, VALUES, "float32")
    for name in sys.argv[1:] or CASES:
        pattern, grid = CASES[name]
        program = attnc.compile(pattern(), grid=grid).program(len(grid))
        call = Call(program, geometry(program, grid, grid), 0.3, {})
        n = call.geometry.n_queries
        q, k = torch.randn(2, BATCH, HEADS, n, DIM)
        v = torch.randn(BATCH, HEADS, n, VALUES)
        chosen = tiles.tiles(call.geometry, DIM, VALUES, 4)
        _fresh()
        out, lse = forward(call, q, k, v)
        runs = {"forward": (dict(counted), ["forward"], [chosen.forward])}
        _fresh()
        backward(call, q, k, v, out, lse, torch.randn_like(out), None)
        fused = chosen.dq == chosen.dkv and name == "window"
        runs["backward"] = (dict(counted), ["fused"] if fused else ["dq", "dkv"], [chosen.dq, chosen.dkv][: 1 if fused else 2])
        for direction, (found, kinds, mine) in runs.items():
            model = [cost.of_geometry(call.geometry, kind, t, sizes, "cuda:80") for kind, t in zip(kinds, mine, strict=True)]
            said = {what: sum(getattr(w, what) for w in model) for what in ("flops", "loaded", "stored")}
            sys.stdout.write(json.dumps({"case": name, "direction": direction, "counted": found, "model": said,
                                         "tiles": [asdict(t) for t in mine]}) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
