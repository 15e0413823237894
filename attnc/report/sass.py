"""Machine code read as text: instructions, loops and resources of a compiled kernel, for NVIDIA (SASS) and AMD (AMDGCN)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from attnc.errors import BuildError

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*?);?\s*(?:/\*.*)?$")
_TARGET = re.compile(r"0x([0-9a-f]+)")
MASKS = ("ISETP", "FSETP", "SEL", "FSEL", "PLOP3", "UISETP", "USEL", "UPLOP3")
MMA = ("HMMA", "HGMMA", "QGMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA", "OMMA")


@dataclass(frozen=True)
class Loop:
    """A backward branch: instructions of its body without inner loops (all, tensor-core ones, compares and selects), and those."""

    instructions: int
    mma: int
    inner: tuple[Loop, ...] = ()
    masks: int = 0


@dataclass(frozen=True)
class Code:
    """A kernel's code and resources. `straight`: instructions outside all loops."""

    instructions: int
    straight: int
    mma: int
    loops: tuple[Loop, ...]
    registers: int
    spill_bytes: int
    shared_bytes: int
    histogram: dict[str, int] = field(default_factory=dict)
    global_loads: dict[int, int] = field(default_factory=dict)  # by bits that one lane loads at once
    local: int = 0  # loads and stores of local memory (spills, arrays that are no registers)


def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise BuildError(f"{name} is not beside triton ({path}); it ships in triton's Linux wheels")
    return str(path)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def nvidia(cubin: bytes, shared: int) -> Code:
    """Read a cubin with the tools that ship in the triton wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        listing = _run(_tool("cuobjdump"), "-sass", "-res-usage", f.name)
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    ops: list[tuple[int, str, str]] = []
    for line in listing.splitlines():
        m = _LINE.match(line)
        if m:
            ops.append((int(m[1], 16), m[2], m[3]))
    branches = []
    for at, op, rest in ops:
        target = _TARGET.search(rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            branches.append((int(target[1], 16), at))
    body = [(at, op) for at, op, rest in ops if not op.startswith("NOP") and not _self(at, op, rest)]
    return _code(body, branches, found.get("REG", 0), max(found.get("STACK", 0), found.get("LOCAL", 0)), shared, MMA)


def _self(at: int, op: str, rest: str) -> bool:
    target = _TARGET.search(rest) if op.startswith("BRA") else None
    return bool(target) and int(target[1], 16) == at  # type: ignore[index]


def amd(text: str, shared: int) -> Code:
    """Read AMDGCN assembly and the metadata at its end."""

    def value(key: str) -> int:
        m = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(m[1]) if m else 0

    labels: dict[str, int] = {}
    body: list[tuple[int, str]] = []
    branches: list[tuple[int, int]] = []
    at = 0
    for line in text.splitlines():
        code = line.split(";", 1)[0].strip()
        if re.fullmatch(r"[.\w$]+:", code):
            labels[code[:-1]] = at
        elif code.startswith(".section") and body:
            break
        elif code and not code.startswith("."):
            op = code.split()[0]
            m = re.match(r"s_c?branch\w*\s+(\S+)", code)
            if m and m[1] in labels:
                branches.append((labels[m[1]], at))
            if op != "s_nop":
                body.append((at, op))
            at += 1
    spills = 4 * value("vgpr_spill_count")  # scalar registers go to lanes of vector registers, not to memory
    return _code(
        body,
        branches,
        value("vgpr_count"),
        max(spills, value("private_segment_fixed_size")),
        shared,
        ("v_mfma", "v_wmma", "v_smfmac"),
    )


def _code(
    body: list[tuple[int, str]], branches: list[tuple[int, int]], registers: int, spills: int, shared: int, mma: tuple[str, ...]
) -> Code:
    spans: dict[int, int] = {}
    for begin, end in branches:  # several branches to one head are one loop
        spans[begin] = max(end, spans.get(begin, 0))
    ordered = sorted(spans.items(), key=lambda s: (s[0], -s[1]))

    def build(low: int, high: int, candidates: list[tuple[int, int]]) -> tuple[int, int, tuple[Loop, ...], int]:
        loops, rest = [], list(candidates)
        taken: list[tuple[int, int]] = []
        while rest:
            span = rest.pop(0)
            inside = [s for s in rest if s[0] >= span[0] and s[1] <= span[1]]
            rest = [s for s in rest if s not in inside and s[0] > span[1]]
            own, own_mma, inner, masks = build(span[0], span[1], inside)
            loops.append(Loop(own, own_mma, inner, masks))
            taken.append(span)
        mine = [op for at, op in body if low <= at <= high and not any(b <= at <= e for b, e in taken)]
        masks = sum(op.split(".")[0] in MASKS or op.startswith(("v_cmp", "v_cndmask")) for op in mine)
        return len(mine), sum(op.startswith(mma) for op in mine), tuple(loops), masks

    last = body[-1][0] if body else 0
    straight, _, loops, _ = build(0, last, ordered)
    histogram: dict[str, int] = {}
    for _, op in body:
        histogram[op.split(".")[0]] = histogram.get(op.split(".")[0], 0) + 1
    total_mma = sum(op.startswith(mma) for _, op in body)
    loads: dict[int, int] = {}
    for _, op in body:
        bits = load_bits(op)
        if bits:
            loads[bits] = loads.get(bits, 0) + 1
    local = sum(op.split(".")[0] in ("LDL", "STL") or op.startswith(("scratch_load", "scratch_store")) for _, op in body)
    widths = dict(sorted(loads.items(), reverse=True))
    return Code(len(body), straight, total_mma, loops, registers, spills, shared, histogram, widths, local)


def load_bits(op: str) -> int:
    """Bits that one lane loads from global memory by this instruction, 0 where it is no such load."""
    name, *suffixes = op.split(".")
    if name in ("LDG", "LDGSTS"):
        known = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
        return next((known[x] for x in suffixes if x in known), 32)
    m = re.fullmatch(r"(?:global|buffer|flat)_load_(?:lds_)?(dword|b|short|ushort|ubyte|u|d)(x)?(\d*)\w*", name)
    if not m:
        return 0
    if m[1] == "dword":
        return 32 * int(m[3] or 1)
    return int(m[3]) if m[1] in ("b", "u", "d") and m[3] else 8 if m[1] == "ubyte" else 16
