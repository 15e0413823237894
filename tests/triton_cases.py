"""Statements run on the Triton backend and held to the float64 meaning: `python triton_cases.py GROUP ...`, one JSON line a case.

Triton decides when it is imported whether kernels are interpreted, so the tests run this file in processes of their own:
TRITON_INTERPRET=1 for the interpreter, `--sim FOLDER ARCH` for compiled PTX in the simulator.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from counting import counting
from strategies import Problem, hold, weighted
from triton_held import HELD

import attnc
from attnc import ir, patterns
from attnc.codegen import eager
from attnc.lang import functions as fn
from attnc.lang.pattern import Pattern
from attnc.runtime import device, triton
from attnc.runtime.call import Call
from attnc.runtime.triton_choice import target_of
from attnc.schedule import tiles, walks
from attnc.schedule.geometry import geometry

GRIDS = triton.CONSTANT_GRIDS
BUDGET = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value of a tensor


@dataclass(frozen=True)
class Case:
    """A pattern and the sizes it is tried at. `tables` are shapes."""

    pattern: Callable[[], Pattern]
    grid: tuple[int, ...]
    heads: int = 2
    key_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    batch: int = 1
    dtype: torch.dtype = torch.float32
    prefix: tuple[int, int] = (0, 0)
    key_grid: tuple[int, ...] | None = None
    pad: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scale: float | None = None
    heads_last: bool = False
    cropped: bool = False  # tensors [B, H, *grid, D] cut out of larger ones, whose grid is no one axis in memory


@attnc.pattern
def causal(q, k):
    return q.index >= k.index


@attnc.pattern
def nobody(q, k):
    return (k.x < q.x) & (k.y <= q.y)


@attnc.pattern
def strange(q, k):
    return (k.y == q.size.y - 1 - q.y) & (k.x <= q.x) & (k.x >= q.x - 5) & ((q.y - k.y) * (q.y - k.y) <= 9)


@attnc.pattern
def softcap(q, k, *, slope: attnc.Table):
    return fn.where(q.index >= k.index, 5 * fn.tanh(attnc.SCORE / 5) + slope[attnc.HEAD] * (k.x - q.x))


@attnc.pattern
def gained(q, k, *, gain: attnc.Table):
    return fn.where(abs(q.x - k.x) <= 2, attnc.SCORE, post=fn.exp(gain[attnc.HEAD, k.x]))


@attnc.pattern
def segments(q, k, *, part: attnc.Table, last: attnc.Table):
    return (part[q.x] == part[k.x]) & (k.y <= last[attnc.BATCH])


@attnc.pattern
def wider_by_head(q, k):
    return (abs(q.x - k.x) <= 2 * attnc.HEAD + 1) & (abs(q.y - k.y) <= 1)


@attnc.pattern
def pooled_weighted(q, k, *, bias: attnc.Table, gain: attnc.Table):
    near = (q.y // 2 == k.y) & (q.x // 2 <= k.x) & (k.x <= q.x // 2 + 1)
    return fn.where(near, attnc.SCORE + bias[attnc.HEAD, q.x - 2 * k.x + 2], post=fn.exp(gain[k.y]))


@attnc.pattern
def pooled(q, k):
    return (q.y // 2 == k.y) & (q.x // 2 <= k.x) & (k.x <= q.x // 2 + 1)


@attnc.pattern
def guarded(q, k, *, bias: attnc.Table, member: attnc.Table):
    """Tables that some allowed pairs have no entry in, and are told not to read."""
    near = fn.where(abs(q.x - k.x) <= 2, bias[attnc.HEAD, q.x - k.x + 2], 0.5)
    return fn.where(((q.x + 1) * (k.x + 1) < 200) & (member[q.x * k.x] < 2), attnc.SCORE + near)


def timed() -> Pattern:
    """Reals of both sides decide, and make the index of a table (as traced mods may say)."""
    far = ir.make("sub", *(ir.load("time", (ir.coord(role, 0),)) for role in ir.ROLES))
    step = ir.make("add", ir.make("floor", ir.make("mul", far, ir.const(2.0))), ir.const(3))
    at = ir.make("min", ir.make("max", step, ir.ZERO), ir.const(6))
    score = ir.make("add", ir.SCORE, ir.load("bias", (ir.HEAD, at)))
    return Pattern("timed", lambda q, k: fn.Statement(ir.make("lt", ir.make("abs", far), ir.const(1.2)), score, typed=True))


@attnc.pattern
def few_keys(q, k):
    return (k.x < 3) & (k.y <= q.y)


def neighborhood(size: int, *args: Any, **named: Any) -> Callable[[], Pattern]:
    return lambda: patterns.neighborhood(size, *args, **named)


def window(size: int, *args: Any, **named: Any) -> Callable[[], Pattern]:
    return lambda: patterns.window(size, *args, **named)


BIAS = {"tables": {"bias": (2, 5, 5)}}
CASES: dict[str, dict[str, Case]] = {
    "groups": {
        "window": Case(window(3), (6, 7)),
        "window-shift": Case(window(3, shift=1), (7, 8)),
        "window-bias": Case(window(3, bias="relative"), (7, 6), batch=3, **BIAS),
        "window-shift-bias": Case(window(3, shift=1, bias="relative"), (7, 6), tables={"bias": (1, 5, 5)}),
        # the first and the last group of an axis share a tile: on both axes, on one, with and without lanes to spare
        "window-joined": Case(window(3, shift=1), (6, 9), batch=3),
        "window-joined-once": Case(window(3, shift=2), (7, 6)),
        "window-joined-full": Case(window(4, shift=1), (8, 8), heads=4),
        "window-joined-bias": Case(window(3, shift=1, bias="relative"), (6, 6), batch=3, **BIAS),
        "window-joined-once-bias": Case(window(3, shift=2, bias="relative"), (6, 7), **BIAS),
        "window-joined-alone": Case(window(4, shift=2), (4, 8), cropped=True),
        "window-absolute": Case(window(3, bias="absolute"), (6, 6), tables={"bias": (2, 9, 9)}),
        "window-bias-shared-keys": Case(window(3, bias="relative"), (6, 6), heads=4, key_heads=2, tables={"bias": (4, 5, 5)}),
        "window-large": Case(window(9), (9, 18), heads=1, key_heads=1, batch=1),
        "grid": Case(lambda: patterns.grid(2), (5, 6)),
        # classes of 4 and 3 rows: the second has no tile where the first has its last
        "dilated-blocks": Case(lambda: patterns.dilated_blocks(3, 2), (7, 6)),
        "dilated-blocks-bias": Case(lambda: patterns.dilated_blocks(3, 2, bias="relative"), (7, 10), batch=3, **BIAS),
        "axial-x": Case(lambda: patterns.axial("x"), (4, 19)),
        "axial-y": Case(lambda: patterns.axial("y"), (19, 4)),
        # rows of queries that have no keys, and a tile of their own
        "axial-x-fewer-rows": Case(lambda: patterns.axial("x"), (5, 40), key_grid=(3, 40)),
        "dilated-points-fewer-classes": Case(lambda: patterns.dilated_blocks(1, 2), (2, 5), key_grid=(1, 1)),
        "strip": Case(lambda: patterns.strip("x", 2), (5, 9)),
    },
    "bands": {
        "neighborhood": Case(neighborhood(3), (5, 9)),
        "neighborhood-bias": Case(neighborhood(3, bias="relative"), (5, 6), batch=2, **BIAS),
        "neighborhood-dilated": Case(neighborhood(3, 2), (7, 9)),
        "neighborhood-dilated-bias": Case(neighborhood(3, 2, bias="relative"), (6, 5), **BIAS),
        "neighborhood-stride": Case(neighborhood(3, stride=2), (7, 9)),
        "neighborhood-causal": Case(neighborhood(3, causal=True), (5, 9)),
        "neighborhood-line": Case(neighborhood(5), (39,)),
        "neighborhood-3d": Case(neighborhood(3), (3, 4, 5), batch=1),
        "causal": Case(causal, (5, 9)),
        "causal-long": Case(causal, (1, 150), heads=1, key_heads=1, batch=1),
        "causal-cropped": Case(causal, (5, 9), heads=4, key_heads=2, cropped=True, value_dim=8),
        "dense": Case(lambda: patterns.full(), (5, 9)),
        "dense-cropped": Case(lambda: patterns.full(), (5, 9), cropped=True),
        "neighborhood-cropped": Case(neighborhood(3), (5, 9), cropped=True),
    },
    "statements": {
        "strange": Case(strange, (7, 8)),
        "softcap": Case(softcap, (5, 7), tables={"slope": (2,)}),
        "post": Case(gained, (3, 12), tables={"gain": (2, 12)}),
        "nobody": Case(nobody, (4, 6)),
        "per-head": Case(lambda: patterns.per_head([patterns.window(2), patterns.neighborhood(3)]), (4, 5)),
        "head-in-relation": Case(wider_by_head, (4, 7), heads=3, key_heads=3),
        "integer-tables": Case(segments, (4, 9), batch=2, tables={"part": (9,), "last": (2,)}),
        "another-grid-post": Case(pooled_weighted, (6, 8), key_grid=(3, 5), tables={"bias": (2, 4), "gain": (3,)}),
        "complement": Case(lambda: ~patterns.window(3), (4, 5)),
        "another-grid": Case(pooled, (6, 8), key_grid=(3, 5)),
        "negative-scale": Case(neighborhood(3), (5, 6), scale=-0.3),
        "zero-scale": Case(window(3), (5, 6), scale=0.0),
        "shared-keys": Case(neighborhood(3), (5, 6), heads=4, key_heads=2),
        "one-channel": Case(neighborhood(3), (5, 6), dim=1, value_dim=33),
        "odd-channels": Case(window(3), (6, 7), dim=24, value_dim=8, heads_last=True),
        "float16": Case(window(3), (6, 7), dtype=torch.float16),
        "bfloat16": Case(neighborhood(3), (5, 7), dtype=torch.bfloat16),
    },
    "tokens": {
        "prefix": Case(neighborhood(3), (5, 6), prefix=(2, 2)),
        "prefix-window-bias": Case(window(3, bias="relative"), (6, 6), prefix=(1, 1), **BIAS),
        "prefix-window-joined": Case(window(3, shift=1, bias="relative"), (6, 6), prefix=(1, 1), **BIAS),
        "prefix-softcap": Case(softcap, (4, 6), prefix=(3, 3), tables={"slope": (2,)}),
        "prefix-keys": Case(window(3), (4, 6), prefix=(0, 2)),
        "pad": Case(window(3), (7, 8), pad={"pad_multiple": (3, 3)}),
        "pad-bias": Case(window(3, bias="relative"), (4, 5), pad={"pad_multiple": (3, 3)}, **BIAS),
        "pad-before": Case(window(4), (5, 7), pad={"pad": ((1, 2), (2, 0))}),
        "pad-neighborhood": Case(neighborhood(3), (5, 6), pad={"pad": ((1, 1), (0, 2))}),
        "pad-shared-keys": Case(window(3), (4, 5), heads=4, key_heads=2, pad={"pad_multiple": (3, 3)}),
        "pad-prefix": Case(window(3), (4, 5), heads=4, key_heads=2, prefix=(2, 2), pad={"pad_multiple": (3, 3)}),
        "pad-prefix-bias": Case(window(3, bias="relative"), (4, 5), prefix=(1, 1), pad={"pad": ((1, 1), (2, 0))}, **BIAS),
        "pad-prefix-neighborhood": Case(neighborhood(3), (5, 6), prefix=(1, 3), pad={"pad": ((1, 1), (0, 2))}),
        "pad-prefix-softcap": Case(softcap, (4, 6), prefix=(3, 0), pad={"pad": ((1, 0), (0, 2))}, tables={"slope": (2,)}),
    },
}
SIMULATED = {
    f"{name}-{str(dtype).removeprefix('torch.')}": replace(case, dtype=dtype)
    for dtype in (torch.float16, torch.bfloat16)
    for name, case in {
        "window-bias": Case(window(7, bias="relative"), (14, 14), 1, 1, 32, 32, 2, tables={"bias": (1, 13, 13)}),
        "neighborhood": Case(neighborhood(7), (12, 17), 1, 1, 32, 32, 1),
    }.items()
}
SIMULATED["another-grid"] = Case(pooled, (8, 12), 1, 1, 32, 32, 1, torch.float16, key_grid=(4, 6))
SIMULATED["causal"] = Case(causal, (12, 16), 1, 1, 64, 64, 1, torch.float16)
SIMULATED["pad"] = Case(window(7), (9, 10), 2, 1, 24, 24, 1, torch.float16, pad={"pad_multiple": (7, 7)})
SIMULATED["neighborhood-bias"] = Case(
    neighborhood(3, bias="relative"), (7, 10), 1, 1, 32, 32, 1, torch.float16, tables={"bias": (1, 5, 5)}
)

SIMULATED["sigmoid"] = Case(
    lambda: weighted(patterns.window(7, bias="relative"), "sigmoid"),
    (14, 14),
    1,
    1,
    32,
    32,
    2,
    torch.float16,
    tables={"bias": (1, 13, 13)},
)
SIMULATED["relu"] = Case(
    lambda: weighted(patterns.neighborhood(7), "relu cubed", post=True), (7, 12), 1, 1, 32, 32, 1, torch.float16
)
SIMULATED["window-joined"] = Case(
    window(7, shift=3, bias="relative"), (14, 14), 1, 1, 32, 32, 2, torch.float16, tables={"bias": (1, 13, 13)}
)
SIMULATED["timed"] = Case(timed, (45,), 2, 1, 32, 32, 1, torch.float16, tables={"time": (45,), "bias": (2, 7)})
SIMULATED["guarded"] = Case(guarded, (45,), 2, 1, 32, 32, 1, torch.float16, tables={"bias": (2, 5), "member": (200,)})
SIMULATED["few-keys"] = Case(few_keys, (7, 10), 1, 1, 32, 32, 1, torch.float16)
FEW = {n: SIMULATED[n] for n in ("window-bias-float16", "neighborhood-bfloat16", "causal", "sigmoid")}
# the library at two or three tiles an axis, for `make gpusim`
LIBRARY = {
    f"{name}-{str(dtype).removeprefix('torch.')}": Case(make, grid, 1, 1, 32, 32, 1, dtype, key_grid=keys)
    for dtype in (torch.float16, torch.bfloat16)
    for name, make, grid, keys in (
        ("window", window(7), (14, 14), None),
        ("window-shift", window(7, shift=3), (14, 21), None),
        ("window-cut", window(7, shift=3), (13, 16), None),
        ("blocks", lambda: patterns.blocks((4, 8)), (8, 16), None),
        ("grid", lambda: patterns.grid(7), (14, 14), None),
        ("axial", lambda: patterns.axial("x"), (3, 40), None),
        ("strip", lambda: patterns.strip("y", 4), (20, 8), None),
        ("dilated-blocks", lambda: patterns.dilated_blocks(4, 3), (14, 13), None),
        ("neighborhood", neighborhood(7), (9, 17), None),
        ("neighborhood-dilated", neighborhood(5, 2), (12, 17), None),
        ("neighborhood-stride", neighborhood(7, stride=4), (12, 14), None),
        ("neighborhood-causal", neighborhood(5, causal=True), (9, 17), None),
        ("overlapping-window", lambda: patterns.overlapping_window(4, 8), (12, 12), None),
        ("cross-scale", lambda: patterns.cross_scale(3), (12, 12), (6, 6)),
        ("causal", lambda: patterns.causal(), (150,), None),
        ("causal-2d", lambda: patterns.causal(), (9, 17), None),
        ("band", lambda: patterns.band(2, 5), (9, 17), None),
        ("full", lambda: patterns.full(), (9, 17), None),
        ("beside-a-strip", lambda: patterns.strip("y", 8) & ~patterns.strip("x", 8), (40, 8), None),
    )
}

# problems for operators, which put row maps and sinks around the kernels


def problem(c: Case) -> tuple[Call, dict[str, torch.Tensor]]:
    """The call and random tensors of a case."""
    torch.manual_seed(0)
    rank, same = len(c.grid), c.key_grid is None
    unknown = (None,) * rank
    pattern = c.pattern().trace(ir.AXES[rank], same_grid=same)
    queries, keys = (ir.Tokens(unknown, n, c.pad.get("pad"), c.pad.get("pad_multiple")) for n in c.prefix)
    program = ir.Program(pattern, queries, keys, same)
    key_grid = c.key_grid or c.grid
    nq, nk = c.prefix[0] + math.prod(c.grid), c.prefix[1] + math.prod(key_grid)

    def rows(heads: int, n: int, d: int) -> torch.Tensor:
        if c.cropped:
            wide = torch.randn(c.batch, c.grid[1] + 2, c.grid[0] + 1, heads, d).to(c.dtype)
            return wide.permute(0, 3, 2, 1, 4)[:, :, 1:, 1:-1]
        t = torch.randn(c.batch, n, heads, d).transpose(1, 2) if c.heads_last else torch.randn(c.batch, heads, n, d)
        return t.to(c.dtype)

    tensors = {"q": rows(c.heads, nq, c.dim), "k": rows(c.key_heads, nk, c.dim), "v": rows(c.key_heads, nk, c.value_dim)}
    tensors |= {"grad_out": rows(c.heads, nq, c.value_dim), "grad_lse": torch.randn(c.batch, c.heads, nq)}
    integers = pattern.int_tables
    tables = {name: torch.randint(0, 3, s) if name in integers else torch.randn(s) for name, s in c.tables.items()}
    if c.pad:
        tables |= {"pad_k": torch.randn(c.key_heads, c.dim).to(c.dtype), "pad_v": torch.randn(1, c.value_dim).to(c.dtype)}
    scale = c.dim**-0.5 if c.scale is None else c.scale
    return Call(program, geometry(program, c.grid, key_grid), scale, tables), tensors


@contextmanager
def poisoned() -> Iterator[None]:
    """Nothing may be read, or left in a result, that was never written: it is NaN."""
    makers = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *a, **k: x.fill_(math.nan) if (x := make(*a, **k)).is_floating_point() else x

    for name, make in makers.items():
        setattr(torch, name, filled(make))
    try:
        yield
    finally:
        for name, make in makers.items():
            setattr(torch, name, make)


def errors(c: Case) -> dict[str, float]:
    """Error of each output and gradient against float64, in units of the budget (at most 1 passes)."""
    from attnc.runtime import triton as backend

    call, t = problem(c)
    wide = replace(call, tables={n: x.double() if x.is_floating_point() else x for n, x in call.tables.items()})
    out64, lse64 = eager.forward(wide, *(t[n].double() for n in "qkv"))
    some = torch.isfinite(lse64)
    grad_lse = torch.where(some, t["grad_lse"], 0.0)
    rest64 = (t["grad_out"].double(), grad_lse.double())
    wanted64 = eager.backward(wide, *(t[n].double() for n in "qkv"), out64, lse64, *rest64)
    with poisoned():
        out, lse = backend.forward(call, t["q"], t["k"], t["v"])
        assert torch.equal(torch.isfinite(lse), some), "rows without keys"
        got = backend.backward(call, t["q"], t["k"], t["v"], out, lse, t["grad_out"], grad_lse)
    pairs = {"out": (out, out64), "lse": (lse[some], lse64[some])}
    pairs |= {f"d{n}": (a, b) for n, a, b in zip("qkv", got, wanted64, strict=False)}
    learned = [n for n, x in call.tables.items() if x.is_floating_point()]
    pairs |= {f"d{n}": (got[3][n], wanted64[3][n]) for n in learned}
    found = {}
    if learned:  # sums over programs: a second run has the same bits
        again = backend.backward(call, t["q"], t["k"], t["v"], out, lse, t["grad_out"], grad_lse)
        same = all(map(torch.equal, (*got[:3], *map(got[3].get, learned)), (*again[:3], *map(again[3].get, learned))))
        found["bitwise rerun"] = 0.0 if same else math.inf
    for name, (a, b) in pairs.items():
        gap = (a.double() - b).abs().max().item() if a.numel() else 0.0
        found[name] = gap / (BUDGET[c.dtype] * max(1.0, b.abs().max().item() if b.numel() else 0.0))
        assert a.shape == b.shape, f"{name} has shape {tuple(a.shape)}"
    return found


COUNTED: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(1, dtype=torch.int64))


def count_scores() -> None:
    """Have the kernels of every module that is loaded from now on count the score elements they compute."""
    plain = triton.load

    def load(text: str) -> ModuleType:
        module = plain(counting(text)[0])
        module.COUNTED = COUNTED  # type: ignore[attr-defined]
        return module

    triton.load = load


def counted(c: Case) -> None:
    """What kernels have counted in `errors`, one forward and a backward (two of learned tables), is what the report says."""
    call, _ = problem(c)
    g, target = call.geometry, target_of(device.of(torch.device("cpu")))
    chosen = tiles.tiles(g, c.dim, c.value_dim, torch.empty(0, dtype=c.dtype).element_size(), target)
    side: walks.Side = "k" if "backward_dq" in COUNTED else "q"  # else one kernel makes all gradients of a group
    back = 2 if any(x.is_floating_point() for x in call.tables.values()) else 1
    walked = {"forward": ("q", chosen.forward, 1), "backward_dq": ("q", chosen.dq, back), "backward_dkv": (side, chosen.dkv, back)}
    for name, n in COUNTED.items():
        of, tile, runs = walked[name]
        issued = runs * c.heads * c.batch * walks.issued(g, of, tile)  # type: ignore[arg-type]
        assert int(n) == issued, f"{name} counted {int(n)} score elements, the report says {issued}"
    assert {"forward", "backward_dkv"} <= set(COUNTED)


GROUPS: dict[str, dict[str, Any]] = {
    **CASES,
    **HELD,
    "simulated": SIMULATED,
    "simulated, few": FEW,
    "library": LIBRARY,
}


def simulate(folder: str, arch: int) -> None:
    """Have kernels run as compiled PTX."""
    sys.path.insert(0, folder)
    import ptxsim
    import simdriver

    simdriver.install("cuda", arch)
    for cls in vars(ptxsim).values():
        if isinstance(cls, type) and "mm" in vars(cls):  # min and max with .relu (sm_90): the simulator reads past the suffix
            plain, arith = cls.mm, cls.arith

            def mm(self: Any, p: Any, t: Any, o: Any, m: Any, name: str, plain: Any = plain) -> None:
                if "relu" not in p:
                    plain(self, p, t, o, m, name)
                    return
                e = f"np.{name}imum({self.val(o[1], t)}, {self.val(o[2], t)})"
                self.wr(o[0], self.fin(f"np.maximum({e}, {e} * 0)", p, t), t, m)

            def of_halves(self: Any, p: Any, t: Any, o: Any, m: Any, sign: str, arith: Any = arith) -> None:
                """Sums of two integers of 16 bits in a register, which it does not know."""
                if t != "s16x2":
                    arith(self, p, t, o, m, sign)
                    return
                two = (f"np.ascontiguousarray(bc({self.val(x, 'b32')}, S.T)).view(i16)" for x in o[1:3])
                self.wr(o[0], f"({f' {sign} '.join(two)}).view(u32)", "b32", m)

            cls.mm, cls.arith = mm, of_halves


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="+")
    parser.add_argument("--sim", nargs=2)
    options = parser.parse_args()
    if options.sim:
        simulate(str(Path(options.sim[0]).resolve()), int(options.sim[1]))
        here = device.Device("simulator", f"cuda:{options.sim[1]}", torch.device("cpu"))  # whose tiles are chosen
        with device.using(here):
            run(options.groups)
    else:
        run(options.groups)


def run(groups: list[str]) -> None:
    """The cases of some groups: interpreted, grids are constants of every other one's kernels, and arguments of the rest."""
    for group in groups:
        if group == "library":
            count_scores()
        for n, (name, case) in enumerate(GROUPS[group].items()):
            triton.CONSTANT_GRIDS = GRIDS * (1 - n % 2 if os.environ.get("TRITON_INTERPRET") == "1" else 1)
            try:
                line: dict[str, Any] = {"case": name}
                if isinstance(case, Problem):
                    hold(case, "triton")
                else:
                    line["errors"] = errors(case)
                    if group == "library":
                        counted(case)
            except Exception as e:
                line = {"case": name, "failure": f"{type(e).__name__}: {e}"}
            COUNTED.clear()
            print(json.dumps(line), flush=True)  # noqa: T201
            right = "failure" not in line and all(e <= 1 for e in line.get("errors", {}).values())
            if os.environ.get("ATTNC_TEST_STOP") and not right:  # what follows would say no more
                return


if __name__ == "__main__":
    main()
