"""The classifier that EfficientViT and SHViT share: a stem of stride 16, stages of blocks, and a linear layer after a BatchNorm."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from attnc.errors import DeclarationError
from attnc.models.blocks.conv_norm import NormLinear, downsampling, fuse_norms, stem
from attnc.models.blocks.drop import linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.staged import Staged
from attnc.models.timm_names import Replacement

STRIDE = 16  # of the stem
LEADING = 3  # places in the list of a later stage's blocks that lead to it


class ConvStages(Staged):
    """Image classifier or backbone of blocks on maps ``[B, C, H, W]``.

    Args:
        block: builds a block, given its stage and its drop path rate.
        in_chans: channels of the image.
        widths, depth: channels and blocks per stage.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        num_classes, features_only, out_indices, grad_checkpointing: see `Staged`.
        distillation: a second classifier ``head_dist`` for a teacher's labels; the logits are the mean of both.

    Raises:
        DeclarationError: an argument is out of range.
    """

    classifier = "head.l"

    def __init__(
        self,
        block: Callable[[int, float], nn.Module],
        in_chans: int,
        widths: Sequence[int],
        depth: Sequence[int],
        drop_path_rate: float,
        *,
        num_classes: int,
        distillation: bool,
        features_only: bool,
        out_indices: Sequence[int] | None,
        grad_checkpointing: bool,
    ) -> None:
        super().__init__(
            widths,
            [STRIDE << stage for stage in range(len(widths))],
            "blocks",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        for info, i in zip(self.feature_info, self.out_indices, strict=True):
            info["module"] = f"blocks{i + 1}"
        self.count = len(widths)
        self.patch_embed = stem(in_chans, widths[0])
        rates = iter(linear_rates(drop_path_rate, sum(depth)))
        for stage, count in enumerate(depth):
            leading = downsampling(widths[stage - 1], widths[stage]) if stage else []
            blocks = [block(stage, next(rates)) for _ in range(count)]
            self.add_module(f"blocks{stage + 1}", nn.Sequential(*leading, *blocks))
        if not features_only:
            self.head = NormLinear(widths[-1], num_classes)
            self.head_dist = NormLinear(widths[-1], num_classes) if distillation else None

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all stages, ``[B, C, H', W']``, in channels-last memory."""
        maps = []
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        for stage in range(self.count):
            for block in cast(nn.Sequential, self.get_submodule(f"blocks{stage + 1}")):
                x = self.run(block, x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map ``[B, C, H', W']`` and the classifier; `pre_logits` gives what its linear layer reads."""
        x = x.mean((2, 3))
        if pre_logits:
            return cast(Tensor, self.head.bn(x)) if isinstance(self.head, NormLinear) else x
        logits: Tensor = self.head(x)
        return logits if self.head_dist is None else (logits + cast(Tensor, self.head_dist(x))) / 2

    def forward_distilled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits for the labels and for the teacher's, both ``[B, num_classes]``, for training with distillation.

        Raises:
            DeclarationError: the model has one classifier.
        """
        if self.head_dist is None:
            raise DeclarationError(f"{type(self).__name__}: there is no head_dist: build the model with distillation=True")
        x = self.forward_features(x).mean((2, 3))
        return self.head(x), self.head_dist(x)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear layers by fresh ones; 0 classes leave the normalised features."""
        super().reset_classifier(num_classes)
        if self.head_dist is not None:
            fresh = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
            place = self.classifier.replace("head", "head_dist")
            self.set_submodule(place, fresh.apply(init_vit).to(next(self.parameters())))

    def fuse(self) -> Self:
        """Make one of each convolution and its norm, in place, for evaluation; the parameters are then those of a fused official
        checkpoint, which can be loaded."""
        fuse_norms(self)
        if isinstance(self._modules.get("head"), nn.Linear):
            self.classifier = "head"
        return self


def stage_names(downsample: Mapping[str, str]) -> list[tuple[str, Replacement]]:
    """Rules for `timm_names`: ``stages.1.blocks.0`` is ``blocks2.3``, and ``stages.1.downsample.NAME`` is ``blocks2.PLACE``."""

    def block(match: re.Match[str]) -> str:
        stage = int(match[1])
        return f"blocks{stage + 1}.{int(match[2]) + (LEADING if stage else 0)}."

    def leading(match: re.Match[str]) -> str:
        return f"blocks{int(match[1]) + 1}.{downsample[match[2]]}."

    names = "|".join(downsample)
    return [(r"^stages\.(\d+)\.blocks\.(\d+)\.", block), (rf"^stages\.(\d+)\.downsample\.({names})\.", leading)]
