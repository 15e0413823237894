"""How a call on a GPU may run: candidate tiles of its kernels with the model's time for each, and what a measured winner is kept
under. Which of them spill is told by whoever can compile without a device (`use_static`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from attnc import codegen
from attnc.runtime import tuner, winners
from attnc.runtime.call import Call
from attnc.runtime.device import Device
from attnc.schedule import cost
from attnc.schedule import tiles as schedule
from attnc.schedule.chips import chip
from attnc.schedule.choose import bucket
from attnc.schedule.geometry import Geometry
from attnc.schedule.tiles import Kind, Tiles
from attnc.schedule.walks import Tile

PAIRED = 5  # tiles of dq, and of dk and dv, that are paired with each other
DEARER = 2.5  # times the model's least time that a candidate may be said to take


@dataclass(frozen=True)
class Choice:
    """Tiles of the kernels of one direction: `forward`, or `dq` and `dkv`."""

    forward: Tile | None = None
    dq: Tile | None = None
    dkv: Tile | None = None

    def given(self) -> dict[str, Tile]:
        """Those it speaks of."""
        return {n: t for n in ("forward", "dq", "dkv") if (t := getattr(self, n)) is not None}

    def data(self) -> dict[str, Any]:
        """Its JSON form."""
        return {n: {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(t).items()} for n, t in self.given().items()}

    def show(self) -> str:
        """For people: "2x8/2x16, 1 warp, 2 stages"."""
        told = {n: shown(t) for n, t in self.given().items()}
        if len(set(told.values())) == 1:
            return next(iter(told.values()))
        return "; ".join(f"{'dk, dv' if n == 'dkv' else n} {text}" for n, text in told.items())


Static = Callable[[Call, tuple[Tensor, ...], Choice, str], str | None]
_static: Static | None = None


def use_static(check: Static) -> None:
    """What is wrong with a choice for a target, found by compiling it, is asked of `check(call, rows, choice, target)`."""
    global _static
    _static = check


def shown(t: Tile) -> str:
    """A tile for people."""
    words = [f"{'x'.join(map(str, t.rows))}/{'x'.join(map(str, t.chunk))}", f"{t.warps} warp{'s' * (t.warps > 1)}"]
    words += [f"{t.stages} stages"] * (t.stages > 1) + [f"{t.batch} items"] * (t.batch > 1)
    return ", ".join(words) + (f", along {t.inner}" if t.inner and t.batch == 1 else "")


@lru_cache(maxsize=1)
def source_version() -> str:
    """Changes with the printers of kernels: what was measured of another text says nothing of this one."""
    folder = Path(codegen.__file__).parent
    texts = [p.read_bytes() for p in sorted([*folder.glob("triton*.py"), folder / "around.py"])]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def target_of(device: Device) -> str:
    """The target whose limits tiles are chosen for; elsewhere than on a GPU (in the interpreter) any will do."""
    return device.target if device.target.startswith(("cuda", "hip")) else "cuda:80"


def sizes_of(q: Tensor, k: Tensor, v: Tensor) -> cost.Sizes:
    """What the cost model asks of a call's tensors."""
    dtype = str(q.dtype).removeprefix("torch.")
    return cost.Sizes(q.shape[1], k.shape[1], q.shape[0], q.shape[-1], v.shape[-1], dtype)


@lru_cache(maxsize=256)
def candidates(g: Geometry, sizes: cost.Sizes, backward: bool, target: str, name: str) -> tuple[tuple[float, Choice], ...]:
    """Every choice of one direction with the model's seconds; the model's own choice first."""
    here = chip(target, name)

    def timed(kind: Kind) -> list[tuple[float, Tile]]:
        found = schedule.candidates(g, sizes.width, kind, sizes.itemsize, target)
        return [(cost.seconds(g, kind, t, sizes, here), t) for t in found]

    if not backward:
        out = [(s, Choice(forward=t)) for s, t in timed("forward")]
    else:
        first, second = timed("dq"), timed("dkv")
        pairs = [(a, b) for a, b in zip(first, second, strict=False) if a[1] == b[1]]  # a group's gradients in one kernel
        for n in range(PAIRED):
            a, b = first[min(n, len(first) - 1)], second[min(n, len(second) - 1)]
            pairs += [(a, b), *((a, other) for other in second[:n]), *((other, b) for other in first[:n])]
        out = [(a[0] + b[0], Choice(dq=a[1], dkv=b[1])) for a, b in dict.fromkeys([(first[0], second[0]), *pairs])]
    least = min(s for s, _ in out)
    return tuple(x for n, x in enumerate(out) if n == 0 or x[0] <= DEARER * least)


@lru_cache(maxsize=256)
def _tunable(
    program: Any, g: Geometry, sizes: cost.Sizes, backward: bool, device: Device, variant: str, interpreted: bool
) -> tuner.Tunable:
    target = target_of(device)
    like = winners.key(
        backend=f"triton{variant}",
        device={"name": device.name, "target": device.target} | ({"interpreted": 1} if interpreted else {}),
        source=source_version(),
        program=program,
        direction="backward" if backward else "forward",
        dtype=sizes.dtype,
        head_dim=sizes.head_dim,
        value_dim=sizes.value_dim,
        bucket={
            "grid": [bucket(n) for n in g.q_grid],
            "kv_grid": [bucket(n) for n in g.k_grid],
            "items": bucket(sizes.batch * sizes.heads, steps=1),
        },
    )
    found = candidates(g, sizes, backward, target, device.name)
    return tuner.Tunable(like, tuple(tuner.Candidate(c, c.data(), c.show(), s) for s, c in found))


def tunable(call: Call, rows: tuple[Tensor, ...], backward: bool, device: Device, interpreted: bool) -> tuner.Tunable:
    """What a tuner may choose about a call."""
    variant = " part" * call.part + " negative scale" * (call.scale <= 0)
    found = _tunable(call.program, call.geometry, sizes_of(*rows), backward, device, variant, interpreted)
    if _static is None or interpreted:
        return found
    check = partial(_flaw, _static, call, rows, target_of(device))
    return replace(found, flaw=check)


def _flaw(check: Static, call: Call, rows: tuple[Tensor, ...], target: str, c: tuner.Candidate) -> str | None:
    return check(call, rows, c.choice, target)


def tiles(call: Call, rows: tuple[Tensor, ...], choice: Choice, target: str) -> Tiles:
    """The tiles of a module whose kernels of one direction run a choice; those of the other are the model's."""
    q, _, v = rows
    own = schedule.tiles(call.geometry, q.shape[-1], v.shape[-1], q.element_size(), target)
    given: dict[str, Any] = choice.given()
    return replace(own, **given)
