"""Weight initialisation of vision transformers; call as ``model.apply(init_vit)``."""

from __future__ import annotations

from torch import nn


def init_vit(module: nn.Module) -> None:
    """Linear: truncated normal of std 0.02, zero bias. Norms: one and zero. Convolutions: torch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_vit_conv(module: nn.Module) -> None:
    """`init_vit`, and convolutions: normal of std 0.02 and zero bias."""
    init_vit(module)
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
