"""PiT under Gaussian-mixture masks, a host of the paper of `gmm_mask` (Li et al. 2023, arXiv:2309.05375), for small images.

PiT (Heo et al. 2021) pools its patches between stages by convolutions, and its class token by a linear layer. Names are those of
the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnc.errors import DeclarationError
from attnc.models.blocks.isotropic import tokens_to_map
from attnc.models.blocks.tokens import with_class_token
from attnc.models.gmm_mask import (
    BASE,
    IGNORED,
    Attention,
    FeedForward,
    PatchClassifier,
    PreNorm,
    Transformer,
    base_mask,
    last_of,
    side_of,
)
from attnc.models.official import official
from attnc.models.registry import variants


class Downsample(nn.Module):
    """A strided 3x3 depthwise and a 1x1 convolution, to twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1, groups=dim), nn.Conv2d(2 * dim, 2 * dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, n, n] -> [B, 2C, ceil(n / 2), ceil(n / 2)]``."""
        return cast(Tensor, self.net(x))


class Pool(nn.Module):
    """Between PiT's stages: convolutions of patches, a linear layer for the class token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.downsample = Downsample(dim)
        self.cls_ff = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 1 + n^2, C] -> [B, 1 + ceil(n / 2)^2, 2C]``."""
        side = side_of(x.shape[1] - 1)
        patches = x[:, 1:].transpose(1, 2).reshape(x.shape[0], -1, side, side)
        pooled = cast(Tensor, self.downsample(patches)).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_ff(x[:, :1]), pooled], 1)


class Rows(nn.Module):
    """A map as rows, ``[B, C, H, W] -> [B, H W, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, H W, C]``."""
        return x.flatten(2).transpose(1, 2)


PIT: dict[str, Any] = {"img_size": 32, "patch_size": 2, "dim": 96, "depth": (2, 6, 4), "heads": (2, 4, 8), "num_kernals": 5}
TINY_IMAGENET: dict[str, Any] = {"img_size": 64, "patch_size": 4, "num_classes": 200}


@variants(
    gmm_mask_pit={**PIT, "num_classes": 10},
    gmm_mask_pit_cifar100={**PIT, "num_classes": 100},
    gmm_mask_pit_tiny_imagenet={**PIT, **TINY_IMAGENET},
)
class PiT(PatchClassifier):
    """Image classifier for images ``[B, channels, img_size, img_size]``; scores of the class token are not masked.

    Args:
        img_size, patch_size: side of the image and of its patches.
        num_classes: logits; 0 leaves the normalised features.
        dim: channels of the first stage, doubled by each pooling.
        depth, heads: layers and heads per stage.
        mlp_dim_ratio, num_kernals, channels, dim_head, stochastic_depth, is_GMM, is_SLM, backend: see `gmm_mask.ViT`.
        features_only, out_indices, grad_checkpointing: see `Staged`.

    Raises:
        DeclarationError: the stages differ in number, or patches do not divide the image.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: Sequence[int],
        heads: Sequence[int],
        mlp_dim_ratio: float = 2,
        num_kernals: int = 3,
        channels: int = 3,
        dim_head: int = 48,
        stochastic_depth: float = 0.0,
        is_GMM: bool = True,
        is_SLM: bool = False,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        if len(depth) != len(heads):
            raise DeclarationError(f"PiT: {depth=} and {heads=} differ in length")
        stages = len(depth)
        super().__init__(
            img_size,
            patch_size,
            num_classes,
            [dim << stage for stage in range(stages)],
            [patch_size << stage for stage in range(stages)],
            "layers",
            channels,
            1,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        for info, i in zip(self.feature_info, self.out_indices, strict=True):
            info["module"] = f"layers.{2 * i}"  # poolings have places of their own
        self.to_patch_embedding = nn.Sequential(nn.Conv2d(channels, dim, patch_size, patch_size), Rows())
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        del self.mask  # there is one for each stage
        self.layers = nn.Sequential()
        side, width = img_size // patch_size, dim
        for stage, (count, h) in enumerate(zip(depth, heads, strict=True)):
            if stage:
                self.layers.append(Pool(width))
                side, width = -(-side // 2), 2 * width
            branches = []
            for _ in range(count):
                attention = Attention(width, 1 + side**2, h, dim_head, is_GMM, num_kernals, is_SLM, prefix=1, backend=backend)
                branches.append((PreNorm(width, attention), PreNorm(width, FeedForward(width, int(width * mlp_dim_ratio)))))
            self.layers.append(Transformer(branches, stochastic_depth))
            # frozen; what it says is computed from coordinates here
            self.layers[-1].mask = nn.Parameter(base_mask(side), requires_grad=False)

    def _forward_tokens(self, image: Tensor) -> list[Tensor]:
        """The tokens after each stage, ``[B, 1 + N, C]``, the class token first."""
        x = self.embed(image)
        x = with_class_token(self.cls_token, x) + self.pos_embedding
        found = []
        for layer in self.layers:
            if isinstance(layer, Transformer):
                x = last_of(layer.run(self.run, x))
                found.append(x)
            else:
                x = layer(x)
        return found

    def forward_stages(self, image: Tensor) -> list[Tensor]:
        """The patches after each stage, ``[B, C, H', W']`` (views)."""
        return [tokens_to_map(x, (side_of(x.shape[1] - 1),) * 2) for x in self._forward_tokens(image)]

    def forward_features(self, image: Tensor) -> Tensor:
        """The class token ``[B, C]``, before the norm."""
        return self._forward_tokens(image)[-1][:, 0]


@official("gmm-mask", "pit.PiT", ignores=IGNORED, derived=(*BASE, "*.mask"))
def _official_pit(
    img_size: int,
    patch_size: int,
    num_classes: int,
    dim: int,
    depth: Sequence[int],
    heads: int | Sequence[int],
    mlp_dim_ratio: float,
    dim_head: int = 64,
    stochastic_depth: float = 0.0,
    is_GMM: bool = False,
    is_SLM: bool = False,
    num_kernals: int = 5,
    *,
    backend: str = "auto",
) -> nn.Module:
    """With the official defaults; one number of heads stands for all stages."""
    return PiT(
        img_size,
        patch_size,
        num_classes,
        dim,
        depth,
        [heads] * len(depth) if isinstance(heads, int) else heads,
        mlp_dim_ratio,
        num_kernals,
        dim_head=dim_head,
        stochastic_depth=stochastic_depth,
        is_GMM=is_GMM,
        is_SLM=is_SLM,
        backend=backend,
    )
