"""StyleSwin: parameter counts, filters, the discriminator's forms, training. Outputs and gradients: test_goldens.py."""

from __future__ import annotations

from typing import Any

import model_checks as checks
import pytest
import torch
from torch import Tensor, nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models import create_model, load_official
from attnc.models.blocks.resample import Haar, downsample_twice, upsample_twice
from attnc.models.styleswin import BilinearUpsample, Discriminator, Generator, StyleBlock

PARAMETERS = {
    "styleswin_256": 48_929_512,
    "styleswin_512": 40_788_511,
    "styleswin_512_m2": 49_301_879,
    "styleswin_1024": 40_862_990,
    "styleswin_1024_m2": 49_462_342,
    "styleswin_discriminator_256": 26_211_073,
    "styleswin_discriminator_512": 27_430_529,
    "styleswin_discriminator_1024": 27_736_129,
}
SMALL: dict[str, Any] = {
    "size": 16,
    "style_dim": 8,
    "n_mlp": 2,
    "enable_full_resolution": 4,  # shifted windows from 16 on
    "mlp_ratio": 2.0,
    "channels": (8, 8, 8),
    "num_heads": (2, 2, 2),
}
WIDTHS = {"4": 6, "8": 6, "16": 4, "32": 4}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("styleswin_256", **{**SMALL, **overrides})


def noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    assert checks.count(name) == PARAMETERS[name]


def test_widths_and_windows() -> None:
    with torch.device("meta"):
        model = create_model("styleswin_256")
    blocks = [block for block in model.modules() if isinstance(block, StyleBlock)]
    assert [b.qkv.in_features for b in blocks[::2]] == [512, 512, 512, 512, 512, 256, 128]
    assert [b.attend.heads for b in blocks[::2]] == [16, 16, 16, 16, 16, 8, 4]
    assert [b.window_size for b in blocks[::2]] == [4, 8, 8, 8, 8, 8, 8]


def test_no_window_is_shifted_where_there_is_one() -> None:
    torch.manual_seed(0)
    one, two = StyleBlock(8, (4, 8), 2, 4, style_dim=5), StyleBlock(8, (8, 8), 2, 4, style_dim=5)
    two.load_state_dict(one.state_dict())
    x, style = torch.randn(2, 8, 8, 8), torch.randn(2, 5)
    assert one.attend is not two.attend
    # the first half of the heads does not differ
    seen = []
    for block in (one, two):
        block.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        block(x, style)
    torch.testing.assert_close(seen[0][..., :4], seen[1][..., :4])
    assert not torch.allclose(seen[0][..., 4:], seen[1][..., 4:])


def test_wavelets_are_inverted() -> None:
    x = checks.image(6, 8, channels=2)
    torch.testing.assert_close(Haar(inverse=True)(Haar()(x)), x)


def test_filters_keep_a_constant() -> None:
    for filtered in (upsample_twice()(torch.ones(1, 2, 6, 6)), downsample_twice()(torch.ones(1, 2, 12, 12))):
        torch.testing.assert_close(filtered[..., 2:-2, 2:-2], torch.ones_like(filtered[..., 2:-2, 2:-2]))


def test_upsampling_adds_positions() -> None:
    up = BilinearUpsample(8, 16)
    nn.init.ones_(up.alpha)
    nn.init.zeros_(up.reduction.weight)
    out = up(torch.zeros(1, 2, 3, 8))[0]
    assert out.shape == (4, 6, 16)
    column, row = torch.arange(1.0, 7), torch.arange(1.0, 5)  # positions begin at 1; the last frequency is 1 / 10000
    torch.testing.assert_close(out[2, :, 0], column.sin())
    torch.testing.assert_close(out[2, :, 7], (column / 10000).cos())
    torch.testing.assert_close(out[:, 3, 8], row.sin())


def test_truncation() -> None:
    model = small().eval()
    mean = model.mean_latent(100)
    torch.testing.assert_close(model(noise(), 0.0, mean)[0], model(noise(), 0.0, mean)[1])
    torch.testing.assert_close(model(noise(), 1.0, mean), model(noise()))
    with pytest.raises(ShapeError, match="needs truncation_latent"):
        model(noise(), 0.5)


def test_training_lowers_the_loss() -> None:
    target = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(3)).expand(-1, -1, 16, 16) + 1
    checks.check_training(small(), noise(), target)


@pytest.mark.parametrize("sn", [False, True])
def test_the_discriminator_trains(sn: bool) -> None:
    torch.manual_seed(0)
    model = Discriminator(32, sn=sn, channels=WIDTHS)
    x = checks.image(32, 32, batch=8)
    checks.check_training(model, x, torch.ones(8, 1) * 2, lr=1e-3 if sn else 1e-2)


@pytest.mark.parametrize("sn", [False, True])
def test_the_discriminator_loads(sn: bool) -> None:
    torch.manual_seed(0)
    model = Discriminator(32, sn=sn, channels=WIDTHS)
    x = checks.image(32, 32, batch=4)
    model(x)  # spectral norms take a step
    state = model.state_dict()
    assert ("convs.0.conv2.1.weight_orig" in state) == sn
    assert ("final_linear.2.weight_u" in state) == sn
    config = {"size": 32, "sn": sn, "channels": WIDTHS, "blur_kernel": [1, 3, 3, 1]}
    torch.testing.assert_close(load_official("styleswin", "Discriminator", config, state)(x), model.eval()(x))
    without = {key: t for key, t in state.items() if not key.endswith((".kernel", ".ll", ".lh", ".hl", ".hh"))}
    torch.testing.assert_close(load_official("styleswin", "Discriminator", config, without)(x), model.eval()(x))


def test_round_trip() -> None:
    checks.check_saves(small, noise())


def test_checkpointing() -> None:
    checks.check_checkpointing(small, noise())


@pytest.mark.parametrize("sn", [False, True])
def test_checkpointing_the_discriminator(sn: bool) -> None:
    """With two forwards before the backward, as in training: spectral norms step in each, and in no recomputation."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Discriminator(32, sn=sn, channels=WIDTHS)
        model.set_grad_checkpointing(checkpointing)
        kept: list[Tensor] = []
        real, fake = checks.image(32, 32, batch=4), checks.image(32, 32, batch=4).flip(0, 2).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            loss = (model(real) - 2 * model(fake)).square().sum()
        loss.backward()
        found.append(({n: p.grad for n, p in model.named_parameters()} | {"fake": fake.grad}, dict(model.named_buffers()), kept))
        assert all(m.training for m in model.modules())
    (grads, buffers, every), (again, kept_buffers, fewer) = found
    torch.testing.assert_close(again, grads)
    torch.testing.assert_close(kept_buffers, buffers, rtol=0, atol=0)
    assert sum(t.numel() for t in fewer) < sum(t.numel() for t in every) * 0.6
    assert create_model("styleswin_discriminator_256", channels=dict.fromkeys((4, 8, 16, 32, 64, 256), 4), grad_checkpointing=True)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_autocast(backend: str) -> None:
    checks.check_autocast(small(backend=backend), noise())


def test_torch_compile() -> None:
    checks.check_compiles(small(), noise())


def test_wrong_arguments() -> None:
    for overrides, message in (
        ({"size": 12}, "a power of two"),
        ({"num_heads": (1, 2, 2)}, "it must be even"),
        ({"num_heads": (2, 2)}, "one each for"),
        ({"channels": (8, 8, 6)}, "multiple of 4, at least 8"),
    ):
        with pytest.raises(DeclarationError, match=message):
            small(**overrides)
    with pytest.raises(DeclarationError, match=r"one each for \[4, 8, 32\]"):
        Discriminator(32, channels={4: 6, 32: 4})
    with pytest.raises(DeclarationError, match="at least 16"):
        Discriminator(8)
    with pytest.raises(ShapeError, match="a batch of 6 has no groups of 4"):
        Discriminator(16, channels=WIDTHS)(checks.image(16, 16, batch=6))
    with pytest.raises(ShapeError, match="5 x 8, which is no multiple of the window 4"):
        StyleBlock(8, (8, 8), 2, 4, style_dim=5)(torch.randn(1, 5, 8, 8), torch.randn(1, 5))


def test_constructor_arguments() -> None:
    config = {**SMALL, "qkv_bias": False, "qk_scale": 0.3, "drop_rate": 0.1, "attn_drop_rate": 0.1, "use_checkpoint": True}
    model = small(qkv_bias=False, qk_scale=0.3).eval()
    assert isinstance(model, Generator)
    torch.testing.assert_close(load_official("styleswin", "Generator", config, model.state_dict())(noise=noise()), model(noise()))
