"""Gaussian-mixture masks: parameter counts, the mask on larger grids, hosts, training. Outputs and gradients: test_goldens.py."""

from __future__ import annotations

import math
from typing import Any

import model_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, load_official
from attnc.models.gmm_mask import Attention, GaussianMixtureMask, base_mask
from attnc.models.gmm_mask_cait import LayerScale, TalkingHeads
from attnc.models.gmm_mask_pit import Pool
from attnc.models.gmm_mask_swin import MaskedWindows
from attnc.models.gmm_mask_t2t import Attention as TokenAttention
from attnc.models.gmm_mask_t2t import TokenTransformer, sinusoids

PARAMETERS = {  # with the frozen base mask, and without
    "gmm_mask_vit": (2_697_218, 2_693_122),
    "gmm_mask_vit_cifar100": (2_714_588, 2_710_492),
    "gmm_mask_vit_tiny_imagenet": (2_761_536, 2_757_440),
    "gmm_mask_vit_plain": (2_696_522, 2_692_426),
    "gmm_mask_vit_plain_cifar100": (2_713_892, 2_709_796),
    "gmm_mask_vit_plain_tiny_imagenet": (2_760_840, 2_756_744),
    "gmm_mask_vit_base": (4_348_490, 4_282_954),
    "gmm_mask_pit": (7_043_074, 6_973_186),
    "gmm_mask_pit_cifar100": (7_077_724, 7_007_836),
    "gmm_mask_pit_tiny_imagenet": (7_119_680, 7_049_792),
    "gmm_mask_swin": (7_074_344, 7_074_088),
    "gmm_mask_swin_cifar100": (7_108_994, 7_108_738),
    "gmm_mask_swin_tiny_imagenet": (7_150_950, 7_150_694),
    "gmm_mask_t2t": (6_572_586, 6_486_570),
    "gmm_mask_t2t_cifar100": (6_595_716, 6_509_700),
    "gmm_mask_t2t_tiny_imagenet": (7_794_354, 6_659_762),
    "gmm_mask_cait": (9_025_674, 9_021_578),
    "gmm_mask_cait_cifar100": (9_043_044, 9_038_948),
    "gmm_mask_cait_tiny_imagenet": (9_089_992, 9_085_896),
    "gmm_mask_cait_tiny": (5_083_890, 5_079_794),
    "gmm_mask_cait_tiny_cifar100": (5_093_700, 5_089_604),
    "gmm_mask_cait_tiny_tiny_imagenet": (5_120_152, 5_116_056),
}
SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 4, "dim": 8, "depth": 1, "heads": 2, "dim_head": 4, "num_kernals": 2}
HOSTS: dict[str, dict[str, Any]] = {
    "gmm_mask_vit": {},
    "gmm_mask_vit_plain": {},
    "gmm_mask_cait": {"mlp_dim": 16, "cls_depth": 1},
    "gmm_mask_pit": {"depth": (1, 1), "heads": (2, 2)},
    "gmm_mask_swin": {"embed_dim": 4, "depths": (2, 1), "num_heads": (2, 2), "window_size": 2, "num_kernals": 2},
    "gmm_mask_t2t": {"embed_dim": 8, "depth": 1, "num_heads": 2, "token_dim": 4, "backend": "torch"},
}
TAKES = {"gmm_mask_swin": ("img_size", "patch_size", "num_kernals"), "gmm_mask_t2t": ("img_size", "num_kernals")}
UNUSED = ("cls_token", "tokens_to_token.norm")  # of T2T, as officially


def small(host: str = "gmm_mask_vit", **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    common = {key: value for key, value in SMALL.items() if key in TAKES.get(host, SMALL)}
    if host in TAKES and "stochastic_depth" in overrides:
        overrides["drop_path_rate"] = overrides.pop("stochastic_depth")
    model = create_model(host, **{**common, **HOSTS[host], **overrides})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not (host == "gmm_mask_t2t" and name.startswith(UNUSED)))
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert (sum(n for n, _ in counts), sum(n for n, trained in counts if trained)) == PARAMETERS[name]


def reference(attention: Attention, x: Tensor, prefix: int) -> Tensor:
    """The official way: a dense mask, as a power of the base mask, times the scores between patches."""
    assert attention.mask is not None
    heads = attention.mask.sigma.shape[1]
    q, k, v = attention.to_qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    power = base_mask(attention.side).to(x.dtype) ** (1 / (attention.mask.sigma**2 + 1e-5))
    factor = torch.ones_like(scores)
    factor[:, :, prefix:, prefix:] = (attention.mask.alpha * power).sum(0)
    return attention.to_out(((factor * scores).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("side", "prefix"), [(3, 0), (9, 0), (13, 0), (4, 1), (13, 1)])  # from 9 on, float32 loses far pairs
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_the_mask_is_the_official_one(side: int, prefix: int, backend: str) -> None:
    torch.manual_seed(0)
    attention = Attention(6, prefix + side * side, 2, 3, num_kernals=2, prefix=prefix, backend=backend).double()
    x = torch.randn(1, prefix + side * side, 6, dtype=torch.float64)
    # exp(-d^2) has few bits left where it is about to vanish, and the official mask is a root of it
    torch.testing.assert_close(attention(x), reference(attention, x, prefix), atol=2e-3 if side > 8 else 1e-6, rtol=1e-3)


def test_far_pairs_vanish() -> None:
    mask = GaussianMixtureMask(1, 1)
    dense = mask.dense(13)[0]
    assert dense[0, 13 * 10 + 2] == 0  # d^2 = 104
    assert dense[0, 13 * 10 + 1] != 0
    assert torch.equal(dense == 0, base_mask(13)[0, 0] == 0)


def test_talking_heads_without_a_mask() -> None:
    torch.manual_seed(0)
    block = TalkingHeads(8, 16, 2, 3).double()
    x, context = torch.randn(2, 1, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    q = block.to_q(x).unflatten(-1, (2, 3)).transpose(1, 2)
    k, v = block.to_kv(context).unflatten(-1, (2, 2, 3)).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT * 3**-0.5, block.mix_heads_pre_attn)
    weights = torch.einsum("bhij,hg->bgij", scores.softmax(-1), block.mix_heads_post_attn)
    torch.testing.assert_close(block(x, context), block.to_out((weights @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_simple_mask_multiplies_the_scores_of_all_heads(prefix: int) -> None:
    torch.manual_seed(0)
    attention = Attention(6, prefix + 16, 2, 3, is_GMM=False, is_SLM=True, prefix=prefix, backend="torch").double()
    assert attention.mask is not None
    assert [(n, tuple(p.shape)) for n, p in attention.mask.named_parameters()] == [("mask", (16, 16))]
    assert not bool(attention.mask.mask.any())
    nn.init.normal_(attention.mask.mask)
    x = torch.randn(2, prefix + 16, 6, dtype=torch.float64)
    q, k, v = attention.to_qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    factor = F.pad(attention.mask.mask, (prefix, 0, prefix, 0), value=1.0)
    weights = (factor * (q @ k.mT * 3**-0.5)).softmax(-1)
    expected = attention.to_out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)
    found, wanted = (torch.autograd.grad(out.square().sum(), attention.mask.mask)[0] for out in (attention(x), expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("host", ["gmm_mask_vit", "gmm_mask_cait", "gmm_mask_pit", "gmm_mask_t2t"])
def test_hosts_of_the_simple_mask(host: str) -> None:
    model = small(host, is_GMM=False, is_SLM=True, backend="torch")
    learned = [p for name, p in model.named_parameters() if name.endswith("mask.mask")]
    assert learned
    model(checks.image(16, 16)).square().sum().backward()
    # what patches say to each other in PiT's last block does not reach its class token
    assert all(p.grad is not None for p in learned)
    assert sum(bool(p.grad.any()) for p in learned) >= len(learned) - (host == "gmm_mask_pit")
    assert getattr(model, "cls_token", None) is None or host != "gmm_mask_vit"


def test_layer_scales_shrink_with_depth() -> None:
    assert [LayerScale(3, nn.Identity(), depth).scale.flatten()[0].item() for depth in (1, 18, 19, 24, 25)] == pytest.approx(
        [0.1, 0.1, 1e-5, 1e-5, 1e-6]
    )


def test_one_head_has_no_projection() -> None:
    assert not list(Attention(6, 9, 1, 6).to_out.parameters())
    assert list(Attention(6, 9, 1, 5).to_out.parameters())


@pytest.mark.parametrize("host", HOSTS)
def test_head(host: str) -> None:
    model = small(host).eval()
    x = checks.image(16, 16)
    assert model(x).shape == (2, 10)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert small(host, num_classes=0)(x).shape == (2, model.num_features)


MAPS: dict[str, list[tuple[int, int, int]]] = {  # (channels, side, reduction) of SMALL's
    "gmm_mask_vit": [(8, 4, 4)],
    "gmm_mask_vit_plain": [(8, 4, 4)],
    "gmm_mask_cait": [(8, 4, 4)],
    "gmm_mask_t2t": [(8, 4, 4)],
    "gmm_mask_pit": [(8, 4, 4), (16, 2, 8)],
    "gmm_mask_swin": [(4, 4, 4), (8, 2, 8)],
}


@pytest.mark.parametrize("host", HOSTS)
def test_features(host: str) -> None:
    backbone = small(host, features_only=True).eval()
    x = checks.image(16, 16)
    maps = backbone(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(c, side, side) for c, side, _ in MAPS[host]]
    assert [(info["num_chs"], info["reduction"]) for info in backbone.feature_info] == [(c, r) for c, _, r in MAPS[host]]
    assert all(backbone.get_submodule(info["module"]) for info in backbone.feature_info)
    model = small(host).eval()
    assert not model.load_state_dict(backbone.state_dict(), strict=False).unexpected_keys
    torch.testing.assert_close(model.forward_stages(x), maps)
    with pytest.raises(DeclarationError, match="out_indices"):
        small(host, features_only=True, out_indices=(5,))


@pytest.mark.parametrize(("host", "module"), [("gmm_mask_vit", "vit.ViT"), ("gmm_mask_cait", "cait.CaiT")])
def test_load_official_repeats_the_base_mask(host: str, module: str) -> None:
    model = small(host, num_classes=10).eval()
    state = model.state_dict()
    aliases = {key.replace(".sigma", ".mask"): state["mask"] for key in state if key.endswith("mask.sigma")}
    assert aliases
    config = {**SMALL, **HOSTS[host], "num_classes": 10, "dropout": 0.1, "emb_dropout": 0.1}
    torch.testing.assert_close(
        load_official("gmm-mask", module, config, state | aliases)(checks.image(16, 16)), model(checks.image(16, 16))
    )


@pytest.mark.parametrize(
    ("host", "module", "more", "names", "buffers"),
    [
        (
            "gmm_mask_pit",
            "pit.PiT",
            {"mlp_dim_ratio": 2, "is_GMM": True, "dropout": 0.1, "emb_dropout": 0.1},
            {
                "to_patch_embedding.0.weight",
                "layers.0.mask",
                "layers.0.layers.0.0.fn.mask.sigma",
                "layers.0.layers.0.1.fn.net.3.bias",
                "layers.1.downsample.net.0.weight",
                "layers.1.cls_ff.bias",
                "layers.2.mask",
                "layers.2.layers.0.0.norm.weight",
                "mlp_head.1.weight",
            },
            (),
        ),
        (
            "gmm_mask_swin",
            "swin.SwinTransformer",
            {"mlp_ratio": 2.0, "is_GMM": True, "drop_rate": 0.1},
            {
                "mask",
                "absolute_pos_embed",
                "patch_embed.norm.weight",
                "layers.0.blocks.1.attn.mask.alpha",
                "layers.0.blocks.0.attn.relative_position_bias_table",
                "layers.0.downsample.reduction.weight",
                "layers.1.blocks.0.mlp.fc2.bias",
                "head.bias",
            },
            ("layers.0.blocks.0.attn.relative_position_index", "layers.0.blocks.1.attn_mask"),
        ),
    ],
)
def test_official_names_of_other_hosts(host: str, module: str, more: Any, names: set[str], buffers: tuple[str, ...]) -> None:
    model = small(host, num_classes=10, backend="torch").eval()
    state = model.state_dict()
    assert names <= set(state)
    aliases = {key.replace(".sigma", ".mask"): torch.zeros(1) for key in state if key.endswith("mask.sigma")}
    aliases |= {key: torch.zeros(1) for key in buffers}
    common = {key: value for key, value in SMALL.items() if key in TAKES.get(host, SMALL)}
    config = {**common, **HOSTS[host], "num_classes": 10, **more}
    loaded = load_official("gmm-mask", module, config, state | aliases, backend="torch")
    torch.testing.assert_close(loaded(checks.image(16, 16)), model(checks.image(16, 16)))
    with pytest.raises(ShapeError, match="is not one of its keys"):
        load_official("gmm-mask", module, config, state | {"stray": torch.zeros(1)})


def test_patches_of_pit_are_a_convolution() -> None:
    model = small("gmm_mask_pit", backend="torch").eval()
    rows = model.to_patch_embedding(checks.image(16, 16))
    conv = model.to_patch_embedding[0]
    torch.testing.assert_close(rows, F.conv2d(checks.image(16, 16), conv.weight, conv.bias, stride=4).flatten(2).mT)


@pytest.mark.parametrize("host", HOSTS)
def test_training_lowers_the_loss(host: str) -> None:
    target = torch.randn(8, 10, generator=torch.Generator().manual_seed(3))
    checks.check_training(small(host, stochastic_depth=0.1), checks.image(16, 16, batch=8), target, lr=2e-2)


@pytest.mark.parametrize("host", HOSTS)
def test_round_trip(host: str) -> None:
    checks.check_saves(lambda: small(host), checks.image(16, 16))


@pytest.mark.parametrize("host", HOSTS)
def test_checkpointing(host: str) -> None:
    checks.check_checkpointing(lambda **more: small(host, stochastic_depth=0.3, **more), checks.image(16, 16))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("host", HOSTS)
def test_autocast(host: str, backend: str) -> None:
    checks.check_autocast(small(host, backend=backend), checks.image(16, 16))


@pytest.mark.parametrize("host", ["gmm_mask_vit", "gmm_mask_cait", "gmm_mask_t2t"])
def test_torch_compile(host: str) -> None:
    checks.check_compiles(small(host), checks.image(16, 16))


def test_masked_windows_are_the_official_ones() -> None:
    """One window of the map: the mask multiplies the scores, then the bias is added."""
    torch.manual_seed(0)
    layer = MaskedWindows(6, 2, 3, 0, 2).double()
    nn.init.normal_(layer.relative_position_bias_table)
    x = torch.randn(2, 3, 3, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    place = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), -1).flatten(0, 1)
    at = place[:, None] - place + 2
    bias = layer.relative_position_bias_table[at[..., 0] * 5 + at[..., 1]].permute(2, 0, 1)
    assert layer.mask is not None
    scores = q @ k.mT * 3**-0.5 * layer.mask.dense(3) + bias
    torch.testing.assert_close(layer(x), layer.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)))


def token_reference(attention: TokenAttention, x: Tensor) -> Tensor:
    """The official way: the scale by the input's channels, a dense mask, and a skip from v, or from x for several heads."""
    heads = attention.num_heads
    q, k, v = attention.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * (x.shape[-1] // heads) ** -0.5
    if attention.mask is not None:
        scores = attention.mask.dense(attention.side) * scores
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return attention.proj(mixed) + (v[:, 0] if heads == 1 else x)


@pytest.mark.parametrize(
    ("dim", "in_dim", "heads", "side", "masked"), [(27, 4, 1, 5, True), (6, 6, 3, 4, True), (6, 6, 2, 3, False)]
)
def test_attention_of_tokens(dim: int, in_dim: int, heads: int, side: int, masked: bool) -> None:
    torch.manual_seed(0)
    attention = TokenAttention(dim, heads, in_dim, num_patches=side**2, is_GMM=masked, num_kernals=2, backend="torch").double()
    x = torch.randn(2, side**2, dim, dtype=torch.float64)
    torch.testing.assert_close(attention(x), token_reference(attention, x))


def test_tokens_to_token_is_the_official_one() -> None:
    """Two soft splits and a transformer of tokens, sinusoids, blocks, the mean."""
    model = small("gmm_mask_t2t", backend="torch").eval()
    x = checks.image(16, 16)
    steps = model.tokens_to_token
    first, block = steps.attention1, model.blocks[0]
    assert isinstance(first, TokenTransformer)
    u = F.unfold(x, (3, 3), stride=2, padding=1).transpose(1, 2)
    u = token_reference(first.attn, first.norm1(u))
    u = u + first.mlp(first.norm2(u))
    u = F.unfold(u.transpose(1, 2).reshape(2, 4, 8, 8), (3, 3), stride=2, padding=1).transpose(1, 2)
    u = steps.project(u) + sinusoids(16, 8)
    u = u + token_reference(block.attn, block.norm1(u))
    u = u + block.mlp(block.norm2(u))
    torch.testing.assert_close(model(x), model.head(model.norm(u).mean(1)), atol=1e-5, rtol=1e-4)
    assert sinusoids(5, 6)[0, 3, 4:].tolist() == pytest.approx([math.sin(3 / 10000 ** (4 / 6)), math.cos(3 / 10000 ** (4 / 6))])


def test_large_images_are_split_once_more() -> None:
    model = small("gmm_mask_t2t", img_size=64, backend="torch").eval()
    assert model.forward_features(checks.image(64, 64)).shape == (2, 64, 8)
    names = {name for name, _ in model.named_parameters()}
    assert {"tokens_to_token.attention2.attn.mask.sigma", "tokens_to_token.attention2.mask", "blocks.0.attn.mask.alpha"} <= names
    state = model.state_dict()
    aliases = {key.replace(".sigma", ".mask"): torch.zeros(1) for key in state if key.endswith("mask.sigma")}
    config = {"img_size": 64, "num_classes": 10, **HOSTS["gmm_mask_t2t"], "num_kernals": 2, "is_GMM": True, "attn_drop_rate": 0.1}
    loaded = load_official("gmm-mask", "t2t.T2T_ViT", config, state | aliases, backend="torch")
    x = checks.image(64, 64)
    torch.testing.assert_close(loaded(x), model(x))


def test_pooling_leaves_the_class_token_out() -> None:
    pool = Pool(4)
    x = torch.randn(2, 1 + 25, 4)
    out = pool(x)
    assert out.shape == (2, 1 + 9, 8)
    torch.testing.assert_close(out[:, 0], pool.cls_ff(x[:, 0]))
    torch.testing.assert_close(
        out[:, 1:], pool.downsample(x[:, 1:].view(2, 5, 5, 4).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    )


def test_wrong_arguments() -> None:
    for host, overrides, message in (
        ("gmm_mask_pit", {"heads": (2,)}, "differ in length"),
        ("gmm_mask_swin", {"num_heads": (2,)}, "differ in length"),
        ("gmm_mask_swin", {"window_size": 3}, "2 stages in windows of 3 do not fit"),
        ("gmm_mask_t2t", {"img_size": 18}, "img_size=18 is no multiple of 4"),
    ):
        with pytest.raises(DeclarationError, match=message):
            small(host, **overrides)
    with pytest.raises(ShapeError, match="learned positions fix it to 16 x 16"):
        small("gmm_mask_swin")(checks.image(16, 20))
    with pytest.raises(ShapeError, match="masks fix it to 16 x 16"):
        small("gmm_mask_t2t")(checks.image(16, 20))
    with pytest.raises(ShapeError, match="2 heads add their input of 6 channels to an output of 4"):
        TokenAttention(6, 2, 4, num_patches=9)
    with pytest.raises(DeclarationError, match="does not divide img_size = 16"):
        small(patch_size=5)
    with pytest.raises(DeclarationError, match="a mixture needs at least one"):
        small(num_kernals=0)
    with pytest.raises(ShapeError, match="12 tokens are no square grid"):
        Attention(6, 12)
    with pytest.raises(ShapeError, match="learned positions fix it to 16 x 16"):
        small()(checks.image(16, 20))
