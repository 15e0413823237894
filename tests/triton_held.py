"""Calls whose interpreted kernels are held to the meaning, by what they try."""

from __future__ import annotations

from typing import Any

import torch
from strategies import Problem, capped, weighted

from attnc import patterns

REST: dict[str, Any] = {"heads": 4, "kv_heads": 2, "d": 16, "dv": 5, "batch": 1}
HALF: dict[str, Any] = {"dtype": torch.float16, "batch": 1, "heads": 2}
IMAGES: dict[str, Any] = {"batch": 3, "sizes": ((4, 5), (2, 3), (2, 3)), "kv_heads": 1, "d": 16}
LINES = patterns.axial("y") | patterns.axial("x")
BIASED = {"neighborhood": patterns.neighborhood(3, bias="relative"), "window": patterns.window(3, bias="relative")}
HELD: dict[str, dict[str, Problem]] = {
    "no sum": {
        **{f"{n}, {k}": Problem(weighted(p, k), (5, 6), **REST) for n, p in BIASED.items() for k in ("sigmoid", "relu cubed")},
        "plain": Problem(weighted(patterns.window(3), "relu"), (5, 7), **REST),
        "fused": Problem(weighted(patterns.window(3), "sigmoid", post=True), (6, 6), batch=3),
        "fused bias": Problem(weighted(patterns.window(3, bias="relative"), "sigmoid"), (6, 6), batch=2),
        "prefix": Problem(weighted(patterns.window(3), "sigmoid"), (4, 5), prefix=2, **REST),
        "prefix and post": Problem(weighted(patterns.neighborhood(3), "relu cubed", post=True), (4, 5), prefix=1, **REST),
        "virtual keys": Problem(weighted(patterns.window(3), "sigmoid", maps=True), (4, 5), pad=((1, 1), (0, 1)), **REST),
        "union": Problem(weighted(patterns.cross(2), "sigmoid"), (12, 14), batch=1),
        "cap": Problem(weighted(capped(cap=2.0), "relu"), (3, 6), **REST),
        "bfloat16": Problem(weighted(patterns.neighborhood(3), "sigmoid"), (5, 6), dtype=torch.bfloat16, **REST),
        "negative scale": Problem(weighted(patterns.causal(), "relu"), (3, 6), scale=-0.3, **REST),
    },
    "sinks": {
        "window": Problem(weighted(patterns.window(3, bias="relative"), "sink"), (6, 6), **REST),
        "post and maps": Problem(weighted(patterns.neighborhood(3), "sink", post=True, maps=True), (5, 6), **REST),
        "union": Problem(weighted(patterns.cross(2), "sink"), (12, 14), batch=1),
        "prefix": Problem(weighted(patterns.window(3), "sink"), (4, 5), prefix=2, **REST),
        "virtual keys": Problem(weighted(patterns.window(3), "sink", maps=True), (4, 5), pad=((1, 1), (0, 1)), **REST),
        "no keys": Problem(weighted(patterns.window(3).heads([0]), "sink"), (3, 6), batch=1),
    },
    "queries": {
        "window": Problem(weighted(patterns.window(3, bias="relative"), "queries"), (6, 6), **REST),
        "neighborhood": Problem(weighted(patterns.neighborhood(3), "queries with a sink", post=True), (5, 6), **REST),
        "prefix": Problem(weighted(patterns.window(3), "queries", maps=True), (4, 5), prefix=2, **REST),
        "causal": Problem(weighted(patterns.causal(), "queries"), (3, 6), **REST),
        "virtual keys": Problem(weighted(patterns.window(3), "queries"), (4, 5), pad=((1, 1), (0, 1)), **REST),
    },
    "unions": {  # each part goes on from what those before it wrote
        "heads that share keys": Problem(LINES, (6, 7), strides="channels first", **REST),
        "packed": Problem(LINES, (6, 7), strides="packed", d=16, dv=16),
        "tokens first": Problem(LINES, (5, 8), strides="tokens first", heads=4, kv_heads=4, d=8, dv=5),
        "float16": Problem(LINES, (6, 7), dtype=torch.float16, batch=1),
        "bfloat16": Problem(patterns.cross(2), (8, 10), dtype=torch.bfloat16, batch=1),
        "prefix": Problem(LINES, (4, 5), prefix=2, **REST),
        "groups": Problem(patterns.window(3) | patterns.grid(2), (6, 6), heads=4, kv_heads=1),
        "three": Problem(LINES | patterns.window(3), (6, 6), batch=1),
        "one key head of two runs": Problem(patterns.per_head([patterns.window(3), LINES]), (6, 6), heads=4, kv_heads=1),
        "runs": Problem(patterns.per_head([patterns.grid(3), LINES]), (6, 6), strides="tokens first"),
    },
    "columns beyond whole chunks": {
        **{f"line {n}": Problem(patterns.full(), (n,), **REST) for n in (48, 80)},  # of constants: open sizes in every other case
        "unlike": Problem(patterns.full(), (33,), kv_grid=(80,), **REST),
        "half precision": Problem(patterns.full(), (80,), dtype=torch.float16, batch=1, heads=1, kv_heads=1, d=64, dv=64),
        "bias": Problem(patterns.full(bias="relative"), (80,), tables={"bias": (4, 159)}, **REST),
        "dropout": Problem(patterns.full(), (12, 12), dropout=0.4, **REST),
        "rows": Problem(patterns.axial("y"), (80, 2), **REST),
        "a row": Problem(patterns.axial("x"), (2, 48), **REST),
        "heads": Problem(patterns.full().heads([1, 3]), (80,), **REST),
        "sigmoid": Problem(weighted(patterns.full(), "sigmoid"), (80,), **REST),
        "prefix": Problem(patterns.full(), (48,), prefix=2, **REST),
        "virtual keys": Problem(patterns.full(), (44,), pad=((2, 2),), **REST),
    },
    "outputs in parts of channels": {
        "window": Problem(patterns.window(7), (14, 7), d=128, dv=128, kv_heads=1, **HALF),
        "shift": Problem(patterns.window(7, shift=3, bias="relative"), (10, 9), d=32, dv=80, **HALF),
        "bfloat16": Problem(patterns.window(8), (8, 16), d=96, dv=96, **{**HALF, "dtype": torch.bfloat16}),
        "loop": Problem(patterns.neighborhood(7, bias="relative"), (9, 10), d=128, dv=128, **HALF),
        "prefix and pad": Problem(patterns.window(7), (6, 6), prefix=2, pad=((0, 1), (1, 0)), d=16, dv=96, **HALF),
        "virtual keys": Problem(patterns.neighborhood(5, bias="relative"), (9, 9), pad=((1, 1), (0, 2)), d=16, dv=128, **HALF),
        "sigmoid": Problem(weighted(patterns.window(7), "sigmoid"), (7, 7), d=16, dv=128, **HALF),
        "union": Problem(patterns.cross(8), (16, 24), d=16, dv=72, **HALF),
    },
    "pairs of blocks": {
        "line": Problem(patterns.cross(8), (8, 48), d=64, dv=64, **HALF),
        "plane": Problem(patterns.cross(8), (16, 64), d=16, dv=16, kv_heads=1, **HALF),
        "wide": Problem(patterns.cross(8), (8, 64), d=128, dv=128, **HALF),
        "blocks that are no pairs": Problem(patterns.cross(8), (8, 40), d=64, dv=64, **HALF),
    },
    "last tiles that begin earlier": {
        **{f"line {n}": Problem(patterns.full(), (n,), d=64, dv=64, **HALF) for n in (129, 200)},
        "unlike": Problem(patterns.full(), (70,), kv_grid=(131,), **REST),
        "grid": Problem(patterns.full(bias="relative"), (9, 17), tables={"bias": (2, 17, 33)}, d=32, dv=32, **HALF),
        "strip": Problem(patterns.strip("y", 8), (16, 37), **REST),
        "dropout": Problem(patterns.full(), (75,), dropout=0.4, **REST),
        "grad of lse": Problem(weighted(patterns.full(), "sink"), (75,), **REST),
        "prefix": Problem(patterns.full(), (75,), prefix=2, **REST),
        "union": Problem(patterns.cross(8), (16, 37), **REST),
    },
    "sizes": {
        "window": Problem(BIASED["window"], (4, 5), dropout=0.3, **IMAGES),
        "prefix": Problem(patterns.neighborhood(3), (4, 5), prefix=1, strides="packed", **IMAGES),
        "prefix and pad": Problem(patterns.window(3), (4, 5), prefix=1, pad=((0, 1), (1, 0)), dropout=0.3, **IMAGES),
    },
}
