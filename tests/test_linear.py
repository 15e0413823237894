"""Linear layers by oneDNN's operator, and the GELU that follows one, in models of our own and in accelerated ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import attnc
from attnc.models.blocks import linear

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    pytest.skip("PyTorch is built without oneDNN", allow_module_level=True)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What follows the product in each call of oneDNN's operator, on a machine where it pays for any size."""
    calls: list[str] = []

    def operator(*args: Any) -> Tensor:
        calls.append(args[3])
        return torch.ops.mkldnn._linear_pointwise(*args)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.ops.attnc_models, "linear", operator)
    monkeypatch.setattr(linear, "SLOW_MKL", True)
    monkeypatch.setattr(linear, "PRODUCT", 1)
    return calls


def test_linear_layers_take_the_faster_library(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, but where somebody differentiates or watches, the product is small or another dtype passes."""
    layer = nn.Linear(24, 40)
    model, report = attnc.accelerate(nn.Sequential(layer))
    assert type(layer) is linear.Linear
    assert report.linear == report.to_dict()["linear"] == 1
    x = torch.randn(3, 200, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for rows in (x, x.transpose(0, 1), x[:, ::2], x[:0]):
            torch.testing.assert_close(model(rows), torch.nn.functional.linear(rows, layer.weight, layer.bias))
            assert model(rows).is_contiguous()
        assert seen == 6 * ["none"]  # the empty one is the other library's
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        torch.vmap(model)(x)
        with FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == 2 * 600 * 24 * 40
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent
        torch.testing.assert_close(tangent, x @ layer.weight.T)
        exported = torch.export.export(model, (x,))
        assert "attnc" not in str(exported.graph)
        monkeypatch.setattr(linear, "PRODUCT", x.numel() * 40 + 1)
        model(x)
        monkeypatch.setattr(linear, "PRODUCT", 1)
        monkeypatch.setattr(linear, "SLOW_MKL", False)
        model(x)
    model(x).sum().backward()
    assert not seen


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), timm.layers.activations.GELU(), timm.layers.activations.GELUTanh()])
def test_a_gelu_is_part_of_the_product(act: nn.Module, seen: list[str]) -> None:
    """In timm's feed-forward layer, where nobody listens between the two."""
    layer = timm.layers.Mlp(16, 32, act_layer=lambda: act).eval()
    plain = copy.deepcopy(layer)
    changed, report = attnc.accelerate(layer)
    assert report.mlps == report.to_dict()["mlps"] == 1
    assert not report.rows
    assert "2 linear layers by the faster library, 1 with their GELU" in str(report)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(changed(x), plain(x))
        assert seen == ["gelu", "none"]
        seen.clear()
        heard: list[Tensor] = []
        handle = changed.act.register_forward_hook(lambda _, args, out: heard.append(args[0]))
        torch.testing.assert_close(changed(x), plain(x))
        torch.testing.assert_close(heard, [plain.fc1(x)])
        handle.remove()
        changed.fc1.forward = lambda x: 2 * plain.fc1(x)
        torch.testing.assert_close(changed(x), plain.fc2(plain.act(2 * plain.fc1(x))))
        del changed.fc1.forward
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (changed, plain)]
    torch.testing.assert_close(*grads)
    assert seen == 3 * ["none"]  # of the two calls that were heard; a gradient takes none


def test_feed_forward_layers_without_a_gelu_stay(seen: list[str]) -> None:
    for layer in (timm.layers.Mlp(16, 32, act_layer=nn.ReLU), torchvision.ops.MLP(16, [32, 16]), torchvision.ops.MLP(16, [32])):
        plain, x = copy.deepcopy(layer).eval(), torch.randn(2, 9, 16)
        changed, report = attnc.accelerate(layer.eval())
        assert not report.mlps
        with torch.no_grad():
            torch.testing.assert_close(changed(x), plain(x))
    assert "gelu" not in seen


def test_torchvision_s_feed_forward_layer(seen: list[str]) -> None:
    layer = torchvision.ops.MLP(16, [32, 16], activation_layer=nn.GELU, inplace=None, dropout=0.5)
    plain, x = copy.deepcopy(layer).eval(), torch.randn(2, 9, 16)
    changed, report = attnc.accelerate(layer.eval())
    assert report.mlps == 1
    with torch.no_grad():
        torch.testing.assert_close(changed(x), plain(x))
    assert seen == ["gelu", "none"]
    assert [n for n, _ in changed.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_an_odd_subclass_of_a_feed_forward_layer_stays() -> None:
    class Doubled(timm.layers.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.fc1(x)

    layer = Doubled(16, 32)
    changed, report = attnc.accelerate(layer)
    assert type(changed) is Doubled
    assert not report.mlps
    assert not report.rows


def test_compiled_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, whatever the batch; its code calls the operator where that pays, and a gradient gets another graph."""
    monkeypatch.setattr(linear, "PRODUCT", 1)
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = timm.layers.Mlp(16, 32).eval()
    changed, _ = attnc.accelerate(copy.deepcopy(plain))
    compiled = torch.compile(changed, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 16, 9).transpose(1, 2)  # a producer's layout that is not the product's
        with torch.no_grad():
            found, codes = run_and_get_code(compiled, x) if batch == 2 else (compiled(x), [])
            torch.testing.assert_close(found, plain(x))
        assert sum(code.count("attnc_models.linear.default(") for code in codes) == 2 * linear.SLOW_MKL * (batch == 2)
        torch.testing.assert_close(compiled(x), plain(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["shvit_s1", "efficientvit_m0"])
def test_maps_lie_channels_last_from_the_image_on(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
    for _ in range(2):  # a second time changes nothing
        changed, report = attnc.accelerate(model)
        assert (report.model, report.stems) == (type(timm.create_model(name)).__name__, 1)
        assert "; maps channels last from the image on" in str(report).splitlines()[0]
        assert report.to_dict()["stems"] == 1
    seen: list[bool] = []
    for conv in (m for m in changed.modules() if isinstance(m, nn.Conv2d)):
        conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last)))
    with torch.no_grad():
        torch.testing.assert_close(changed(x), expected)
    assert seen[0]
    assert sum(seen) > len(seen) / 2  # slices of maps do not
