"""A whole model: DaViT-Tiny, batch 8, beside timm's, eager and through torch.compile; and where its time goes."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.timing import COPIES, Results, interleaved, medians, threads

BATCH, THREADS = 8, 2
BAR = {"eager": 1.10, "compiled": 1.0}
PARTS = {  # operators by what they are part of; self times add up to the whole
    "linear": ("addmm", "mm", "linear", "bmm_linear"),
    "attention": ("attnc::", "bmm", "softmax", "scaled_dot", "flash_attention", "baddbmm"),
    "convolution": ("conv", "mkldnn"),
    "layer norm": ("layer_norm",),
    "activation": ("gelu",),
}


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, nn.Module]]:
    """The two models with the same weights; timm's also in the memory format that its convolutions like."""
    timm = pytest.importorskip("timm")
    from attnc.models import create_model, from_timm

    torch.manual_seed(0)
    theirs = timm.create_model("davit_tiny", pretrained=False).eval()
    ours = create_model("davit_tiny").eval()
    ours.load_state_dict(from_timm("davit_tiny", theirs.state_dict()))
    yield {"attnc": ours, "timm": theirs}
    torch._dynamo.reset()


def images(side: int, quick: bool) -> list[Tensor]:
    """Inputs, taken in turn."""
    return [torch.randn(1 if quick else BATCH, 3, side, side) for _ in range(COPIES)]


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("side", [224, 448])
def test_davit_tiny(
    side: int, mode: str, models: dict[str, nn.Module], benchmark: Any, results: Results, seconds: float, quick: bool
) -> None:
    """Images a second, the same logits."""
    with threads(THREADS), torch.no_grad():
        inputs = images(64 if quick else side, quick)
        torch.testing.assert_close(models["attnc"](inputs[0]), models["timm"](inputs[0]), rtol=1e-3, atol=1e-4)
        start = time.perf_counter()
        compiled = {n: torch.compile(m, dynamic=False) if mode == "compiled" else m for n, m in models.items()}
        runners = {n: lambda i, m=m: m(inputs[i]) for n, m in compiled.items()}
        if mode == "eager":
            last = [x.to(memory_format=torch.channels_last) for x in inputs]
            runners["timm, channels last"] = lambda i: models["timm"](last[i])
        for run in runners.values():
            run(0)
        setup = time.perf_counter() - start
        found = medians(interleaved(runners, 12 * seconds, benchmark))
    peer = min((n for n in found if n != "attnc"), key=found.__getitem__)
    ratio = found[peer] / found["attnc"]
    row = {
        "name": "DaViT-Tiny",
        "size": f"{side}x{side}",
        "mode": mode,
        "batch": len(inputs[0]),
        "threads": THREADS,
        "seconds": found,
    }
    results.add(row | {"setup": setup, "peer": peer, "ratio": ratio, "bar": BAR[mode]})
    shown = f"{1e3 * found['attnc']:9.1f} ms  {peer} {1e3 * found[peer]:9.1f}  {ratio:5.2f}x (bar {BAR[mode]:.2f})"
    print(f"{f'DaViT-Tiny {side}x{side} {mode} b{len(inputs[0])} t{THREADS}':72} {shown}", flush=True)
    gc.collect()


def test_davit_profile(models: dict[str, nn.Module], results: Results, quick: bool) -> None:
    """Where the time of the eager models goes."""
    side = 64 if quick else 224
    for name, model in models.items():
        with threads(THREADS), torch.no_grad():
            inputs = images(side, quick)
            model(inputs[0])
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for x in inputs:
                    model(x)
        spent: dict[str, float] = {}
        for event in profile.key_averages():
            part = next((p for p, words in PARTS.items() if any(w in event.key for w in words)), "other")
            spent[part] = spent.get(part, 0.0) + event.self_cpu_time_total / 1e6 / len(inputs)
        total = sum(spent.values())
        results.add(
            {"name": "DaViT-Tiny profile", "size": f"{side}x{side}", "model": name, "batch": len(inputs[0]), "parts": spent}
        )
        shares = ", ".join(f"{p} {t / total:.0%}" for p, t in sorted(spent.items(), key=lambda x: -x[1]))
        print(f"{f'DaViT-Tiny profile {side}x{side} {name}':72} {1e3 * total:9.1f} ms: {shares}", flush=True)
