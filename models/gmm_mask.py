"""Gaussian-mixture mask attention on small data: RetNet viewed through convolution (Li et al. 2023, arXiv:2309.05375).

Scores are multiplied, before the softmax, by a mixture of Gaussians of the distance between tokens, learned per head. The
host here is ViT. Parameter names are those of the official code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.drop import DropPath
from attnc.models.blocks.isotropic import last_blocks, tokens_to_map
from attnc.models.blocks.staged import Staged
from attnc.models.blocks.tokens import with_class_token
from attnc.models.official import official
from attnc.models.registry import variants

VANISH = 104  # the official base mask is sqrt(exp(-d^2)) in float32, which is 0 from this d^2 on
MaskKind = int | Literal["learned"]  # how many Gaussians are mixed (0: there is no mask), or a mask that is learned pair by pair


@cache  # layers share operators
def masked_operator(mask: MaskKind, prefix: int, heads: int, backend: str) -> attnc.Operator:
    """Attention of a square grid under a mask of this kind, on packed ``[B, prefix + N, 3 h d]``.

    Scores from and to prefix tokens stay as they are.
    """
    if mask == "learned":
        pattern = attnc.patterns.learned_mask()
    else:
        pattern = attnc.patterns.gaussian_mixture(mask, vanish=VANISH) if mask else attnc.patterns.full()
    return attnc.compile(pattern, prefix=prefix, layout="b (y x) (three h d)", heads=heads, backend=backend)


def side_of(count: int) -> int:
    """The side of a square grid of `count` tokens. Raises ShapeError where there is none."""
    side = math.isqrt(count)
    if side * side != count or not count:
        raise ShapeError(f"{count} tokens are no square grid, whose distances the mask is made of")
    return side


def base_mask(side: int) -> Tensor:
    """exp(-d^2 / 2) between the tokens of a square grid, ``[1, 1, N, N]``, as the official code rounds it."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
    squared = (place[:, None] - place).square().sum(-1)
    return torch.exp(-squared.float()).sqrt()[None, None]


class GaussianMixtureMask(nn.Module):
    """sum_k alpha[k, h] exp(-d^2 / (2 (sigma[k, h]^2 + 1e-5))): the mask of head h at distance d."""

    def __init__(self, num_heads: int, num_kernals: int = 3) -> None:
        super().__init__()
        if num_kernals < 1:
            raise DeclarationError(f"num_kernals is {num_kernals}; a mixture needs at least one")
        self.sigma = nn.Parameter(10 + 10 * torch.randn(num_kernals, num_heads, 1, 1))
        self.alpha = nn.Parameter(2 * torch.randn(num_kernals, num_heads, 1, 1))

    def tables(self) -> dict[str, Tensor]:
        """`alpha` and `sigma` ``[kernels, h]``, as the operator takes them."""
        return {"alpha": self.alpha.flatten(1), "sigma": self.sigma.flatten(1)}

    def dense(self, side: int) -> Tensor:
        """The mask ``[h, N, N]`` on a square grid."""
        place = torch.arange(side, device=self.sigma.device)
        d2 = (place[:, None] - place).square()
        squared = (d2[:, None, :, None] + d2[None, :, None, :]).reshape(side * side, -1)
        kernels = self.alpha * torch.exp(-squared / (2 * (self.sigma.square() + 1e-5)))
        return torch.where(squared < VANISH, kernels.sum(0), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[B, h, N, N]`` times the mask. Raises ShapeError where N is no square."""
        return x * self.dense(side_of(x.shape[-1]))


class SimpleMask(nn.Module):
    """A learned mask ``[N, N]`` of all pairs of patches, the same for every head, which begins at zero (SLM officially)."""

    def __init__(self, num_patches: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(num_patches, num_patches))

    def tables(self) -> dict[str, Tensor]:
        """`mask`, as the operator takes it."""
        return {"mask": self.mask}

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[B, h, N, N]`` times the mask."""
        return x * self.mask


def made_mask(
    heads: int, num_patches: int, num_kernals: int, is_GMM: bool, is_SLM: bool
) -> tuple[GaussianMixtureMask | SimpleMask | None, MaskKind]:
    """The mask of an attention, a mixture or else a learned one or else none, and its kind."""
    if is_GMM:
        return GaussianMixtureMask(heads, num_kernals), num_kernals
    return (SimpleMask(num_patches), "learned") if is_SLM else (None, 0)


def _projection(dim: int, heads: int, dim_head: int) -> nn.Module:
    """The last layer of attention, which one head of the whole width does not have."""
    if heads == 1 and dim_head == dim:
        return nn.Identity()
    return nn.Sequential(nn.Linear(heads * dim_head, dim))


class Attention(nn.Module):
    """ViT's attention under a mask: softmax(mask * q k^T / sqrt(d)) v.

    Args:
        dim: channels C.
        num_patches: tokens, `prefix` ones included.
        heads, dim_head: heads and their width d.
        is_GMM, is_SLM: whether there is a Gaussian mixture; whether there is a learned mask where there is none.
        num_kernals: Gaussians of the mixture.
        prefix: tokens before the grid, whose scores are not masked.
        backend: of the attnc operator.

    Raises:
        ShapeError: the patches are no square grid.
    """

    def __init__(
        self,
        dim: int,
        num_patches: int,
        heads: int = 8,
        dim_head: int = 64,
        is_GMM: bool = True,
        num_kernals: int = 3,
        is_SLM: bool = False,
        *,
        prefix: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.side = side_of(num_patches - prefix)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = _projection(dim, heads, dim_head)
        self.mask, kind = made_mask(heads, num_patches - prefix, num_kernals, is_GMM, is_SLM)
        self.attend = masked_operator(kind, prefix, heads, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        tables: dict[str, Any] = {} if self.mask is None else self.mask.tables()
        mixed = self.attend(self.to_qkv(x), grid=(self.side, self.side), **tables)
        return cast(Tensor, self.to_out(mixed))


class PreNorm(nn.Module):
    """fn(LN(x), ...)."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B, N, C] -> [B, N, C]``; a context, which is not normalised, is handed on."""
        x = self.norm(x)
        return cast(Tensor, self.fn(x) if context is None else self.fn(x, context))


class FeedForward(nn.Module):
    """Linear C -> hidden, GELU, Linear hidden -> C."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        return cast(Tensor, self.net(x))


Run = Callable[..., Tensor]  # runs a function of tensors, see `Classifier.run`


class Transformer(nn.Module):
    """Pairs of an attention and a feed-forward branch, each added to what it was given."""

    def __init__(self, layers: Sequence[tuple[nn.Module, nn.Module]], drop_path: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in layers)
        self.drop_path = DropPath(drop_path)

    def run(self, run: Run, x: Tensor, context: Tensor | None = None) -> Iterator[Tensor]:
        """``[B, N, C]`` after each layer, which `run` runs; keys and values are those of `context` ``[B, M, C]`` where given."""
        for layer in self.layers:
            x = run(self._layer, layer, x, context)
            yield x

    def _layer(self, layer: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        attention, feed_forward = cast(nn.ModuleList, layer)
        x = x + self.drop_path(attention(x, context))
        return x + cast(Tensor, self.drop_path(feed_forward(x)))


def last_of(each: Iterator[Tensor]) -> Tensor:
    """The last one."""
    for x in each:
        found = x
    return found


class Patches(nn.Module):
    """Images ``[B, c, H, W]`` as rows of patches ``[B, N, p p c]``, channels fastest."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """``[B, c, H, W] -> [B, H W / p^2, p p c]``."""
        b, c, height, width = x.shape
        x = x.view(b, c, height // self.size, self.size, width // self.size, self.size)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, self.size**2 * c)


class PatchClassifier(Staged):
    """What the hosts share: patches with learned positions, and a LayerNorm with a linear layer at the end.

    A subclass has `forward_features`, which gives what the norm reads, ``[B, C]``, and `forward_stages`. Other arguments: see
    `Staged`.

    Raises:
        DeclarationError: patches do not divide the image.
    """

    classifier = "mlp_head.1"

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        num_classes: int,
        widths: Sequence[int],
        reductions: Sequence[int],
        stages: str,
        channels: int,
        prefix: int,
        *,
        features_only: bool,
        **staged: Any,
    ) -> None:
        if patch_size < 1 or img_size % patch_size:
            raise DeclarationError(f"patch_size is {patch_size}, which does not divide img_size = {img_size}")
        super().__init__(widths, reductions, stages, num_classes=num_classes, features_only=features_only, **staged)
        dim, side = widths[0], img_size // patch_size
        self.img_size, self.num_patches = img_size, side**2
        self.to_patch_embedding = nn.Sequential(Patches(patch_size), nn.Linear(patch_size**2 * channels, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, prefix + self.num_patches, dim))
        # frozen, and officially there without masks too; what it says is computed from coordinates here
        self.mask = nn.Parameter(base_mask(side), requires_grad=False)
        if not features_only:
            last = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
            self.mlp_head = nn.Sequential(nn.LayerNorm(self.num_features), last)

    def embed(self, image: Tensor) -> Tensor:
        """``[B, c, img_size, img_size] -> [B, N, C]``, without positions."""
        if image.shape[2:] != (self.img_size, self.img_size):
            raise ShapeError(
                f"the image is {tuple(image.shape[2:])}; learned positions fix it to {self.img_size} x {self.img_size}"
            )
        return cast(Tensor, self.to_patch_embedding(image))

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """``[B, channels, img_size, img_size] -> [B, num_classes]``; with `features_only`, all ``[B, C, H', W']``.

        Raises:
            ShapeError: the image has another size.
        """
        return super().forward(image)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The norm of ``[B, C]``, and the classifier unless `pre_logits`."""
        return cast(Tensor, self.mlp_head[0](x) if pre_logits else self.mlp_head(x))


class PatchBlocks(PatchClassifier):
    """A host of `depth` layers at one resolution; a subclass has `forward_layers`. As a backbone it gives the last three maps."""

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        stages: str,
        channels: int,
        prefix: int,
        *,
        out_indices: Sequence[int] | None,
        **staged: Any,
    ) -> None:
        shapes = ([dim] * depth, [patch_size] * depth, stages)
        out_indices = last_blocks(depth) if out_indices is None else out_indices
        super().__init__(img_size, patch_size, num_classes, *shapes, channels, prefix, out_indices=out_indices, **staged)

    def forward_layers(self, image: Tensor) -> Iterator[Tensor]:
        """The tokens ``[B, N, C]`` after each layer."""
        raise NotImplementedError

    def forward_stages(self, image: Tensor) -> list[Tensor]:
        """The patches after each layer, ``[B, C, H', W']`` (views)."""
        side = math.isqrt(self.num_patches)
        return [tokens_to_map(x, (side, side)) for x in self.forward_layers(image)]


VIT: dict[str, Any] = {"img_size": 32, "patch_size": 4, "dim": 192, "depth": 9, "heads": 12, "dim_head": 16, "num_kernals": 5}
TINY_IMAGENET: dict[str, Any] = {"img_size": 64, "patch_size": 8, "num_classes": 200}


@variants(
    gmm_mask_vit={**VIT, "num_classes": 10},
    gmm_mask_vit_cifar100={**VIT, "num_classes": 100},
    gmm_mask_vit_tiny_imagenet={**VIT, **TINY_IMAGENET},
    gmm_mask_vit_plain={**VIT, "num_classes": 10, "is_GMM": False},
    gmm_mask_vit_plain_cifar100={**VIT, "num_classes": 100, "is_GMM": False},
    gmm_mask_vit_plain_tiny_imagenet={**VIT, **TINY_IMAGENET, "is_GMM": False},
    gmm_mask_vit_base={**VIT, "num_classes": 10, "patch_size": 2, "dim": 256, "depth": 8, "heads": 4, "dim_head": 64},
)
class ViT(PatchBlocks):
    """Image classifier for images ``[B, channels, img_size, img_size]``.

    Args:
        img_size, patch_size: side of the image and of its patches.
        num_classes: logits; 0 leaves the pooled, normalised features.
        dim, depth: channels and layers.
        heads, dim_head: heads and their width.
        mlp_dim_ratio: hidden width of the feed-forward layers over `dim`.
        num_kernals: Gaussians per head.
        channels: of the image.
        stochastic_depth: probability of dropping a branch, the same for all; officially 0.1.
        is_GMM, is_SLM: see `Attention`. With a mask there is no class token, and the head takes the mean over tokens.
        features_only, out_indices, grad_checkpointing: see `PatchBlocks`.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim_ratio: float = 2,
        num_kernals: int = 3,
        channels: int = 3,
        dim_head: int = 16,
        stochastic_depth: float = 0.0,
        is_GMM: bool = True,
        is_SLM: bool = False,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        prefix = 0 if is_GMM or is_SLM else 1
        super().__init__(
            img_size,
            patch_size,
            num_classes,
            dim,
            depth,
            "transformer.layers",
            channels,
            prefix,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim)) if prefix else None

        def layer() -> tuple[nn.Module, nn.Module]:
            count = prefix + self.num_patches
            attention = Attention(dim, count, heads, dim_head, is_GMM, num_kernals, is_SLM, prefix=prefix, backend=backend)
            return PreNorm(dim, attention), PreNorm(dim, FeedForward(dim, int(dim * mlp_dim_ratio)))

        self.transformer = Transformer([layer() for _ in range(depth)], stochastic_depth)

    def forward_layers(self, image: Tensor) -> Iterator[Tensor]:
        """The tokens after each layer, ``[B, N, C]`` or, the class token first, ``[B, 1 + N, C]``."""
        x = self.embed(image)
        if self.cls_token is not None:
            x = with_class_token(self.cls_token, x)
        return self.transformer.run(self.run, x + self.pos_embedding)

    def forward_features(self, image: Tensor) -> Tensor:
        """The mean token, or the class token where there is one, ``[B, C]``, before the norm."""
        x = last_of(self.forward_layers(image))
        return x.mean(1) if self.cls_token is None else x[:, 0]


# dropouts, which mean nothing in evaluation mode, and what follows from the sizes
IGNORED = ("dropout", "emb_dropout", "layer_dropout", "grid", "is_LSA", "is_SPT", "is_Coord", "mask")
BASE = ("mask", "*mask.mask")

official("gmm-mask", "Gaussian_Mixture_Mask", ignores=IGNORED, derived=BASE)(GaussianMixtureMask)
official("gmm-mask", "Simple_Mask", ignores=(*IGNORED, "num_heads"))(SimpleMask)
official("gmm-mask", "vit.Attention", ignores=IGNORED, derived=BASE)(Attention)
official("gmm-mask", "vit.ViT", ignores=IGNORED, derived=BASE)(ViT)


@official("gmm-mask", "pit.Attention", ignores=IGNORED, derived=BASE)
def _pit_attention(
    dim: int,
    num_patches: int,
    heads: int = 8,
    dim_head: int = 64,
    is_GMM: bool = True,
    num_kernals: int = 3,
    is_SLM: bool = False,
    *,
    backend: str = "auto",
) -> nn.Module:
    """PiT's, whose class token is one of the `num_patches`."""
    return Attention(dim, num_patches, heads, dim_head, is_GMM, num_kernals, is_SLM, prefix=1, backend=backend)
