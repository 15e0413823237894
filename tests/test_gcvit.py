"""GCViT: parameter counts, timm parity, queries that windows share, and what every model does."""

from __future__ import annotations

from typing import Any

import classifier_checks
import pytest
import torch
from torch import nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, from_timm
from attnc.models.blocks.biased_window import BiasedWindowAttention
from attnc.models.gcvit import GlobalWindowAttention, Level

PARAMETERS = {  # 1000 classes
    "gcvit_xxtiny": 11_995_428,
    "gcvit_xtiny": 19_981_294,
    "gcvit_tiny": 28_221_974,
    "gcvit_tiny2": 34_535_654,
    "gcvit_small": 51_092_173,
    "gcvit_small2": 68_615_197,
    "gcvit_base": 90_320_836,
    "gcvit_large": 202_075_570,
    "gcvit_large_384": 202_860_610,
    "gcvit_large_512": 203_795_362,
}
SIZE = (64, 64)
SMALL: dict[str, Any] = {
    "dim": 8,
    "depths": (2, 2, 3),
    "num_heads": (2, 4, 8),  # 4 channels each: few kernels to build
    "window_size": (2, 2, 4),
    "resolution": 64,
    "mlp_ratio": 1.0,
    "num_classes": 5,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("gcvit_tiny", **{**SMALL, "layer_scale": 0.5, "drop_path_rate": 0.0, "backend": "torch", **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert classifier_checks.parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize("layer_scale", [None, 1e-5])
def test_equals_timm(layer_scale: float | None) -> None:
    pytest.importorskip("timm")
    from timm.models.gcvit import GlobalContextVit

    torch.manual_seed(0)
    shape: dict[str, Any] = {"depths": (2, 2, 1, 2), "num_heads": (4, 8, 8, 16), "mlp_ratio": 1.0, "layer_scale": layer_scale}
    theirs = GlobalContextVit(img_size=64, embed_dim=32, num_classes=5, **shape).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = small(dim=32, window_size=(2, 2, 4, 2), **shape).eval()
    ours.load_state_dict(from_timm("gcvit", theirs.state_dict()))
    with torch.no_grad():
        x = classifier_checks.image(*SIZE)
        expected, found = theirs(x), ours(x)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_shared_queries_are_local_ones_repeated(backend: str) -> None:
    """Where all windows of a map hold the same tokens, local queries are the same in all of them, too."""
    torch.manual_seed(0)
    local = BiasedWindowAttention(12, 3, (4, 4), backend=backend).double()
    shared = GlobalWindowAttention(12, 3, 4, backend=backend).double()
    nn.init.normal_(local.qkv.bias)
    shared.load_state_dict({k: t[12:] if k.startswith("qkv") else t for k, t in local.state_dict().items()})
    window = torch.randn(2, 4, 4, 12, dtype=torch.float64)
    x = window.repeat(1, 2, 3, 1).requires_grad_()
    queries = local.qkv(window)[..., :12]
    torch.testing.assert_close(shared(x, queries), local(x))
    assert shared(x, queries).is_contiguous()


def test_a_lone_block_is_local() -> None:
    level = Level(8, 1, 4, 2, 2, backend="torch")
    assert [more for _, more in level.calls(torch.randn(1, 4, 4, 8))] == [{}]


def test_features() -> None:
    classifier_checks.features(small, SIZE, [(8, 16, 16), (16, 8, 8), (32, 4, 4)])


def test_classifier() -> None:
    classifier_checks.classifier_changes(small(), SIZE)


def test_training() -> None:
    classifier_checks.trains(small(drop_path_rate=0.1, drop_rate=0.01), SIZE)


def test_round_trip() -> None:
    classifier_checks.saves(small, SIZE)


def test_checkpointing() -> None:
    classifier_checks.checkpointing_changes_nothing(small, SIZE)


def test_autocast() -> None:
    classifier_checks.autocasts(small(), SIZE)


def test_compile() -> None:
    classifier_checks.compiles(small(depths=(2,), num_heads=(2,), window_size=(2,)), SIZE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1, 1)}, "differ in length"),
        ({"window_size": (3, 2, 4)}, "16x16 halved 3 times has 2x2 tokens, a window 3x3"),
        ({"num_heads": (3, 4, 8)}, "does not divide dim = 8"),
        ({"out_indices": (3,)}, "there are 3 stages"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)


def test_wrong_image() -> None:
    with pytest.raises(ShapeError, match="a map of 15x15 has no whole windows of 2x2"):
        small()(classifier_checks.image(60, 60))
    with pytest.raises(ShapeError, match="global queries of shape"):
        small()(classifier_checks.image(128, 128))
