"""Train a tiny HAT to double the size of photos, and beat bicubic interpolation. `python examples/super_resolution.py`

scikit-learn has two photos. The network learns from crops of the temple (china.jpg), shrunk to half their size. All of the other
photo (flower.jpg) is held out: no pixel of it is seen in training, and the PSNR is measured on the
whole of it once training is done. The network adds to the bicubic image what that lacks. Writes super_resolution/photo.png,
report.json and a checkpoint; started again, it goes on where it was stopped. The exit status is 1 where bicubic interpolation is
not beaten by 0.2 dB.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import attnc

WINDOW, CROP, BATCH, RATE, WARM_UP = 8, 16, 8, 2e-3, 0.1
MARGIN = 0.2  # dB over bicubic interpolation
EVERY = 50  # steps between checkpoints
HAT = {"embed_dim": 32, "depths": (2,), "num_heads": (4,), "window_size": WINDOW, "mlp_ratio": 2.0, "squeeze_factor": 8}
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def photos() -> tuple[Tensor, Tensor]:
    """For training (china.jpg) and for testing (flower.jpg): ``[1, 3, H, W]`` in [0, 1], even sides."""
    from sklearn.datasets import load_sample_image

    found = [torch.as_tensor(load_sample_image(name).copy()) for name in ("china.jpg", "flower.jpg")]
    train, test = (image.permute(2, 0, 1)[None, :, : len(image) // 2 * 2].float() / 255 for image in found)
    return train, test


def shrunk(image: Tensor) -> Tensor:
    """Half as high and wide, by antialiased bicubic interpolation."""
    return F.interpolate(image, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)


def bicubic(image: Tensor) -> Tensor:
    """Twice as high and wide."""
    return F.interpolate(image, scale_factor=2, mode="bicubic").clamp(0, 1)


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal to noise, dB, of 8-bit images without 4 pixels of border."""
    error = ((image.clamp(0, 1) * 255).round() - (truth * 255).round())[..., 4:-4, 4:-4] / 255
    return float(-10 * error.square().mean().log10())


class Doubled(nn.Module):
    """bicubic(x) + HAT(x), on images of any size: HAT's are padded by reflection to whole windows."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.hat = attnc.models.create_model("hat_s_x2", backend=backend, **HAT)
        for parameter in self.hat.conv_last.parameters():  # to begin with, it is bicubic interpolation
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W] -> [B, 3, 2 H, 2 W]``."""
        height, width = x.shape[2:]
        wide = F.pad(x, (0, -width % WINDOW, 0, -height % WINDOW), mode="reflect")
        missing = (self.hat(wide) - self.hat.mean)[..., : 2 * height, : 2 * width]  # the network adds the mean of its images
        return F.interpolate(x, scale_factor=2, mode="bicubic") + missing


def crops(image: Tensor, random: torch.Generator) -> Tensor:
    """Some crops of an image, turned and mirrored at random, ``[BATCH, 3, 2 CROP, 2 CROP]``."""
    found, side = [], 2 * CROP
    for _ in range(BATCH):
        y, x, turn, mirror = (
            int(torch.randint(0, n, (), generator=random)) for n in (image.shape[2] - side, image.shape[3] - side, 4, 2)
        )
        part = torch.rot90(image[0, :, y : y + side, x : x + side], turn, (1, 2))
        found.append(part.flip(2) if mirror else part)
    return torch.stack(found)


def rate(step: int, steps: int) -> float:
    """A linear warm-up, then half a cosine."""
    share = (step + 1) / steps
    return RATE * min(share / WARM_UP, (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2)


def train(model: nn.Module, image: Tensor, steps: int, path: Path) -> list[float]:
    """Losses of all steps, those of earlier starts included; a step's crops follow from its number."""
    optimizer = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.99))
    losses: list[float] = []
    state = checkpoint.load(path)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[at]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("crops of the temple", total=steps, completed=len(losses), at="")
        model.train()
        while len(losses) < steps:
            for group in optimizer.param_groups:
                group["lr"] = rate(len(losses), steps)
            sharp = crops(image, torch.Generator().manual_seed(len(losses)))
            loss = F.l1_loss(model(shrunk(sharp)), sharp)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            progress.update(task, advance=1, at=f"L1 {loss.item():.4f}")
            if len(losses) % EVERY == 0 or len(losses) == steps:
                states: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint.save(path, **states, losses=losses)
    return losses


def picture(images: dict[str, Tensor], path: Path) -> None:
    """The middle of each image, beside each other."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(images), figsize=(4 * len(images), 4), layout="constrained")
    for at, (title, image) in zip(axes, images.items(), strict=True):
        height, width = image.shape[2:]
        y, x = height // 2, width // 2
        at.imshow(image[0, :, y - 48 : y + 48, x - 48 : x + 48].clamp(0, 1).permute(1, 2, 0).numpy())
        at.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--backend", default="auto", help="see attnc.compile")
    parser.add_argument("--out", type=Path, default=Path("super_resolution"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    image, held_out = photos()
    torch.manual_seed(0)
    model = Doubled(given.backend)
    start = time.perf_counter()
    losses = train(model, image, given.steps, given.out / "hat.safetensors")
    small = shrunk(held_out)
    model.eval()
    with torch.no_grad():
        found = {"bicubic": bicubic(small), "HAT": model(small)}
    reached = {name: psnr(doubled, held_out) for name, doubled in found.items()}
    for name, value in reached.items():
        console.print(f"{name:8} {value:.2f} dB on the held-out photo")
    picture({"truth": held_out, **{f"{n}, {reached[n]:.2f} dB": x for n, x in found.items()}}, given.out / "photo.png")
    report = {"psnr": reached, "steps": len(losses), "seconds": time.perf_counter() - start, "losses": losses}
    (given.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"{given.out}/photo.png and report.json written; {report['seconds']:.0f} s in this start")
    return 0 if reached["HAT"] > reached["bicubic"] + MARGIN else 1


if __name__ == "__main__":
    sys.exit(main())
