"""DRCT: parameter counts, heads of each block, official constructors, training. Outputs and gradients: test_goldens.py."""

from __future__ import annotations

from typing import Any

import model_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, load_official
from attnc.models.drct import DenseGroup, SwinBlock

PARAMETERS = {
    "drct_x2": 13_991_867,
    "drct_x3": 14_176_507,
    "drct_x4": 14_139_579,
    "drct_l_x2": 27_433_007,
    "drct_l_x3": 27_617_647,
    "drct_l_x4": 27_580_719,
}
SMALL: dict[str, Any] = {"embed_dim": 8, "depths": (6,), "num_heads": (2,), "window_size": 4, "gc": 4, "upscale": 2}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("drct", **{**SMALL, **overrides})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert checks.count(name) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("dim", "gc", "num_heads", "heads"),
    [(180, 32, 6, [6, 4, 2, 6, 4]), (12, 4, 3, [3, 2, 1, 3, 2])],
)
def test_heads_follow_the_width(dim: int, gc: int, num_heads: int, heads: list[int]) -> None:
    group = DenseGroup(dim, (64, 64), num_heads, 4, gc=gc)
    blocks = [block for block in group.modules() if isinstance(block, SwinBlock)]
    assert [block.attn.relative_position_bias_table.shape[1] for block in blocks] == heads
    assert [block.mlp.fc1.out_features / block.mlp.fc1.in_features for block in blocks] == [4, 4, 4, 1, 1]


def test_drop_path_rates() -> None:
    """All blocks of a group take the first rate of its share of the depths."""
    model = small(depths=(2, 3), num_heads=(2, 2), drop_path_rate=0.4)
    rates = [block.drop_path.rate for block in model.modules() if isinstance(block, SwinBlock)]
    assert rates == pytest.approx([0.0] * 5 + [0.2] * 5)
    assert DenseGroup(8, (8, 8), 2, 4, drop_path=[0.1, 0.2]).get_submodule("swin5.drop_path").rate == 0.1


def test_load_official_takes_all_arguments() -> None:
    state = small().state_dict()
    unused = {"compress_ratio": 3, "squeeze_factor": 30, "conv_scale": 0.01, "overlap_ratio": 0.5, "drop_rate": 0.1}
    buffers = {
        "layers.0.swin2.attn_mask": torch.zeros(4, 16, 16),
        "layers.0.swin1.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
    }
    model = load_official("drct", "DRCT", {**SMALL, **unused}, state | buffers)
    torch.testing.assert_close(model(x=checks.image(8, 12)), small().eval()(checks.image(8, 12)))


def test_load_official_on_tokens() -> None:
    config = {"dim": 8, "input_resolution": [8, 4], "num_heads": 2, "window_size": 2, "shift_size": 1}
    block = SwinBlock(**{**config, "input_resolution": (8, 4)}).eval()
    x = torch.randn(2, 8, 12, 8)
    ours = load_official("drct", "SwinTransformerBlock", {**config, "H": 8, "W": 12}, block.state_dict())
    torch.testing.assert_close(ours(x=x.flatten(1, 2), x_size=(8, 12)), block(x).flatten(1, 2))


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


def test_wrong_arguments() -> None:
    with pytest.raises(DeclarationError, match="differ in length"):
        small(num_heads=(2, 2))
    with pytest.raises(DeclarationError, match="num_heads is 3, which does not divide dim = 13"):
        small(num_heads=(4,), gc=5)  # a width of 13 takes 4 - 1 heads
    with pytest.raises(DeclarationError, match=r"shift_size is 4; it must lie in \[0, window_size\)"):
        SwinBlock(8, (8, 8), 2, 4, 4)
    with pytest.raises(ShapeError, match="6 x 8, which is no multiple of the window 4"):
        small()(checks.image(6, 8))
