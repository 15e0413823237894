"""Classifiers whose blocks all work at one resolution: the maps of their patches, beside other tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from attnc.models.blocks.staged import Staged


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The last tokens of ``[B, N, C]``, which are those of a grid, or a map ``[B, H, W, C]``, as a view ``[B, C, H, W]``."""
    if tokens.dim() == 3:
        tokens = torch.unflatten(tokens[:, tokens.shape[1] - grid[0] * grid[1] :], 1, grid)
    return tokens.permute(0, 3, 1, 2)


def last_blocks(depth: int) -> range:
    """Which blocks' maps such a backbone gives by default: the last three, as with timm."""
    return range(max(depth - 3, 0), depth)


class Isotropic(Staged):
    """Base of such classifiers; a subclass builds them and has `forward_blocks`, a ``norm`` and `forward_head`.

    Args:
        dim: channels C.
        depth: blocks, each a stage.
        patch: rows and columns of a patch.
        num_classes, grad_checkpointing: see `Classifier`.
        features_only, out_indices: see `Staged`, and `last_blocks`.

    Raises:
        DeclarationError: there is no block, or `out_indices` names one that does not exist.
    """

    norm: nn.Module

    def __init__(
        self,
        dim: int,
        depth: int,
        patch: tuple[int, int],
        *,
        num_classes: int,
        features_only: bool,
        out_indices: Sequence[int] | None,
        grad_checkpointing: bool,
        stages: str = "blocks",
    ) -> None:
        self.check(depth > 0, f"{depth=}: at least one block")
        super().__init__(
            [dim] * depth,
            [max(patch)] * depth,
            stages,
            num_classes=num_classes,
            features_only=features_only,
            out_indices=last_blocks(depth) if out_indices is None else out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.patch = patch

    def forward_blocks(self, x: Tensor) -> Iterator[Tensor]:
        """The tokens of the image after each block, as `tokens_to_map` takes them."""
        raise NotImplementedError

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The patches after each block, ``[B, C, H / rows, W / columns]`` (views)."""
        grid = (x.shape[2] // self.patch[0], x.shape[3] // self.patch[1])
        return [tokens_to_map(tokens, grid) for tokens in self.forward_blocks(x)]

    def forward_features(self, x: Tensor) -> Tensor:
        """The tokens after the last norm, ``[B, N, C]``."""
        for tokens in self.forward_blocks(x):
            last = tokens
        out: Tensor = self.norm(last if last.dim() == 3 else last.flatten(1, 2))
        return out
