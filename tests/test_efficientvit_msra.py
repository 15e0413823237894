"""EfficientViT: parameter counts, timm parity, the cascade by the book, windows, and what every model does."""

from __future__ import annotations

from typing import Any

import classifier_checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model
from attnc.models.efficientvit_msra import CascadedGroupAttention, LocalWindowAttention

PARAMETERS = {  # 1000 classes
    "efficientvit_msra_m0": 2_349_436,
    "efficientvit_msra_m1": 2_980_560,
    "efficientvit_msra_m2": 4_187_554,
    "efficientvit_msra_m3": 6_900_722,
    "efficientvit_msra_m4": 8_804_228,
    "efficientvit_msra_m5": 12_473_772,
}
SIZE = (112, 112)
SMALL: dict[str, Any] = {
    "img_size": 112,
    "embed_dim": (16, 24, 24),
    "key_dim": (4, 4, 4),
    "depth": (1, 1, 1),
    "num_heads": (2, 3, 2),
    "window_size": (4, 3, 4),
    "kernels": (5, 3, 3),
    "num_classes": 5,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("efficientvit_msra_m0", **{**SMALL, "backend": "torch", **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert classifier_checks.parameters(name) == PARAMETERS[name]


def test_equals_timm() -> None:
    """Also for an image with other sides, whose windows are padded."""
    pytest.importorskip("timm")
    from timm.models.efficientvit_msra import EfficientVitMsra

    classifier_checks.equals_timm(small(), EfficientVitMsra(**SMALL), "efficientvit_msra", [SIZE, (144, 208)])


def test_names_are_timm_s() -> None:
    classifier_checks.has_timm_s_names("efficientvit_msra_m5", "efficientvit_m5")


def by_the_book(layer: CascadedGroupAttention, x: Tensor) -> Tensor:
    """One window ``[B, C, h, w]``, pair by pair."""
    height, width = x.shape[2:]
    rows, columns = torch.arange(height * width) // width, torch.arange(height * width) % width
    place = (rows[:, None] - rows).abs() * layer.resolution + (columns[:, None] - columns).abs()
    slices, outputs = x.chunk(len(layer.qkvs), 1), []
    f = torch.zeros_like(slices[0])
    for i, part in enumerate(slices):
        q, k, v = layer.qkvs[i](f + part).split(layer.widths, 1)
        q, k, v = layer.dws[i](q).flatten(2), k.flatten(2), v.flatten(2)
        scores = q.transpose(1, 2) @ k * layer.scale + layer.attention_biases[i][place]
        f = (v @ scores.softmax(-1).transpose(1, 2)).unflatten(2, (height, width))
        outputs.append(f)
    return layer.proj(torch.cat(outputs, 1))


@pytest.mark.parametrize("size", [(4, 4), (3, 4), (4, 8), (5, 9), (2, 7)])
def test_windows_by_the_book(size: tuple[int, int]) -> None:
    """Outputs, and gradients of input and table, against windows that are cut out of the padded map."""
    layer = classifier_checks.randomized(LocalWindowAttention(12, 3, 2, 2.0, 9, 4, (5, 3), backend="torch").double())
    x = torch.randn(2, 12, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def windows() -> Tensor:
        if max(size) <= 4:
            return by_the_book(layer.attn, x)
        padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
        out = [torch.cat([by_the_book(layer.attn, part) for part in row.split(4, 3)], 3) for row in padded.split(4, 2)]
        return torch.cat(out, 2)[:, :, : size[0], : size[1]]

    results = []
    for out in (layer(x), windows()):
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, layer.attn.attention_biases))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_heads_cascade() -> None:
    """The first head's slice reaches all outputs of later heads, the last one's only its own."""
    layer = classifier_checks.randomized(CascadedGroupAttention(12, 4, 3, 1.0, 3, (3, 3, 3), backend="torch"))
    seen: list[Tensor] = []
    layer.proj[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    x = torch.randn(1, 12, 3, 3)
    for channel in (0, 11):
        moved = x.clone()
        moved[:, channel] += 1.0
        layer(x), layer(moved)
    changed = [(seen[i] - seen[i + 1]).abs().amax((0, 2, 3)).view(3, 4).amax(1) > 1e-6 for i in (0, 2)]
    assert changed[0].tolist() == [True, True, True]
    assert changed[1].tolist() == [False, False, True]


def test_a_map_without_whole_windows() -> None:
    with pytest.raises(ShapeError, match="a map of 3x8 has no whole windows of 4: LocalWindowAttention pads it"):
        CascadedGroupAttention(8, 4, 2, 1.0, 4, (3, 3), backend="torch")(torch.randn(1, 8, 3, 8))


def test_fused() -> None:
    assert "blocks1.0.dw0.weight" in classifier_checks.fuses(small, SIZE)


def test_features() -> None:
    classifier_checks.features(small, (128, 192), [(16, 8, 12), (24, 4, 6), (24, 2, 3)])


def test_classifier() -> None:
    classifier_checks.classifier_changes(small(), SIZE)


def test_round_trip() -> None:
    classifier_checks.saves(small, SIZE)


def test_training() -> None:
    classifier_checks.trains(small(drop_path_rate=0.1), SIZE)


def test_checkpointing() -> None:
    classifier_checks.checkpointing_changes_nothing(small, SIZE)


def test_autocast() -> None:
    classifier_checks.autocasts(small(), SIZE)


def test_compile() -> None:
    two = {"embed_dim": (16, 24), "key_dim": (4, 4), "depth": (1, 1), "num_heads": (2, 1), "window_size": (4, 3)}
    classifier_checks.compiles(small(**two), SIZE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": (1, 1)}, "differ in length"),
        ({"patch_size": 8}, "the stem has stride 16"),
        ({"img_size": 8}, "at least one patch"),
        ({"kernels": (5, 3)}, "one odd number for each of 3 heads"),
        ({"num_heads": (3, 3, 2)}, "slices of dim=16 channels"),
        ({"window_size": (0, 3, 4)}, "1 or more"),
        ({"out_indices": (3,)}, "there are 3 stages"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)
