"""Stochastic depth (Huang et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from attnc.errors import DeclarationError


class DropPath(nn.Module):
    """In training, drop a branch per sample with probability `rate`; kept ones grow by 1 / (1 - rate).

    Raises:
        DeclarationError: the rate is not in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise DeclarationError(f"drop path rate is {rate}; it must lie in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...] -> [B, ...]``; the identity in evaluation mode."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], *(1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        """The rate, for printing."""
        return f"rate={self.rate:g}"


def linear_rates(last: float, blocks: int) -> list[float]:
    """Drop path rates that grow linearly from 0 at the first block to `last` at the last one."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]
