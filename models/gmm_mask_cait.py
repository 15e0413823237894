"""CaiT under Gaussian-mixture masks, a host of the paper of `gmm_mask` (Li et al. 2023, arXiv:2309.05375), for small images.

CaiT (Touvron et al. 2021) mixes its heads before and after softmax, and a class token joins in the last layers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

import attnc
from attnc.models.gmm_mask import (
    BASE,
    IGNORED,
    TINY_IMAGENET,
    VIT,
    FeedForward,
    PatchBlocks,
    PreNorm,
    Transformer,
    last_of,
    made_mask,
    side_of,
)
from attnc.models.official import official
from attnc.models.registry import variants


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


class TalkingHeads(nn.Module):
    """CaiT's attention: scores, masked, are mixed between heads before the softmax, and weights after it.

    s'_g = sum_h Wpre[h, g] mask_h q_h k_h^T / sqrt(d); y_g = sum_h Wpost[h, g] softmax(s'_h) v_g.

    Without a mask the mixture of scores is one product of wider rows. With it a score is no function of one product, which is all
    that a pattern can state: the scores ``[B, h, N, N]`` are made here and given to the operator as a table.

    Args:
        dim, num_patches, heads, dim_head, num_kernals, backend: see `gmm_mask.Attention`.
        if_patch_attn: whether this is a block of patches, which alone are masked.
        is_GMM, is_SLM: whether those are, and by what.
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
        is_SLM: bool = False,
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
        self.mask = made_mask(heads, num_patches, num_kernals, is_GMM, is_SLM)[0] if if_patch_attn else None
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
        mask = cast(nn.Module, self.mask)
        products = torch.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k.view(*k.shape[:2], self.heads, -1))
        scores = torch.einsum("bhnm,hg->bgnm", mask(products), self.mix_heads_pre_attn)
        nothing = q.new_zeros(()).expand(q.shape[0], self.heads, q.shape[1], 1)
        return self.attend(nothing, nothing[:, :1], v[:, None], grid=(q.shape[1],), scores=scores)


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


CAIT: dict[str, Any] = {**VIT, "dim": 192, "depth": 24, "cls_depth": 2, "heads": 4, "mlp_dim": 384, "dim_head": 64}


@variants(
    gmm_mask_cait={**CAIT, "num_classes": 10},
    gmm_mask_cait_cifar100={**CAIT, "num_classes": 100},
    gmm_mask_cait_tiny_imagenet={**CAIT, **TINY_IMAGENET},
    gmm_mask_cait_tiny={**CAIT, "num_classes": 10, "dim": 108},
    gmm_mask_cait_tiny_cifar100={**CAIT, "num_classes": 100, "dim": 108},
    gmm_mask_cait_tiny_tiny_imagenet={**CAIT, **TINY_IMAGENET, "dim": 108},
)
class CaiT(PatchBlocks):
    """Image classifier: layers of masked patches, then layers in which a class token reads them.

    Args:
        img_size, patch_size, num_classes, dim, heads, dim_head, num_kernals, channels, stochastic_depth, is_GMM, is_SLM,
            features_only, out_indices, grad_checkpointing, backend: see `gmm_mask.ViT`.
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
        is_SLM: bool = False,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            num_classes,
            dim,
            depth,
            "patch_transformer.layers",
            channels,
            0,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )

        def layers(count: int, patches: bool) -> Transformer:
            built: list[tuple[nn.Module, nn.Module]] = []
            for i in range(1, count + 1):
                attention = TalkingHeads(
                    dim, self.num_patches, heads, dim_head, patches, is_GMM, num_kernals, is_SLM, backend=backend
                )
                branches = (PreNorm(dim, attention), PreNorm(dim, FeedForward(dim, mlp_dim)))
                built.append((LayerScale(dim, branches[0], i), LayerScale(dim, branches[1], i)))
            return Transformer(built, stochastic_depth)

        self.patch_transformer = layers(depth, patches=True)
        if not features_only:
            self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
            self.cls_transformer = layers(cls_depth, patches=False)

    def forward_layers(self, image: Tensor) -> Iterator[Tensor]:
        """The tokens after each layer of patches, ``[B, N, C]``."""
        return self.patch_transformer.run(self.run, self.embed(image) + self.pos_embedding)

    def forward_features(self, image: Tensor) -> Tensor:
        """The class token ``[B, C]``, before the norm."""
        x = last_of(self.forward_layers(image))
        return last_of(self.cls_transformer.run(self.run, self.cls_token.expand(x.shape[0], -1, -1), x))[:, 0]


official("gmm-mask", "cait.Attention", ignores=IGNORED, derived=BASE)(TalkingHeads)
official("gmm-mask", "cait.CaiT", ignores=IGNORED, derived=BASE)(CaiT)
