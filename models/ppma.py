"""PPMA: polyline path masked attention for vision transformers (Zhao et al., NeurIPS 2025, arXiv:2506.15940).

A score falls by the cost of a path of two legs from the query to the key, whose steps the image itself prices. In early stages one
softmax along rows and one along columns stand in for the whole. Parameter names are those of the official code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError
from attnc.models.blocks.conv import conv_map
from attnc.models.blocks.drop import DropPath, linear_rates
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.relative_window import check_heads
from attnc.models.blocks.rotary import rotate
from attnc.models.blocks.staged import Staged
from attnc.models.official import official
from attnc.models.registry import variants

Path = Literal["key column", "key row", "x", "y"]


@cache  # layers share operators
def path_operator(path: Path, backend: str) -> attnc.Operator:
    """Attention under a path mask over ``[B, H, W, h, d]``: between all tokens around one corner, or along one axis."""
    polyline = attnc.patterns.polyline
    pattern = polyline(attnc.patterns.axial(path)) if path in ("x", "y") else polyline(corner=path)  # type: ignore[arg-type]
    return attnc.compile(pattern, layout="b y x h d", backend=backend)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions by the row-major index p on ``[B, H, W, h, d]``: the pair of channels 2t, 2t + 1 turns by an angle
    p * 10000^(-t / (d / 2 - 1))."""
    _, height, width, _, d = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    rate = 10000.0 ** -torch.linspace(0, 1, d // 2, dtype=dtype, device=x.device)
    angle = torch.arange(height * width, dtype=dtype, device=x.device).view(height, width, 1, 1) * rate
    return rotate(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))


class PathCosts(nn.Module):
    """What a step costs at each token and head: exp(A_log) softplus(dt_linear(x_h) + dt_bias), across and down.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(self, embed_dim: int, nheads: int) -> None:
        super().__init__()
        check_heads(embed_dim, nheads)
        self.dt_linear = nn.Linear(embed_dim // nheads, 2, bias=False)
        first = torch.exp(torch.rand(nheads) * math.log(100) + math.log(1e-3))  # steps of 1e-3 to 0.1, as in Mamba-2
        self.dt_bias = nn.Parameter(first + torch.log(-torch.expm1(-first)))
        self.A_log = nn.Parameter(torch.empty(nheads).uniform_(1, 16).log())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``[B, H, W, C]`` to the sums of costs along rows and down columns, `across` and `down` ``[B, h, H, W]``."""
        steps = self.dt_linear(x.view(*x.shape[:3], len(self.A_log), -1)) + self.dt_bias[:, None]
        costs = (F.softplus(steps) * self.A_log.exp()[:, None]).permute(4, 0, 3, 1, 2)
        return {"across": costs[0].cumsum(-1), "down": costs[1].cumsum(-2)}


class DensePathMask(PathCosts):
    """The mask itself, of every pair of tokens: for looking at, and for the official class of that name."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, H, W, C] -> [B, h, H W, H W]``: minus the costs along the query's row, then along the key's column."""
        across, down = super().forward(x).values()
        legs = (across[..., :, None] - across[..., None, :]).abs()  # row, column of query, column of key
        columns = (down[..., :, None, :] - down[..., None, :, :]).abs()  # row of query, row of key, column of key
        return -(legs[..., :, :, None, :] + columns[..., :, None, :, :]).flatten(-2).flatten(2, 3)


class DepthwiseConv(nn.Module):
    """A convolution of each channel, zero padded, on a map."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        return conv_map(self.conv, x)


class PathAttention(nn.Module):
    """Attention under path masks, with a 5x5 convolution of the values beside it.

    Whole: the mean of the attentions around either corner. Separable: with A_x the attention along rows and A_y that along columns,
    the mean of A_y A_x v and A_x A_y v.

    Args:
        embed_dim: channels C.
        num_heads: heads of C / h channels, an even number of them.
        value_factor: channels of the values over C.
        separable: which of the two.
        backend: of the attnc operators.

    Raises:
        DeclarationError: the heads do not divide the channels into an even number.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, value_factor: int = 1, *, separable: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.path_embed = PathCosts(embed_dim, num_heads)
        if embed_dim // num_heads % 2:
            raise DeclarationError(f"heads have {embed_dim // num_heads} channels; rotary positions need an even number")
        self.num_heads = num_heads
        self.separable = separable
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim * value_factor)
        self.lepe = DepthwiseConv(embed_dim * value_factor, 5)
        self.out_proj = nn.Linear(embed_dim * value_factor, embed_dim)
        paths: tuple[Path, Path] = ("x", "y") if separable else ("key column", "key row")
        self.first, self.second = (path_operator(path, backend) for path in paths)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        heads = (*x.shape[:3], self.num_heads, -1)
        q, k = (rotated(projection(x).view(heads)) for projection in (self.q_proj, self.k_proj))
        values = self.v_proj(x)
        v = values.view(heads)
        costs: dict[str, Any] = self.path_embed(x)
        a, b = self.first(q, k, v, **costs), self.second(q, k, v, **costs)
        if self.separable:
            a, b = self.second(q, k, a, **costs), self.first(q, k, b, **costs)
        return cast(Tensor, self.out_proj((0.5 * (a + b)).flatten(3) + self.lepe(values)))


class FeedForward(nn.Module):
    """Linear C -> hidden, GELU, plus its own 3x3 depthwise convolution, Linear hidden -> C."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        a = F.gelu(self.fc1(x))
        return cast(Tensor, self.fc2(a + self.dwconv(a)))


class Block(nn.Module):
    """x + DWConv3x3(x), x + g1 attention(LN x), x + g2 FFN(LN x); the scales g only where `layer_init` is given."""

    def __init__(
        self, dim: int, attention: PathAttention, mlp_ratio: float, drop_path: float, layer_init: float | None = None
    ) -> None:
        super().__init__()
        self.pos = DepthwiseConv(dim, 3)
        self.retention_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.retention = attention
        self.drop_path = DropPath(drop_path)
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FeedForward(dim, int(dim * mlp_ratio))
        self.gamma_1, self.gamma_2 = (
            None if layer_init is None else nn.Parameter(torch.full((1, 1, 1, dim), layer_init)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        x = x + self.pos(x)
        for norm, branch, gamma in (
            (self.retention_layer_norm, self.retention, self.gamma_1),
            (self.final_layer_norm, self.ffn, self.gamma_2),
        ):
            y = branch(norm(x))
            x = x + self.drop_path(y if gamma is None else gamma * y)
        return x


class PatchEmbed(nn.Module):
    """Four 3x3 convolutions, two of them of stride 2, each with its BatchNorm, and GELU between them."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for before, after, stride in ((in_chans, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, ceil(H / 4), ceil(W / 4), C]``."""
        return cast(Tensor, self.proj(x)).permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """Between stages: a 3x3 convolution of stride 2 with its BatchNorm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C']``."""
        return cast(Tensor, self.norm(self.reduction(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Blocks, and what leads to the next stage (nothing after the last one)."""

    def __init__(self, blocks: Sequence[Block], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


@variants(
    ppma_tiny={"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 8, 2), "num_heads": (4, 4, 8, 16)},
    ppma_small={
        "embed_dims": (64, 128, 256, 512),
        "depths": (3, 4, 18, 4),
        "num_heads": (4, 4, 8, 16),
        "mlp_ratios": (4, 4, 3, 3),
        "chunkwise_recurrents": (True, True, True, False),
    },
    ppma_base={
        "embed_dims": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "num_heads": (5, 5, 10, 16),
        "mlp_ratios": (4, 4, 3, 3),
        "chunkwise_recurrents": (True, True, True, False),
        "layerscales": (False, False, True, True),
    },
)
class PPMAViT(Staged):
    """Image classifier or backbone for images ``[B, in_chans, H, W]`` of any size.

    Args:
        in_chans: channels of the image.
        num_classes: logits; 0 leaves the pooled features.
        embed_dims, depths, num_heads, mlp_ratios: channels, blocks, heads and hidden width of the FFN over C, per stage.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; officially 0.1 (tiny), 0.15, 0.4.
        chunkwise_recurrents: the stages whose attention is separable.
        layerscales, layer_init_values: the stages with a scale per channel of each branch, and what it begins with.
        projection: width of the last features.
        features_only, out_indices, grad_checkpointing: see `Staged`; each map passes a LayerNorm of its own.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or the stages differ in number.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        drop_path_rate: float = 0.0,
        chunkwise_recurrents: Sequence[bool] = (True, True, False, False),
        layerscales: Sequence[bool] = (False, False, False, False),
        layer_init_values: float = 1e-6,
        projection: int = 1024,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        stages = len(embed_dims)
        given = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
        given |= {"chunkwise_recurrents": chunkwise_recurrents, "layerscales": layerscales}
        for name, values in given.items():
            if len(values) != stages:
                raise DeclarationError(f"PPMA: {name}={values!r}: there are {stages} stages in {embed_dims=}")
        super().__init__(
            embed_dims,
            [4 << i for i in range(stages)],
            "layers",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.num_features = projection
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0])
        rates = iter(linear_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            scale = layer_init_values if layerscales[i] else None
            blocks = [
                Block(
                    dim,
                    PathAttention(dim, heads, separable=chunkwise_recurrents[i], backend=backend),
                    mlp_ratios[i],
                    next(rates),
                    scale,
                )
                for _ in range(depths[i])
            ]
            self.layers.append(Stage(blocks, PatchMerging(dim, embed_dims[i + 1]) if i + 1 < stages else None))
        if features_only:
            for i in self.out_indices:
                self.add_module(f"outnorm{i}", nn.LayerNorm(embed_dims[i]))
        else:
            self.proj = nn.Linear(embed_dims[-1], projection)
            self.norm = nn.BatchNorm2d(projection)
            self.head = nn.Linear(projection, num_classes) if num_classes else nn.Identity()
        self.apply(init_vit)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """``[B, in_chans, H, W] -> [B, num_classes]``; with `features_only`, all ``[B, C, H', W']``."""
        out = super().forward(image)
        if isinstance(out, Tensor):
            return out
        norms = [self.get_submodule(f"outnorm{i}") for i in self.out_indices]
        return [norm(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, t in zip(norms, out, strict=True)]

    def forward_stages(self, image: Tensor) -> list[Tensor]:
        """The outputs of all stages, ``[B, C, H', W']`` (views of channels-last memory)."""
        maps = []
        x = self.patch_embed(image)
        for stage in self.layers:
            for block in cast(nn.ModuleList, stage.blocks):
                x = self.run(block, x)
            maps.append(x.permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = cast(PatchMerging, stage.downsample)(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``[B, C, H', W']`` to `projection` channels, BatchNorm, SiLU, mean, and the classifier unless `pre_logits`."""
        wide = self.norm(self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        pooled = F.silu(wide).mean((2, 3))
        return pooled if pre_logits else cast(Tensor, self.head(pooled))


# arguments without a meaning, and what follows from the sizes
IGNORED = ("init_values", "heads_ranges", "rel_pos", "norm_layer", "patch_norm", "use_checkpoint", "use_checkpoints", "args")
DERIVED = ("*Relpos.angle", "*num_batches_tracked")

official("ppma", "MambaAttentionAllDouble", ignores=IGNORED, derived=DERIVED)(PathAttention)
official("ppma", "PPMAViT", ignores=IGNORED, derived=DERIVED)(PPMAViT)


@official("ppma", "MambaAttentionChunkDouble", ignores=IGNORED, derived=DERIVED)
def _separable(embed_dim: int, num_heads: int, value_factor: int = 1, *, backend: str = "auto") -> nn.Module:
    return PathAttention(embed_dim, num_heads, value_factor, separable=True, backend=backend)


@official("ppma", "PathEmbeding2D", ignores=IGNORED, derived=DERIVED)
def _mask(embed_dim: int, nheads: int, chunkwise_recurrent: bool = False) -> nn.Module:
    if chunkwise_recurrent:
        raise DeclarationError("PathEmbeding2D: the mask of pairs is that of chunkwise_recurrent=False")
    return DensePathMask(embed_dim, nheads)
