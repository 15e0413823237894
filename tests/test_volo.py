"""VOLO: parameter counts, timm parity, outlook attention by the book, token labelling, and what every model does."""

from __future__ import annotations

from typing import Any

import classifier_checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, from_timm
from attnc.models.volo import OutlookAttention

PARAMETERS = {  # 1000 classes
    "volo_d1": 26_632_040,
    "volo_d1_384": 26_777_960,
    "volo_d2": 58_678_336,
    "volo_d2_384": 58_872_896,
    "volo_d3": 86_325_072,
    "volo_d3_448": 86_626_128,
    "volo_d4": 192_961_520,
    "volo_d4_448": 193_413_104,
    "volo_d5": 295_455_584,
    "volo_d5_448": 295_907_168,
    "volo_d5_512": 296_091_488,
}
SIZE = (32, 48)
SMALL: dict[str, Any] = {
    "layers": (1, 2),
    "img_size": SIZE,
    "stem_hidden_dim": 4,
    "embed_dims": (8, 16),
    "num_heads": (2, 4),
    "mlp_ratios": (2.0, 2.0),
    "downsamples": (True, False),
    "outlook_attention": (True, False),
    "num_classes": 5,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("volo_d1", **{**SMALL, "backend": "torch", **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert classifier_checks.parameters(name) == PARAMETERS[name]


def test_equals_timm() -> None:
    pytest.importorskip("timm")
    from timm.models.volo import VOLO

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "layers": (1, 1, 1, 1),
        "img_size": 64,
        "embed_dims": (16, 24, 24, 24),
        "num_heads": (2, 3, 3, 3),
        "downsamples": (True, False, False, False),
        "outlook_attention": (True, False, False, False),
    }
    theirs = VOLO(**shape, stem_hidden_dim=4, num_classes=5, mlp_ratio=2.0).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = small(**shape, mlp_ratios=(2.0,) * 4).eval()
    ours.load_state_dict(from_timm("volo", theirs.state_dict()))
    x = classifier_checks.image(64, 64)
    expected = theirs(x)
    assert (ours(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("backend", ["eager", "torch", "cpp"])
@pytest.mark.parametrize(("size", "settings"), [((7, 8), (3, 2, 1)), ((5, 6), (3, 1, 1)), ((6, 5), (5, 1, 2)), ((4, 6), (2, 2, 0))])
def test_outlook_is_unfold_softmax_fold(size: tuple[int, int], settings: tuple[int, int, int], backend: str) -> None:
    """Outputs and gradients of the pattern against windows cut by unfold, padding included."""
    kernel, stride, padding = settings
    anchors = [-(-n // stride) for n in size]
    torch.manual_seed(0)
    values = torch.randn(2, *size, 3, 4, dtype=torch.float64)
    scores = torch.randn(2, 3, *anchors, kernel**2, kernel**2, dtype=torch.float64)

    def by_the_book(v: Tensor, logits: Tensor) -> Tensor:
        windows = F.unfold(v.flatten(3).permute(0, 3, 1, 2), kernel, padding=padding, stride=stride)
        windows = windows.view(2, 3, 4, kernel**2, -1).permute(0, 1, 4, 3, 2)
        mixed = logits.flatten(2, 3).softmax(-1) @ windows
        mixed = mixed.view(2, 3, *anchors, kernel, kernel, 4).permute(0, 2, 4, 3, 5, 1, 6)
        return mixed.reshape(2, kernel * anchors[0], kernel * anchors[1], 3, 4)

    op = attnc.compile(
        attnc.patterns.outlook(kernel, stride, padding),
        grid={"y": None, "x": None},
        kv_grid=(None, None),
        pad=((padding, padding),) * 2 if padding else None,
        layout="b y x h d",
        backend=backend,
    )

    def by_the_pattern(v: Tensor, logits: Tensor) -> Tensor:
        q = v.new_zeros(2, kernel * anchors[0], kernel * anchors[1], 3, 1)
        return op(q, v[..., :1].detach(), v, logits=logits)

    results = []
    for mix in (by_the_pattern, by_the_book):
        v, logits = values.clone().requires_grad_(), scores.clone().requires_grad_()
        out = mix(v, logits)
        out.square().sum().backward()
        results.append((out.detach(), v.grad, logits.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_token_labelling() -> None:
    """Logits are those of the class token and half the best of any token; a trainer gets both apart."""
    model = small().eval()
    x = classifier_checks.image(*SIZE)
    token, dense = model.forward_dense(x)
    assert token.shape == (2, 5)
    assert dense.shape == (2, 6, 5)
    torch.testing.assert_close(model(x), token + 0.5 * dense.amax(1))
    plain = small(return_dense=False).eval()
    plain.load_state_dict({k: t for k, t in model.state_dict().items() if not k.startswith("aux_head")})
    torch.testing.assert_close(plain(x), token)
    with pytest.raises(DeclarationError, match="to label tokens"):
        plain.forward_dense(x)


def test_without_a_class_token() -> None:
    """The first token, or the mean over all, is classified."""
    x = classifier_checks.image(*SIZE)
    for mean in (False, True):
        model = small(post_layers=None, return_dense=False, return_mean=mean).eval()
        tokens = model.norm(model.forward_features(x).flatten(2).transpose(1, 2))
        torch.testing.assert_close(model(x), model.head(tokens.mean(1) if mean else tokens[:, 0]))


def test_features() -> None:
    classifier_checks.features(small, SIZE, [(8, 4, 6), (16, 2, 3)])
    assert [info["module"] for info in small().feature_info] == ["network.0", "network.2"]


def test_classifiers() -> None:
    model = small().eval()
    x = classifier_checks.image(*SIZE)
    model.reset_classifier(3)
    assert [t.shape[-1] for t in (model(x), *model.forward_dense(x))] == [3, 3, 3]
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)


def test_training() -> None:
    classifier_checks.trains(small(drop_path_rate=0.1, drop_rate=0.01), SIZE)


def test_round_trip() -> None:
    classifier_checks.saves(small, SIZE)


def test_checkpointing() -> None:
    classifier_checks.checkpointing_changes_nothing(small, SIZE)


def test_autocast() -> None:
    classifier_checks.autocasts(small(), SIZE)


def test_compile() -> None:
    classifier_checks.compiles(small(layers=(1, 1), post_layers=("ca",)), SIZE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": (1,)}, "differ in length"),
        ({"patch_size": 7}, "has stride 2"),
        ({"downsamples": (False, True)}, "nothing comes after the last stage"),
        ({"post_layers": ("sa",)}, "'ca' exists"),
        ({"return_mean": True}, "exclude each other"),
        ({"num_heads": (3, 4)}, "does not divide dim = 8"),
        ({"num_heads": (2, 3)}, "does not divide dim = 16"),
        ({"out_indices": (2,)}, "there are 2 stages"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)


def test_wrong_maps() -> None:
    with pytest.raises(ShapeError, match=r"position embedding \[2, 3, 16\] meets a map \[4, 4, 16\]"):
        small()(classifier_checks.image(64, 64))
    with pytest.raises(ShapeError, match="meet another number of windows of 3, padded by 0"):
        OutlookAttention(8, 2, 3, 0, 2, backend="torch")(torch.randn(1, 6, 6, 8))
