"""`attnc.accelerate`: every family of timm's and torchvision's that it knows computes what it did, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO

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


def tiny(name: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=3, **settings)


def tv_swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as s

    v2 = {"block": s.SwinTransformerBlockV2, "downsample_layer": s.PatchMergingV2} if version == 2 else {}
    return s.SwinTransformer([4, 4], 12, [2, 2], [3, 6], [5, 4], stochastic_depth_prob=0.0, num_classes=3, **v2)


SWIN = {"embed_dim": 12, "depths": (2, 2), "num_heads": (3, 2), "window_size": 4}
MAXVIT = {"embed_dim": (32, 32), "depths": (1, 1), "stem_width": 16, "block_type": ("M", "M"), "window_size": 4, "img_size": 32}
CASES = {
    # the second size does not divide: shifted blocks run timm's code there
    "swin": Case(
        tiny("swin_tiny_patch4_window7_224", img_size=32, strict_img_size=False, **SWIN),
        ((32, 32), (36, 28)),
        {"window((4, 4))", "window((4, 4)).shift(2, 2)"},
        4,
    ),
    "swinv2": Case(
        tiny("swinv2_tiny_window8_256", img_size=32, strict_img_size=False, **SWIN),
        ((32, 32), (36, 28)),
        {"cosine(window((4, 4)))", "cosine(window((4, 4)).shift(2, 2))"},
        4,
    ),
    "swin, dynamic mask": Case(
        tiny("swin_tiny_patch4_window7_224", img_size=32, strict_img_size=False, always_partition=True, **SWIN),
        ((48, 32), (44, 28)),
        {"window((4, 4))", "window((4, 4)).shift(2, 2)"},
        4,
    ),
    "davit": Case(
        tiny("davit_tiny", embed_dims=(16, 32, 32, 32), num_heads=(2, 2, 2, 2), depths=(1, 1, 1, 1), window_size=3),
        ((32, 32), (72, 44)),
        {"window((3, 3))", "channel()"},
        8,
    ),
    "maxvit": Case(
        tiny("maxvit_tiny_tf_224", **MAXVIT), ((32, 32), (64, 32)), {"window((4, 4))", "grid((4, 4))"}, 4
    ),
    "maxvit, a network of positions": Case(
        tiny("maxvit_rmlp_pico_rw_256", **MAXVIT), ((32, 32), (64, 32)), {"window((4, 4))", "grid((4, 4))"}, 4
    ),
    "gcvit": Case(
        tiny("gcvit_xxtiny", embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_ratio=(4, 4), img_size=64),
        ((64, 64), (64, 64)),
        {"window((4, 4))", "window((2, 2))", "same_window(size=4)", "same_window(size=2)"},
        4,
    ),
    "crossvit": Case(
        tiny("crossvit_tiny_240", embed_dim=(16, 24), num_heads=(2, 2), depth=((1, 1, 0),), img_size=48),
        ((48, 48), (48, 48)),
        {"full()"},
        4,
    ),
    "convit": Case(
        tiny("convit_tiny", embed_dim=9, num_heads=4, depth=3, local_up_to_layer=2, img_size=64),
        ((64, 64), (64, 64)),
        {"full()", "positional()"},
        3,
    ),
    "volo": Case(
        tiny("volo_d1_224", layers=(1, 1, 0, 0), embed_dims=(12, 24, 24, 24), num_heads=(2, 2, 2, 2), img_size=64),
        ((64, 64), (64, 64)),
        {"outlook(3, stride=2, padding=1)", "full()"},
        4,
    ),
    "efficientvit_msra": Case(
        tiny("efficientvit_m0", embed_dim=(16, 32, 32), depth=(1, 1, 1), img_size=160),
        ((160, 160), (160, 192)),
        {"full()"},
        3,
    ),
    "shvit": Case(
        tiny("shvit_s1", embed_dim=(32, 32, 48), partial_dim=(8, 8, 12), depth=(1, 1, 1)), ((64, 64), (112, 80)), {"full()"}, 2
    ),
    "tnt": Case(
        tiny("tnt_s_patch16_224", embed_dim=24, inner_dim=12, num_heads_inner=2, num_heads_outer=3, depth=2, img_size=48),
        ((48, 48), (48, 48)),
        {"full()"},
        4,
    ),
    "vit": Case(
        tiny("vit_tiny_patch16_224", embed_dim=24, num_heads=3, depth=2, img_size=48, dynamic_img_size=True),
        ((48, 48), (80, 48)),
        {"full()"},
        2,
    ),
    "vit, norms of q and k": Case(
        tiny("vit_tiny_patch16_224", embed_dim=24, num_heads=3, depth=1, img_size=48, dynamic_img_size=True, qk_norm=True),
        ((48, 48), (80, 48)),
        {"full()"},
        1,
    ),
    "deit": Case(
        tiny("deit_tiny_distilled_patch16_224", embed_dim=24, num_heads=3, depth=1, img_size=48, dynamic_img_size=True),
        ((48, 48), (80, 48)),
        {"full()"},
        1,
    ),
    # windows of 5 x 4 on maps of 8 x 8 and 4 x 4: padded, shifted, and no shift on an axis of one window
    "torchvision swin": Case(
        lambda: tv_swin(1), ((32, 32), (44, 52)), {"window((5, 4), shift=(2, 2))", "window((5, 4))"}, 4
    ),
    "torchvision swin v2": Case(
        lambda: tv_swin(2), ((32, 32), (44, 52)), {"cosine(window((5, 4), shift=(2, 2)))", "cosine(window((5, 4)))"}, 4
    ),
}


def image(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def random_model(case: Case) -> nn.Module:
    """All parameters away from what they are initialised with, tables of zeros and ones too."""
    torch.manual_seed(0)
    model = case.build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((0.5 if "table" in name or "bias" in name else 0.1) * torch.randn_like(p))
    return model


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", CASES)
def test_computes_what_it_did(name: str) -> None:
    case = CASES[name]
    before = random_model(case)
    after = copy.deepcopy(before)
    parameters = dict(after.named_parameters())
    model, report = attnc.accelerate(after, backend="eager")
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
            torch.testing.assert_close(outputs(after, x), expected, rtol=1e-4, atol=1e-4)
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
            torch.testing.assert_close(found / scale, expected_grad / scale, rtol=1e-3, atol=1e-3, msg=lambda m, n=n: f"{n}: {m}")
