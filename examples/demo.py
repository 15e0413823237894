"""`make demo`: declare a pattern, see what is proved about it, then run DaViT-Tiny on a real photo through generated kernels.

Every attention of the network is recorded while it runs, checked against the float64 meaning of its statement, and timed next
to eager PyTorch doing it the paper's own way. Writes demo/module.py, demo/pattern.png and demo/report.json; the exit status is
1 where an error exceeds twice that of eager PyTorch in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from paper import Attention, recorded
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor

import attnc
from attnc.report.issued import issued
from attnc.schedule.geometry import geometry

OUT = Path("demo")
GRID = (56, 56)  # of the declared pattern
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = 1e-6  # of the largest output: below it, errors are rounding and nothing is compared
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


# A pattern is a statement about coordinates; a table in it is a runtime tensor, and it gets a gradient.
DECLARED = '''
@attnc.pattern
def near(q, k, *, reach, bias: attnc.Table):
    """Keys at most `reach` away on both axes, each offset with a learned bias per head."""
    close = (abs(q.y - k.y) <= reach) & (abs(q.x - k.x) <= reach)
    return attnc.where(close, attnc.SCORE + bias[attnc.HEAD, q.y - k.y + reach, q.x - k.x + reach])
'''


@attnc.pattern
def near(q: Any, k: Any, *, reach: int, bias: attnc.Table) -> Any:
    """Keys at most `reach` away on both axes, each offset with a learned bias per head."""
    close = (abs(q.y - k.y) <= reach) & (abs(q.x - k.x) <= reach)
    return attnc.where(close, attnc.SCORE + bias[attnc.HEAD, q.y - k.y + reach, q.x - k.x + reach])


def photo() -> Tensor:
    """scikit-learn's china.jpg, [1, 3, 427, 640], normalised as for ImageNet."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255.0
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((image - mean) / std).to(DEVICE)


def times_ms(*calls: Callable[[], object], rounds: int = 21, budget: float = 1.2) -> list[float]:
    """Median times in milliseconds of calls that take turns, after two turns that warm them up."""
    taken: list[list[float]] = [[] for _ in calls]
    spent = 0.0
    for turn in range(2 + rounds):
        for f, mine in zip(calls, taken, strict=True):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            mine.append(time.perf_counter() - start)
            spent += mine[-1]
        if spent > budget and turn >= 6:
            break
    return [1e3 * float(np.median(mine[2:])) for mine in taken]


def relative(got: Tensor, meaning: Tensor) -> float:
    """Largest difference, over the largest value."""
    return float((got.double() - meaning).abs().max() / meaning.abs().max())


def examine(call: Attention) -> dict[str, Any]:
    """One attention of the network: its error and its time, beside eager PyTorch's."""
    meaning = call.meaning()
    error, eager_error = relative(call.output, meaning), relative(call.eager(), meaning)
    ms, eager_ms = times_ms(call.run, call.eager)
    return {
        "layer": call.layer,
        "operator": call.operator,
        "pattern": call.pattern,
        "backend": call.backend,
        "strategy": call.strategy,
        "grid": list(call.grid),
        "heads": call.heads,
        "allowed": call.allowed,
        "issued": call.issued,
        "error": error,
        "eager_error": eager_error,
        "ok": error <= 2 * eager_error + FLOOR,
        "ms": ms,
        "eager_ms": eager_ms,
        "ratio": eager_ms / ms,
    }


def network(image: Tensor, label: str, backend: str, progress: Progress) -> list[dict[str, Any]]:
    """Run DaViT-Tiny once with its attentions recorded, then examine each of them."""
    torch.manual_seed(0)
    model = attnc.models.create_model("davit_tiny", backend=backend).to(DEVICE).eval()
    task = progress.add_task(f"DaViT-Tiny at {label}", total=None)
    with torch.inference_mode():
        calls = recorded(model, image)
        progress.update(task, total=len(calls))
        rows = []
        for call in calls:
            rows.append(examine(call) | {"image": f"DaViT-Tiny, photo at {label}"})
            progress.advance(task)
    return rows


def declared(backend: str, progress: Progress) -> tuple[str, dict[str, Any]]:
    """The declared pattern: its explanation, module and picture; then output and gradients beside float64 and eager float32."""
    task = progress.add_task("the declared pattern", total=4)
    p, grid, heads = near(reach=3), GRID, 3
    text = attnc.explain(p, grid=grid, heads=heads)
    progress.advance(task)
    (OUT / "module.py").write_text(attnc.emit(p, grid=grid, heads=heads, head_dim=32, dtype="float16", target="cuda:90"))
    progress.advance(task)
    attnc.draw(p, grid=grid, heads=heads, path=OUT / "pattern.png")
    progress.advance(task)

    torch.manual_seed(0)
    q, k, v, cotangent = torch.randn(4, 1, heads, grid[0] * grid[1], 32, device=DEVICE)
    bias = torch.randn(heads, 7, 7, device=DEVICE)
    op, y, x = attnc.compile(p, grid=grid, backend=backend), *np.indices(grid).reshape(2, -1)
    apart = [torch.from_numpy(c[:, None] - c[None]).to(DEVICE) for c in (y, x)]
    close = (apart[0].abs() <= 3) & (apart[1].abs() <= 3)
    at = [c.clamp(-3, 3) + 3 for c in apart]

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias[:, at[0], at[1]]
        return torch.softmax(scores.masked_fill(~close, float("-inf")), -1) @ v

    def graded(f: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v, bias)]
        out = f(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    reference = attnc.reference(p, grid=grid)
    meaning = graded(lambda q, k, v, bias: reference(q, k, v, bias=bias), torch.float64)
    mine = graded(lambda q, k, v, bias: op(q, k, v, bias=bias), torch.float32)
    eager = graded(dense, torch.float32)
    pairs = [(relative(a, m), relative(b, m)) for a, b, m in zip(mine, eager, meaning, strict=True)]
    with torch.no_grad():
        ms, eager_ms = times_ms(lambda: op(q, k, v, bias=bias), lambda: dense(q, k, v, bias))
    progress.advance(task)
    ran = op._backend(DEVICE)
    g = geometry(op.program(2), grid, grid)
    return text, {
        "image": "the declared pattern, and its gradients for q, k, v and bias",
        "layer": p.name,
        "operator": "attend",
        "pattern": p.name,
        "backend": ran,
        "strategy": g.structure.strategy,
        "grid": list(grid),
        "heads": heads,
        "allowed": g.allowed(heads),
        "issued": issued(ran, op.program(2), g, heads=heads, head_dim=32, value_dim=32, dtype="float32"),
        "error": max(a for a, _ in pairs),
        "eager_error": max(b for _, b in pairs),
        "ok": all(a <= 2 * b + FLOOR for a, b in pairs),
        "ms": ms,
        "eager_ms": eager_ms,
        "ratio": eager_ms / ms,
    }


def shown(rows: list[dict[str, Any]]) -> Table:
    """The report as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "strategy", "tokens"):
        table.add_column(name, no_wrap=True)
    for name in ("allowed", "issued", "error", "eager's", "ms", "eager ms", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        error = f"{r['error']:.1e}" if r["ok"] else f"[bold red]{r['error']:.1e}[/]"
        layer = r["layer"].removeprefix("main_blocks.").removesuffix(".attn")
        counts = f"{r['allowed']:,}", f"{r['issued']:,}"
        times = f"{r['ms']:.2f}", f"{r['eager_ms']:.2f}", f"{r['ratio']:.2f}x"
        table.add_row(layer, r["strategy"], "x".join(map(str, r["grid"])), *counts, error, f"{r['eager_error']:.1e}", *times)
    return table


def main() -> int:
    """Run the demo; 0, or 1 where an error is too large."""
    parser = argparse.ArgumentParser(description="attnc on a real photo")
    parser.add_argument("--backend", default="auto", help="auto: C++ on a CPU, Triton on a GPU; or triton, cpp, torch")
    backend = parser.parse_args().backend
    began = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    image = photo()
    small = F.interpolate(image, (224, 224), mode="bicubic", antialias=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        text, first = declared(backend, progress)
        rows = [first, *network(small, "224x224", backend, progress), *network(image, "427x640", backend, progress)]
    report = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "attnc": attnc.__version__,
        "torch": torch.__version__,
        "layers": rows,
    }
    (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")

    console.print(Syntax(DECLARED.strip(), "python", background_color="default"))
    console.print()
    console.print(text, markup=False, soft_wrap=True)
    ran = " and ".join(sorted({r["backend"] for r in rows}))
    console.rule(f"float32, backend {ran}, {report['device']}")
    for image, group in groupby(rows, key=lambda r: str(r["image"])):
        console.print(f"\n[bold]{image}[/]")
        console.print(shown(list(group)))
    console.print(
        "\n[dim]allowed, issued: score elements of one image. error: largest difference from the float64 meaning, over the "
        "largest output.\neager: the paper's own way in eager PyTorch (pad, partition, softmax(q k^T) v, reverse; channel: two "
        "matmuls).\nratio: eager's time over attnc's.[/]"
    )
    console.print(f"\nwrote {', '.join(str(OUT / n) for n in ('module.py', 'pattern.png', 'report.json'))}")
    bad = [f"{r['image']} {r['layer']}" for r in rows if not r["ok"]]
    if bad:
        console.print(f"[bold red]error above twice that of eager float32: {', '.join(bad)}[/]")
        return 1
    console.print(f"every error is within twice that of eager float32; {time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
