"""ConViT: parameter counts, timm parity, gates that start as convolutions, and what every model does."""

from __future__ import annotations

from typing import Any

import classifier_checks
import pytest
import torch
from torch import nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, from_timm, load_official
from attnc.models.convit import GPSA

PARAMETERS = {  # 1000 classes
    "convit_tiny": 5_710_512,
    "convit_tiny_plus": 9_972_912,
    "convit_small": 27_777_322,
    "convit_small_plus": 48_979_882,
    "convit_base": 86_540_040,
    "convit_base_plus": 153_134_856,
}
SIZE = (32, 48)
SMALL: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "local_up_to_layer": 2,
    "num_classes": 5,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("convit_tiny", **{**SMALL, "backend": "torch", **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert classifier_checks.parameters(name) == PARAMETERS[name]


def test_equals_timm() -> None:
    pytest.importorskip("timm")
    from timm.models.convit import ConVit

    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}
    theirs = ConVit(embed_dim=4, num_classes=5, **shape).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = small(embed_dim=16, mlp_ratio=4.0, **shape).eval()
    ours.load_state_dict(from_timm("convit", theirs.state_dict()))
    x = classifier_checks.image(32, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    for found, expected in zip(ours.forward_stages(x), theirs.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("heads", "kernel"), [(4, 2), (9, 3), (5, 2)])
def test_heads_start_out_as_taps_of_a_convolution(heads: int, kernel: int) -> None:
    """With a strong locality and an open gate, head a + K b reads the pixel (b - m, a - m) away: whole ones for odd K."""
    torch.manual_seed(0)
    layer = GPSA(4 * heads, heads, locality_strength=20.0, backend="torch")
    weight = layer.pos_proj.weight / 20.0
    middle = (kernel - 1) / 2
    for p in range(kernel**2):
        b, a = divmod(p, kernel)
        assert weight[p].tolist() == pytest.approx([2 * (b - middle), 2 * (a - middle), -1.0])
    assert all(abs(w) < 0.1 for w in weight[kernel**2 :].flatten().tolist())
    assert bool((layer.gating_param == 1).all())
    assert bool((layer.v.weight == torch.eye(4 * heads)).all())
    if kernel % 2:
        nn.init.constant_(layer.gating_param, 50.0)
        nn.init.eye_(layer.proj.weight)
        x = torch.randn(1, 5, 6, 4 * heads)
        out = layer(x).unflatten(3, (heads, 4))
        for p in range(heads):
            dx, dy = p // 3 - 1, p % 3 - 1
            moved = x.unflatten(3, (heads, 4))[:, 1 + dy : 4 + dy, 1 + dx : 5 + dx, p]
            torch.testing.assert_close(out[:, 1:4, 1:5, p], moved, atol=1e-5, rtol=1e-5)


def test_the_position_s_bias_changes_nothing() -> None:
    torch.manual_seed(0)
    layer = GPSA(8, 2, use_local_init=False, backend="torch")
    x = torch.randn(1, 3, 4, 8)
    before = layer(x)
    nn.init.normal_(layer.pos_proj.bias)
    torch.testing.assert_close(layer(x), before)
    layer(x).square().sum().backward()
    assert layer.pos_proj.bias.grad is not None
    assert not layer.pos_proj.bias.grad.any()


def test_all_blocks_gated() -> None:
    """Then no class token joins, and the first patch is read."""
    model = small(local_up_to_layer=3).eval()
    tokens = model.forward_features(classifier_checks.image(*SIZE))
    assert tokens.shape == (2, 24, 16)
    torch.testing.assert_close(model(classifier_checks.image(*SIZE)), model.get_classifier()(tokens[:, 0]))


def test_any_size_without_position_embedding() -> None:
    model = small(use_pos_embed=False).eval()
    assert model(classifier_checks.image(40, 24)).shape == (2, 5)
    with pytest.raises(ShapeError, match="has 5x3 patches, the position embedding 4x6"):
        small()(classifier_checks.image(40, 24))


def test_official_tokens() -> None:
    config = {"dim": 8, "num_heads": 2}
    module = load_official("convit", "GPSA", config, GPSA(8, 2).state_dict(), backend="torch")
    assert module(x=torch.randn(2, 9, 8)).shape == (2, 9, 8)
    with pytest.raises(ShapeError, match="10 tokens are not a map of 3x3"):
        module(x=torch.randn(2, 10, 8))


def test_features() -> None:
    """Gated blocks have no class token, the others do."""
    classifier_checks.block_features(lambda **more: small(depth=4, **more), SIZE, (16, 4, 6), 8)


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
    classifier_checks.compiles(small(), SIZE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 3}, "does not divide dim = 16"),
        ({"num_heads": 3, "local_up_to_layer": 0}, "does not divide dim = 16"),
        ({"img_size": 4}, "less than a patch"),
        ({"img_size": "a"}, r"the size 'a': an int, or \(rows, columns\)"),
        ({"local_up_to_layer": -1}, "number of gated blocks"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)
