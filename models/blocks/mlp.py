"""The transformer's feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear C -> hidden, exact (erf) GELU, Linear hidden -> C, on the last dimension of ``[..., C]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out
