"""torchvision's feed-forward layer, a sequence: a GELU in the pass over memory of the product before it."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import misc

from attnc.models.accelerate.swap import Accelerated, replaces
from attnc.models.blocks.linear import activated


@replaces(misc.MLP)
class AcceleratedMLP(Accelerated, misc.MLP):
    """Linear, GELU, Dropout, Linear, Dropout, as in torchvision's Swin."""

    counted = "mlps"

    def refuse(self) -> str:
        return "" if len(self) > 1 and type(self[1]) is nn.GELU else "no GELU follows its first layer"

    def build(self) -> tuple[()]:
        return ()

    def forward(self, x: Tensor) -> Tensor:
        """As the original's."""
        first, act, *rest = self
        x = activated(first, act, act.approximate, x)
        for layer in rest:
            x = layer(x)
        return x
