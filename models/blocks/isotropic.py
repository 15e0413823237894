"""Classifiers whose blocks all work at one resolution: the maps of their patches, beside other tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from attnc.errors import ShapeError
from attnc.models.blocks.patches import pair
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
    """Base of such classifiers; a subclass builds them, calls `add_head` and has `forward_blocks`.

    reads: what the classifier reads, the first of the normalised tokens or their mean.

    Args:
        dim: channels C.
        depth: blocks, each a stage.
        patch: rows and columns of a patch.
        num_classes, grad_checkpointing: see `Classifier`.
        features_only, out_indices: see `Staged`, and `last_blocks`.

    Raises:
        DeclarationError: there is no block, or `out_indices` names one that does not exist.
    """

    reads: ClassVar[Literal["first", "mean"]] = "first"
    norm: nn.Module
    head: nn.Module

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

    def grid_of(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of this size; DeclarationError where there are none."""
        height, width = pair(img_size)
        grid = height // self.patch[0], width // self.patch[1]
        self.check(min(grid) > 0, f"{img_size=} is less than a patch of {self.patch[0]}x{self.patch[1]}")
        return grid

    def check_grid(self, x: Tensor, grid: tuple[int, int], instead: str = "") -> None:
        """ShapeError unless the map ``[B, H, W, C]`` has the size that position embeddings are made for."""
        if tuple(x.shape[1:3]) != grid:
            raise ShapeError(
                f"{type(self).__name__}: the image has {x.shape[1]}x{x.shape[2]} patches, the position embedding "
                f"{grid[0]}x{grid[1]}: build the model with this img_size{instead}"
            )

    def add_head(self, eps: float = 1e-5) -> None:
        """The last norm and the classifier, which a backbone does not have."""
        if not self.features_only:
            self.norm = nn.LayerNorm(self.num_features, eps)
            self.head = nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

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

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What the classifier `reads` of ``[B, N, C]``, and the classifier unless `pre_logits`."""
        x = x[:, 0] if self.reads == "first" else x.mean(1)
        return x if pre_logits else cast(Tensor, self.head(x))
