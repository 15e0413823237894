"""What every paper's tests ask of its models, whatever they compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from attnc.models import create_model

Build = Callable[..., nn.Module]


def image(height: int, width: int, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def count(name: str, **overrides: object) -> int:
    """Parameters of a registered variant, without allocating any."""
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **overrides).parameters())


def check_training(model: nn.Module, x: Tensor, target: Tensor, *, steps: int = 12, lr: float = 3e-3, to: float = 0.7) -> None:
    """Some steps towards `target` lower the squared error to less than `to` of what it was; all gradients are finite."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < to * losses[0], losses
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in trained.values()), [n for n, g in trained.items() if g is None]


def check_checkpointing(build: Build, x: Tensor) -> None:
    """The gradients with `grad_checkpointing` are those without, random depth included."""
    gradients = []
    for checkpointing in (False, True):
        model = build(grad_checkpointing=checkpointing)
        torch.manual_seed(2)
        model(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, msg=name)


def check_autocast(model: nn.Module, x: Tensor) -> None:
    """A forward under bfloat16 autocast is close to that in float32."""
    model.eval()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(x)
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


def check_saves(build: Build, x: Tensor) -> None:
    """A state dict survives safetensors, which takes no shared memory, and is all that there is to a model."""
    model, other = build().eval(), build().eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.02)
        other.load_state_dict(load(save(model.state_dict())))
        torch.testing.assert_close(other(x), model(x), atol=0, rtol=0)


def check_compiles(model: nn.Module, x: Tensor) -> None:
    """`torch.compile` takes the model in one graph and changes nothing."""
    model.eval()
    torch._dynamo.reset()  # models share code, and many of them in one process pass the limit of its recompilations
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), atol=1e-5, rtol=1e-4)
