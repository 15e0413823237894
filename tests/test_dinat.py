"""DiNAT and NAT: parameter counts, maps that are too short for a neighbourhood, and what every model does."""

from __future__ import annotations

from typing import Any

import classifier_checks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnc.errors import DeclarationError
from attnc.models import create_model
from attnc.models.dinat import NeighborhoodAttention

PARAMETERS = {  # 1000 classes
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_nat_tiny": 27_901_582,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_isotropic_small": 21_999_736,
    "dinat_isotropic_base": 86_465_800,
}
SIZE = (29, 38)  # levels of 8x10, 4x5 and 2x3: the last is padded for its 3x3 neighbourhoods
BASE: dict[str, Any] = {
    "embed_dim": 8,
    "depths": (2, 1, 1),
    "num_heads": (2, 4, 8),  # 4 channels each: few kernels to build
    "kernel_size": 3,
    "dilations": ((1, 2), (1,), (1,)),
    "mlp_ratio": 2.0,
    "num_classes": 5,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("dinat_tiny", **{**BASE, "layer_scale": 0.5, "backend": "torch", **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert classifier_checks.parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("size", [(7, 10), (10, 5), (4, 3), (9, 9)])
def test_short_maps_are_padded_before_qkv(size: tuple[int, int], backend: str) -> None:
    """The operator's virtual padding equals padding the tensor, gradients included; 9 rows or columns need none."""
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, kernel_size=3, dilation=3, backend=backend).double()
    nn.init.normal_(layer.qkv.bias)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    missing = [max(9 - n, 0) for n in size]

    def padded(t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = layer(F.pad(t, (0, 0, 0, missing[1], 0, missing[0])))
        return out[:, : size[0], : size[1]]

    results = []
    for forward in (layer, padded):
        layer.zero_grad()
        out = forward(x)
        out.square().sum().backward()
        results.append([out.detach()] + [p.grad.clone() for p in layer.parameters() if p.grad is not None])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_no_biases(bias: bool) -> None:
    layer = NeighborhoodAttention(8, 2, 3, 2, qkv_bias=bias, rel_pos_bias=not bias, backend="torch")
    assert layer(torch.randn(1, 4, 7, 8)).shape == (1, 4, 7, 8)


def test_features() -> None:
    classifier_checks.features(small, (33, 50), [(8, 9, 13), (16, 5, 7), (32, 3, 4)])
    classifier_checks.features(lambda **more: small(swin=True, **more), (33, 50), [(8, 9, 13), (16, 5, 7), (32, 3, 4)])


def test_classifier() -> None:
    classifier_checks.classifier_changes(small(), SIZE)


@pytest.mark.parametrize("swin", [False, True])
def test_training(swin: bool) -> None:
    classifier_checks.trains(small(swin=swin, drop_path_rate=0.1, drop_rate=0.01), SIZE)


def test_round_trip() -> None:
    classifier_checks.saves(small, SIZE)


def test_checkpointing() -> None:
    classifier_checks.checkpointing_changes_nothing(small, SIZE)


def test_autocast() -> None:
    classifier_checks.autocasts(small(), SIZE)


def test_compile() -> None:
    classifier_checks.compiles(small(), SIZE)


def test_initialisation() -> None:
    model = small(embed_dim=64, layer_scale=1e-5)
    assert 0.015 < model.get_parameter("levels.0.blocks.0.attn.rpb").std() < 0.025
    assert 0.015 < model.get_parameter("head.weight").std() < 0.025
    assert not model.get_parameter("levels.0.blocks.0.attn.qkv.bias").any()
    assert bool((model.get_parameter("levels.0.blocks.0.gamma1") == 1e-5).all())
    assert model.get_parameter("patch_embed.proj.0.weight").abs().max() > 0.15  # torch's default


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (2, 1)}, "differ in length"),
        ({"dilations": ((1,), (1,), (1,))}, "one per block"),
        ({"kernel_size": 4}, "odd size"),
        ({"dilations": ((1, -2), (1,), (1,))}, "distance of neighbours"),
        ({"num_heads": (3, 4, 8)}, "does not divide dim = 8"),
        ({"patch_size": 8}, "stride 4"),
        ({"out_indices": (3,)}, "there are 3 stages"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)
