"""TiC: parameter counts, the layer beside its equation, shifts and pooled keys, any size. Goldens: test_goldens.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import classifier_checks as checks
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attnc.errors import DeclarationError
from attnc.models import create_model, load_official
from attnc.models.tic import DIRECTIONS, MSAConv, WindowAttention, WindowScores

SMALL: dict[str, Any] = {
    "dims": (8, 12),
    "depths": (2, 1),
    "num_heads": (2, 3),
    "kernel_size": 3,
    "mlp_ratio": 2.0,
    "num_classes": 5,
    "backend": "torch",
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("tic_tiny", **{**SMALL, **overrides})


def expected_count(dims: tuple[int, ...], depths: tuple[int, ...], classes: int) -> int:
    """Of the network's own description: patch embeddings with norms, blocks, the head."""
    total, before, side = dims[-1] * 2 + (dims[-1] + 1) * classes, 3, 4
    for c, depth in zip(dims, depths, strict=True):
        total += (before * side**2 + 1) * c + 2 * c  # convolution, norm
        total += depth * (2 * 2 * c + 3 * c * (c + 1) + c * (c + 1) + 4 * c * (c + 1) + c * (4 * c + 1))
        before, side = c, 2
    return total


def test_parameter_count() -> None:
    dims, depths = (64, 128, 256, 512), (2, 2, 6, 2)
    assert checks.parameters("tic_tiny") == expected_count(dims, depths, 1000) == 12_747_944
    assert checks.parameters("tic_tiny", pooled=True) == 12_747_944  # averages have no parameters


@pytest.mark.parametrize(
    ("channels", "out", "kernel", "bias", "count"), [(12, 16, 3, False, 2196), (8, 12, 5, True, 2628), (8, 8, (3, 1), False, 408)]
)
def test_layer_count(channels: int, out: int, kernel: Any, bias: bool, count: int) -> None:
    assert sum(p.numel() for p in MSAConv(channels, out, kernel, bias=bias).parameters()) == count


def unfolded(x: Tensor, kernel: tuple[int, int], dilation: int | tuple[int, int]) -> Tensor:
    """Each position's window of a map ``[B, h, d, H, W]``, zeros outside: ``[B, h, d, taps, H, W]``."""
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    around = [d * (n - 1) // 2 for n, d in zip(kernel, steps, strict=True)]
    rows = F.unfold(x.flatten(1, 2), kernel, dilation=dilation, padding=around)
    return rows.view(*x.shape[:3], -1, *x.shape[3:])


def windowed(q: Tensor, keys: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax over the windows of several maps, each with its keys and values ``[B, h, d, taps, H, W]``."""
    dots = torch.cat([(q[:, :, :, None] * k).sum(2) for k, _ in keys], 2) * q.shape[2] ** -0.5
    return (dots.softmax(2)[:, :, None] * torch.cat([v for _, v in keys], 3)).sum(3)


@pytest.mark.parametrize(
    ("kernel", "dilation", "heads", "size"),
    [
        ((3, 3), 1, 1, (5, 7)),
        ((3, 5), 2, 2, (9, 4)),
        ((5, 1), 1, 6, (2, 3)),
        ((3, 3), (2, 1), 2, (6, 5)),
        ((7, 7), 3, 3, (6, 11)),
        ((1, 1), 1, 1, (3, 2)),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_layer_is_its_equation(kernel: tuple[int, int], dilation: Any, heads: int, size: tuple[int, int], backend: str) -> None:
    torch.manual_seed(0)
    layer = MSAConv(6, 4, kernel, (1, 2), dilation, (2, 1), True, num_heads=heads, backend=backend).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    q, k, v = layer.qkv_conv(x).view(2, 3, heads, 6 // heads, *size).unbind(1)
    mixed = windowed(q, [(unfolded(k, kernel, dilation), unfolded(v, kernel, dilation))]).reshape(x.shape)
    expected = F.relu(F.conv2d(mixed + x, layer.mlp.weight, layer.mlp.bias, stride=(1, 2), padding=(2, 1)))
    out = layer(x)
    torch.testing.assert_close(out, expected)
    leaves = [x, *layer.parameters()]
    weight = torch.randn_like(out)
    for found, wanted in zip(torch.autograd.grad(out, leaves, weight), torch.autograd.grad(expected, leaves, weight), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("kernel", "dilation", "size"), [((3, 5), 1, (4, 7)), ((1, 3), 3, (5, 5))])
def test_scores_by_tap(kernel: tuple[int, int], dilation: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = WindowScores(kernel, dilation, backend="torch")(q, k, v)
    around, wide = [dilation * (n - 1) // 2 for n in kernel], [dilation * (n - 1) for n in kernel]
    padded = F.pad(k, (around[1], around[1], around[0], around[0]))
    for tap in range(kernel[0] * kernel[1]):
        y, x = dilation * (tap // kernel[1]), dilation * (tap % kernel[1])
        under = padded[:, :, y : y + size[0], x : x + size[1]]
        torch.testing.assert_close(out["dots"][:, tap], (q * under).sum(1))
    assert padded.shape[2] == size[0] + wide[0]
    keys = [(unfolded(t[:, None], kernel, dilation)) for t in (k, v)]
    torch.testing.assert_close(out["out"], windowed(q[:, None] * 3**0.5, [(keys[0], keys[1])])[:, 0])
    weight = [torch.randn_like(t) for t in out.values()]
    expected = [(q[:, :, None] * keys[0][:, 0]).sum(1), windowed(q[:, None] * 3**0.5, [(keys[0], keys[1])])[:, 0]]
    for found, wanted in zip(
        torch.autograd.grad(list(out.values()), (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_padding_takes_its_share() -> None:
    """Equal scores: a corner of a 3 x 3 window has 4 of 9 keys, and the rest of the weight goes to zeros."""
    layer = MSAConv(1, 1, backend="torch")
    nn.init.zeros_(layer.qkv_conv.weight)
    with torch.no_grad():
        layer.qkv_conv.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    x = torch.zeros(1, 1, 4, 5)
    q, k, v = layer.qkv_conv(x).permute(0, 2, 3, 1)[:, :, :, None].split(1, -1)
    out = layer.attend(q, k, v)[0, :, :, 0, 0]
    assert out[0, 0].item() == pytest.approx(4 / 9)
    assert out[0, 2].item() == pytest.approx(6 / 9)
    assert out[2, 2].item() == pytest.approx(1)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("size", "direction"), [((8, 5), (1, -1)), ((9, 6), (-1, 1)), ((3, 7), (1, 1)), ((5, 5), (0, 0))])
def test_attention_of_the_network(size: tuple[int, int], direction: tuple[int, int], pooled: bool) -> None:
    """Keys roll round the border by a quarter of the rows; pooled ones stay and join the softmax."""
    torch.manual_seed(0)
    attention = WindowAttention(6, 2, 3, 1, direction, pooled, backend="torch").double()
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    q, k, v = attention.qkv(x).view(2, *size, 3, 2, 3).permute(3, 0, 4, 5, 1, 2)
    step = size[0] // 4
    rolled = [torch.roll(t, (step * direction[0], step * direction[1]), (3, 4)) for t in (k, v)]
    keys = [(unfolded(rolled[0], (3, 3), 1), unfolded(rolled[1], (3, 3), 1))]
    if pooled:
        coarse = []
        for t in (k, v):
            half = F.avg_pool2d(t.flatten(1, 2), 2, ceil_mode=True).unflatten(1, (2, 3))
            window = unfolded(half, (3, 3), 1).repeat_interleave(2, 4).repeat_interleave(2, 5)
            coarse.append(window[..., : size[0], : size[1]])
        keys.append((coarse[0], coarse[1]))
    mixed = windowed(q, keys).permute(0, 3, 4, 1, 2).flatten(3)
    torch.testing.assert_close(attention(x), attention.proj(mixed))


def test_blocks_shift_in_turn() -> None:
    model = small(depths=(6, 2))
    ways = [block.attn.direction for block in model.stages[0].blocks]
    assert ways == [(0, 0), (1, -1), (-1, 1), (-1, -1), (1, 1), (1, -1)]
    assert DIRECTIONS[0] == (1, 1)
    assert [block.attn.direction for block in model.stages[1].blocks] == [(0, 0), (1, -1)]
    assert {block.attn.direction for block in small(shifted=False).stages[0].blocks} == {(0, 0)}


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (45, 30)])
def test_any_size(size: tuple[int, int]) -> None:
    logits = small().eval()(checks.image(*size))
    assert logits.shape == (2, 5)
    assert bool(logits.isfinite().all())


def test_features_only() -> None:
    checks.features(lambda **more: small(**more), (32, 40), [(8, 8, 10), (12, 4, 5)])


def test_head() -> None:
    checks.classifier_changes(small(), (24, 32))


def test_training_lowers_the_loss() -> None:
    checks.trains(small(pooled=True, drop_path_rate=0.1), (24, 32), rate=1e-2)


def test_checkpointing() -> None:
    checks.checkpointing_changes_nothing(lambda **more: small(**more), (24, 32))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_autocast(backend: str) -> None:
    checks.autocasts(small(backend=backend), (24, 32))


def test_layer_under_autocast_attends_in_float32() -> None:
    torch.manual_seed(0)
    layer = MSAConv(6, 4, backend="torch")
    seen: list[torch.dtype] = []
    plain = layer.attend
    layer.attend = lambda q, k, v: seen.append(q.dtype) or plain(q, k, v)  # type: ignore[assignment,func-returns-value]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 6, 5, 5)).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_torch_compile() -> None:
    checks.compiles(small(pooled=True), (24, 32))


def test_depthwise_flavour_is_one_head_per_channel() -> None:
    torch.manual_seed(0)
    attention = MSAConv(4, 4, num_heads=4, backend="torch")
    assert attention(torch.randn(1, 4, 5, 6)).shape == (1, 4, 5, 6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MSAConv(6, 4, 4), "a window of 4 has no middle"),
        (lambda: MSAConv(6, 4, num_heads=4), "does not divide dim = 6"),
        (lambda: small(depths=(1,)), "differ in length"),
        (lambda: small(out_indices=(2,), features_only=True), "there are 2 stages"),
        (lambda: load_official("tic", "MSA_Conv_2d", {"input_channel": 4, "kernel_size": 3}, {}), "output_channel"),
    ],
)
def test_wrong_arguments(build: Any, message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        build()


def test_a_rest_of_rows_is_left_out() -> None:
    """Patches are convolutions without padding, and the second stage's have 2 x 2 tokens."""
    maps = small(features_only=True).eval()(checks.image(33, 46))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 11), (2, 12, 4, 5)]


def test_safetensors(tmp_path: Path) -> None:
    model = small(pooled=True).eval()
    save_file(model.state_dict(), tmp_path / "tic.safetensors")
    other = create_model("tic_tiny", **SMALL, pooled=True).eval()
    other.load_state_dict(load_file(tmp_path / "tic.safetensors"))
    assert torch.equal(other(checks.image(16, 16)), model(checks.image(16, 16)))
