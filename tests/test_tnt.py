"""TNT: parameter counts, timm parity, words that stay in their patch, and what every model does."""

from __future__ import annotations

from typing import Any

import classifier_checks
import pytest
import torch
from torch import nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, from_timm
from attnc.models.tnt import Block, PatchEmbed

PARAMETERS = {"tnt_ti": 6_114_040, "tnt_s": 23_843_848, "tnt_b": 65_554_120}  # 1000 classes, the untrained ones included
TRAINED = {"tnt_ti": 6_076_408, "tnt_s": 23_768_584, "tnt_b": 65_428_680}
SIZE = (32, 48)
SMALL: dict[str, Any] = {
    "img_size": SIZE,
    "outer_dim": 24,
    "inner_dim": 8,
    "depth": 2,
    "outer_num_heads": 3,
    "inner_num_heads": 2,
    "num_classes": 5,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("tnt_s", **{**SMALL, "backend": "torch", **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert classifier_checks.parameters(name) == PARAMETERS[name]
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == TRAINED[name]


def test_equals_timm() -> None:
    pytest.importorskip("timm")
    from timm.models.tnt import TNT

    shape = {"embed_dim": 24, "inner_dim": 8, "depth": 2, "num_heads_outer": 3, "num_heads_inner": 2, "num_classes": 5}
    theirs = classifier_checks.randomized(TNT(img_size=SIZE, **shape))
    ours = small().eval()
    ours.load_state_dict(from_timm("tnt", theirs.state_dict()))
    x = classifier_checks.image(*SIZE)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    for found, expected in zip(ours.forward_stages(x), theirs.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_words_stay_in_their_patch() -> None:
    """A pixel reaches the words of its own patch only, and in a block their patch's token before all others."""
    torch.manual_seed(0)
    embed = PatchEmbed(SIZE, 16, 3, 6, 4)
    x = torch.randn(1, 3, *SIZE)
    moved = x.clone()
    moved[:, :, 15, 16] += 1.0  # the last row of the first row of patches, the first column of the second
    changed = (embed(moved) - embed(x)).abs().amax((1, 2)) > 0
    assert changed.tolist() == [False, True, False, False, False, False]
    block = Block(8, 4, 2, 2, 16, backend="torch").eval()
    inner, outer = torch.randn(6, 16, 4), torch.randn(1, 7, 8)
    other = inner.clone()
    other[1] += torch.randn(16, 4)
    (words, tokens), (words2, tokens2) = block(inner, outer), block(other, outer)
    assert ((words - words2).abs().amax((1, 2)) > 0).tolist() == changed.tolist()
    assert bool(((tokens - tokens2).abs().amax(2) > 0).all())


def test_unused_tokens_are_not_trained() -> None:
    model = small()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["outer_tokens"]


def test_features() -> None:
    classifier_checks.block_features(small, SIZE, (24, 2, 3), 16)


def test_classifier() -> None:
    model = small().eval()
    x = classifier_checks.image(*SIZE)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 7, 24)
    torch.testing.assert_close(model(x), model.get_classifier()(tokens[:, 0]))
    classifier_checks.classifier_changes(model, SIZE)


def test_round_trip() -> None:
    classifier_checks.saves(small, SIZE)


def test_training() -> None:
    classifier_checks.trains(small(drop_path_rate=0.1, drop_rate=0.01, se=1), SIZE)


def test_checkpointing() -> None:
    classifier_checks.checkpointing_changes_nothing(small, SIZE)


def test_autocast() -> None:
    classifier_checks.autocasts(small(), SIZE)


def test_compile() -> None:
    classifier_checks.compiles(small(depth=1), SIZE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"outer_num_heads": 5}, "does not divide dim = 24"),
        ({"inner_num_heads": 3}, "does not divide dim = 8"),
        ({"img_size": (32, 40)}, "do not divide img_size"),
        ({"out_indices": (2,)}, "there are 2 stages"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)


def test_wrong_image() -> None:
    with pytest.raises(ShapeError, match="the image is 48x48, its position embedding is for 32x48"):
        small()(classifier_checks.image(48, 48))
