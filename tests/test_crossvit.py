"""CrossViT: parameter counts, timm parity, exchanged class tokens, resized images, and what every model does."""

from __future__ import annotations

from typing import Any

import classifier_checks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnc.errors import DeclarationError
from attnc.models import create_model, from_timm
from attnc.models.crossvit import CrossAttentionBlock, MultiScaleBlock

PARAMETERS = {  # 1000 classes
    "crossvit_tiny": 7_014_800,
    "crossvit_small": 26_856_272,
    "crossvit_base": 105_025_232,
    "crossvit_9": 8_553_296,
    "crossvit_9_dagger": 8_776_592,
    "crossvit_15": 27_528_464,
    "crossvit_15_dagger": 28_209_008,
    "crossvit_15_dagger_408": 28_500_080,
    "crossvit_18": 43_271_408,
    "crossvit_18_dagger": 44_266_976,
    "crossvit_18_dagger_408": 44_606_560,
}
SIZE = (36, 36)
SMALL: dict[str, Any] = {
    "img_size": (36, 32),
    "embed_dim": (16, 24),
    "depth": ((1, 2, 0), (1, 1, 0)),
    "num_heads": (2, 3),
    "mlp_ratio": (2.0, 2.0, 1.0),
    "num_classes": 5,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("crossvit_tiny", **{**SMALL, "backend": "torch", **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert classifier_checks.parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize("overrides", [{}, {"multi_conv": True, "depth": ((1, 1, 2),)}], ids=["plain", "dagger"])
def test_equals_timm(overrides: dict[str, Any]) -> None:
    """Features too, and images of other sides, which are resized."""
    pytest.importorskip("timm")
    from timm.models.crossvit import CrossVit

    config = {**SMALL, **overrides, "img_size": 36}
    theirs = classifier_checks.randomized(CrossVit(**config, img_scale=(1.0, 32 / 36), patch_size=(12, 16)))
    ours = small(**overrides).eval()
    ours.load_state_dict(from_timm("crossvit", theirs.state_dict()))
    for size in (SIZE, (32, 40)):
        x = classifier_checks.image(*size)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    for found, expected in zip(ours.forward_stages(x), theirs.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_class_tokens_are_exchanged() -> None:
    """A patch of one branch reaches the other's class token, and no patch of it."""
    block = classifier_checks.randomized(MultiScaleBlock((8, 12), (1, 1, 0), (2, 3), (2, 2, 1), backend="torch"))
    x0, x1 = torch.randn(1, 5, 8), torch.randn(1, 4, 12)
    moved = x1.clone()
    moved[:, 2] += torch.randn(12)
    changed = (block(x0, moved)[0] - block(x0, x1)[0]).abs().amax(2)[0] > 1e-6
    assert changed.tolist() == [True, False, False, False, False]


def test_cross_attention_by_the_book() -> None:
    layer = classifier_checks.randomized(CrossAttentionBlock(12, 3, True, backend="torch"))
    x = torch.randn(2, 7, 12)
    y, attn = layer.norm1(x), layer.attn
    q, k, v = (w(t).unflatten(2, (3, 4)).transpose(1, 2) for w, t in ((attn.wq, y[:, :1]), (attn.wk, y), (attn.wv, y)))
    expected = x[:, :1] + attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_features() -> None:
    """The last maps of both branches by default; all of them, the first branch's first."""
    backbone = small(features_only=True).eval()
    assert [tuple(m.shape[1:]) for m in backbone(classifier_checks.image(*SIZE))] == [(16, 3, 3), (24, 2, 2)]
    assert [(info["num_chs"], info["reduction"]) for info in backbone.feature_info] == [(16, 12), (24, 18)]
    maps = small(features_only=True, out_indices=(0, 1, 2, 3))(classifier_checks.image(*SIZE))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 3, 3)] * 2 + [(24, 2, 2)] * 2
    model = small().eval()
    assert not model.load_state_dict(backbone.state_dict(), strict=False).unexpected_keys


def test_classifier() -> None:
    model = small().eval()
    x = classifier_checks.image(*SIZE)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    first, second = (head(t) for head, t in zip(model.get_classifier(), pooled.split((16, 24), 1), strict=True))
    torch.testing.assert_close(model(x), (first + second) / 2)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    assert model.num_features == pooled.shape[1]


def test_round_trip() -> None:
    classifier_checks.saves(small, SIZE)


def test_training() -> None:
    classifier_checks.trains(small(drop_path_rate=0.1, drop_rate=0.01), SIZE)


def test_checkpointing() -> None:
    classifier_checks.checkpointing_changes_nothing(small, SIZE)


def test_autocast() -> None:
    classifier_checks.autocasts(small(), SIZE)


def test_compile() -> None:
    classifier_checks.compiles(small(depth=((1, 1, 0),)), SIZE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"img_size": (36,)}, "two each"),
        ({"num_heads": (2,)}, "there are two branches"),
        ({"depth": ((1, 0, 0),)}, "either branch needs a block"),
        ({"num_heads": (3, 3)}, "does not divide dim = 16"),
        ({"multi_conv": True, "patch_size": (12, 8)}, "multi_conv with patches of 8"),
        ({"img_size": (36, 8)}, "less than a patch of 16"),
        ({"out_indices": (4,)}, "there are 4 stages"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)
