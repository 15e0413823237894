"""HAT: parameter counts, official constructors, meaning at borders, training. Outputs and gradients: test_goldens.py."""

from __future__ import annotations

from typing import Any

import model_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, load_official
from attnc.models.blocks.relative_window import RelativeWindowAttention
from attnc.models.hat import OverlappingBlock

PARAMETERS = {
    "hat_s": (9_473_471, 9_658_111, 9_621_183),
    "hat": (20_624_795, 20_809_435, 20_772_507),
    "hat_l": (40_698_863, 40_883_503, 40_846_575),
}
SMALL: dict[str, Any] = {
    "embed_dim": 8,
    "depths": (2,),
    "num_heads": (2,),
    "window_size": 4,
    "compress_ratio": 2,
    "squeeze_factor": 4,
    "upscale": 2,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("hat", **{**SMALL, **overrides})


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str, scale: int) -> None:
    assert checks.count(f"{name}_x{scale}") == PARAMETERS[name][scale - 2]


def test_initialisation() -> None:
    model = small(embed_dim=32)
    assert 0.015 < model.get_parameter("layers.0.residual_group.overlap_attn.relative_position_bias_table").std() < 0.025
    assert 0.015 < model.get_parameter("layers.0.residual_group.blocks.1.attn.qkv.weight").std() < 0.025
    assert not model.get_parameter("layers.0.residual_group.blocks.1.mlp.fc1.bias").any()


def rolled(attention: RelativeWindowAttention, x: Tensor, shift: int) -> Tensor:
    """Swin's own way: roll by -shift, cut into windows, -100 between regions, roll back."""
    w, (b, height, width, c) = attention.window_size, x.shape
    heads = attention.relative_position_bias_table.shape[1]

    def cut(t: Tensor) -> Tensor:
        return t.view(b, height // w, w, width // w, w, -1).transpose(2, 3).reshape(-1, w * w, t.shape[-1])

    label = sum(
        ((torch.arange(n) >= n - w).int() + (torch.arange(n) >= n - shift).int()).view(shape) * weight
        for n, shape, weight in ((height, (-1, 1), 3), (width, (1, -1), 1))
    )
    region = cut(label.expand(height, width)[None, :, :, None].expand(b, -1, -1, -1)).squeeze(-1)
    mask = torch.where(region[:, None, :, None] == region[:, None, None, :], 0.0, -100.0).to(x.dtype)
    row, column = torch.arange(w * w) // w, torch.arange(w * w) % w
    index = (row[:, None] - row + w - 1) * (2 * w - 1) + column[:, None] - column + w - 1
    bias = attention.relative_position_bias_table[index].permute(2, 0, 1)
    qkv = cut(torch.roll(attention.qkv(x), (-shift, -shift), (1, 2))).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias + mask).transpose(1, 2).flatten(2)
    out = out.view(b, height // w, width // w, w, w, c).transpose(2, 3).reshape(b, height, width, c)
    return attention.proj(torch.roll(out, (shift, shift), (1, 2)))


@pytest.mark.parametrize("size", [(4, 4), (4, 12), (8, 4), (12, 8)])  # one window on an axis is still cut in two
@pytest.mark.parametrize("shift", [1, 2])
def test_shifted_windows_are_swins(size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    attention = RelativeWindowAttention(6, 4, 2, shift).double()
    nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    torch.testing.assert_close(attention(x), rolled(attention, x, shift))


@pytest.mark.parametrize(("window", "ratio"), [(2, 1.0), (4, 0.5), (4, 1.0), (3, 0.7), (4, 0.0), (2, 3.0)])
def test_overlapping_windows_are_an_unfold(window: int, ratio: float) -> None:
    """Zero rows around the map are keys; the bias index may be negative, and then counts from the table's end."""
    torch.manual_seed(0)
    block = OverlappingBlock(6, window, ratio, 2).double()
    keys, span = block.overlap_size, block.span
    nn.init.normal_(block.relative_position_bias_table)
    rows, columns = 2, 3
    x = torch.randn(1, rows * window, columns * window, 6, dtype=torch.float64)
    u = block.norm1(x)
    q, k, v = (block.qkv(u).permute(0, 3, 1, 2)).chunk(3, 1)

    def unfold(t: Tensor, size: int) -> Tensor:
        patches = F.unfold(t, size, stride=window, padding=(size - window) // 2)
        return patches.view(2, 3, size * size, -1).permute(3, 0, 2, 1)

    i, j = torch.arange(window * window), torch.arange(keys * keys)
    dy = j // keys - (i // window)[:, None] + window - keys + 1
    dx = j % keys - (i % window)[:, None] + window - keys + 1
    bias = block.relative_position_bias_table[dy * span + dx].permute(2, 0, 1)
    out = F.scaled_dot_product_attention(unfold(q, window), unfold(k, keys), unfold(v, keys), attn_mask=bias)
    out = out.view(rows, columns, 2, window, window, 3).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    y = block.proj(out) + x
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


@pytest.mark.parametrize(
    "overrides",
    [
        {"upscale": 1, "in_chans": 1},
        {"upscale": 3, "img_range": 255.0, "resi_connection": "identity"},
        {"upscale": 4, "patch_norm": False, "qkv_bias": False, "qk_scale": 0.3},
        {"img_size": (8, 12), "ape": True},
    ],
)
def test_constructor_arguments(overrides: dict[str, Any]) -> None:
    model = small(**overrides)
    x = checks.image(8, 12, 1, overrides.get("in_chans", 3))
    scale = overrides.get("upscale", 2)
    assert model(x).shape == (1, x.shape[1], 8 * scale, 12 * scale)
    names = dict(model.named_parameters())
    assert ("absolute_pos_embed" in names) == ("ape" in overrides)
    assert ("layers.0.conv.weight" in names) == ("resi_connection" not in overrides)


def test_small_images_are_one_window() -> None:
    """An `img_size` within the window takes away the shift, and the window shrinks."""
    shrunk = small(img_size=3)
    assert shrunk.get_parameter("layers.0.residual_group.blocks.0.attn.relative_position_bias_table").shape == (25, 2)
    one, two = small(img_size=4).eval(), small().eval()
    two.load_state_dict(one.state_dict())
    x = checks.image(8, 8)
    assert not torch.allclose(one(x), two(x))


def test_load_official_takes_all_arguments() -> None:
    state = small().state_dict()
    config = {**SMALL, "mlp_ratio": 2, "drop_rate": 0.1, "attn_drop_rate": 0.1, "use_checkpoint": True, "upsampler": "pixelshuffle"}
    index = {"relative_position_index_SA": torch.zeros(16, 16, dtype=torch.int64)}
    model = load_official("hat", "HAT", config, state | index)
    torch.testing.assert_close(model(x=checks.image(8, 8)), small().eval()(checks.image(8, 8)))


def test_training_lowers_the_loss() -> None:
    x = checks.image(8, 8)
    checks.check_training(small(drop_path_rate=0.1), x, F.interpolate(x, scale_factor=2))


def test_round_trip() -> None:
    checks.check_saves(small, checks.image(8, 8))


def test_checkpointing() -> None:
    checks.check_checkpointing(lambda **more: small(drop_path_rate=0.3, **more), checks.image(8, 8))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_autocast(backend: str) -> None:
    checks.check_autocast(small(backend=backend), checks.image(8, 12))


def test_torch_compile() -> None:
    checks.check_compiles(small(), checks.image(8, 12))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1, 1)}, "differ in length"),
        ({"num_heads": (3,)}, "does not divide dim = 8"),
        ({"overlap_ratio": 0.25}, "must be even"),
        ({"upscale": 5}, "a power of two, or 3"),
        ({"upsampler": "nearest"}, "only 'pixelshuffle'"),
        ({"resi_connection": "3conv"}, "'1conv' and 'identity' exist"),
        ({"squeeze_factor": 9}, "between 1 and dim = 8"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        small(**overrides)


def test_wrong_sizes() -> None:
    with pytest.raises(ShapeError, match="9 x 8, which is no multiple of the window 4"):
        small()(checks.image(9, 8))
    with pytest.raises(ShapeError, match="absolute positions were made for 64 tokens"):
        small(img_size=8, ape=True)(checks.image(8, 12))
