"""Train three attentions on scikit-learn's digits: windows, neighbourhoods, channels. `python examples/train_digits.py`

Each network is a small configuration of a model of attnc; the bar is 97 % of the test images (450 of 1,797), in a few minutes on
two cores. Its first steps are done twice, with generated kernels and with the eager meaning of the same statements
(`--check 0` leaves that out): the two losses must agree. Writes digits/curves.png, digits/report.json and one checkpoint per
network; started again, it goes on where it was stopped. The exit status is 1 where a network stays below the bar or the losses
differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import attnc

SIDE, BATCH, RATE, DECAY = 32, 64, 3e-3, 0.05
BAR = 0.97  # of the test images
APART = 1e-3  # how far the losses of a step may be apart between two backends, over the larger of them
DAVIT = {"embed_dims": (48, 96), "num_heads": (3, 6), "depths": (1, 1), "window_size": 3, "mlp_ratio": 2.0}
DINAT = {"embed_dim": 64, "depths": (2, 2), "num_heads": (4, 8), "kernel_size": 3, "dilations": ((1, 2), (1, 1)), "mlp_ratio": 2.0}
NETWORKS: dict[str, tuple[str, int, dict[str, Any]]] = {  # model, epochs, settings
    "window": ("davit_tiny", 20, DAVIT | {"attention_types": ("spatial",)}),
    "neighbourhood": ("dinat_mini", 30, DINAT | {"drop_path_rate": 0.0}),
    "channel": ("davit_tiny", 20, DAVIT | {"attention_types": ("channel",)}),
}
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images ``[N, 1, 32, 32]`` and classes, for training and for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
    classes = torch.as_tensor(data.target)
    train, test = train_test_split(torch.arange(len(classes)).numpy(), test_size=0.25, random_state=0, stratify=data.target)
    return (images[train], classes[train]), (images[test], classes[test])


def moved(images: Tensor, random: torch.Generator) -> Tensor:
    """Each image moved by up to 3 pixels (less than one of the 8x8 that there were), its border repeated."""
    wide = F.pad(images, (3,) * 4, mode="replicate")
    at = torch.randint(0, 7, (len(images), 2), generator=random).tolist()
    return torch.stack([image[:, y : y + SIDE, x : x + SIDE] for image, (y, x) in zip(wide, at, strict=True)])


def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Share of images whose class is found."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(256)])
    return float((found == classes).float().mean())


def network(kind: str, backend: str) -> nn.Module:
    """The network with the weights that it always starts with."""
    torch.manual_seed(0)
    name, _, settings = NETWORKS[kind]
    return attnc.models.create_model(name, in_chans=1, num_classes=10, backend=backend, **settings)


class Training:
    """One network, its optimizer and what was measured, kept in a checkpoint after every epoch."""

    def __init__(self, kind: str, backend: str, epochs: int, folder: Path | None) -> None:
        self.model = network(kind, backend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), RATE, weight_decay=DECAY)
        self.epochs, self.path = epochs, None if folder is None else folder / f"{kind}.safetensors"
        self.curve: list[dict[str, float]] = []
        state = checkpoint.load(self.path) if self.path else {}
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.curve = state["curve"]

    def rate(self, step: int, steps: int) -> float:
        """Half a cosine, after a warm-up of an epoch."""
        share = step / (steps * self.epochs)
        return RATE * min(1.0, (step + 1) / steps) * (1 + math.cos(math.pi * share)) / 2

    def steps(self, images: Tensor, classes: Tensor) -> Iterator[float]:
        """The losses of an epoch's steps; its number alone decides on the order of images and on how they are moved."""
        done = len(self.curve)
        random = torch.Generator().manual_seed(done)
        parts = torch.randperm(len(images), generator=random).split(BATCH)
        for i, part in enumerate(parts):
            self.model.train()
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(done * len(parts) + i, len(parts))
            loss = F.cross_entropy(self.model(moved(images[part], random)), classes[part], label_smoothing=0.05)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item()

    def epoch(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        """One pass over the images, and the checkpoint."""
        start = time.perf_counter()
        losses = list(self.steps(*train))
        row = {"loss": sum(losses) / len(losses), "accuracy": accuracy(self.model, *test)}
        self.curve.append(row | {"seconds": time.perf_counter() - start})
        if self.path:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "curve": self.curve}
            checkpoint.save(self.path, **state)


def first_losses(kind: str, backend: str, epochs: int, train: tuple[Tensor, Tensor], count: int) -> list[float]:
    """Losses of the first steps from the weights that training starts with."""
    return list(itertools.islice(Training(kind, backend, epochs, None).steps(*train), count))


def apart(one: list[float], other: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a - b) / max(a, b) for a, b in zip(one, other, strict=True))


def picture(report: list[dict[str, Any]], path: Path) -> None:
    """Losses and accuracies by epoch, and the first steps' losses with both backends."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for color, found in zip(("tab:blue", "tab:orange", "tab:green"), report, strict=False):
        epochs = range(1, len(found["curve"]) + 1)
        left.plot(epochs, [r["loss"] for r in found["curve"]], color=color, label=found["network"])
        middle.plot(epochs, [100 * r["accuracy"] for r in found["curve"]], color=color)
        for (backend, losses), style in zip(found["first"].items(), ("-", "x"), strict=False):
            right.plot(range(1, len(losses) + 1), losses, style, color=color, label=f"{found['network']}, {backend}")
    left.set(xlabel="epoch", ylabel="training loss")
    middle.set(xlabel="epoch", ylabel="test accuracy, %")
    middle.axhline(100 * BAR, color="gray", lw=0.8, ls=":")
    right.set(xlabel="step", ylabel="training loss")
    for axes in (left, right):
        if axes.lines:  # none where the first steps were not compared
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, help="of every network; its own number by default")
    parser.add_argument("--backend", default="auto", help="of the trained networks, see attnc.compile")
    parser.add_argument("--check", type=int, default=10, metavar="N", help="steps that the eager meaning does, too")
    parser.add_argument("--out", type=Path, default=Path("digits"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    train, test = digits()
    report: list[dict[str, Any]] = []
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[at]}"),
    )
    with Progress(*columns, console=console) as progress:
        for kind in given.networks:
            epochs = given.epochs or NETWORKS[kind][1]
            training = Training(kind, given.backend, epochs, given.out)
            task = progress.add_task(kind, total=epochs, completed=len(training.curve), at="")
            while len(training.curve) < epochs:
                training.epoch(train, test)
                last = training.curve[-1]
                progress.update(task, advance=1, at=f"loss {last['loss']:.3f}, test {last['accuracy']:.2%}")
            first: dict[str, list[float]] = {}
            for backend in (given.backend, "eager") if given.check else ():
                task = progress.add_task(f"{kind}, {given.check} steps, {backend}", total=1, at="")
                first[backend] = first_losses(kind, backend, epochs, train, given.check)
                progress.update(task, advance=1)
            found = {"network": kind, "seconds": sum(r["seconds"] for r in training.curve), "curve": training.curve, "first": first}
            report.append(found | {"difference": apart(*first.values()) if first else None})
    table = Table("network", "epochs", "seconds", "test accuracy", "largest difference to the eager losses", title="digits")
    for found in report:
        curve, difference = found["curve"], found["difference"]
        shown = "-" if difference is None else f"{difference:.1e} of the loss, {given.check} steps"
        table.add_row(found["network"], str(len(curve)), f"{found['seconds']:.0f}", f"{curve[-1]['accuracy']:.2%}", shown)
    console.print(table)
    picture(report, given.out / "curves.png")
    (given.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"{given.out}/curves.png and report.json written; the bar is {BAR:.0%} of the test images")
    good = all(r["curve"][-1]["accuracy"] > BAR and (r["difference"] or 0.0) < APART for r in report)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
