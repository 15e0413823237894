"""`attnc.accelerate`: every family of timm's and torchvision's that it knows computes what it did, and what it leaves alone."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


@dataclass(frozen=True)
class Case:
    """A tiny model, two sizes of images, the patterns that are found, and how many modules are replaced."""

    build: Callable[[], nn.Module]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    patterns: set[str]
    count: int


def tiny(module: str, cls: str, **settings: Any) -> Callable[[], nn.Module]:
    """A class of `timm.models`."""
    return lambda: getattr(importlib.import_module(f"timm.models.{module}"), cls)(num_classes=3, **settings)


def maxvit(**settings: Any) -> nn.Module:
    from timm.models import maxxvit as m

    kinds = settings.pop("kinds", ("M", "M"))
    transformer = m.MaxxVitTransformerCfg(window_size=(4, 4), grid_size=(4, 4), dim_head=8, **settings)
    cfg = m.MaxxVitCfg(embed_dim=(16, 16), depths=(1, 1), block_type=kinds, stem_width=16, transformer_cfg=transformer)
    return m.MaxxVit(cfg, img_size=32, num_classes=3)


def tv_swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as s

    v2 = {"block": s.SwinTransformerBlockV2, "downsample_layer": s.PatchMergingV2} if version == 2 else {}
    return s.SwinTransformer([4, 4], 12, [2, 2], [3, 6], [5, 4], stochastic_depth_prob=0.0, num_classes=3, **v2)


def swin(version: str, **settings: Any) -> Callable[[], nn.Module]:
    sizes = {"img_size": 32, "embed_dim": 12, "depths": (2, 2), "num_heads": (3, 2), "window_size": 4, "strict_img_size": False}
    return tiny(f"swin_transformer{version}", f"SwinTransformer{version[1:].upper()}", **(sizes | settings))


VIT = {"img_size": 48, "embed_dim": 24, "num_heads": 3, "depth": 1, "dynamic_img_size": True}
CASES = {
    # the second size does not divide: shifted blocks run timm's code there
    "swin": Case(swin(""), ((32, 32), (36, 28)), {"window((4, 4))", "window((4, 4)).shift(2, 2)"}, 4),
    "swin, always shifted": Case(
        swin("", always_partition=True), ((48, 32), (16, 16)), {"window((4, 4))", "window((4, 4)).shift(2, 2)"}, 4
    ),
    "swin, one size": Case(
        swin("", strict_img_size=True, window_size=(4, 2)),
        ((32, 32), (32, 32)),
        {"window((4, 2))", "window((4, 2)).shift(2, 1)", "window((4, 2)).shift(0, 1)"},
        4,
    ),
    "swinv2": Case(swin("_v2"), ((32, 32), (36, 28)), {"cosine(window((4, 4)))", "cosine(window((4, 4)).shift(2, 2))"}, 4),
    "davit": Case(
        tiny("davit", "DaVit", embed_dims=(16, 16), num_heads=(2, 2), depths=(1, 1), window_size=3),
        ((48, 48), (44, 28)),
        {"window((3, 3))", "channel()"},
        4,
    ),
    "davit, channels scaled by their number": Case(
        tiny("davit", "DaVit", embed_dims=(16,), num_heads=(2,), depths=(1,), window_size=3, channel_attn_v2=True),
        ((24, 24), (44, 28)),
        {"window((3, 3))", "channel()"},
        2,
    ),
    "maxvit": Case(lambda: maxvit(rel_pos_type="bias_tf"), ((32, 32), (64, 32)), {"window((4, 4))", "grid((4, 4))"}, 4),
    "maxvit, heads first": Case(
        lambda: maxvit(rel_pos_type="bias", head_first=True), ((32, 32), (64, 32)), {"window((4, 4))", "grid((4, 4))"}, 4
    ),
    "maxvit, a network of positions": Case(
        lambda: maxvit(rel_pos_type="mlp", use_nchw_attn=True), ((32, 32), (64, 32)), {"window((4, 4))", "grid((4, 4))"}, 4
    ),
    "maxvit, parallel": Case(
        lambda: maxvit(rel_pos_type="", kinds=("PM", "PM")), ((32, 32), (64, 32)), {"window((4, 4))", "grid((4, 4))"}, 2
    ),
    "gcvit": Case(
        tiny(
            "gcvit",
            "GlobalContextVit",
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 2),
            window_ratio=(8, 8),
            img_size=32,
            layer_scale=0.5,
        ),
        ((32, 32), (32, 32)),
        {"window((4, 4))", "same_window(size=4)"},
        4,
    ),
    "crossvit": Case(
        tiny(
            "crossvit", "CrossVit", embed_dim=(16, 24), num_heads=(2, 2), depth=((1, 1, 0),), mlp_ratio=(2.0, 2.0, 1.0), img_size=48
        ),
        ((48, 48), (48, 48)),
        {"full()"},
        4,
    ),
    "convit": Case(
        tiny("convit", "ConVit", embed_dim=12, num_heads=4, depth=3, local_up_to_layer=2, img_size=48),
        ((48, 48), (48, 48)),
        {"full()", "positional()"},
        3,
    ),
    "volo": Case(
        tiny(
            "volo",
            "VOLO",
            layers=(1, 1),
            embed_dims=(12, 24),
            num_heads=(2, 2),
            downsamples=(True, False),
            outlook_attention=(True, False),
            mlp_ratio=3.0,
            use_mix_token=False,
            img_size=64,
        ),
        ((64, 64), (64, 64)),
        {"outlook(3, stride=2, padding=1)", "full()"},
        4,
    ),
    "efficientvit_msra": Case(
        tiny(
            "efficientvit_msra",
            "EfficientVitMsra",
            embed_dim=(16, 32),
            key_dim=(4, 4),
            depth=(1, 1),
            num_heads=(2, 2),
            window_size=(3, 3),
            kernels=(3, 5),
            down_ops=(("", 1), ("subsample", 2)),
            img_size=64,
        ),
        ((64, 64), (80, 112)),
        {"full()"},
        2,
    ),
    "shvit": Case(
        tiny("shvit", "SHViT", embed_dim=(32, 32, 48), partial_dim=(8, 8, 12), depth=(1, 1, 1), types=("i", "s", "s")),
        ((64, 64), (112, 80)),
        {"full()"},
        2,
    ),
    "tnt": Case(
        tiny("tnt", "TNT", embed_dim=24, inner_dim=12, num_heads_inner=2, num_heads_outer=3, depth=1, img_size=32),
        ((32, 32), (32, 32)),
        {"full()"},
        2,
    ),
    "vit": Case(tiny("vision_transformer", "VisionTransformer", **VIT), ((48, 48), (80, 48)), {"full()"}, 1),
    "vit, norms of q and k": Case(
        tiny("vision_transformer", "VisionTransformer", qk_norm=True, **VIT), ((48, 48), (80, 48)), {"full()"}, 1
    ),
    "deit": Case(tiny("deit", "VisionTransformerDistilled", **VIT), ((48, 48), (80, 48)), {"full()"}, 1),
    # windows of 5 x 4 on maps of 8 x 8 and 4 x 4: padded, shifted, and no shift on an axis of one window
    "torchvision swin": Case(lambda: tv_swin(1), ((32, 32), (44, 52)), {"window((5, 4), shift=(2, 2))", "window((5, 4))"}, 4),
    "torchvision swin v2": Case(
        lambda: tv_swin(2), ((32, 32), (44, 52)), {"cosine(window((5, 4), shift=(2, 2)))", "cosine(window((5, 4)))"}, 4
    ),
}


def image(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def random_model(case: Case) -> nn.Module:
    """All parameters away from what they are initialised with, tables of zeros and ones too."""
    torch.manual_seed(0)
    model = case.build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((0.5 if "table" in name or "bias" in name else 0.1) * torch.randn_like(p))
    return model.double()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", CASES)
def test_computes_what_it_did(name: str) -> None:
    case = CASES[name]
    before = random_model(case)
    after = copy.deepcopy(before)
    parameters = dict(after.named_parameters())
    model, report = attnc.accelerate(after, backend="torch")
    assert model is after
    assert {p for r in report.replaced for p in r.patterns} == case.patterns
    assert len(report.replaced) == case.count
    assert not report.left, str(report)
    assert list(after.state_dict()) == list(before.state_dict())
    assert all(p is parameters[n] for n, p in after.named_parameters())
    for size in dict.fromkeys(case.sizes):
        x = image(size)
        for m in (before, after):
            m.eval()
        with torch.no_grad():
            expected = outputs(before, x)
            assert expected.abs().max() > 1e-2
            torch.testing.assert_close(outputs(after, x), expected, rtol=1e-7, atol=1e-7)
        gradients = []
        for m in (before, after):
            m.train()
            m.zero_grad()
            torch.manual_seed(2)
            outputs(m, x).square().sum().backward()
            gradients.append({n: p.grad for n, p in m.named_parameters()})
        for n, expected_grad in gradients[0].items():
            found = gradients[1][n]
            if expected_grad is None:
                assert found is None
                continue
            scale = max(float(expected_grad.abs().max()), 1e-2)
            assert found is not None
            torch.testing.assert_close(found / scale, expected_grad / scale, rtol=1e-7, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")


def plain_vit(**settings: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(num_classes=3, **(VIT | settings)).double()


def one_stage() -> nn.Module:
    """A block without a shift and one with."""
    return random_model(Case(swin("", depths=(2,), num_heads=(3,)), ((32, 32),) * 2, set(), 2)).eval()


def test_float32_with_the_default_backend() -> None:
    """What users run: windows, shift and bias in one kernel, to 1e-4."""
    before = one_stage().float()
    after, _ = attnc.accelerate(copy.deepcopy(before))
    x = image((32, 32)).float()
    with torch.no_grad():
        torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- what is left alone
def test_unknown_attention_is_left_alone() -> None:
    from timm.models.swin_transformer import SwinTransformerBlock

    class Mine(SwinTransformerBlock):
        pass

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)
            self.block = Mine(8, (8, 8))
            self.vit = plain_vit(img_size=32)
            self.own = attnc.models.create_model("davit_tiny", depths=(1,), embed_dims=(8,), num_heads=(1,))

    other = Other()
    _, report = attnc.accelerate(other)
    assert type(other.block) is Mine
    assert [r.path for r in report.rows] == ["attn", "block", "vit.blocks.0.attn"]
    assert [r.path for r in report.replaced] == ["vit.blocks.0.attn"]
    assert report.rows[0].reason == "no replacement is known for this class"
    assert report.rows[1].reason.startswith("it is a subclass of timm.models.swin_transformer.SwinTransformerBlock")
    with pytest.raises(DeclarationError, match=r"the model is a str, not a torch\.nn\.Module"):
        attnc.accelerate("davit_tiny")  # type: ignore[type-var]


def test_modules_without_replacement_give_their_reason() -> None:
    """Hooks would be lost; half of an unknown kind of head does not exist; both stay what they were."""
    model = random_model(CASES["swin"])
    seen = []
    model.layers[0].blocks[1].attn.qkv.register_forward_hook(lambda *_: seen.append(1))
    _, report = attnc.accelerate(model, backend="torch")
    assert [r.path for r in report.left] == ["layers.0.blocks.1"]
    assert report.left[0].reason == "attn has hooks, which would not be called any more: remove them first"
    with torch.no_grad():
        model(image((32, 32)))
    assert seen


def test_an_unlowered_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnc.models.accelerate import timm_vit

    def refused(*_: object) -> attnc.Operator:
        raise attnc.UnsupportedError("not lowered: use another backend")

    model = plain_vit()
    original = type(model.blocks[0].attn)
    monkeypatch.setattr(timm_vit, "packed_tokens", refused)
    _, report = attnc.accelerate(model)
    assert type(model.blocks[0].attn) is original
    assert [r.reason for r in report.left] == ["not lowered: use another backend"]


@pytest.mark.parametrize("name", ["vit", "torchvision swin", "maxvit", "gcvit", "volo", "swin", "convit", "crossvit", "tnt"])
def test_dropped_weights_are_the_originals(name: str) -> None:
    """With dropout of attention weights the original runs in training, attnc in evaluation."""
    before = random_model(CASES[name])
    for m in before.modules():
        if hasattr(m, "attn_drop"):
            m.attn_drop.p = 0.3
        if hasattr(m, "attention_dropout"):
            m.attention_dropout = 0.3
    after, report = attnc.accelerate(copy.deepcopy(before), backend="torch")
    assert all("the original where attention weights are dropped (p = 0.3, in training)" in r.reason for r in report.replaced)
    found = []
    for m in (before, after):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(outputs(m.train(), image(CASES[name].sizes[0])))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_masked_tokens_are_the_originals() -> None:
    before = plain_vit()
    after, report = attnc.accelerate(copy.deepcopy(before), backend="torch")
    assert "the original where a call masks tokens" in report.rows[0].reason
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(after.blocks[0].attn(x, attn_mask=mask), before.blocks[0].attn(x, attn_mask=mask))
    assert not torch.allclose(after.blocks[0].attn(x, attn_mask=mask), after.blocks[0].attn(x))


# ------------------------------------------------------------------------------------------------------- the model goes on living
def test_a_second_time_changes_nothing_but_the_backend() -> None:
    model = random_model(CASES["davit"])
    _, first = attnc.accelerate(model, backend="eager")
    classes = [type(m) for m in model.modules()]
    _, second = attnc.accelerate(model, backend="torch")
    assert [type(m) for m in model.modules()] == classes
    assert first.to_dict() == second.to_dict()
    assert model.stages[0].blocks[0][0].attend.backend == "torch"


def test_copies_and_checkpoints() -> None:
    before = random_model(CASES["swin"]).eval()
    after, _ = attnc.accelerate(copy.deepcopy(before), backend="torch")
    x = image((32, 32))
    with torch.no_grad():
        expected = after(x)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(after)))  # noqa: S301  our own bytes
        torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)
        assert type(copied.layers[0].blocks[0]) is type(after.layers[0].blocks[0])
        fresh, _ = attnc.accelerate(CASES["swin"].build().double().eval(), backend="torch")
        fresh.load_state_dict(before.state_dict())  # a checkpoint of the plain model
        torch.testing.assert_close(fresh(x), expected, rtol=0, atol=0)


# timm's own, where it resizes tables
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("name", ["swin", "swinv2", "maxvit"])
def test_another_input_size(name: str) -> None:
    """Windows change with timm's set_input_size, and so do the operators."""
    before = random_model(CASES[name])
    after, _ = attnc.accelerate(copy.deepcopy(before), backend="torch")
    for m in (before.eval(), after.eval()):
        m.set_input_size(img_size=(48, 48), window_size=(3, 3))
        if name == "maxvit":
            assert m.stages[0].blocks[0].attn_block.partition_size == (3, 3)
    with torch.no_grad():
        torch.testing.assert_close(after(image((48, 48))), before(image((48, 48))), rtol=1e-7, atol=1e-7)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    model = one_stage()
    attnc.accelerate(model, backend="torch")
    x = image((32, 32))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()


def test_autocast() -> None:
    before = random_model(CASES["swin"]).float().eval()
    after, _ = attnc.accelerate(copy.deepcopy(before), backend="torch")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = after(image((32, 32)).float()), before(image((32, 32)).float())
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


# ------------------------------------------------------------------------------------------------------------------- the report
def test_report() -> None:
    from rich.console import Console

    _, report = attnc.accelerate(random_model(CASES["swin, one size"]))
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["model"], data["replaced"], data["left"]) == ("SwinTransformer", 4, 0)
    assert data["rows"][1] == {
        "path": "layers.0.blocks.1",
        "kind": "timm.models.swin_transformer.SwinTransformerBlock",
        "patterns": ["window((4, 2)).shift(2, 1)"],
        "reason": "the original where windows do not divide the map, for timm rolls before it pads",
        "replaced": True,
    }
    assert "layers.0.blocks.1 (timm.models.swin_transformer.SwinTransformerBlock): window((4, 2)).shift(2, 1); the" in str(report)
    out = StringIO()
    Console(file=out, width=160).print(report)
    assert "SwinTransformer: 4 attention modules replaced, 0 left alone" in out.getvalue()
    assert "layers.1.blocks.0" in out.getvalue()


def test_optional_and_in_any_order() -> None:
    """In fresh interpreters: attnc after timm, and accelerating a model without timm or torchvision loads neither."""
    after = "import timm, attnc; assert 'attnc_davit_tiny' in timm.list_models('attnc_*')"
    alone = """
import sys, torch, attnc
assert "attnc.models.accelerate" not in sys.modules
_, report = attnc.accelerate(torch.nn.Sequential(torch.nn.MultiheadAttention(4, 1)))
assert [r.path for r in report.left] == ["0"] and not {"timm", "torchvision"} & set(sys.modules)
"""
    for text in (after, alone):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
