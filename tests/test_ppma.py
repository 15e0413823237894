"""PPMA: parameter counts, both forms of the attention, every size, training. Outputs and gradients: test_goldens.py."""

from __future__ import annotations

from typing import Any

import model_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.errors import DeclarationError
from attnc.models import create_model, load_official
from attnc.models.ppma import DensePathMask, PathAttention, rotated

PARAMETERS = {  # 1000 classes
    "ppma_tiny": 14_335_272,
    "ppma_small": 26_969_472,
    "ppma_base": 54_158_524,
}
SMALL: dict[str, Any] = {
    "embed_dims": (8, 8),
    "depths": (1, 1),
    "num_heads": (2, 2),
    "mlp_ratios": (2, 2),
    "chunkwise_recurrents": (True, False),
    "layerscales": (False, True),
    "projection": 16,
    "num_classes": 10,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("ppma_tiny", **{**SMALL, **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert checks.count(name) == PARAMETERS[name]


def reference(attention: PathAttention, x: Tensor) -> Tensor:
    """Dense: both softmaxes of the whole form, or the matrices of rows and columns in either order."""
    _, height, width, _ = x.shape
    mask = DensePathMask(x.shape[-1], attention.num_heads).to(x.dtype)
    mask.load_state_dict(attention.path_embed.state_dict())
    m = mask(x)
    q, k = (
        rotated(projection(x).unflatten(-1, (attention.num_heads, -1))).flatten(1, 2).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    values = attention.v_proj(x)
    v = values.unflatten(-1, (attention.num_heads, -1)).flatten(1, 2).transpose(1, 2)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if attention.separable:
        row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
        along_rows = (scores + m).masked_fill(row[:, None] != row, -torch.inf).softmax(-1)
        along_columns = (scores + m).masked_fill(column[:, None] != column, -torch.inf).softmax(-1)
        mixed = along_columns @ (along_rows @ v) + along_rows @ (along_columns @ v)
    else:
        mixed = (scores + m).softmax(-1) @ v + (scores + m.mT).softmax(-1) @ v
    out = 0.5 * mixed.transpose(1, 2).reshape(values.shape)
    return attention.out_proj(out + attention.lepe(values))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (1, 5), (6, 1)])
def test_attention_is_the_dense_one(size: tuple[int, int], separable: bool, backend: str) -> None:
    torch.manual_seed(0)
    attention = PathAttention(8, 2, 2, separable=separable, backend=backend).double()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(x), reference(attention, x))


def test_steps_are_paid_when_entered() -> None:
    """From a to b > a along a row costs the steps a + 1 .. b; then those down the key's column."""
    torch.manual_seed(0)
    mask = DensePathMask(4, 2).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    steps = F.softplus(mask.dt_linear(x.view(1, 3, 4, 2, 2)) + mask.dt_bias[:, None])[0] * mask.A_log.exp()[:, None]
    expected = -(steps[0, 1, 1, 0] + steps[0, 2, 1, 0] + steps[1, 2, 1, 1] + steps[2, 2, 1, 1])
    torch.testing.assert_close(mask(x)[0, 1, 0, 2 * 4 + 2], expected)


def test_rotations_keep_lengths() -> None:
    x = torch.randn(1, 2, 3, 1, 6)
    turned = rotated(x)
    torch.testing.assert_close(turned[0, 0, 0], x[0, 0, 0])  # the first token is not turned
    torch.testing.assert_close(turned.unflatten(-1, (3, 2)).norm(dim=-1), x.unflatten(-1, (3, 2)).norm(dim=-1))
    last = turned[0, 1, 0, 0, 4:]  # token 3 turns its last pair by 3 / 10000
    torch.testing.assert_close(last[0], x[0, 1, 0, 0, 4] - 3e-4 * x[0, 1, 0, 0, 5], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (1, 1)])
def test_any_size(size: tuple[int, int]) -> None:
    logits = small().eval()(checks.image(*size))
    assert logits.shape == (2, 10)
    assert bool(logits.isfinite().all())


def test_features_only() -> None:
    model = small(features_only=True).eval()
    maps = model(checks.image(40, 27))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 10, 7), (2, 8, 5, 4)]
    torch.testing.assert_close(maps[1].mean(1), torch.zeros(2, 5, 4), atol=1e-5, rtol=0)  # through a LayerNorm
    only = small(features_only=True, out_indices=(-1,))
    assert [f["reduction"] for f in only.feature_info] == [8]
    assert len(only(checks.image(32, 32))) == 1


def test_head() -> None:
    model = small().eval()
    x = checks.image(32, 32)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert small(num_classes=0)(x).shape == (2, 16)


def test_load_official_takes_all_arguments() -> None:
    model = small().eval()
    state = {key: t for key, t in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    angle = {"layers.0.Relpos.angle": torch.zeros(4)}
    config = {**SMALL, "init_values": [2, 2], "heads_ranges": [4, 4]}
    torch.testing.assert_close(
        load_official("ppma", "PPMAViT", config, state | angle)(image=checks.image(24, 32)), model(checks.image(24, 32))
    )


def test_training_lowers_the_loss() -> None:
    target = torch.randn(8, 10, generator=torch.Generator().manual_seed(3))
    checks.check_training(small(drop_path_rate=0.1), checks.image(24, 32, batch=8), target, lr=1e-2)


def test_checkpointing() -> None:
    checks.check_checkpointing(lambda **more: small(drop_path_rate=0.3, **more), checks.image(32, 24))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_autocast(backend: str) -> None:
    checks.check_autocast(small(backend=backend), checks.image(32, 24))


def test_torch_compile() -> None:
    checks.check_compiles(small(), checks.image(32, 24))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": (3, 2)}, "does not divide dim = 8"),
        ({"num_heads": (8, 2)}, "heads have 1 channels; rotary positions need an even number"),
        ({"depths": (1,)}, "there are 2 stages"),
        ({"out_indices": (2,)}, "there are 2 stages"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)


def test_the_mask_of_pairs_is_that_of_the_whole_form() -> None:
    with pytest.raises(DeclarationError, match="chunkwise_recurrent=False"):
        load_official("ppma", "PathEmbeding2D", {"embed_dim": 4, "nheads": 2, "chunkwise_recurrent": True}, {})
