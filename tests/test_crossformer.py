"""CrossFormer: parameter counts, groups at every size, the official padding, training. Outputs and gradients: test_goldens.py."""

from __future__ import annotations

import copy
from typing import Any

import model_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, load_official
from attnc.models.crossformer import Block, Groups, OneGroup, shares

PARAMETERS = {  # 1000 classes
    "crossformer_tiny": 27_776_794,
    "crossformer_small": 30_657_394,
    "crossformer_base": 51_971_554,
    "crossformer_large": 91_971_184,
    "crossformer_pp_small": 23_325_340,
    "crossformer_pp_base": 51_994_594,
    "crossformer_pp_large": 92_001_904,
    "crossformer_pp_huge": 95_962_944,
}
SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": (4, 8),
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (2, 4),
    "group_size": (3, 2),
    "crs_interval": (2, 1),
    "mlp_ratio": 2.0,
    "merge_size": ((2, 4),),
    "num_classes": 10,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("crossformer_tiny", **{**SMALL, **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert checks.count(name) == PARAMETERS[name]


def test_widths_of_kernels() -> None:
    assert shares(64, 4) == [32, 16, 8, 8]
    assert shares(64, 2) == [32, 32]
    assert shares(64, 1) == [64]


def padded(block: Block, x: Tensor, flag: int) -> Tensor:
    """The official way: zeros around the map, masked as keys, then a permutation into groups."""
    (_, height, width, c), g, side = x.shape, block.group_size, 1
    if min(height, width) <= g:
        g, flag = min(height, width), 0
    side = block.interval if flag else 1
    down, right = -height % (g * side), -width % (g * side)
    up, left = (down // 2, right // 2) if block.pad_type else (0, 0)
    frame = (0, 0, left, right - left, up, down - up)

    def cut(t: Tensor) -> Tensor:
        t = F.pad(t, frame)
        t = t.unflatten(2, (-1, g, side)).unflatten(1, (-1, g, side))  # b Y g s X g s c
        return t.permute(0, 1, 4, 3, 6, 2, 5, 7).flatten(5, 6).flatten(0, 4)

    real = cut(torch.ones(x.shape[0], height, width, 1, dtype=x.dtype))
    qkv = block.attn.qkv(cut(block.norm1(x))).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    place = torch.stack(torch.meshgrid(torch.arange(g), torch.arange(g), indexing="ij"), -1).flatten(0, 1)
    table = block.attn.pos((g, g))
    at = (place[:, None] - place) + g - 1
    mask = table[:, at[..., 0], at[..., 1]] + (real.transpose(1, 2)[:, None] - 1) * 1e6
    out = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=mask).transpose(1, 2).flatten(2)
    rows, columns = (height + down) // (g * side), (width + right) // (g * side)
    out = out.view(-1, rows, columns, side, side, g, g, c).permute(0, 1, 5, 3, 2, 6, 4, 7)
    out = out.reshape(-1, height + down, width + right, c)[:, up : up + height, left : left + width]
    y = x + block.attn.proj(out)
    return y + block.mlp(block.norm2(y))


@pytest.mark.parametrize("pad_type", [0, 1])
@pytest.mark.parametrize("flag", [0, 1])
@pytest.mark.parametrize("size", [(7, 11), (12, 6), (4, 5), (3, 8), (2, 1)])
def test_groups_are_the_official_ones(size: tuple[int, int], flag: int, pad_type: int) -> None:
    torch.manual_seed(0)
    block = Block(32, (12, 12), 2, 3, 2, flag, 1.0, pad_type=pad_type).double()  # made for another size
    block.apply(lambda m: nn.init.normal_(m.weight, std=0.5) if isinstance(m, nn.Linear) else None)
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x), padded(block, x, flag))


def test_operators_follow_the_size() -> None:
    block = Block(16, (14, 14), 2, 7, 2, 1)
    assert block.groups(14, 15) == Groups((7, 7), 2)
    assert block.groups(7, 20) == Groups((7, 7))
    assert block.groups(20, 5) == Groups((5, 5))
    assert Block(16, (9, 9), 2, 4, 2, 1, pad_type=1).groups(9, 15) == Groups((4, 4), 2, (3, 0))
    assert copy.deepcopy(block).attn.operator(Groups((7, 7), 2)) is block.attn.operator(Groups((7, 7), 2))


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (9, 8), (64, 8)])
def test_any_size(size: tuple[int, int]) -> None:
    logits = small()(checks.image(*size))
    assert logits.shape == (2, 10)
    assert bool(logits.isfinite().all())


def test_features_only() -> None:
    model = small(features_only=True).eval()
    maps = model(checks.image(40, 28))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 10, 7), (2, 32, 5, 3)]
    classifier = small().eval()
    classifier.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(classifier.forward_features(checks.image(40, 28)), maps[-1])
    only = small(features_only=True, out_indices=(-1,))
    assert [f["reduction"] for f in only.feature_info] == [8]
    assert len(only(checks.image(32, 32))) == 1


def test_head() -> None:
    model = small().eval()
    maps = model.forward_features(checks.image(32, 32))
    pooled = model.forward_head(maps, pre_logits=True)
    torch.testing.assert_close(pooled, model.norm(maps.flatten(2).transpose(1, 2)).mean(1))  # the norm comes first
    model.reset_classifier(3)
    assert model(checks.image(32, 32)).shape == (2, 3)
    assert small(num_classes=0)(checks.image(32, 32)).shape == (2, 32)


def test_amplitude_cooling() -> None:
    """After every third block of a stage, but not after its last one."""
    model = small(use_acl=True, depths=(3, 7))
    cooled = [[block.ex_conv is not None for block in stage.blocks] for stage in model.layers]
    assert cooled == [[False] * 3, [False, False, True, False, False, True, False]]


@pytest.mark.parametrize(
    "overrides",
    [
        {"qkv_bias": False, "qk_scale": 0.4},
        {"ape": True, "patch_norm": False},
        {"group_size": 2, "mlp_ratio": [1, 3], "pad_type": 1},
    ],
)
def test_constructor_arguments(overrides: dict[str, Any]) -> None:
    config = {**SMALL, **overrides, "drop_rate": 0.1, "attn_drop_rate": 0.1}
    model = small(**overrides).eval()
    ours = load_official("crossformer", "CrossFormer", config, model.state_dict())
    torch.testing.assert_close(ours(x=checks.image(32, 32)), model(checks.image(32, 32)))


def test_attention_without_bias() -> None:
    config = {"dim": 8, "group_size": (2, 3), "num_heads": 2, "position_bias": False}
    module = OneGroup(**config)
    x = torch.randn(4, 6, 8)
    heads = module.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    expected = module.proj(F.scaled_dot_product_attention(*heads.unbind(0)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(load_official("crossformer", "Attention", config, module.state_dict())(x=x), expected)


def test_training_lowers_the_loss() -> None:
    target = torch.randn(8, 10, generator=torch.Generator().manual_seed(3))
    checks.check_training(small(drop_path_rate=0.1), checks.image(24, 32, batch=8), target)


def test_round_trip() -> None:
    checks.check_saves(small, checks.image(32, 24))


def test_checkpointing() -> None:
    checks.check_checkpointing(lambda **more: small(drop_path_rate=0.3, **more), checks.image(32, 24))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_autocast(backend: str) -> None:
    checks.check_autocast(small(backend=backend), checks.image(33, 50))


def test_torch_compile() -> None:
    checks.check_compiles(small(), checks.image(32, 32))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": (3, 4)}, "does not divide dim = 16"),
        ({"embed_dim": 8}, "use 16 or more"),
        ({"group_size": (3, 3, 3)}, "there are 2 stages"),
        ({"merge_size": ()}, "after each of the 2 stages but the last"),
        ({"merge_size": ((4, 8),)}, "the first kernel is the stride, 2"),
        ({"patch_size": (4, 7)}, "the first plus even numbers"),
        ({"out_indices": (2,)}, "there are 2 stages"),
        ({"pad_type": 2}, "pad_type=2 are 0 or 1"),
        ({"crs_interval": 0}, "interval=0 must be positive"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)


def test_wrong_sizes() -> None:
    with pytest.raises(ShapeError, match="7 x 32; its stages need at least 8 x 8"):
        small()(checks.image(7, 32))
    with pytest.raises(ShapeError, match="absolute positions were made for 64 tokens"):
        small(ape=True)(checks.image(32, 28))
