"""What every model must do, as checks that a paper's test calls with a small configuration of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from attnc.models import create_model, from_timm

Build = Callable[..., nn.Module]
Module = TypeVar("Module", bound=nn.Module)


def image(height: int, width: int, batch: int = 2) -> Tensor:
    """Random pixels, the same at each call."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def randomized(module: Module) -> Module:
    """`module` in evaluation mode with random parameters and statistics, so that nothing is zero, or one, by chance."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, std=0.2)
            nn.init.normal_(norm.weight, 1.0, 0.2)
    return module.eval()


def parameters(name: str, **overrides: Any) -> int:
    """The number of parameters of a registered variant, without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **overrides).parameters())


def has_timm_s_names(name: str, theirs: str) -> None:
    """timm's weights of the model `theirs` become exactly those of our variant."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        state, ours = timm.create_model(theirs, pretrained=False).state_dict(), create_model(name).state_dict()
    renamed = from_timm(name, state)
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in ours.items()}


def equals_timm(ours: nn.Module, theirs: nn.Module, family: str, sizes: Sequence[tuple[int, int]]) -> None:
    """With timm's random weights: the same logits at all sizes, and the same maps at the last one."""
    randomized(theirs)
    ours.eval().load_state_dict(from_timm(family, theirs.state_dict()))
    for size in sizes:
        x = image(*size)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    for found, expected in zip(ours.forward_stages(x), theirs.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def fuses(build: Build, size: tuple[int, int], **overrides: Any) -> set[str]:
    """One convolution per norm, the same function; a fused checkpoint fits a fused model. Gives the names of its parameters."""
    model = randomized(build(**overrides))
    x = image(*size)
    expected = model(x)
    state = model.fuse().state_dict()
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    other = build(**overrides).eval().fuse()
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), model(x))
    classifier_changes(build().eval().fuse(), size)
    return set(state)


def trains(model: nn.Module, size: tuple[int, int], steps: int = 12, rate: float = 3e-3) -> None:
    """A few steps on one batch lower the loss, and every parameter has a finite gradient."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    x, target = image(*size, batch=4), torch.arange(4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        assert p.grad is not None and bool(p.grad.isfinite().all()), name


def checkpointing_changes_nothing(build: Build, size: tuple[int, int]) -> None:
    """Gradients with and without recomputation are the same, random branches included."""
    gradients = []
    for checkpointing in (False, True):
        model = build(drop_path_rate=0.3, grad_checkpointing=checkpointing)
        torch.manual_seed(2)
        model(image(*size)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, msg=name)


def autocasts(model: nn.Module, size: tuple[int, int]) -> None:
    """Under bfloat16 autocast outputs stay near those of float32."""
    model.eval()
    exact = model(image(*size))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(image(*size))
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


def compiles(model: nn.Module, size: tuple[int, int]) -> None:
    """torch.compile takes the whole model as one graph, in evaluation and with a gradient."""
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = image(*size)
    torch.testing.assert_close(compiled(x), model(x))


def classifier_changes(model: nn.Module, size: tuple[int, int]) -> None:
    """Another number of classes, or none, which leaves what the classifier reads."""
    model.eval()
    model.reset_classifier(3)
    assert model(image(*size)).shape == (2, 3)
    pooled = model.forward_head(model.forward_features(image(*size)), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(image(*size)))
    model.reset_classifier(0)
    torch.testing.assert_close(model(image(*size)), pooled)


def features(build: Build, size: tuple[int, int], shapes: list[tuple[int, int, int]]) -> None:
    """Stage outputs ``(C, H, W)``, without a classifier, and equal to what the classifier is computed from."""
    backbone = build(features_only=True).eval()
    maps = backbone(image(*size))
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    info = [(i["num_chs"], *(-(-n // i["reduction"]) for n in size)) for i in backbone.feature_info]
    assert info == shapes
    model = build().eval()
    left = model.load_state_dict(backbone.state_dict(), strict=False)
    assert not left.unexpected_keys
    torch.testing.assert_close(model.forward_features(image(*size)), maps[-1])
    last = build(features_only=True, out_indices=(-1,)).eval()
    assert [tuple(m.shape[1:]) for m in last(image(*size))] == shapes[-1:]


def block_features(build: Build, size: tuple[int, int], shape: tuple[int, int, int], reduction: int) -> None:
    """Maps of a model without stages: those of its last three blocks by default, from which the classifier is computed."""
    backbone = build(features_only=True).eval()
    depth = len(backbone.blocks)
    maps = backbone(image(*size))
    assert [tuple(m.shape[1:]) for m in maps] == [shape] * min(depth, 3)
    assert {(info["num_chs"], info["reduction"]) for info in backbone.feature_info} == {(shape[0], reduction)}
    model = build().eval()
    left = model.load_state_dict(backbone.state_dict(), strict=False)
    assert not left.unexpected_keys
    every = model.forward_stages(image(*size))
    assert len(every) == depth
    for found, expected in zip(maps, every[-3:], strict=True):
        torch.testing.assert_close(found, expected)
    tokens = model.forward_features(image(*size))[:, -shape[1] * shape[2] :]
    torch.testing.assert_close(model.norm(maps[-1].flatten(2).transpose(1, 2)), tokens)
    last = build(features_only=True, out_indices=(-1,)).eval()
    assert [tuple(m.shape[1:]) for m in last(image(*size))] == [shape]


def saves(build: Build, size: tuple[int, int]) -> None:
    """A state dict survives safetensors, which takes no shared memory, and is all that there is to a model."""
    model, other = randomized(build()), build().eval()
    other.load_state_dict(load(save(model.state_dict())))
    torch.testing.assert_close(other(image(*size)), model(image(*size)), atol=0, rtol=0)
