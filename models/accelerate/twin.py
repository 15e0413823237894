"""Attentions of timm whose module in `attnc.models` reads parameters of the same names."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

import attnc
from attnc.models.accelerate.operators import project
from attnc.models.accelerate.swap import Accelerated, dropout_remark, drops


class Twin(Accelerated):
    """Runs the forward of `twin` on its own parameters, where no attention weights are dropped.

    twin: a class of `attnc.models`. attribute: where that one's forward finds the operator, which a subclass makes.
    """

    twin: ClassVar[type[nn.Module]]
    attribute: ClassVar[str] = "attend"
    attn_drop: Any

    def operator(self) -> attnc.Operator:
        """From the module's settings."""
        raise NotImplementedError

    def build(self) -> tuple[attnc.Operator, ...]:
        operator = self.operator()
        setattr(self, self.attribute, operator)
        return (operator,)

    def remark(self) -> str:
        return dropout_remark(self.attn_drop.p)

    def project(self, mixed: Tensor) -> Tensor:
        """What ends an attention of ours."""
        return project(self, mixed)

    def forward(self, x: Tensor) -> Tensor:
        """As the original's and the twin's: tokens or a map, channels last."""
        run = super().forward if drops(self.attn_drop) else self.twin.forward.__get__(self)  # type: ignore[misc]
        out: Tensor = run(x)
        return out
