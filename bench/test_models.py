"""Whole models: timm's (or torchvision's) eager code, `attnc.accelerate` of it, and attnc's own model with the same weights."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.timing import COPIES, Results, Run, medians, threads, timed

BATCH, THREADS = 8, 2
ROUNDS = 5  # of each model of a row, per second that a row is given
COMPILED = ("swin", "maxvit", "davit")  # compiled against compiled; the others take long and say little
TWICE = ("davit", "swin", "maxvit", "gcvit")  # what a run measures at twice the resolution
BAR = {"eager": 0.98, "compiled": 1.1}  # of every model; the windowed ones together are asked for a geometric mean of 1.2


@dataclass(frozen=True)
class Model:
    """A model of a library, and ours.

    peer: its name with timm, or with torchvision after "torchvision:". own: our name for it, if there is such a model.
    settings: of the peer at images of `side` pixels. ours: settings of our model there. windowed: whether it counts among those.
    """

    family: str
    peer: str
    own: str = ""
    side: int = 224
    settings: Callable[[int], dict[str, Any]] = lambda side: {}
    ours: Callable[[int], dict[str, Any]] = lambda side: {}
    windowed: bool = False


def sized(side: int) -> dict[str, Any]:
    """For models that are made for one size."""
    return {"img_size": side}


MODELS = [
    Model("davit", "davit_tiny", "davit_tiny", windowed=True),
    Model("swin", "swin_tiny_patch4_window7_224", settings=sized, windowed=True),
    Model("swinv2", "swinv2_tiny_window8_256", side=256, settings=sized, windowed=True),
    Model(
        "maxvit", "maxvit_tiny_tf_224", "maxvit_tiny", settings=sized, ours=lambda side: {"window_size": side // 32}, windowed=True
    ),
    Model(
        "gcvit",
        "gcvit_tiny",
        "gcvit_tiny",
        settings=sized,
        ours=lambda side: {"resolution": side, "window_size": tuple(side // r for r in (32, 32, 16, 32))},
        windowed=True,
    ),
    Model("torchvision swin", "torchvision:swin_t", windowed=True),
    Model("torchvision swin v2", "torchvision:swin_v2_t", side=256, windowed=True),
    Model(
        "crossvit",
        "crossvit_small_240",
        "crossvit_small",
        side=240,
        settings=sized,
        ours=lambda side: {"img_size": (side, side * 224 // 240)},
    ),
    Model("convit", "convit_small", "convit_small", settings=sized, ours=sized),
    Model("volo", "volo_d1_224", "volo_d1", settings=sized, ours=sized),
    Model("efficientvit_msra", "efficientvit_m5", "efficientvit_msra_m5"),
    Model("shvit", "shvit_s4", "shvit_s4", side=256),
    Model("tnt", "tnt_s_patch16_224", "tnt_s", settings=sized, ours=sized),
    Model("vit", "vit_small_patch16_224", settings=sized),
    Model("deit", "deit_tiny_patch16_224", settings=sized),
]


@dataclass(frozen=True)
class Row:
    """A model at `scale` times its image's sides, eager or compiled."""

    model: Model
    scale: int
    mode: str

    def __str__(self) -> str:
        return f"{self.model.family}{' twice' if self.scale == 2 else ''} {self.mode}"


STANDARD = [
    *(Row(m, 1, "eager") for m in MODELS),
    *(Row(m, 2, "eager") for m in MODELS if m.family in TWICE),
    *(Row(m, 1, "compiled") for m in MODELS if m.family in COMPILED),
]
ROWS = STANDARD + [
    r
    for r in (*(Row(m, 2, "eager") for m in MODELS), *(Row(m, 2, "compiled") for m in MODELS if m.family in COMPILED))
    if r not in STANDARD
]
# models of papers beside convolutional ones of timm, and what the papers measured: SHViT on a CPU, EfficientViT on a Xeon
RIVALS = [("shvit_s4", "mobilevitv2_100", 256, 8.1), ("efficientvit_msra_m5", "mobilenetv3_large_100", 224, 1.45)]


def peer(model: Model, side: int) -> nn.Module:
    """The library's model, with random weights."""
    torch.manual_seed(0)
    library, _, name = model.peer.rpartition(":")
    if library:
        return getattr(pytest.importorskip("torchvision").models, name)().eval()
    return pytest.importorskip("timm").create_model(model.peer, pretrained=False, **model.settings(side)).eval()


def own(model: Model, side: int, weights: dict[str, Tensor]) -> nn.Module | None:
    """Ours with the same weights, where there is one."""
    from attnc.models import create_model, from_timm, list_models

    if model.own not in list_models():
        return None
    ours = create_model(model.own, **model.ours(side)).eval()
    ours.load_state_dict(from_timm(model.own, weights), strict=False)  # buffers that follow from the size may differ
    return ours


def images(side: int, batch: int) -> list[Tensor]:
    """Inputs, taken in turn."""
    return [torch.randn(batch, 3, side, side) for _ in range(COPIES)]


def logits(found: Any) -> Tensor:
    """The first output of models that have several."""
    return found[0] if isinstance(found, tuple) else found


LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.GELU, nn.ReLU, nn.SiLU)
TIMM_GELU = ("GELU", "GELUTanh")  # timm's own classes, which are no nn.GELU


@contextmanager
def attention_times(model: nn.Module, paths: list[str]) -> Iterator[list[float]]:
    """Seconds spent in the modules `paths` beside their layers: attention, partitions and residuals, from qkv to proj.

    Swin v2 calls its qkv layer's product as a function, with a bias that it puts together: that counts as the layer it is.
    """
    total, within = [0.0], [""]

    def timed(place: Any, name: str, what: str) -> None:
        run = getattr(place, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = within[0]
            if before != {"block": "", "layer": "block"}[what]:  # outside of the blocks, or part of a layer whose time is taken
                return run(*args, **kwargs)
            within[0], start = what, time.perf_counter()
            out = run(*args, **kwargs)
            total[0] += (1 if what == "block" else -1) * (time.perf_counter() - start)
            within[0] = before
            return out

        undo.callback(partial(setattr, place, name, run) if isinstance(place, ModuleType) else partial(delattr, place, name))
        setattr(place, name, call)

    with ExitStack() as undo:
        for path in paths:
            block = model.get_submodule(path)
            timed(block, "forward", "block")
            for layer in block.modules():
                if isinstance(layer, LAYERS) or type(layer).__name__ in TIMM_GELU:
                    timed(layer, "forward", "layer")
        ours = [m for name, m in sys.modules.items() if name.startswith("attnc.models.accelerate.") and hasattr(m, "linear")]
        for module in (nn.functional, *ours):
            timed(module, "linear", "layer")
        yield total


def parts(runners: dict[str, nn.Module], paths: list[str], inputs: list[Tensor]) -> dict[str, float]:
    """Median seconds of the attention part of each model."""
    found: dict[str, list[float]] = {name: [] for name in runners}
    for x in inputs:
        for name, model in runners.items():
            with attention_times(model, paths) as total:
                model(x)
            found[name].append(total[0])
    return medians(found)


def report(results: Results, row: dict[str, Any]) -> None:
    """Keep a row and print it."""
    results.add(row)
    shown = ", ".join(f"{n} {1e3 * t:.1f} ms" for n, t in row["seconds"].items())
    ratios = ", ".join(f"{n} {r:.2f}x" for n, r in row["ratios"].items())
    print(f"{row['name']} {row['size']} {row['mode']} b{row['batch']}: {shown}; {ratios}", flush=True)


def turns(models: dict[str, Run], inputs: list[Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of each model, which take turns, so that a slow moment of the machine falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds):
        for name, run in models.items():
            times[name].append(timed(run, inputs[i % len(inputs)]))
    return medians(times)


@pytest.mark.parametrize("asked", ROWS, ids=str)
def test_model(asked: Row, request: pytest.FixtureRequest, results: Results, seconds: float, quick: bool) -> None:
    """Forward of the same weights, the same logits, in turns."""
    import attnc

    if asked not in STANDARD and not request.config.getoption("everything"):
        pytest.skip("only with --everything")
    model, side, compiled = asked.model, asked.model.side * asked.scale, asked.mode == "compiled"
    start = time.perf_counter()
    with threads(THREADS), torch.no_grad():
        theirs = peer(model, side)
        changed, found = attnc.accelerate(copy.deepcopy(theirs))
        models: dict[str, nn.Module] = {"accelerated": changed, "eager": theirs}
        ours = None if compiled or asked.scale > 1 else own(model, side, theirs.state_dict())
        if ours is not None:
            models["attnc"] = ours
        inputs = images(side, 1 if quick else BATCH)
        runs: dict[str, Run] = {n: torch.compile(m, dynamic=False) if compiled else m for n, m in models.items()}
        expected = logits(runs["eager"](inputs[0]))
        for name in models.keys() - {"eager"}:  # also builds, and warms caches
            torch.testing.assert_close(logits(runs[name](inputs[0])), expected, rtol=1e-3, atol=1e-4)
        times = turns(runs, inputs, 1 if quick else max(3, round(ROUNDS * seconds / asked.scale**2)))
        attention: dict[str, float] = {}
        if not compiled:
            paths = [r.path for r in found.replaced]
            attention = parts({n: models[n] for n in ("accelerated", "eager")}, paths, inputs[: 1 if quick else None])
    torch._dynamo.reset()
    ratios = {n: times["eager"] / t for n, t in times.items() if n != "eager"}
    if attention:
        ratios["attention part"] = attention["eager"] / attention["accelerated"]
    kept = {"name": model.family, "peer": model.peer, "own": model.own if ours is not None else "", "windowed": model.windowed}
    kept |= {"size": f"{side}x{side}", "scale": asked.scale, "mode": asked.mode, "batch": len(inputs[0]), "threads": THREADS}
    kept |= {"seconds": times, "ratios": ratios, "attention": attention, "bar": BAR[asked.mode]}
    report(results, kept | {"took": time.perf_counter() - start})


@pytest.mark.parametrize(("name", "rival", "side", "paper"), RIVALS, ids=[r[0] for r in RIVALS])
def test_rival(name: str, rival: str, side: int, paper: float, results: Results, seconds: float, quick: bool) -> None:
    """A paper's model, its norms folded, beside the network that the paper measured it against, with random weights.

    The rival runs as timm has it, and with channels last, which its convolutions like better.
    """
    from attnc.models import create_model, list_models

    timm = pytest.importorskip("timm")
    if name not in list_models():
        pytest.skip(f"{name} is not in the model layer")
    with threads(THREADS), torch.no_grad():
        ours, theirs = create_model(name).eval().fuse(), timm.create_model(rival, pretrained=False).eval()
        last = f"{rival}, channels last"
        runs: dict[str, Run] = {
            "attnc": ours,
            rival: theirs,
            last: lambda x: theirs(x.contiguous(memory_format=torch.channels_last)),
        }
        inputs = images(side, 1 if quick else BATCH)
        for run in runs.values():
            run(inputs[0])
        times = turns(runs, inputs, 1 if quick else max(3, round(4 * ROUNDS * seconds)))
    row = {"name": name, "peer": rival, "own": name, "size": f"{side}x{side}", "mode": "rival", "batch": len(inputs[0])}
    ratios = {"attnc": times[rival] / times["attnc"], "beside channels last": times[last] / times["attnc"]}
    report(results, row | {"threads": THREADS, "seconds": times, "ratios": ratios, "paper": paper})


def test_together(results: Results) -> None:
    """Geometric means of what was measured, and the bars that were missed."""
    rows = [r for r in results.report["rows"] if r["mode"] in BAR]
    for scale, mode in dict.fromkeys((r["scale"], r["mode"]) for r in rows):
        mine = [r for r in rows if (r["scale"], r["mode"]) == (scale, mode) and r["windowed"]]
        for what in ("accelerated", "attention part"):
            found = [r["ratios"][what] for r in mine if what in r["ratios"]]
            if found:
                named = ", ".join(r["name"] for r in mine)
                print(f"geometric mean of {what}, {mode}, {scale}x ({named}): {statistics.geometric_mean(found):.2f}x")
    for r in rows:
        for what in ("accelerated", "attnc"):
            if r["ratios"].get(what, r["bar"]) < r["bar"]:
                print(f"below its bar of {r['bar']}: {r['name']} {r['size']} {r['mode']}, {what} {r['ratios'][what]:.2f}x")
