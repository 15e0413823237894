"""timm's feed-forward layer, which most of its transformers share: the GELU in the product's pass over memory."""

from __future__ import annotations

from typing import Any

from timm.layers import activations, mlp
from torch import Tensor, nn

from attnc.models.accelerate.swap import Accelerated, replaces
from attnc.models.blocks.linear import activated


def gelu(act: Any) -> str | None:
    """The name of this GELU, if it is one."""
    if type(act) is nn.GELU:
        return act.approximate
    return {activations.GELU: "none", activations.GELUTanh: "tanh"}.get(type(act))


@replaces(mlp.Mlp)
class AcceleratedMlp(Accelerated, mlp.Mlp):
    """Linear, GELU, Linear."""

    counted = "mlps"
    gelu: str | None

    def refuse(self) -> str:
        return "" if gelu(self.act) else "its activation is no GELU"

    def build(self) -> tuple[()]:
        self.gelu = gelu(self.act)
        return ()

    def forward(self, x: Tensor) -> Tensor:
        """As the original's."""
        hidden = self.drop1(activated(self.fc1, self.act, self.gelu, x))
        out: Tensor = self.drop2(self.fc2(self.norm(hidden)))
        return out
