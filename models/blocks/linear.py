"""Linear layers on a CPU by the faster of the two libraries that PyTorch has for them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 400  # from so many on oneDNN's time for reordering the weight, in each call, is paid for


@lru_cache(maxsize=1)
def _slow_mkl() -> bool:
    """PyTorch's linear layers call MKL, whose products took 6 to 15 % longer than oneDNN's on an AMD EPYC with AVX-512."""
    info = Path("/proc/cpuinfo")
    vendor = next((line for line in info.read_text().splitlines() if line.startswith("vendor_id")), "") if info.exists() else ""
    libraries: bool = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return libraries and "AuthenticAMD" in vendor


class Linear(nn.Linear):
    """`nn.Linear`; where nobody differentiates, in float32 on a CPU, as a convolution of one pixel, which oneDNN computes."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C']``."""
        if not self.as_convolution(x):
            return super().forward(x)
        pixels = x.view(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
        # to dilate one pixel changes nothing, but for PyTorch's choice: without it one thread would go to MKL here, too
        out = F.conv2d(pixels, self.weight[:, :, None, None], self.bias, dilation=2)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)

    def as_convolution(self, x: Tensor) -> bool:
        """Whether this call is worth it, and nothing speaks against it."""
        return (
            not torch.compiler.is_compiling()
            and x.dtype == self.weight.dtype == torch.float32
            and x.device.type == "cpu"
            and x.numel() >= ROWS * x.shape[-1]
            and x.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and _slow_mkl()
        )
