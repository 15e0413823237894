"""SHViT: Single-Head Vision Transformer (Yun & Ro, CVPR 2024, arXiv:2401.16456).

Attention has one head, and sees the first channels only; the others pass by and meet it in the projection that follows.
All norms but the one before attention are BatchNorms after convolutions. Parameter names are those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnc.errors import DeclarationError
from attnc.models.blocks.conv_norm import ConvNorm, FeedForward, PatchMerging, Residual, depthwise
from attnc.models.blocks.conv_stages import ConvStages, stage_names
from attnc.models.blocks.tokens import map_operator
from attnc.models.official import official
from attnc.models.registry import variants
from attnc.models.timm_names import timm_names


class SHSA(nn.Module):
    """Single-head attention among all tokens of a map, on its first `pdim` channels; ReLU and ``proj`` join the others.

    softmax(q k^T / sqrt(qk_dim)) v with q, k, v of one GroupNorm over those channels and the whole map.

    Args:
        dim: channels C.
        qk_dim: channels of queries and keys.
        pdim: channels that attend; values have as many.
        backend: of the operator.

    Raises:
        DeclarationError: `pdim` exceeds `dim`.
    """

    def __init__(self, dim: int, qk_dim: int, pdim: int, *, backend: str = "auto") -> None:
        super().__init__()
        if not 0 < pdim <= dim:
            raise DeclarationError(f"SHSA: {pdim=} channels attend, out of {dim=}")
        self.widths = (qk_dim, qk_dim, pdim)
        self.split = [pdim, dim - pdim]
        self.scale = qk_dim**-0.5
        self.pre_norm = nn.GroupNorm(1, pdim)
        self.qkv = ConvNorm(pdim, sum(self.widths))
        self.proj = nn.Sequential(nn.ReLU(inplace=True), ConvNorm(dim, dim, gain=0.0))
        self.attend = map_operator(backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        x, rest = torch.split(x, self.split, 1)
        qkv = self.qkv(self.pre_norm(x)).permute(0, 2, 3, 1)
        q, k, v = qkv.unsqueeze(3).split(self.widths, 4)
        mixed = self.attend(q, k, v, scale=self.scale).squeeze(3).permute(0, 3, 1, 2)
        out: Tensor = self.proj(torch.cat([mixed, rest], 1))
        return out


class BasicBlock(nn.Module):
    """A depthwise convolution, attention where `type` is "s", and a feed-forward layer, each added to what it was given.

    Args:
        dim, qk_dim, pdim: see `SHSA`.
        type: "s", or "i" for a block without attention.
        drop_path: probability of dropping a branch.
        backend: of the operator.
    """

    def __init__(self, dim: int, qk_dim: int, pdim: int, type: str, drop_path: float = 0.0, *, backend: str = "auto") -> None:
        super().__init__()
        if type not in ("s", "i"):
            raise DeclarationError(f"SHViT: a block of {type=}: 's' attends, 'i' does not")
        self.conv = Residual(depthwise(dim, gain=0.0), drop_path)
        self.mixer = Residual(SHSA(dim, qk_dim, pdim, backend=backend), drop_path) if type == "s" else nn.Identity()
        self.ffn = Residual(FeedForward(dim), drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``."""
        out: Tensor = self.ffn(self.mixer(self.conv(x)))
        return out


def _variant(dims: tuple[int, ...], partial: tuple[int, ...], depth: tuple[int, ...]) -> dict[str, Any]:
    return {"embed_dim": dims, "partial_dim": partial, "qk_dim": (16, 16, 16), "depth": depth, "types": ("i", "s", "s")}


@variants(
    shvit_s1=_variant((128, 224, 320), (32, 48, 68), (2, 4, 5)),
    shvit_s2=_variant((128, 308, 448), (32, 66, 96), (2, 4, 5)),
    shvit_s3=_variant((192, 352, 448), (48, 75, 96), (3, 5, 5)),
    shvit_s4=_variant((224, 336, 448), (48, 72, 96), (4, 7, 6)),
)
class SHViT(ConvStages):
    """Image classifier or backbone for images ``[B, in_chans, H, W]`` of any size.

    Args:
        in_chans: channels of the image.
        num_classes, distillation, features_only, out_indices, grad_checkpointing: see `ConvStages`.
        embed_dim, depth: channels and blocks per stage.
        partial_dim, qk_dim, types: of the blocks, per stage, see `BasicBlock`.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; officially none.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or the stages differ in number.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (128, 256, 384),
        partial_dim: Sequence[int] = (32, 64, 96),
        qk_dim: Sequence[int] = (16, 16, 16),
        depth: Sequence[int] = (1, 2, 3),
        types: Sequence[str] = ("s", "s", "s"),
        drop_path_rate: float = 0.0,
        distillation: bool = False,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        lengths = {len(each) for each in (embed_dim, partial_dim, qk_dim, depth, types)}
        self.check(len(lengths) == 1, f"{embed_dim=}, {partial_dim=}, {qk_dim=}, {depth=} and {types=} differ in length")

        def block(stage: int, rate: float) -> nn.Module:
            return BasicBlock(embed_dim[stage], qk_dim[stage], partial_dim[stage], types[stage], rate, backend=backend)

        super().__init__(
            block,
            in_chans,
            embed_dim,
            depth,
            drop_path_rate,
            num_classes=num_classes,
            distillation=distillation,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )


timm_names("shvit", *stage_names({"0": "0.0", "1": "0.1", "2": "1", "3": "2.0", "4": "2.1"}))

DERIVED = ("*num_batches_tracked",)

official("shvit", "SHSA", derived=DERIVED)(SHSA)
official("shvit", "PatchMerging", derived=DERIVED)(PatchMerging)
official("shvit", "BasicBlock", derived=DERIVED)(BasicBlock)
official("shvit", "SHViT", ignores=("down_ops",), derived=DERIVED)(SHViT)
