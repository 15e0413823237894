"""The transformer's feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from attnc.models.blocks.linear import Linear, activated


class Mlp(nn.Module):
    """Linear C -> hidden, GELU, Linear hidden -> C, on the last dimension of ``[..., C]``.

    Args:
        dim: C.
        hidden: channels between the two.
        gelu: "none" is the exact (erf) GELU, "tanh" its approximation.
        drop: dropout after either layer.
    """

    def __init__(self, dim: int, hidden: int, *, gelu: str = "none", drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU(gelu)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``."""
        out: Tensor = self.drop(self.fc2(self.drop(activated(self.fc1, self.act, self.act.approximate, x))))
        return out
