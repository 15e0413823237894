"""DependencyViT: visual dependency transformers (Ding et al., CVPR 2023, arXiv:2304.03282).

Attention is reversed: each token distributes itself over its parents, and a parent adds up what its children send. A token sends
through one head more than through others, and less and less with depth: both gates are learned. Tokens that send little may be
dropped on the way. The authors published no code; names and open choices are those of a third party's port to timm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.errors import ShapeError
from attnc.models.blocks.attention import QkvAttention
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.isotropic import Isotropic
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.patches import PatchEmbed, pair
from attnc.models.official import official
from attnc.models.registry import variants

WIDEST = 256  # channels of a value that an operator takes


@cache  # layers share operators
def reversed_operator(backend: str) -> attnc.Operator:
    """Reversed attention among all tokens; receivers, senders and values ``[B, N, h, d]``."""
    return attnc.compile(attnc.patterns.reversed_attention(), layout="b x h d", backend=backend)


class MessageController(nn.Module):
    """c = sigmoid(fc2(gelu(fc1(x)))): the share of its message that a token sends on."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 2, bias=False)
        self.fc2 = nn.Linear(dim // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C] -> [B, N]``, in float32 at least: twelve of them are multiplied."""
        logits: Tensor = self.fc2(F.gelu(self.fc1(x)))[..., 0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


class ReversedAttention(QkvAttention):
    """y[j] = sum over h, i of softmax_j(q_i . k_j / sqrt(d)) p[i, h] m[i] v[i], and a projection.

    p[i] = softmax over heads of (head_selector(x_i) / temperature); m[i] is the incoming m[i] times `message_controller` of x_i.

    Args:
        dim, num_heads, qkv_bias, proj_drop: see `QkvAttention`.
        head_selector_temperature: of p.
        backend: of the operator.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        head_selector_temperature: float = 0.1,
        proj_drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, proj_drop=proj_drop)
        self.temperature = head_selector_temperature
        self.head_selector = nn.Linear(dim, num_heads, bias=False)
        self.message_controller = MessageController(dim)
        self.attend = reversed_operator(backend)

    def gates(self, x: Tensor, m: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """p times m ``[B, N, h]``, and m ``[B, N]``, of x ``[B, N, C]`` and the incoming m (ones where it is None)."""
        sent = self.message_controller(x)
        m = sent if m is None else m * sent
        return (self.head_selector(x) / self.temperature).softmax(-1) * m[..., None], m

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v ``[B, N, h, d]``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q, k, v

    def forward(self, x: Tensor, m: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x ``[B, N, C]`` and the incoming m ``[B, N]`` to the output ``[B, N, C]`` and the outgoing m."""
        gates, m = self.gates(x, m)
        q, k, v = self.rows(x)
        mixed = self.attend(k, q, v * gates[..., None].to(v.dtype), scale=self.scale)
        return self.project(mixed.flatten(2)), m

    def dependencies(self, x: Tensor, m: Tensor | None = None) -> Tensor:
        """The soft dependency mask ``[B, N, N]``: what token i (column) sends to token j (row), over all heads. To look at."""
        gates, _ = self.gates(x, m)
        q, k, _ = self.rows(x)
        # what arrives where each token sends a one of its own, WIDEST tokens at a time
        ones = torch.eye(x.shape[1], dtype=q.dtype, device=x.device)[:, None]
        parts = [self.attend(k, q, gates[..., None].to(q.dtype) * part, scale=self.scale) for part in torch.split(ones, WIDEST, -1)]
        return torch.cat([part.sum(2) for part in parts], -1)


class LayerScale(nn.Module):
    """x * gamma, per channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``."""
        return x * self.gamma


class Block(nn.Module):
    """x + ls1(attention(LN x, m)), then only the tokens that are kept, then x + ls2(MLP(LN x)).

    Args:
        dim, num_heads: channels and heads.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias, head_selector_temperature, drop: see `ReversedAttention`; `drop` is in the MLP too.
        drop_path: probability of dropping a branch.
        init_values: where the layer scales begin.
        keep: the share of tokens that is kept, those of the largest m; None for all.
        backend: of the operator.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        head_selector_temperature: float,
        drop: float,
        drop_path: float,
        init_values: float,
        keep: float | None,
        *,
        backend: str,
    ) -> None:
        super().__init__()
        self.keep = keep
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = ReversedAttention(dim, num_heads, qkv_bias, head_selector_temperature, drop, backend=backend)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.ls2 = LayerScale(dim, init_values)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, m: Tensor | None, place: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """x ``[B, N, C]``, m and, if asked for, the `place` ``[B, N]`` of its tokens in the image; all of the tokens kept."""
        mixed, m = self.attn(self.norm1(x), m)
        x = x + self.drop_path(self.ls1(mixed))
        if self.keep is not None:
            kept = m.topk(max(1, int(self.keep * x.shape[1])), 1).indices
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
            m = m.gather(1, kept)
            place = None if place is None else place.gather(1, kept)
        return x + cast(Tensor, self.drop_path(self.ls2(self.mlp(self.norm2(x))))), m, place


def kept_share(n: int, ratio: float) -> float:
    """Of the tokens there are at the n-th pruning (from 1), so that n * ratio of all are gone after it."""
    return (1 - n * ratio) / (1 - (n - 1) * ratio)


LITE: dict[str, Any] = {"prune_layers": (2, 5, 8, 11), "prune_ratio": 0.16}


@variants(
    dependencyvit_tiny={"embed_dim": 192},
    dependencyvit_small={"embed_dim": 384},
    dependencyvit_lite_tiny={"embed_dim": 192, **LITE},
)
class DependencyViT(Isotropic):
    """Image classifier, or backbone where no tokens are dropped, for images ``[B, in_chans, *img_size]``.

    Args:
        img_size: rows and columns of the image; the position embedding is made for them.
        patch_size: of patches; an int, or rows and columns.
        in_chans: channels of the image.
        num_classes, features_only, out_indices, grad_checkpointing: see `Isotropic`.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: of the blocks.
        head_selector_temperature: see `ReversedAttention`.
        init_values: where the layer scales begin.
        prune_layers: blocks (from 1) that drop tokens, in ascending order.
        prune_ratio: share of the image's tokens that each of them drops.
        drop_rate: dropout after the position embedding, after each attention and in the MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range.
    """

    reads = "mean"

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        head_selector_temperature: float = 0.1,
        init_values: float = 1e-6,
        prune_layers: Sequence[int] | None = None,
        prune_ratio: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        patch = pair(patch_size)
        super().__init__(
            embed_dim,
            depth,
            patch,
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.grid = self.grid_of(img_size)
        pruned, ratio = sorted(prune_layers or ()), prune_ratio or 0.0
        self.check(
            all(1 <= i <= depth for i in pruned) and len(set(pruned)) == len(pruned),
            f"{prune_layers=}: different blocks, from 1 to {depth}",
        )
        self.check(ratio >= 0 and len(pruned) * ratio < 1, f"{prune_ratio=} for {len(pruned)} prunings: no token would be left")
        self.check(
            not (features_only and pruned),
            f"{features_only=} with {prune_layers=}: dropped tokens leave no maps; build it with prune_layers=None",
        )
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch, norm=False, pad=False)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.grid[0] * self.grid[1], embed_dim), std=0.02))
        self.pos_drop = nn.Dropout(drop_rate)
        shares = {i: kept_share(n, ratio) for n, i in enumerate(pruned, 1)}
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                head_selector_temperature,
                drop_rate,
                rate,
                init_values,
                shares.get(i),
                backend=backend,
            )
            for i, rate in enumerate(linear_rates(drop_path_rate, depth), 1)
        )
        self.add_head(1e-6)
        self.apply(init_vit)

    def embed(self, x: Tensor) -> Tensor:
        """Patches with their positions, ``[B, N, C]``; ShapeError for another image size."""
        x = self.patch_embed(x)
        self.check_grid(x, self.grid)
        return cast(Tensor, self.pos_drop(x.flatten(1, 2) + self.pos_embed))

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """``[B, in_chans, *img_size] -> [B, num_classes]``; with `features_only`, maps. Raises ShapeError for another size."""
        return super().forward(image)

    def _forward_gated(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The tokens that are left after each block and their m."""
        x, m = self.embed(x), None
        for block in self.blocks:
            x, m, _ = cast(Any, self.run(block, x, m=m))
            yield x, m

    def forward_blocks(self, x: Tensor) -> Iterator[Tensor]:
        """The tokens that are left after each block, ``[B, N', C]``."""
        return (tokens for tokens, _ in self._forward_gated(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The tokens that are left, after the last norm and times their m, ``[B, N', C]``."""
        for tokens, m in self._forward_gated(x):
            last, gate = tokens, m
        x = self.norm(last)
        return x if gate is None else x * gate[..., None].to(x.dtype)

    @torch.no_grad()
    def dependencies(self, image: Tensor) -> Tensor:
        """The soft dependency masks of all blocks, added up: ``[B, N, N]``, from column to row, for `dependency_tree`."""
        x, m = self.embed(image), None
        count = x.shape[1]
        place: Tensor | None = torch.arange(count, device=x.device).expand(len(x), -1)
        total = x.new_zeros(len(x), count * count)
        for block in cast("list[Block]", self.blocks):
            assert place is not None
            flat = (place[:, :, None] * count + place[:, None]).flatten(1)
            total.scatter_add_(1, flat, block.attn.dependencies(block.norm1(x), m).flatten(1).to(total.dtype))
            x, m, place = block(x, m, place)
        return total.view(-1, count, count)


def dependency_tree(mask: Tensor) -> list[int]:
    """The parent of each token, -1 for the root, from a soft dependency mask ``[N, N]`` (row: parent, column: child).

    Greedy: the strongest dependency first, unless the child has a parent already or a cycle would close. The token without a
    parent at the end is the root.

    Raises:
        ShapeError: the mask is not square, or empty.
    """
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or not len(mask):
        raise ShapeError(f"dependency_tree: a mask [N, N] of one image, not {list(mask.shape)}")
    count = len(mask)
    parents, tree = [-1] * count, list(range(count))  # tree: a token nearer to the root of the tree that one belongs to

    def top(i: int) -> int:
        while tree[i] != i:
            tree[i] = tree[tree[i]]
            i = tree[i]
        return i

    left = count - 1
    for edge in mask.flatten().argsort(descending=True, stable=True).tolist():
        if not left:
            break
        parent, child = divmod(edge, count)
        if parents[child] < 0 and top(parent) != child:
            parents[child] = tree[child] = parent
            left -= 1
    return parents


# the port's drops, and what is always so here
IGNORED = ("attn_drop", "attn_drop_rate", "proj_drop_rate", "norm_layer", "act_layer", "class_token", "global_pool")


@official("dependencyvit", "ReversedAttention", ignores=IGNORED)
class _OfficialAttention(ReversedAttention):
    """With the gate as ``[B, 1, 1, N]``, in and out."""

    def forward(self, x: Tensor, m: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        out, sent = super().forward(x, None if m is None else m[:, 0, 0])
        return {"x": out, "m": sent[:, None, None]}


official("dependencyvit", "DependencyViT", ignores=IGNORED)(DependencyViT)
