"""`python -m bench.gpu`: on a GPU, every library pattern's correctness and then its speed beside the peers, in eight minutes.

Correctness comes first: forward and gradients of each pattern in each dtype against the float64 meaning, with twice plain
eager's error of the same dtype as the budget. Then the cases of the CPU's bench, timed by the GPU's own events beside SDPA,
FlexAttention, NATTEN, FlashAttention and eager code, whichever import. Results go to bench/results/gpu-*.json and the page
docs/performance-gpu-*.md, one for each GPU. Without a GPU it prints one line and ends with status 2.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import attnc
from attnc import patterns
from attnc.errors import AttncError
from attnc.runtime import device as devices
from attnc.runtime import winners
from attnc.runtime.device import Device

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8.0
DTYPES = ("float16", "bfloat16", "float32")
BUDGET = {"out": 2.0, "gradient": 3.0}  # times eager's error in the same dtype
FLOOR = 1e-7  # of the largest value: below, eager's luck decides
REDUCED = {"grid": (13, 18), "heads": 2, "dim": 32, "batch": 2}
Clock = Callable[[], float]


@dataclass(frozen=True)
class Check:
    """One pattern of the library, and the shapes of its tables."""

    name: str
    pattern: attnc.Pattern
    grid: tuple[int, ...] = REDUCED["grid"]
    tables: dict[str, tuple[int, ...]] | None = None


def checks() -> list[Check]:
    """Every relation of the library and its scores, at sizes that no tile divides."""
    p = patterns
    relative = {"bias": (2, 13, 13)}
    return [
        Check("full", p.full()),
        Check("causal", p.causal()),
        Check("band", p.band(3, 5)),
        Check("blocks", p.blocks(5)),
        Check("window", p.window(7)),
        Check("window shifted", p.window(7, 3)),
        Check("window + relative bias", p.window(7, 3, bias="relative"), tables=relative),
        Check("window + absolute bias", p.window(4, bias="absolute"), tables={"bias": (2, 16, 16)}),
        Check("neighborhood", p.neighborhood(7)),
        Check("neighborhood + bias", p.neighborhood(7, bias="relative"), tables=relative),
        Check("neighborhood dilated", p.neighborhood(3, dilation=4)),
        Check("neighborhood strided", p.neighborhood(5, stride=2)),
        Check("neighborhood causal", p.neighborhood(5, causal=True)),
        Check("dilated", p.dilated(3, 2)),
        Check("dilated blocks", p.dilated_blocks(3, 2)),
        Check("grid", p.grid(4)),
        Check("axial", p.axial("x")),
        Check("strip", p.strip("y", 3)),
        Check("cross", p.cross(3)),
        Check("overlapping window", p.overlapping_window(4, 6)),
        Check("per head", p.per_head([p.window(4), p.neighborhood(3)])),
        Check("line", p.neighborhood(9), (61,)),
        Check("volume", p.neighborhood(3), (5, 6, 7)),
    ]


def error(found: Iterable[Tensor], true: Iterable[Tensor]) -> list[float]:
    """Largest difference of each tensor over the largest value of the true one."""
    return [float((f.double() - t).abs().max() / t.abs().max().clamp(min=1e-30)) for f, t in zip(found, true, strict=True)]


def correctness(where: Device, check: Check, dtype: str, backend: str = "triton") -> dict[str, Any]:
    """One pattern in one dtype: errors of the output and each gradient, and eager's in the same dtype."""
    torch.manual_seed(0)
    n, heads = 1, REDUCED["heads"]
    for size in check.grid:
        n *= size
    kind = getattr(torch, dtype)
    rows = [torch.randn(REDUCED["batch"], heads, n, REDUCED["dim"]).to(where.where, kind) for _ in range(3)]
    named = {k: torch.randn(s).to(where.where) for k, s in (check.tables or {}).items()}
    weight = torch.randn_like(rows[0])

    def run(op: Any, wide: bool) -> list[Tensor]:
        def leaf(t: Tensor) -> Tensor:
            return (t.double() if wide else t).detach().requires_grad_()

        q, k, v = map(leaf, rows)
        tables = {k_: leaf(t) for k_, t in named.items()}
        out = op(q, k, v, **tables)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v, *tables.values()), weight.to(out.dtype))]

    row: dict[str, Any] = {"pattern": check.name, "grid": list(check.grid), "dtype": dtype}
    try:
        meaning = attnc.reference(check.pattern, grid=check.grid)
        true, plain = run(meaning, True), run(meaning, False)
        mine = run(attnc.compile(check.pattern, grid=check.grid, backend=backend), False)
    except AttncError as e:
        return row | {"ok": False, "refused": f"{type(e).__name__}: {str(e).splitlines()[0]}"}
    ours, theirs = error(mine, true), error(plain, true)
    allowed = [BUDGET["gradient" if i else "out"] * max(e, FLOOR) for i, e in enumerate(theirs)]
    ok = all(a <= b for a, b in zip(ours, allowed, strict=True))
    return row | {"ok": ok, "out": ours[0], "eager out": theirs[0], "gradients": max(ours[1:]), "eager gradients": max(theirs[1:])}


def speed(where: Device, case: Any, dtype: str, batch: int, backward: bool, makers: dict[str, Any] | None = None) -> dict[str, Any]:
    """One case of the bench beside its peers, in the form of the CPU's rows. A peer that fails is named with its reason."""
    kind = getattr(torch, dtype)
    inputs = tuple(t.to(where.where).requires_grad_(backward) for t in case.inputs(batch, kind))
    failed: dict[str, str] = {}
    measured: dict[str, Callable[[], Any]] = {}
    makers = {"attnc": case.ours, **case.peers, **case.slow_peers} if makers is None else makers
    for name, make in makers.items():
        try:
            run = make()
            if run is not None:
                measured[name] = _pass(run, inputs, backward)
                measured[name]()
        except Exception as e:  # a peer that lacks a kernel for this GPU or dtype is no fault of ours; ours fails the run
            if name == "attnc":
                raise
            measured.pop(name, None)
            failed[name] = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:160]
    assert where.race is not None
    times = where.race(measured)
    theirs = {n: t for n, t in times.items() if n != "attnc"}
    peer = min(theirs, key=theirs.__getitem__, default="none")
    rate = _rate(where, kind)
    return {
        "name": case.name, "size": case.size, "family": case.family, "model": case.model, "dtype": dtype, "asked batch": batch,
        "batch": case.batch or batch, "pass": "forward + backward" if backward else "forward", "seconds": times, "failed": failed,
        "peer": peer, "ratio": theirs[peer] / times["attnc"] if theirs else None,
        "share": case.flops(batch, backward) / times["attnc"] / rate,
    }  # fmt: skip


def _pass(run: Any, inputs: tuple[Tensor, ...], backward: bool) -> Callable[[], Any]:
    if not backward:
        return lambda: run(*inputs)
    weight = torch.randn_like(run(*inputs).detach())
    return lambda: torch.autograd.grad(run(*inputs), inputs, weight)


_rates: dict[Any, float] = {}


def _rate(where: Device, kind: torch.dtype) -> float:
    """The GPU's own 4096^3 product in a dtype, floating-point operations a second."""
    if (where, kind) not in _rates:
        assert where.race is not None
        side = 4096 if where.where.type == "cuda" else 64
        a, b = (torch.randn(side, side, device=where.where).to(kind) for _ in range(2))
        _rates[where, kind] = 2 * side**3 / where.race({"gemm": lambda: torch.mm(a, b)})["gemm"]
    return _rates[where, kind]


def measure(
    where: Device, minutes: float, clock: Clock = time.monotonic, say: Callable[[str], None] = print, backend: str = "triton"
) -> dict[str, Any]:
    """Correctness of everything, then cases until the time is spent: what was not measured is counted, never left out silently."""
    from bench.cases import cases

    start, rows, skipped = clock(), [], 0
    found = []
    for dtype in DTYPES:
        for check in checks():
            found.append(correctness(where, check, dtype, backend))
            r = found[-1]
            say(f"{'ok' if r['ok'] else 'WRONG':6}{check.name:28}{dtype:10}{r.get('refused') or format(r['out'], '.1e')}")
    with torch.device(where.where):
        for dtype, batch, backward in (("float16", 8, False), ("float16", 8, True), ("bfloat16", 8, False), ("float16", 1, False)):
            for case in cases():
                if clock() - start > 60 * minutes:
                    skipped += 1
                    continue
                rows.append(speed(where, case, dtype, batch, backward))
                r = rows[-1]
                ms = 1e3 * r["seconds"]["attnc"]
                say(f"{r['name']:28}{r['size']:14}{dtype:10}b{batch} {r['pass']:20}{ms:9.4f} ms {_times(r['ratio'])}x {r['peer']}")
    tuned = sum(k["device"] == {"name": where.name, "target": where.target} for k, _ in winners.every())
    about = {"gpu": where.name, "target": where.target, "torch": torch.__version__, "seconds": clock() - start, "tuned": tuned}
    return {"machine": about, "correctness": found, "rows": rows, "not measured": skipped}


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


# ---------------------------------------------------------------------------------------------------------------------- the page
def slug(name: str) -> str:
    """A GPU's name for files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(report: dict[str, Any], results: Path, docs: Path) -> Path:
    """Keep the report, and write its page and pictures. Nothing is measured here."""
    from bench import page

    name = f"gpu-{slug(report['machine']['gpu'])}"
    (docs / "img").mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    part = results / f"{name}.part"
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(results / f"{name}.json")
    m, wrong = report["machine"], [c for c in report["correctness"] if not c["ok"]]
    lines = [f"# Performance on {m['gpu']}", "", "Written by `make gpu`, correctness and times from one run.", ""]
    lines += [f"{m['gpu']} ({m['target']}), torch {m['torch']}; {m['seconds'] / 60:.1f} minutes.", ""]
    lines += ["- **ratio**: the best peer's median time over attnc's, by the GPU's own events, the L2 emptied before each run."]
    lines += ["- **share**: useful operations over the GPU's own 4096^3 product in the same dtype."]
    lines += [
        f"- {report['not measured']} rows were not reached in the time; {m['tuned']} tuned winners of this GPU lay in the cache."
    ]
    lines += [
        "",
        "## Correctness",
        "",
        f"{len(report['correctness']) - len(wrong)} of {len(report['correctness'])} within the budget.",
    ]
    head = ("pattern", "grid", "dtype", "error", "eager's", "gradients", "eager's", "")
    cells = []
    for c in report["correctness"]:
        numbers = [f"{c[n]:.1e}" if n in c else "-" for n in ("out", "eager out", "gradients", "eager gradients")]
        said = "" if c["ok"] else c.get("refused", "beyond the budget")
        cells.append((c["pattern"], "x".join(map(str, c["grid"])), c["dtype"], *numbers, said))
    lines += page._table(head, cells)
    lines += ["## attnc beside its peers", ""]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for r in report["rows"]:
        groups.setdefault((r["dtype"], r["asked batch"], r["pass"]), []).append(r)
    for (dtype, batch, what), mine in groups.items():
        title = f"{dtype}, batch {batch}, {what}"
        picture = f"performance-{name}-{dtype}-b{batch}-{'training' if '+' in what else 'forward'}.png"
        lines += [f"### {title}", ""]
        beside = [r | {"bar": {"ratio": 1.0, "share": None}} for r in mine if r["ratio"] is not None]
        if beside:
            page._ratios(beside, title, docs / "img" / picture)
            lines += [f"![ratios to the best peer: {title}](img/{picture})"]
        head = ("pattern", "size", "attnc ms", "best peer", "its ms", "ratio", "share", "others, ms", "did not run")
        body = []
        for r in mine:
            others = {n: t for n, t in r["seconds"].items() if n not in ("attnc", r["peer"])}
            shown = ", ".join(f"{n} {page._ms(t)}" for n, t in others.items()) or "-"
            its = page._ms(r["seconds"][r["peer"]]) if r["peer"] in r["seconds"] else "-"
            times = (page._ms(r["seconds"]["attnc"]), r["peer"], its, _times(r["ratio"]), f"{r['share']:.2f}")
            body.append((r["name"], r["size"], *times, shown, ", ".join(r["failed"]) or "-"))
        lines += page._table(head, body)
    out = docs / f"performance-{name}.md"
    out.write_text("\n".join(lines).rstrip() + "\n")
    return out


def main(
    device: Annotated[str, typer.Option(help="which GPU: cuda, cuda:1")] = "cuda",
    minutes: Annotated[float, typer.Option(min=0.5, help="no new row is begun after so many minutes")] = MINUTES - 1.5,
    results: Annotated[Path, typer.Option(help="folder of the JSON file")] = ROOT / "bench" / "results",
    docs: Annotated[Path, typer.Option(help="folder of the page")] = ROOT / "docs",
) -> None:
    """Correctness on the GPU, then the benchmark, then the page. Status 1 where something was wrong, 2 without a GPU."""
    try:
        where = devices.named(device)
    except AttncError as e:
        typer.echo(f"make gpu: {e}", err=True)
        raise typer.Exit(2) from None
    if where.race is None:
        typer.echo(f"make gpu: device={device!r} is no GPU; `make bench` measures the CPU", err=True)
        raise typer.Exit(2)
    typer.echo(f"{where.name} ({where.target})")
    report = measure(where, minutes, say=typer.echo)
    typer.echo(f"page: {write(report, results, docs)}")
    raise typer.Exit(0 if all(c["ok"] for c in report["correctness"]) else 1)


if __name__ == "__main__":
    typer.run(main)
