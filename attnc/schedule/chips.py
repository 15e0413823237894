"""Facts of GPUs from public documents (devices.json names them): what the cost model divides by. Nothing here was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Chip:
    """One GPU; units as `devices.json` says."""

    name: str
    match: str  # part of the name that its driver tells
    target: str
    sms: int
    clock: float
    issue: int
    peak: dict[str, float]
    bandwidth: float
    l2: float
    shared: int
    shared_block: int
    registers: int
    threads: int
    blocks: int
    source: str

    def __hash__(self) -> int:
        return hash(self.name)

    def rate(self, dtype: str) -> float:
        """Floating-point operations a second of products in a dtype; where it has no units of its own, float32's."""
        return 1e12 * self.peak.get(dtype, self.peak["float32"])

    @property
    def instructions(self) -> float:
        """Thread-instructions a second."""
        return 1e9 * self.clock * self.issue * self.sms

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 64 if self.target == "hip:gfx942" else 32


@lru_cache(maxsize=1)
def chips() -> tuple[Chip, ...]:
    """All of them, in the file's order."""
    found = json.loads(Path(__file__).with_name("devices.json").read_text(encoding="utf-8"))
    return tuple(Chip(**d) for d in found["devices"])


@lru_cache(maxsize=256)
def chip(target: str, name: str = "") -> Chip:
    """The chip of a driver's name, else the first of a target, else (an unknown target) an A100, whose limits others exceed."""
    mine = [c for c in chips() if c.target == target]
    named = [c for c in mine if c.match in name]
    return (named or mine or [c for c in chips() if c.target == "cuda:80"])[0]
