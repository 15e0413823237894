"""SHViT: parameter counts, timm parity, channels that pass by, fused norms, two heads, and what every model does."""

from __future__ import annotations

from typing import Any

import classifier_checks
import pytest
import torch
from torch import nn

from attnc.errors import DeclarationError
from attnc.models import create_model, load_official
from attnc.models.shvit import SHSA

PARAMETERS = {  # 1000 classes, with one head and with two
    "shvit_s1": (6_330_808, 6_652_448),
    "shvit_s2": (11_483_072, 11_932_968),
    "shvit_s3": (14_245_273, 14_695_169),
    "shvit_s4": (16_588_484, 17_038_380),
}
SIZE = (64, 96)
SMALL: dict[str, Any] = {
    "embed_dim": (16, 20, 24),
    "partial_dim": (4, 8, 10),
    "qk_dim": (4, 6, 8),
    "depth": (1, 1, 2),
    "num_classes": 5,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("shvit_s1", **{**SMALL, "backend": "torch", **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    found = [classifier_checks.parameters(name, distillation=two) for two in (False, True)]
    assert tuple(found) == PARAMETERS[name]


def test_equals_timm() -> None:
    pytest.importorskip("timm")
    from timm.models.shvit import SHViT

    classifier_checks.equals_timm(small(), SHViT(types=("i", "s", "s"), **SMALL), "shvit", [SIZE])


def test_names_are_timm_s() -> None:
    classifier_checks.has_timm_s_names("shvit_s4", "shvit_s4")


def test_attention_of_the_first_channels() -> None:
    """Other channels reach the output of their own token only, through ReLU and the projection."""
    torch.manual_seed(0)
    layer = classifier_checks.randomized(SHSA(12, 4, 5, backend="torch"))
    x = torch.randn(1, 12, 3, 5)
    moved = x.clone()
    moved[:, 5:, 1, 2] += 1.0
    changed = (layer(moved) - layer(x)).abs().amax(1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[1, 2]]
    moved = x.clone()
    moved[:, 4, 1, 2] += 1.0
    assert bool(((layer(moved) - layer(x)).abs().amax(1) > 1e-6).all())


def test_branches_begin_as_zero() -> None:
    """At the start only the stem and what leads to a stage change the map."""
    model = small().eval()
    x = torch.randn(2, 16, 4, 6)
    for block in model.blocks1:
        torch.testing.assert_close(block(x), x)
    assert not any(model.blocks2[3].mixer.m.proj[1].bn.weight)


def test_fused() -> None:
    names = classifier_checks.fuses(small, SIZE, distillation=True)
    assert {"patch_embed.0.bias", "blocks1.0.conv.weight", "blocks2.3.mixer.m.qkv.weight", "head.weight"} <= names


def test_two_heads() -> None:
    model = classifier_checks.randomized(small(distillation=True))
    x = classifier_checks.image(*SIZE)
    torch.testing.assert_close(model(x), sum(model.forward_distilled(x)) / 2)
    model.reset_classifier(3)
    assert [t.shape[1] for t in model.forward_distilled(x)] == [3, 3]
    with pytest.raises(DeclarationError, match="build the model with distillation=True"):
        small().forward_distilled(x)


def test_official_block_without_attention() -> None:
    block = small().blocks1[0]
    ours = load_official("shvit", "BasicBlock", {"dim": 16, "qk_dim": 4, "pdim": 4, "type": "i"}, block.state_dict())
    x = torch.randn(2, 16, 3, 5)
    torch.testing.assert_close(ours(x=x), block.eval()(x))


def test_features() -> None:
    classifier_checks.features(small, SIZE, [(16, 4, 6), (20, 2, 3), (24, 1, 2)])


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
    two = {"embed_dim": (16, 20), "partial_dim": (4, 8), "qk_dim": (4, 6), "depth": (1, 1), "types": ("i", "s")}
    classifier_checks.compiles(small(**two), SIZE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": (1, 1)}, "differ in length"),
        ({"types": ("i", "s", "a")}, "'s' attends, 'i' does not"),
        ({"partial_dim": (4, 21, 10)}, "pdim=21 channels attend, out of dim=20"),
        ({"embed_dim": (12, 20, 24)}, "begins with an eighth"),
        ({"out_indices": (3,)}, "there are 3 stages"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)
