"""Linear layers on a CPU by the faster of the two libraries that PyTorch has for them, a GELU in the same pass over memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

PRODUCT = 1 << 23  # multiplications from which on a call of oneDNN, dearer than one of MKL, is made up for


def _slow_mkl() -> bool:
    """PyTorch's linear layers call MKL, whose products took 4 to 35 % longer than oneDNN's on an AMD EPYC with AVX-512."""
    info = Path("/proc/cpuinfo")
    if not info.exists() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    with info.open() as lines:
        vendor = next((line for line in lines if line.startswith("vendor_id")), "")
    libraries: bool = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return libraries and "AuthenticAMD" in vendor


SLOW_MKL = _slow_mkl()

# PyTorch's operator by a name of our own: inductor takes the original only with weights that it has frozen
_library: Any = torch.library.Library("attnc_models", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str after, Scalar?[] scalars, str? kind) -> Tensor",
    tags=(torch.Tag.needs_contiguous_strides,),
)
if SLOW_MKL:
    _library.impl("linear", torch.ops.mkldnn._linear_pointwise.default, "CPU")


def _linear_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.register_fake("attnc_models::linear", _linear_fake, lib=_library)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> Tensor:
    """x W^T + b of ``[..., C]``, or the GELU of that: "none" is the exact (erf) one, "tanh" its approximation."""
    if by_onednn(x, weight, bias):
        out: Tensor = torch.ops.attnc_models.linear(x, weight, bias, "none" if gelu is None else "gelu", [], gelu)
        return out
    out = F.linear(x, weight, bias)
    return out if gelu is None else F.gelu(out, approximate=gelu)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's operator, which has no derivatives, is worth it in this call, and nothing speaks against it."""
    return (
        SLOW_MKL
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.numel() * weight.shape[0] >= PRODUCT
        and all(type(t) in (Tensor, nn.Parameter) for t in (x, weight))
        and not torch.is_autocast_enabled("cpu")
        and not _watched()
    )


def _watched() -> bool:
    """Whether somebody sees operators who may not know this one: a transform, a mode, or what makes a program to take elsewhere."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    modes = bool(torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())
    return modes or forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C']``."""
        return linear(x, self.weight, self.bias)


def activated(layer: nn.Module, act: nn.Module, gelu: str | None, x: Tensor) -> Tensor:
    """act(layer(x)), in one pass where `act` is the GELU called `gelu` and `layer` a `Linear`, with nobody listening in between."""
    if gelu is not None and type(layer) is Linear and not _heard(layer) and not _heard(act):
        return linear(x, layer.weight, layer.bias, gelu)
    out: Tensor = act(layer(x))
    return out


def _heard(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class says."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__
