"""MaxViT: parameter counts, timm's names, TensorFlow's padding, partitions, and what every model does."""

from __future__ import annotations

from typing import Any

import classifier_checks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, from_timm, load_official
from attnc.models.maxvit import MBConv, PartitionAttention, Shortcut

PARAMETERS = {  # 1000 classes, at 224, 384 and 512 pixels
    "maxvit_tiny": (30_916_528, 30_977_008, 31_049_584),
    "maxvit_small": (68_927_956, 69_018_676, 69_127_540),
    "maxvit_base": (119_467_708, 119_653_468, 119_876_380),
    "maxvit_large": (211_785_560, 212_033_240, 212_330_456),
    "maxvit_xlarge": (474_951_952, 475_323_472, 475_769_296),
}
SIZE = (16, 24)
SMALL: dict[str, Any] = {
    "stem_width": (8, 8),
    "embed_dim": (8, 16),
    "depths": (2, 1),
    "dim_head": 4,
    "window_size": (2, 3),
    "mlp_ratio": 2.0,
    "num_classes": 5,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("maxvit_tiny", **{**SMALL, "drop_path_rate": 0.0, "backend": "torch", **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    found = [classifier_checks.parameters(name + suffix) for suffix in ("", "_384", "_512")]
    assert tuple(found) == PARAMETERS[name]


def test_parameter_count_of_imagenet_21k() -> None:
    assert classifier_checks.parameters("maxvit_xlarge", num_classes=21_843) == 506_987_643


def test_names_are_timm_s() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model("maxvit_tiny_tf_224", pretrained=False).state_dict()
        ours = create_model("maxvit_tiny").state_dict()
    renamed = from_timm("maxvit_tiny", theirs)
    assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in ours.items()}


@pytest.mark.parametrize("size", [(5, 7), (6, 4), (1, 3)])
def test_same_padding(size: tuple[int, int]) -> None:
    """Stride 2: an even length is padded after it only, an odd one on both sides; means count only what exists."""
    torch.manual_seed(0)
    block = MBConv(8, 8, 2).eval()
    x = torch.randn(2, 8, *size)
    y = F.gelu(block.norm1(block.conv1_1x1(block.pre_norm(x))), approximate="tanh")
    (top, bottom), (left, right) = ((1, 1) if n % 2 else (0, 1) for n in size)
    y = F.conv2d(F.pad(y, (left, right, top, bottom)), block.conv2_kxk.weight, stride=2, groups=32)
    y = block.conv3_1x1(block.se(F.gelu(block.norm2(y), approximate="tanh")))
    ones = Shortcut(3, 3)(torch.ones(1, 3, *size))
    assert bool((ones == 1).all())
    torch.testing.assert_close(block(x), block.shortcut(x) + y)


def test_interleaved_heads() -> None:
    """timm's other layout of qkv is the same attention with the rows of its weights in another order."""
    torch.manual_seed(0)
    plain, interleaved = (PartitionAttention(12, "grid", (2, 3), 4, interleaved=i, backend="torch") for i in (False, True))
    interleaved.load_state_dict(plain.state_dict())
    for t in (interleaved.qkv.weight, interleaved.qkv.bias):
        t.data = t.data.unflatten(0, (3, 3, 4)).transpose(0, 1).flatten(0, 2)
    x = torch.randn(2, 4, 6, 12)
    torch.testing.assert_close(interleaved(x), plain(x))


def test_features() -> None:
    classifier_checks.features(small, (16, 48), [(8, 4, 12), (16, 2, 6)])


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
    classifier_checks.compiles(small(depths=(1,), embed_dim=(8,)), SIZE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1,)}, "differ in length"),
        ({"depths": (1, 0)}, "needs a block"),
        ({"dim_head": 3}, "does not divide dim = 8"),
        ({"out_indices": (2,)}, "there are 2 stages"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)


def test_wrong_blocks() -> None:
    with pytest.raises(ShapeError, match="a map of 5x6 has no partitions of 2x3"):
        small()(torch.randn(1, 3, 20, 24))
    with pytest.raises(DeclarationError, match="stride 1: 2, or 1 with equal channels"):
        MBConv(8, 12)
    with pytest.raises(DeclarationError, match="'block' and 'grid' exist"):
        PartitionAttention(8, "cell", (2, 2), 4)
    for config, message in (
        ({"dim": 8, "dim_head": 4, "rel_pos_type": "mlp"}, "rel_pos_type is 'mlp'"),
        ({"dim": 8, "dim_head": 4, "act_layer": "relu"}, "act_layer is 'relu'"),
    ):
        with pytest.raises(DeclarationError, match=message):
            load_official("maxvit", "PartitionAttentionCl", config, {})
    with pytest.raises(DeclarationError, match="padding is ''"):
        load_official("maxvit", "MbConvBlock", {"in_chs": 8, "out_chs": 8, "padding": ""}, {})
