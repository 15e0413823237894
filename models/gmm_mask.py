"""Gaussian-mixture mask attention on small data: RetNet viewed through convolution (Li et al. 2023, arXiv:2309.05375).

Scores are multiplied, before the softmax, by a mixture of Gaussians of the distance between tokens, learned per head. Hosts here
are ViT and CaiT. Parameter names are those of the official code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.drop import DropPath
from attnc.models.official import official
from attnc.models.registry import variants

VANISH = 104  # the official base mask is sqrt(exp(-d^2)) in float32, which is 0 from this d^2 on


@cache  # layers share operators
def masked_operator(kernels: int, prefix: int, heads: int, backend: str) -> attnc.Operator:
    """Attention of a square grid under a mixture of `kernels` (0: none), on packed ``[B, prefix + N, 3 h d]``.

    Scores from and to prefix tokens stay as they are.
    """
    pattern = attnc.patterns.gaussian_mixture(kernels, vanish=VANISH) if kernels else attnc.patterns.full()
    return attnc.compile(pattern, prefix=prefix, layout="b (y x) (three h d)", heads=heads, backend=backend)


@attnc.pattern
def given(q: Any, k: Any, *, scores: attnc.Table) -> Any:
    """Softmax of scores that were made elsewhere: a table ``[B, H, N, N]``."""
    return scores[attnc.BATCH, attnc.HEAD, q.index, k.index]


@cache
def given_operator(backend: str) -> attnc.Operator:
    """Attention by given scores over ``[B, h, N, d]``."""
    return attnc.compile(given(), backend=backend)


@cache
def dense_operator(backend: str) -> attnc.Operator:
    """Attention of queries ``[B, h, Nq, d]`` to all keys ``[B, 1, N, d]``."""
    return attnc.compile(attnc.patterns.full(), grid=(None,), kv_grid=(None,), layout="b h x d", backend=backend)


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
        is_GMM: whether there is a mask.
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
        *,
        prefix: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.side = side_of(num_patches - prefix)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = _projection(dim, heads, dim_head)
        self.mask = GaussianMixtureMask(heads, num_kernals) if is_GMM else None
        self.attend = masked_operator(num_kernals if is_GMM else 0, prefix, heads, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        tables: dict[str, Any] = {} if self.mask is None else self.mask.tables()
        mixed = self.attend(self.to_qkv(x), grid=(self.side, self.side), **tables)
        return cast(Tensor, self.to_out(mixed))


class TalkingHeads(nn.Module):
    """CaiT's attention: scores, masked, are mixed between heads before the softmax, and weights after it.

    s'_g = sum_h Wpre[h, g] mask_h q_h k_h^T / sqrt(d); y_g = sum_h Wpost[h, g] softmax(s'_h) v_g.

    Without a mask the mixture of scores is one product of wider rows. With it a score is no function of one product, which is all
    that a pattern can state: the scores ``[B, h, N, N]`` are made here and given to the operator as a table.

    Args:
        dim, num_patches, heads, dim_head, num_kernals, backend: see `Attention`.
        if_patch_attn: whether this is a block of patches, which alone are masked.
        is_GMM: whether those are.
    """

    def __init__(
        self,
        dim: int,
        num_patches: int,
        heads: int = 8,
        dim_head: int = 64,
        if_patch_attn: bool = False,
        is_GMM: bool = True,
        num_kernals: int = 3,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.mix_heads_pre_attn = nn.Parameter(torch.randn(heads, heads))
        self.mix_heads_post_attn = nn.Parameter(torch.randn(heads, heads))
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim))
        self.mask = GaussianMixtureMask(heads, num_kernals) if is_GMM and if_patch_attn else None
        if self.mask is not None:
            side_of(num_patches)
        self.attend = dense_operator(backend) if self.mask is None else given_operator(backend)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B, N, C] -> [B, N, C]``; keys and values are those of `context` ``[B, M, C]`` where it is given."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        k, v = self.to_kv(x if context is None else context).chunk(2, -1)
        # each head's weights meet the values of all heads, of which the last mixture takes a part
        mixed = self._masked(q, k, v) if self.mask is not None else self._plain(q, k, v)
        mixed = mixed.view(*mixed.shape[:-1], self.heads, -1)
        mixed = torch.einsum("bhngd,hg->bngd", mixed, self.mix_heads_post_attn.to(mixed.dtype))
        return cast(Tensor, self.to_out(mixed.flatten(2)))

    def _plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries of all heads side by side, weighted for each mixture; one head of keys serves them all."""
        weighted = torch.einsum("bnhd,hg->bgnhd", q, self.mix_heads_pre_attn.to(q.dtype)).flatten(3)
        return self.attend(weighted, k[:, None], v[:, None], scale=q.shape[-1] ** -0.5)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = cast(GaussianMixtureMask, self.mask)
        products = torch.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k.view(*k.shape[:2], self.heads, -1))
        scores = torch.einsum("bhnm,hg->bgnm", mask(products), self.mix_heads_pre_attn)
        nothing = q.new_zeros(()).expand(q.shape[0], self.heads, q.shape[1], 1)
        return self.attend(nothing, nothing[:, :1], v[:, None], grid=(q.shape[1],), scores=scores)


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


class LayerScale(nn.Module):
    """scale * fn(x, ...), with a scale per channel that begins the smaller the deeper the layer is."""

    def __init__(self, dim: int, fn: nn.Module, depth: int) -> None:
        super().__init__()
        start = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
        self.scale = nn.Parameter(torch.full((1, 1, dim), start))
        self.fn = fn

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B, N, C] -> [B, N, C]``."""
        return cast(Tensor, self.fn(x, context)) * self.scale


class Transformer(nn.Module):
    """Pairs of an attention and a feed-forward branch, each added to what it was given."""

    def __init__(self, layers: Sequence[tuple[nn.Module, nn.Module]], drop_path: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in layers)
        self.drop_path = DropPath(drop_path)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``[B, N, C] -> [B, N, C]``; keys and values are those of `context` ``[B, M, C]`` where it is given."""
        for layer in self.layers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._layer, layer, x, context, use_reentrant=False)
            else:
                x = self._layer(layer, x, context)
        return x

    def _layer(self, layer: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        attention, feed_forward = cast(nn.ModuleList, layer)
        x = x + self.drop_path(attention(x, context))
        return x + cast(Tensor, self.drop_path(feed_forward(x)))


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


class PatchClassifier(nn.Module):
    """What the hosts share: patches with learned positions, and a LayerNorm with a linear layer at the end.

    Raises:
        DeclarationError: patches do not divide the image.
    """

    def __init__(self, img_size: int, patch_size: int, num_classes: int, dim: int, channels: int, prefix: int) -> None:
        super().__init__()
        if patch_size < 1 or img_size % patch_size:
            raise DeclarationError(f"patch_size is {patch_size}, which does not divide img_size = {img_size}")
        self.img_size, self.num_features = img_size, dim
        self.num_patches = (img_size // patch_size) ** 2
        self.to_patch_embedding = nn.Sequential(Patches(patch_size), nn.Linear(patch_size**2 * channels, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, prefix + self.num_patches, dim))
        # frozen, and officially there without masks too; what it says is computed from coordinates here
        self.mask = nn.Parameter(base_mask(img_size // patch_size), requires_grad=False)
        self.reset_classifier(num_classes)

    def embed(self, image: Tensor) -> Tensor:
        """``[B, c, img_size, img_size] -> [B, N, C]``, without positions."""
        if image.shape[2:] != (self.img_size, self.img_size):
            raise ShapeError(
                f"the image is {tuple(image.shape[2:])}; learned positions fix it to {self.img_size} x {self.img_size}"
            )
        return cast(Tensor, self.to_patch_embedding(image))

    def get_classifier(self) -> nn.Module:
        """The last linear layer (an identity without classes)."""
        return self.mlp_head[1]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; 0 classes leave the normalised features."""
        self.num_classes = num_classes
        last = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.mlp_head = nn.Sequential(nn.LayerNorm(self.num_features), last).to(self.pos_embedding)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the layers' activations for computing them again in the backward."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.grad_checkpointing = enable


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
class ViT(PatchClassifier):
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
        is_GMM: with the mask there is no class token, and the head takes the mean over tokens; without it, the class token.
        grad_checkpointing: recompute each layer in the backward.
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
        *,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        prefix = 0 if is_GMM else 1
        super().__init__(img_size, patch_size, num_classes, dim, channels, prefix)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim)) if prefix else None

        def layer() -> tuple[nn.Module, nn.Module]:
            count = prefix + self.num_patches
            attention = Attention(dim, count, heads, dim_head, is_GMM, num_kernals, prefix=prefix, backend=backend)
            return PreNorm(dim, attention), PreNorm(dim, FeedForward(dim, int(dim * mlp_dim_ratio)))

        self.transformer = Transformer([layer() for _ in range(depth)], stochastic_depth)
        self.set_grad_checkpointing(grad_checkpointing)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, channels, img_size, img_size] -> [B, num_classes]``. Raises ShapeError for another size."""
        return cast(Tensor, self.mlp_head(self.forward_features(image)))

    def forward_features(self, image: Tensor) -> Tensor:
        """The mean token, or the class token where there is one, ``[B, C]``, before the norm."""
        x = self.embed(image)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = cast(Tensor, self.transformer(x + self.pos_embedding))
        return x.mean(1) if self.cls_token is None else x[:, 0]


CAIT: dict[str, Any] = {**VIT, "dim": 192, "depth": 24, "cls_depth": 2, "heads": 4, "mlp_dim": 384, "dim_head": 64}


@variants(
    gmm_mask_cait={**CAIT, "num_classes": 10},
    gmm_mask_cait_cifar100={**CAIT, "num_classes": 100},
    gmm_mask_cait_tiny_imagenet={**CAIT, **TINY_IMAGENET},
    gmm_mask_cait_tiny={**CAIT, "num_classes": 10, "dim": 108},
    gmm_mask_cait_tiny_cifar100={**CAIT, "num_classes": 100, "dim": 108},
    gmm_mask_cait_tiny_tiny_imagenet={**CAIT, **TINY_IMAGENET, "dim": 108},
)
class CaiT(PatchClassifier):
    """Image classifier: layers of masked patches, then layers in which a class token reads them.

    Args:
        img_size, patch_size, num_classes, dim, heads, dim_head, num_kernals, channels, stochastic_depth, is_GMM,
            grad_checkpointing, backend: see `ViT`.
        depth, cls_depth: layers of patches and of the class token.
        mlp_dim: hidden width of the feed-forward layers.

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
        cls_depth: int,
        heads: int,
        mlp_dim: int,
        num_kernals: int = 3,
        channels: int = 3,
        dim_head: int = 64,
        stochastic_depth: float = 0.0,
        is_GMM: bool = True,
        *,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(img_size, patch_size, num_classes, dim, channels, 0)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))

        def layers(count: int, patches: bool) -> Transformer:
            built: list[tuple[nn.Module, nn.Module]] = []
            for i in range(1, count + 1):
                attention = TalkingHeads(dim, self.num_patches, heads, dim_head, patches, is_GMM, num_kernals, backend=backend)
                branches = (PreNorm(dim, attention), PreNorm(dim, FeedForward(dim, mlp_dim)))
                built.append((LayerScale(dim, branches[0], i), LayerScale(dim, branches[1], i)))
            return Transformer(built, stochastic_depth)

        self.patch_transformer = layers(depth, patches=True)
        self.cls_transformer = layers(cls_depth, patches=False)
        self.set_grad_checkpointing(grad_checkpointing)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, channels, img_size, img_size] -> [B, num_classes]``. Raises ShapeError for another size."""
        return cast(Tensor, self.mlp_head(self.forward_features(image)))

    def forward_features(self, image: Tensor) -> Tensor:
        """The class token ``[B, C]``, before the norm."""
        x = self.patch_transformer(self.embed(image) + self.pos_embedding)
        return cast(Tensor, self.cls_transformer(self.cls_token.expand(x.shape[0], -1, -1), x)[:, 0])


# dropouts, which mean nothing in evaluation mode, and what follows from the sizes
IGNORED = ("dropout", "emb_dropout", "layer_dropout", "grid", "is_LSA", "is_SPT", "is_Coord", "mask")
BASE = ("mask", "*mask.mask")

official("gmm-mask", "Gaussian_Mixture_Mask", ignores=IGNORED, derived=BASE)(GaussianMixtureMask)
official("gmm-mask", "vit.Attention", ignores=IGNORED, derived=BASE)(Attention)
official("gmm-mask", "cait.Attention", ignores=IGNORED, derived=BASE)(TalkingHeads)
official("gmm-mask", "vit.ViT", ignores=IGNORED, derived=BASE)(ViT)
official("gmm-mask", "cait.CaiT", ignores=IGNORED, derived=BASE)(CaiT)


@official("gmm-mask", "pit.Attention", ignores=IGNORED, derived=BASE)
def _pit_attention(
    dim: int,
    num_patches: int,
    heads: int = 8,
    dim_head: int = 64,
    is_GMM: bool = True,
    num_kernals: int = 3,
    *,
    backend: str = "auto",
) -> nn.Module:
    """PiT's, whose class token is one of the `num_patches`."""
    return Attention(dim, num_patches, heads, dim_head, is_GMM, num_kernals, prefix=1, backend=backend)
