"""DaViT: parameter counts, timm parity, odd sizes, training, and everything a user of the model touches."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attnc.errors import AttncError, DeclarationError, ShapeError, UnsupportedError
from attnc.models import create_model, from_timm, list_models, load_official, timm_bridge
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.davit import Block, ChannelAttention, WindowAttention

PARAMETERS = {  # 1000 classes
    "davit_tiny": 28_360_168,
    "davit_small": 49_745_896,
    "davit_base": 87_954_408,
    "davit_large": 196_811_752,
    "davit_huge": 362_685_416,
    "davit_giant": 1_437_435_880,
}
SMALL: dict[str, Any] = {
    "embed_dims": (16, 16, 24, 32),
    "num_heads": (2, 2, 3, 4),  # 8 channels each: few kernels to build
    "depths": (1, 1, 1, 1),
    "window_size": 3,
    "mlp_ratio": 2.0,
    "num_classes": 10,
}


def small(**overrides: Any) -> nn.Module:
    """A DaViT of a few thousand parameters in which every stage needs padding at most sizes."""
    torch.manual_seed(0)
    return create_model("davit_tiny", **{**SMALL, **overrides})


def image(height: int = 33, width: int = 50, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_all_variants_are_listed() -> None:
    assert set(PARAMETERS) <= set(list_models())


def test_official_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in create_model("davit_tiny").named_parameters()}
    assert shapes["patch_embeds.0.proj.weight"] == (96, 3, 7, 7)
    assert shapes["patch_embeds.0.norm.weight"] == (96,)
    assert shapes["patch_embeds.3.proj.weight"] == (768, 384, 2, 2)
    assert shapes["patch_embeds.3.norm.weight"] == (384,)
    for block in ("main_blocks.2.1.0", "main_blocks.2.1.1"):
        assert shapes[f"{block}.cpe.0.proj.weight"] == shapes[f"{block}.cpe.1.proj.weight"] == (384, 1, 3, 3)
        assert shapes[f"{block}.attn.qkv.weight"] == (1152, 384)
        assert shapes[f"{block}.attn.proj.bias"] == shapes[f"{block}.norm1.weight"] == (384,)
        assert shapes[f"{block}.mlp.fc1.weight"] == (1536, 384)
        assert shapes[f"{block}.mlp.fc2.weight"] == (384, 1536)
    assert shapes["norms.weight"] == (768,)
    assert shapes["head.weight"] == (1000, 768)


def test_initialisation() -> None:
    model = small()
    assert 0.015 < model.get_parameter("head.weight").std() < 0.025
    assert model.get_parameter("main_blocks.0.0.0.attn.qkv.weight").abs().max() < 0.1
    assert not model.get_parameter("main_blocks.0.0.0.mlp.fc1.bias").any()
    assert bool((model.get_parameter("norms.weight") == 1).all())
    stem = "patch_embeds.0.proj.weight"
    assert model.get_parameter(stem).std() > 0.04  # torch's default
    assert 0.015 < small(weight_init="conv").get_parameter(stem).std() < 0.025


# 97 x 70 leaves windows and strides incomplete
@pytest.mark.parametrize("size", [(224, 224), (97, 70)])
def test_equals_timm(size: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("davit_tiny", pretrained=False).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)  # biases too, or padded keys would be zero
    ours = create_model("davit_tiny").eval()
    ours.load_state_dict(from_timm("davit_tiny", theirs.state_dict()))
    with torch.no_grad():
        x = image(*size, batch=1)
        expected, found = theirs(x), ours(x)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_overlapped_patches_equal_timm() -> None:
    pytest.importorskip("timm")
    from timm.models.davit import DaVit

    shared = {key: SMALL[key] for key in ("embed_dims", "num_heads", "depths", "window_size", "mlp_ratio", "num_classes")}
    theirs = DaVit(**shared, down_kernel_size=3).eval()
    ours = small(overlapped_patch=True).eval()
    ours.load_state_dict(from_timm("davit", theirs.state_dict()))
    torch.testing.assert_close(ours(image(37, 51)), theirs(image(37, 51)), atol=1e-5, rtol=1e-4)


def test_registered_with_timm() -> None:
    """In a fresh interpreter: importing attnc.models neither loads timm nor misses its import, whenever that comes."""
    pytest.importorskip("timm")
    code = """
import importlib.util, sys
import attnc.models
assert importlib.util.find_spec("timm") and "timm" not in sys.modules
import timm
assert timm.__spec__.loader is timm.__loader__
assert "attnc_davit_tiny" in timm.list_models("attnc_*")
model = timm.create_model("attnc_davit_tiny", num_classes=3, depths=(1, 1, 1, 1))
assert model.num_classes == 3 and type(model).__name__ == "DaViT"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_registered_with_timm_imported_before() -> None:
    timm = pytest.importorskip("timm")
    timm_bridge.register()  # what importing attnc.models does where timm is loaded already; again is harmless
    assert {f"attnc_{name}" for name in list_models()} <= set(timm.list_models())


def test_timm_has_no_weights_of_ours() -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(UnsupportedError, match="hosts no weights"):
        timm.create_model("attnc_davit_tiny", pretrained=True)
    with pytest.raises(UnsupportedError, match="no timm names are known for 'nothing'"):
        from_timm("nothing", {})


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (33, 50), (7, 5), (1, 1), (130, 9)])
def test_any_size(size: tuple[int, int], overlapped: bool) -> None:
    model = small(overlapped_patch=overlapped)
    logits = model(image(*size))
    assert logits.shape == (2, 10)
    assert bool(logits.isfinite().all())


def test_features_only() -> None:
    model = small(features_only=True).eval()
    maps = model(image(50, 70))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 13, 18), (2, 16, 7, 9), (2, 24, 4, 5), (2, 32, 2, 3)]
    assert not any(name.startswith(("norms", "head")) for name, _ in model.named_parameters())
    classifier = small().eval()
    classifier.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(classifier.forward_features(image(50, 70)), maps[-1])
    two = small(features_only=True, out_indices=(1, -1))
    assert [m.shape[1] for m in two(image())] == [16, 32]
    assert [f["reduction"] for f in two.feature_info] == [8, 32]


def test_head() -> None:
    model = small().eval()
    maps = model.forward_features(image())
    pooled = model.forward_head(maps, pre_logits=True)
    # the norm comes after the pooling
    torch.testing.assert_close(pooled, F.layer_norm(maps.mean((2, 3)), (32,)))
    torch.testing.assert_close(model(image()), model.get_classifier()(pooled))
    model.reset_classifier(3)
    assert model(image()).shape == (2, 3)
    assert small(num_classes=0)(image()).shape == (2, 32)


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small(drop_path_rate=0.3, grad_checkpointing=checkpointing)
        torch.manual_seed(2)
        model(image()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, msg=name)


def test_drop_path() -> None:
    torch.manual_seed(0)
    drop, ones = DropPath(0.25), torch.ones(4000, 2, 3)
    kept = drop(ones)[:, 0, 0]
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(kept.mean() - 1) < 0.05
    assert drop.eval()(ones) is ones
    assert linear_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert linear_rates(0.3, 1) == [0.0]
    with pytest.raises(DeclarationError, match=r"\[0, 1\)"):
        DropPath(1.0)

    model = small(drop_path_rate=0.5)
    rates = [block.drop_path.rate for block in model.modules() if isinstance(block, Block)]
    assert rates == pytest.approx(linear_rates(0.5, 8))
    assert not torch.equal(model(image()), model(image()))
    model.eval()
    assert torch.equal(model(image()), model(image()))


def test_training_lowers_the_loss() -> None:
    model = small(drop_path_rate=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, target = image(24, 40, batch=8), torch.arange(8)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_round_trip(tmp_path: Path) -> None:
    model = small().eval()
    save_file(model.state_dict(), tmp_path / "davit.safetensors")
    torch.manual_seed(9)
    other = create_model("davit_tiny", **SMALL).eval()
    assert not torch.equal(other(image()), model(image()))
    other.load_state_dict(load_file(tmp_path / "davit.safetensors"))
    assert torch.equal(other(image()), model(image()))


def test_copies_share_operators() -> None:
    model = small().eval()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        assert torch.equal(copied(image()), model(image()))


def test_one_operator_per_declaration() -> None:
    """Layers with the same window and heads run the same compiled operator."""
    a, b = WindowAttention(16, 3, 2), WindowAttention(32, (3, 3), 2)
    assert a.attend is b.attend is copy.deepcopy(a).attend
    assert a.attend is not WindowAttention(16, 3, 4).attend
    assert ChannelAttention(16, 2).attend is ChannelAttention(24, 3).attend


def test_backend_reaches_every_operator() -> None:
    model = small(backend="eager").eval()
    operators = {m.attend for m in model.modules() if isinstance(m, WindowAttention | ChannelAttention)}
    assert {op.backend for op in operators} == {"eager"}
    assert len(operators) == 1 + len(set(SMALL["num_heads"]))
    torch.testing.assert_close(model(image()), small().eval()(image()), atol=1e-5, rtol=1e-4)


def test_padded_keys_are_the_biases() -> None:
    """The operator's virtual padding equals padding the tensor before qkv, gradients included."""
    torch.manual_seed(0)
    layer = WindowAttention(12, 4, 3).double()
    nn.init.normal_(layer.qkv.bias)
    x = torch.randn(2, 6, 5, 12, dtype=torch.float64)

    def padded(t: Tensor) -> Tensor:
        return layer(F.pad(t, (0, 0, 0, 3, 0, 2)))[:, :6, :5]

    results = []
    for forward in (layer, padded):
        layer.zero_grad()
        out = forward(x)
        out.square().sum().backward()
        results.append([out.detach()] + [p.grad.clone() for p in layer.parameters() if p.grad is not None])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    without_bias = WindowAttention(12, 4, 3, qkv_bias=False).double()
    assert without_bias(x).shape == x.shape


def test_torch_compile() -> None:
    model = small().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image()), model(image()))


def test_torch_export() -> None:
    model = small().eval()
    exported = torch.export.export(model, (image(),))
    torch.testing.assert_close(exported.module()(image()), model(image()))


def test_autocast() -> None:
    model = small(backend="torch").eval()
    exact = model(image())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(image())
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1, 1)}, "differ in length"),
        ({"depths": (1, 0, 1, 1)}, "at least one layer"),
        ({"patch_size": 8}, "stride 4"),
        ({"attention_types": ("windowed",)}, "'spatial' and 'channel' exist"),
        ({"out_indices": (4,)}, "there are 4 stages"),
        ({"num_heads": (5, 4, 3, 4)}, "does not divide dim = 16"),
        ({"num_classes": -1}, "num_classes=-1: the number of logits"),
        ({"num_classes": 1.5}, "num_classes=1.5: the number of logits"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)


def test_unknown_names() -> None:
    with pytest.raises(DeclarationError, match="did you mean davit_tiny"):
        create_model("davit_tinny")
    with pytest.raises(DeclarationError, match=r"'Nothing' of 'davit'.*ChannelAttention"):
        load_official("davit", "Nothing", {}, {})
    with pytest.raises(DeclarationError, match=r"papers: .*davit"):
        load_official("nothing", "Nothing", {}, {})
    with pytest.raises(DeclarationError, match="colour"):
        load_official("davit", "DaViT", {"colour": 1}, {})


CHANNEL = {"dim": 12, "num_heads": 3, "qkv_bias": True}


def test_load_official_is_strict() -> None:
    state = ChannelAttention(**CHANNEL).state_dict()
    assert not load_official("davit", "ChannelAttention", CHANNEL, state).training
    for wrong, message in (
        ({k: v for k, v in state.items() if k != "proj.bias"}, "'proj.bias' is missing"),
        (state | {"more": torch.zeros(1)}, "'more' is not one of its keys"),
        (state | {"proj.bias": torch.zeros(7)}, r"'proj.bias' has shape \[7\] instead of \[12\]"),
    ):
        with pytest.raises(ShapeError, match=message) as caught:
            load_official("davit", "ChannelAttention", CHANNEL, wrong)
        assert isinstance(caught.value, AttncError)


def test_load_official_takes_dtype_and_derived_inputs() -> None:
    state = {k: v.double() for k, v in ChannelAttention(**CHANNEL).state_dict().items()}
    module = load_official("davit", "ChannelAttention", CHANNEL, state)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x=x, H=2, W=3, size=(2, 3)), module(x))
    pickle.loads(pickle.dumps(module))  # noqa: S301 - our own bytes


def test_official_window_attention() -> None:
    config = {"dim": 12, "window_size": (2, 3), "num_heads": 3}
    state = WindowAttention(**config).state_dict()
    module = load_official("davit", "WindowAttention", config, state)
    x = torch.randn(4, 6, 12)
    heads = F.linear(x, state["qkv.weight"], state["qkv.bias"]).view(4, 6, 3, 3, 4).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(*heads.unbind(0)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x=x), F.linear(mixed, state["proj.weight"], state["proj.bias"]))
    with pytest.raises(ShapeError, match=r"x has 5 tokens, its size \(2, 3\) says 6"):
        module(x=x[:, :5])
