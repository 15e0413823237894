"""DependencyViT: parameter counts, reversed attention beside its equation, pruning, dependency trees. Goldens: test_goldens.py."""

from __future__ import annotations

from typing import Any

import classifier_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, load_official
from attnc.models.dependencyvit import ReversedAttention, dependency_tree, kept_share

PARAMETERS = {  # 1000 classes
    "dependencyvit_tiny": 5_964_712,
    "dependencyvit_small": 22_987_624,
    "dependencyvit_lite_tiny": 5_964_712,
}
SIZE = (32, 48)
SMALL: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 12,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "init_values": 0.5,
    "num_classes": 5,
    "backend": "torch",
}
LITE: dict[str, Any] = {"prune_layers": (1, 3), "prune_ratio": 0.3}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("dependencyvit_tiny", **{**SMALL, **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert checks.parameters(name) == PARAMETERS[name]


def dense(attention: ReversedAttention, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, m and A_M by the paper's steps, every matrix whole: softmax over parents, transposed, times the sender's gates."""
    b, n, c = x.shape
    h = attention.num_heads
    q, k, v = attention.qkv(x).reshape(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4)
    forward = ((q @ k.mT) * (c // h) ** -0.5).softmax(-1)
    p = (attention.head_selector(x) / attention.temperature).softmax(-1).permute(0, 2, 1)
    controller = attention.message_controller
    m = m * controller.fc2(F.gelu(controller.fc1(x)))[..., 0].sigmoid()
    reverse = forward.mT * p[:, :, None] * m[:, None, None]
    y = (reverse @ v).transpose(1, 2).reshape(b, n, c)
    return attention.proj(y), m, reverse.sum(1)


@pytest.mark.parametrize(
    ("dim", "heads", "tokens", "temperature"), [(6, 1, 5, 0.1), (12, 3, 17, 0.5), (8, 4, 1, 0.1), (20, 2, 9, 1.0)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_reversed_attention_is_its_equation(dim: int, heads: int, tokens: int, temperature: float, bias: bool) -> None:
    torch.manual_seed(0)
    attention = ReversedAttention(dim, heads, bias, temperature, backend="torch").double()
    x = torch.randn(2, tokens, dim, dtype=torch.float64, requires_grad=True)
    m = torch.rand(2, tokens, dtype=torch.float64, requires_grad=True)
    found, expected = attention(x, m), dense(attention, x, m)
    weights = [torch.randn_like(t) for t in found]
    leaves = [x, m, *attention.parameters()]
    for a, b in zip(found, expected[:2], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(found, leaves, weights), torch.autograd.grad(expected[:2], leaves, weights), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(attention(x)[0], dense(attention, x, torch.ones_like(m))[0])  # the first layer


def test_dependency_mask() -> None:
    torch.manual_seed(0)
    attention = ReversedAttention(8, 2, backend="torch").double()
    x, m = torch.randn(2, 300, 8, dtype=torch.float64), torch.rand(2, 300, dtype=torch.float64)
    _, sent, mask = dense(attention, x, m)
    found = attention.dependencies(x, m)  # more tokens than an operator's values have channels
    torch.testing.assert_close(found, mask)
    torch.testing.assert_close(found.sum(1), sent)  # all that a token sends is its m


@pytest.mark.parametrize("lite", [False, True])
def test_network_is_its_description(lite: bool) -> None:
    """Block by block: attention, pruning by m, MLP; the last norm times m, the mean."""
    model = small(**(LITE if lite else {})).eval()
    image = checks.image(*SIZE)
    x = F.conv2d(image, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8).flatten(2).mT + model.pos_embed
    m, counts = torch.ones(2, 24), []
    for i, block in enumerate(model.blocks, 1):
        y, m, _ = dense(block.attn, block.norm1(x), m)
        x = x + block.ls1.gamma * y
        if lite and i in LITE["prune_layers"]:
            n = LITE["prune_layers"].index(i) + 1
            keep = int(x.shape[1] * (1 - n * 0.3) / (1 - (n - 1) * 0.3))
            order = m.argsort(1, descending=True)[:, :keep].sort(1).values
            x, m = torch.stack([x[j, order[j]] for j in range(2)]), torch.stack([m[j, order[j]] for j in range(2)])
        x = x + block.ls2.gamma * block.mlp(block.norm2(x))
        counts.append(x.shape[1])
    assert counts == ([16, 16, 9] if lite else [24, 24, 24])
    expected = model.head((model.norm(x) * m[..., None]).mean(1))
    torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-4)


def test_lite_keeps_as_many_tokens_as_the_paper() -> None:
    model = create_model("dependencyvit_lite_tiny", embed_dim=12, num_classes=0, backend="torch").eval()
    kept = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: kept.append(out[0].shape[1]))
    model(torch.zeros(1, 3, 224, 224))
    assert kept == [196, 164, 164, 164, 132, 132, 132, 100, 100, 100, 69, 69]
    assert [kept_share(n, 0.16) for n in range(1, 5)] == pytest.approx([0.84, 0.8095, 0.7647, 0.6923], abs=1e-4)


def test_dependencies_are_summed_where_tokens_stand() -> None:
    model = small(**LITE).eval()
    image = checks.image(*SIZE)
    total = model.dependencies(image)
    assert total.shape == (2, 24, 24)
    x, m, place = model.embed(image), None, torch.arange(24).expand(2, -1)
    expected = torch.zeros(2, 24, 24)
    for block in model.blocks:
        mask = dense(block.attn, block.norm1(x), torch.ones(2, x.shape[1]) if m is None else m)[2]
        for b in range(2):
            expected[b][place[b][:, None], place[b]] += mask[b]
        x, m, place = block(x, m, place)
    torch.testing.assert_close(total, expected.detach(), atol=1e-5, rtol=1e-4)
    assert place.shape == (2, 9)


def test_dependency_tree() -> None:
    mask = torch.zeros(4, 4)
    mask[1, 0], mask[0, 1], mask[1, 2], mask[2, 3], mask[3, 2] = 0.9, 0.8, 0.5, 0.4, 0.7
    # 0 under 1 first; then 1 under 0 would close a cycle; 2 under 3; then not 2 under 1; nor 3 under 2; 1 under 3 or 3 under 1
    parents = dependency_tree(mask)
    assert parents[0] == 1
    assert parents[2] == 3
    assert sorted((parents[1], parents[3])) in ([-1, 0], [-1, 1], [-1, 2], [-1, 3])
    torch.manual_seed(0)
    for count in (1, 2, 9, 30):
        parents = dependency_tree(torch.rand(count, count))
        assert parents.count(-1) == 1
        for i in range(count):  # every token is under the root
            seen = set()
            while parents[i] >= 0:
                assert i not in seen
                seen.add(i)
                i = parents[i]
    with pytest.raises(ShapeError, match=r"a mask \[N, N\] of one image, not \[2, 3\]"):
        dependency_tree(torch.zeros(2, 3))


def test_head() -> None:
    checks.classifier_changes(small(**LITE), SIZE)


def test_features() -> None:
    """The patches after each block, where none is dropped."""
    backbone = small(features_only=True, out_indices=(0, 2)).eval()
    maps = backbone(checks.image(*SIZE))
    assert [tuple(m.shape[1:]) for m in maps] == [(12, 4, 6)] * 2
    assert {(info["num_chs"], info["reduction"]) for info in backbone.feature_info} == {(12, 8)}
    tokens, _, _ = backbone.blocks[0](backbone.embed(checks.image(*SIZE)), None)
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), tokens)
    with pytest.raises(DeclarationError, match="dropped tokens leave no maps; build it with prune_layers=None"):
        small(features_only=True, **LITE)


def test_training_lowers_the_loss() -> None:
    checks.trains(small(**LITE, drop_path_rate=0.1), SIZE, steps=20, rate=3e-2)


def test_checkpointing() -> None:
    checks.checkpointing_changes_nothing(lambda **more: small(**LITE, **more), SIZE)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_autocast(backend: str) -> None:
    checks.autocasts(small(backend=backend), SIZE)


def test_torch_compile() -> None:
    checks.compiles(small(**LITE), SIZE)


def test_load_official_takes_all_arguments() -> None:
    model = small(**LITE, num_classes=10).eval()
    config = {**{k: v for k, v in SMALL.items() if k != "backend"}, **LITE, "num_classes": 10, "attn_drop_rate": 0.1}
    loaded = load_official("dependencyvit", "DependencyViT", config, model.state_dict(), backend="torch")
    torch.testing.assert_close(loaded(image=checks.image(*SIZE)), model(checks.image(*SIZE)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "does not divide dim = 12"),
        ({"prune_layers": (4,), "prune_ratio": 0.1}, "different blocks, from 1 to 3"),
        ({"prune_layers": (1, 1), "prune_ratio": 0.1}, "different blocks"),
        ({"prune_layers": (1, 2, 3), "prune_ratio": 0.4}, "no token would be left"),
        ({"img_size": 4}, "is less than a patch"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)


def test_another_image_size_is_refused() -> None:
    with pytest.raises(ShapeError, match="5x6 patches, the position embedding 4x6"):
        small()(checks.image(40, 48))
