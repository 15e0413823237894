"""CoSwin: parameter counts, the gate between attention and convolutions, shifts, and what every model does."""

from __future__ import annotations

from typing import Any

import classifier_checks
import pytest
import torch
from torch import nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model
from attnc.models.coswin import Block

PARAMETERS = {
    "coswin_cifar10": 23_460_300,
    "coswin_cifar100": 23_494_950,
    "coswin_mnist": 23_460_300,
    "coswin_svhn": 23_460_300,
    "coswin_tinyimagenet": 23_536_906,
}
SIZE = (16, 24)
SMALL: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (2, 4),  # 4 channels each: few kernels to build
    "window_size": 2,
    "num_classes": 5,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("coswin_cifar10", **{**SMALL, "drop_path_rate": 0.0, "backend": "torch", **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert classifier_checks.parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_shift_is_a_masked_roll(backend: str) -> None:
    """The shifted windows of a map are the windows of the map moved by the shift, but for those that the border cuts."""
    torch.manual_seed(0)
    shifted, plain = (Block(8, (8, 12), 2, 4, shift, backend=backend).attn for shift in (1, 0))
    plain.load_state_dict(shifted.state_dict())
    x = torch.randn(2, 8, 12, 8)
    torch.testing.assert_close(shifted(x)[:, 1:5, 1:9], plain(x.roll((-1, -1), (1, 2)))[:, :4, :8])
    assert (shifted(x) - plain(x)).abs().max() > 1e-3


def test_small_maps_are_one_window() -> None:
    for resolution in ((4, 4), (3, 3)):
        block = Block(8, resolution, 2, 4, 2, backend="torch")
        assert block.attn.window == (min(resolution),) * 2
        block.attn.qkv.weight.data[:16] = 0  # equal scores: all tokens of the window have equal weights
        nn.init.zeros_(block.attn.relative_position_bias_table)
        out = block.attn(torch.randn(1, *resolution, 8))
        torch.testing.assert_close(out, out[:, :1, :1].expand(out.shape))


def test_the_gate() -> None:
    """A block with a closed gate is Swin's; half open, it adds half of the convolutions of its input."""
    torch.manual_seed(0)
    block = Block(8, (8, 8), 2, 4, backend="torch")
    x = torch.randn(2, 8, 8, 8)
    assert block.convInfluenceWeight.item() == 0.5
    for t in (block.mlp.fc2.weight, block.mlp.fc2.bias):
        nn.init.zeros_(t)
    swin = x + block.attn(block.norm1(x))
    for gate, share in ((-100.0, 0.0), (0.0, 0.5)):
        nn.init.constant_(block.convInfluenceWeight, gate)
        torch.testing.assert_close(block(x), swin + share * block.conv(x))


def test_features() -> None:
    classifier_checks.features(small, SIZE, [(8, 8, 12), (16, 4, 6)])


def test_position_embedding() -> None:
    model = small(ape=True, embed_dim=32).eval()
    assert 0.015 < model.get_parameter("absolute_pos_embed").std() < 0.025
    assert model(classifier_checks.image(*SIZE)).shape == (2, 5)
    with pytest.raises(ShapeError, match="has 8x8 patches, the position embedding 8x12"):
        model(classifier_checks.image(16, 16))


def test_other_sizes() -> None:
    model = small(img_size=32, window_size=4).eval()
    assert model(classifier_checks.image(16, 48)).shape == (2, 5)
    with pytest.raises(ShapeError, match="a map of 8x10 has no whole windows of 4x4"):
        model(classifier_checks.image(16, 20))
    with pytest.raises(ShapeError, match="no whole patches of 2x2"):
        small(img_size=18, window_size=3)(classifier_checks.image(18, 18))


def test_classifier() -> None:
    classifier_checks.classifier_changes(small(), SIZE)


def test_training() -> None:
    classifier_checks.trains(small(ape=True, drop_path_rate=0.1, drop_rate=0.01), SIZE)


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
        ({"depths": (1,)}, "differ in length"),
        ({"img_size": 2}, "leaves no token after 1 mergings"),
        ({"num_heads": (3, 4)}, "does not divide dim = 8"),
        ({"out_indices": (2,)}, "there are 2 stages"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)


def test_wrong_shift() -> None:
    with pytest.raises(DeclarationError, match=r"shift_size is 4; it lies in \[0, window_size\) = \[0, 4\)"):
        Block(8, (8, 8), 2, 4, 4)
