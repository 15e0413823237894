"""What models offer beside their mathematics: another classifier, checkpointing, and the maps of their stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnc.errors import DeclarationError
from attnc.models.blocks.init import init_vit

T = TypeVar("T")


class Classifier(nn.Module):
    """Base of image classifiers; a subclass builds its layers and has `forward_features` and `forward_head`.

    Args:
        num_features: what the last linear layer reads.
        num_classes: logits; 0 leaves out the last linear layer.
        grad_checkpointing: recompute each block in the backward.
    """

    classifier = "head"  # where the last linear layer is

    def __init__(self, num_features: int, *, num_classes: int, grad_checkpointing: bool) -> None:
        super().__init__()
        self.check_classes(num_classes)
        self.num_features = num_features
        self.num_classes = num_classes
        self.grad_checkpointing = grad_checkpointing

    def check(self, holds: bool, complaint: str) -> None:
        """Raise a DeclarationError that names the model unless `holds`."""
        if not holds:
            raise DeclarationError(f"{type(self).__name__}: {complaint}")

    def check_classes(self, num_classes: int) -> None:
        """Raise a DeclarationError unless there are 0 classes or more."""
        holds = isinstance(num_classes, int) and num_classes >= 0
        self.check(holds, f"{num_classes=}: the number of logits, or 0 for no classifier")

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """``[B, in_chans, H, W] -> [B, num_classes]``."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """What the head reads."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The classifier on `forward_features`; `pre_logits` leaves out its last layer."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """The last linear layer (an identity without classes)."""
        return self.get_submodule(self.classifier)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear layer by a fresh one; 0 classes leave what comes before it."""
        self.check_classes(num_classes)
        self.num_classes = num_classes
        fresh = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        fresh.apply(init_vit)
        self.set_submodule(self.classifier, fresh.to(next(self.parameters())))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the blocks' activations for computing them again in the backward."""
        self.grad_checkpointing = enable

    def run(self, block: Callable[..., T], *inputs: Any, **more: Any) -> T:
        """``block(*inputs, **more)``, checkpointed where that is wanted."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(T, checkpoint(block, *inputs, use_reentrant=False, **more))
        return block(*inputs, **more)


class Staged(Classifier):
    """Base of classifiers whose stages give maps; a subclass builds them and has `forward_stages` and `forward_head`.

    Args:
        widths: channels of each stage's output.
        reductions: stride of each stage's output, in pixels.
        stages: name of the list of stages, for `feature_info`.
        features_only: the forward gives the list of stage outputs; there is no classifier.
        out_indices: stages in that list, all by default.
        num_classes, grad_checkpointing: see `Classifier`.

    Raises:
        DeclarationError: `out_indices` names a stage that does not exist.
    """

    def __init__(
        self,
        widths: Sequence[int],
        reductions: Sequence[int],
        stages: str,
        *,
        num_classes: int,
        features_only: bool,
        out_indices: Sequence[int] | None,
        grad_checkpointing: bool,
    ) -> None:
        super().__init__(widths[-1], num_classes=num_classes, grad_checkpointing=grad_checkpointing)
        n = len(widths)
        out_indices = tuple(range(n) if out_indices is None else out_indices)
        self.check(all(-n <= i < n for i in out_indices), f"{out_indices=}: there are {n} stages")
        self.features_only = features_only
        self.out_indices = tuple(sorted(i % n for i in out_indices))
        # what timm's users of backbones read
        self.feature_info = [
            {"num_chs": widths[i], "reduction": reductions[i], "module": f"{stages}.{i}"} for i in self.out_indices
        ]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """``[B, in_chans, H, W] -> [B, num_classes]``; with `features_only`, all ``[B, C, H', W']``."""
        if self.features_only:
            maps = self.forward_stages(x)
            return [maps[i] for i in self.out_indices]
        return super().forward(x)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all stages, ``[B, C, H', W']``."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's output, ``[B, C, H', W']``, before norm and pooling."""
        return self.forward_stages(x)[-1]
