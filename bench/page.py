"""docs/performance*.md and their pictures, from the JSON files of bench/results. Nothing is measured here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SHORT = {"float32": "float32", "bfloat16": "bf16"}
GOAL = {"forward": 3.0, "forward + backward": 2.5}  # geometric means asked for, over all float32 rows of a pass
INDEX = """# Performance on a CPU

A page for each kind of machine, by its widest vectors. Written by `python -m bench --page` from `bench/results/*/*.json`;
`make bench` measures all of this machine's in one run.
"""
HEAD = """# Performance on a CPU: {kind}

Written by `python -m bench --page` from `bench/results/{kind}/*.json`, which `make bench` measures in one run.

{machine}. {versions}.

- **ratio**: the best peer's median time over attnc's, both from the same run, in turns, on rotating inputs, with malloc's
  thresholds raised for both sides and waiting threads asleep. Peers' masks and compilations are made beforehand.
- **share**: useful floating-point operations (two products over the allowed pairs; five more in a backward) over the machine's own
  1024 x 1024 GEMM in the same dtype on as many threads, measured in the same row.
- **bar**: what the project asks of itself, on a machine with AVX-512; where none is given, no slower than the best peer. Rows below
  a bar are marked.
- All tiles are those of the cost model: nothing was tuned.
"""


def write_all(results: Path, docs: Path) -> None:
    """A page for each folder of results, and the page that leads to them."""
    parts = [INDEX]
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        found = write(folder, docs)
        rows, page = found.get("attention", {}).get("rows", []), f"performance-{folder.name}"
        parts += [f"## {folder.name}", "", f"[Every row]({page}.md). {_machine(next(iter(found.values()))['machine'])}."]
        parts += _summary(_groups(rows))
        first = next((_picture(page, key) for key in _groups(rows)), None)
        parts += [f"![ratios to the best peer on {folder.name}](img/{first})", ""] if first else []
    (docs / "performance.md").write_text("\n".join(parts).rstrip() + "\n")


def write(results: Path, docs: Path) -> dict[str, Row]:
    """Write one folder's page, docs/performance-FOLDER.md, and its pictures, from what is there. Gives what was read."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(results.glob("*.json"))}
    rows, models, costs = (found.get(n, {}).get("rows", []) for n in ("attention", "model", "costs"))
    machine = next((r["machine"] for r in found.values()), {})
    page = f"performance-{results.name}"
    (docs / "img").mkdir(parents=True, exist_ok=True)
    parts = [
        HEAD.format(kind=results.name, machine=_machine(machine), versions=_versions(machine)),
        *_attention(rows, docs, page),
        *_against_ourselves(rows),
    ]
    parts += [*_models(models), *_costs(costs)]
    (docs / f"{page}.md").write_text("\n".join(parts).rstrip() + "\n")
    return found


def _machine(m: Row) -> str:
    return f"{m.get('processor', 'unknown processor')}, {m.get('cores')} cores, {', '.join(m.get('sets', ())) or 'no vector sets'}"


def _versions(m: Row) -> str:
    return ", ".join(f"{n} {v}" for n, v in m.get("versions", {}).items())


def _table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> list[str]:
    head = [str(h) for h in head]
    return [
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(str(c) for c in row)} |" for row in rows),
        "",
    ]


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.geometric_mean(found):.2f}" if found else "-"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def below(r: Row) -> bool:
    """The row misses a bar."""
    return bool(r["ratio"] < r["bar"]["ratio"] or r["share"] < (r["bar"]["share"] or 0))


def label(r: Row) -> str:
    """neighbourhood 7, 56x56x64."""
    return f"{r['name']}, {r['size']}"


# ---------------------------------------------------------------------------------------------------------- attention rows
def _groups(rows: list[Row]) -> dict[tuple[str, int, int, str], list[Row]]:
    """Rows by dtype, batch, threads and pass, in the order they were measured (a row with a batch of its own among the others)."""
    out: dict[tuple[str, int, int, str], list[Row]] = {}
    for r in rows:
        out.setdefault((r["dtype"], r["asked batch"], r["threads"], r["pass"]), []).append(r)
    return out


def _summary(groups: dict[tuple[str, int, int, str], list[Row]]) -> list[str]:
    summary = []
    for (dtype, batch, threads, what), mine in groups.items():
        slower, short = [r for r in mine if r["ratio"] < 1], [r for r in mine if below(r)]
        goal = f"{GOAL[what]:.1f}" if dtype == "float32" else "-"
        cells = (SHORT[dtype], batch, threads, what, len(mine), _mean(r["ratio"] for r in mine), goal)
        summary.append((*cells, _mean(r["share"] for r in mine), len(short), len(slower)))
    head = ("dtype", "batch", "threads", "pass", "rows", "ratio (geometric mean)", "asked", "share (geometric mean)")
    return _table((*head, "below a bar", "slower than a peer"), summary)


def _picture(page: str, key: tuple[str, int, int, str]) -> str:
    dtype, batch, threads, what = key
    return f"{page}-{SHORT[dtype]}-b{batch}-t{threads}-{'training' if '+' in what else 'forward'}.png"


def _attention(rows: list[Row], docs: Path, page: str) -> list[str]:
    if not rows:
        return []
    groups = _groups(rows)
    out = ["", "## attnc beside its peers", "", *_summary(groups)]
    for (dtype, batch, threads, what), mine in groups.items():
        name = f"{SHORT[dtype]}, batch {batch}, {threads} thread{'s' * (threads > 1)}, {what}"
        picture = _picture(page, (dtype, batch, threads, what))
        _ratios(mine, name, docs / "img" / picture)
        out += [f"### {name}", "", f"![ratios to the best peer: {name}](img/{picture})"]
        out += _table(
            ("pattern", "size", "attnc ms", "best peer", "its ms", "ratio", "bar", "share", "bar", ""),
            (
                (r["name"], r["size"], _ms(r["seconds"]["attnc"]), r["peer"], _ms(r["seconds"][r["peer"]]), f"{r['ratio']:.2f}",
                 f"{r['bar']['ratio']:.1f}", f"{r['share']:.2f}", r["bar"]["share"] or "-", "below" if below(r) else "")
                for r in mine
            ),
        )  # fmt: skip
    flex = [
        (label(r), f"{r['seconds']['flex compiled'] / r['seconds']['attnc']:.1f}") for r in rows if "flex compiled" in r["seconds"]
    ]
    if flex:
        out += ["### FlexAttention, compiled", "", "Its block mask and its compilation were made beforehand."]
        out += _table(("pattern", "attnc is faster by"), flex)
    return out


def _against_ourselves(rows: list[Row]) -> list[str]:
    """bf16 beside our own float32, which took turns with it."""
    found = []
    for r in rows:
        if r["dtype"] == "bfloat16":
            gain = r["seconds"]["attnc, float32"] / r["seconds"]["attnc"]
            asked = r["bar"]["float32"]
            mark = "below" if asked and gain < asked else ""
            found.append((label(r), f"batch {r['batch']}", f"{r['threads']} threads", r["pass"], f"{gain:.2f}", asked or "-", mark))
    head = ("pattern", "", "", "pass", "times our float32", "bar", "")
    return ["### bf16 beside our own float32", *_table(head, found)] if found else []


# ------------------------------------------------------------------------------------------------------------------- models
def _models(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    out = ["## A whole model", ""]
    timed = [r for r in rows if "mode" in r]
    head = ("model", "image", "mode", "batch", "threads", "attnc ms", "best peer", "its ms", "ratio", "bar", "")
    out += _table(
        head,
        (
            (r["name"], r["size"], r["mode"], r["batch"], r["threads"], _ms(r["seconds"]["attnc"]), r["peer"],
             _ms(r["seconds"][r["peer"]]), f"{r['ratio']:.2f}", f"{r['bar']:.2f}", "below" if r["ratio"] < r["bar"] else "")
            for r in timed
        ),
    )  # fmt: skip
    profiles = [r for r in rows if "parts" in r]
    if profiles:
        parts = sorted({p for r in profiles for p in r["parts"]}, key=lambda p: -profiles[0]["parts"].get(p, 0))
        out += ["Where the time goes, eager (milliseconds and share of the operators' own time):"]
        cells = []
        for r in profiles:
            total = sum(r["parts"].values())
            shares = (f"{_ms(r['parts'].get(p, 0))} ({r['parts'].get(p, 0) / total:.0%})" for p in parts)
            cells.append((r["model"], r["size"], *shares))
        out += _table(("", "image", *parts), cells)
    return out


# -------------------------------------------------------------------------------------------------------------------- costs
def _costs(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    by: dict[str, list[Row]] = {}
    for r in rows:
        by.setdefault(r["name"], []).append(r)
    out = ["## Costs beside the kernel", ""]
    if "first call" in by:
        out += ["### First call", "", "Seconds in a fresh process, with nothing built and with everything in the cache."]
        head = ("pattern", "forward built", "bar", "backward built", "bar", "forward cached, ms", "bar", "backward cached, ms")
        cells = []
        for r in by["first call"]:
            built, cached, bars = r["built"], r["cached"], r["bar"]
            times = (f"{built[0]:.2f}", bars["built"][0], f"{built[1]:.2f}", bars["built"][1], _ms(cached[0]), _ms(bars["cached"]))
            cells.append((r["pattern"], *times, _ms(cached[1])))
        out += _table(head, cells)
    if "growth" in by:
        out += ["### Growing the grid", "", "One thread, two heads of 32. Extra memory: beyond inputs and outputs (bar: 4 MiB)."]
        cells = []
        for r in by["growth"]:
            pairs = [t / s**2 for s, t in zip(r["sides"], r["seconds"], strict=True)]
            for side, t, pair, extra in zip(r["sides"], r["seconds"], pairs, r["extra MiB"], strict=True):
                cells.append((r["pattern"], f"{side}x{side}", _ms(t), f"{pair / pairs[0]:.2f} (bar 1.25)", f"{extra:.1f}"))
        out += _table(("pattern", "grid", "ms", f"time per pair over {by['growth'][0]['sides'][0]}'s", "extra MiB"), cells)
    if "tuned" in by:
        gains = [r["gain"] for r in by["tuned"]]
        worst = sorted(by["tuned"], key=lambda r: -r["gain"])[:12]
        out += [
            "### The cost model beside measuring",
            "",
            f"Time of the untuned choice over that of the tuned one, {len(gains)} races: ",
        ]
        out[-1] += f"geometric mean {_mean(gains)}, worst {max(gains):.2f} (bar 1.3). The dozen with the most to gain:"
        cells = [(r["case"], r["pass"], r["untuned"], r["trials"][0][0], f"{r['gain']:.2f}") for r in worst]
        out += _table(("pattern", "pass", "untuned", "tuned", "untuned over tuned"), cells)
    if "AVX2" in by:
        out += ["### The build for AVX2 on this machine"]
        cells = [(r["case"], f"{r['ratio']:.2f}", r["bar"], "below" if r["ratio"] > r["bar"] else "") for r in by["AVX2"]]
        out += _table(("pattern", "time over the native build's", "bar", ""), cells)
    if "head dimension" in by:
        out += [
            "### Head dimensions",
            "",
            "Share of the machine's GEMM, one thread. Bar: within 15% of the neighbouring powers of two.",
        ]
        dims = sorted({r["dim"] for r in by["head dimension"]})
        share = {(r["case"], r["dim"]): r["share"] for r in by["head dimension"]}
        names = dict.fromkeys(n for n, _ in share)
        out += _table(("", *dims), [(n, *(f"{share[n, d]:.2f}" if (n, d) in share else "-" for d in dims)) for n in names])
    for r in by.get("call overhead", ()):
        shown = ", ".join(f"{n} {1e6 * t:.0f} us" for n, t in r["seconds"].items())
        out += [f"A call of window 7 on 14x14 with one head of 32: {shown}; with its backward {1e6 * r['training']:.0f} us.", ""]
    return out


# ----------------------------------------------------------------------------------------------------------------- pictures
def _ratios(rows: list[Row], title: str, path: Path) -> None:
    """A bar for each row's ratio, and a mark where it should reach."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.24 * len(rows)))
    place = range(len(rows))
    colours = ["#c44e52" if r["ratio"] < 1 else "#dd8452" if below(r) else "#4c72b0" for r in rows]
    axis.barh(place, [r["ratio"] for r in rows], color=colours, height=0.7)
    axis.plot([r["bar"]["ratio"] for r in rows], place, "|", color="black", markersize=11, markeredgewidth=1.6, label="bar")
    for i, r in zip(place, rows, strict=True):
        end = max(r["ratio"], r["bar"]["ratio"]) + 0.08
        axis.text(end, i, f"{r['ratio']:.1f}x {r['peer']}, {r['share']:.2f} of GEMM", va="center", fontsize=7)
    axis.set_yticks(place, [label(r) for r in rows], fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlim(0, 1.25 * max(r["ratio"] for r in rows) + 0.8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("times faster than the best peer (orange: below its bar, red: slower)")
    axis.set_title(title, fontsize=10)
    axis.legend(loc="lower right", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
