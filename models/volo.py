"""VOLO: Vision Outlooker (Yuan et al., TPAMI 2022, arXiv:2106.13112).

On the fine map each 2 x 2 tokens generate, from their mean alone, the weights of all pairs in a window around them
(*outlook attention*); on the coarse one tokens attend to each other, and in the end a class token to all of them.
Parameter names are those of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc
from attnc.errors import DeclarationError, ShapeError
from attnc.models.blocks.attention import QkvAttention
from attnc.models.blocks.conv import conv_map
from attnc.models.blocks.init import init_vit
from attnc.models.blocks.linear import Linear
from attnc.models.blocks.mlp import Mlp
from attnc.models.blocks.patches import pair
from attnc.models.blocks.prenorm import PreNormBlock
from attnc.models.blocks.staged import Staged
from attnc.models.blocks.tokens import cross_operator, with_class_token
from attnc.models.official import official
from attnc.models.registry import variants
from attnc.models.timm_names import timm_names


@cache  # layers share operators
def outlook_operator(size: int, stride: int, padding: int, backend: str) -> attnc.Operator:
    """Generated weights, on queries ``[B, size * rows, size * columns, heads, d]`` and values ``[B, H, W, heads, d]``."""
    return attnc.compile(
        attnc.patterns.outlook(size, stride, padding),
        grid={"y": None, "x": None},
        kv_grid=(None, None),
        pad=((padding, padding),) * 2 if padding else None,
        layout="b y x h d",
        backend=backend,
    )


@cache
def full_operator(heads: int, backend: str) -> attnc.Operator:
    """Attention among all tokens of a map, on packed ``[B, H, W, 3C]``."""
    return attnc.compile(attnc.patterns.full(), layout="b y x (three h d)", heads=heads, backend=backend)


class OutlookAttention(nn.Module):
    """Windows of K x K values, mixed by softmax of weights that the mean of `stride` x `stride` tokens generates, and added up.

    Args:
        dim: channels C.
        num_heads: heads h of d = C / h channels.
        kernel_size: K.
        padding: rows of zeros around the values, which windows see.
        stride: between windows.
        qkv_bias: whether ``v`` has a bias.
        qk_scale: factor of the generated scores, d^-1/2 where it is None.
        proj_drop: dropout after ``proj``.
        backend: of the operator.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        padding: int = 1,
        stride: int = 1,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise DeclarationError(f"num_heads is {num_heads}, which does not divide dim = {dim}")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.padding = padding
        self.stride = stride
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.v = Linear(dim, dim, bias=qkv_bias)
        self.attn = Linear(dim, kernel_size**4 * num_heads)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.mix = outlook_operator(kernel_size, stride, padding, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``; ShapeError where windows and means differ in number."""
        size, heads = self.kernel_size, self.num_heads
        batch, rows, columns, dim = x.shape
        anchors = [-(-n // self.stride) for n in (rows, columns)]
        if anchors != [(n + 2 * self.padding - size) // self.stride + 1 for n in (rows, columns)]:
            raise ShapeError(
                f"outlook attention: {anchors[0]}x{anchors[1]} means of a map of {rows}x{columns} meet another number of windows "
                f"of {size}, padded by {self.padding}: choose padding = (kernel_size - 1) / 2"
            )
        # an anchor at the border averages the tokens that exist
        means = F.avg_pool2d(x.permute(0, 3, 1, 2), self.stride, self.stride, ceil_mode=True).permute(0, 2, 3, 1)
        logits = (self.attn(means) * self.scale).unflatten(3, (heads, size**2, size**2)).permute(0, 3, 1, 2, 4, 5)
        v = self.v(x).unflatten(3, (heads, -1))
        # scores are generated: q and k say how many rows there are, and q how the output lies in memory
        q, k = v.new_zeros(batch, size * anchors[0], size * anchors[1], heads, 1), v[..., :1].detach()
        mixed = self.mix(q, k, v, logits=logits)
        windows = mixed.view(batch, anchors[0], size, anchors[1], size, dim).permute(0, 5, 2, 4, 1, 3)
        windows = windows.reshape(batch, dim * size**2, -1)
        out = F.fold(windows, (rows, columns), size, padding=self.padding, stride=self.stride)
        mixed = self.proj(out.permute(0, 2, 3, 1))
        return cast(Tensor, self.proj_drop(mixed))


class Attention(QkvAttention):
    """softmax(q k^T / sqrt(d)) v among all tokens of a map. Args: see `QkvAttention`; `backend`: of the operator."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale=qk_scale, proj_drop=proj_drop)
        self.attend = full_operator(num_heads, backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H, W, C]``."""
        return self.project(self.attend(self.qkv(x), scale=self.scale))


class ClassAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v of the first token, the class's, to all tokens.

    Args:
        dim, num_heads, qkv_bias, qk_scale, proj_drop: as in `Attention`, with ``q`` and ``kv`` (C -> [k | v]).
        head_dim: channels of a head, C / h where it is None.
        backend: of the operator.

    Raises:
        DeclarationError: the heads do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if head_dim is None and dim % num_heads:
            raise DeclarationError(f"num_heads is {num_heads}, which does not divide dim = {dim}")
        self.num_heads = num_heads
        head_dim = head_dim or dim // num_heads
        self.scale = qk_scale or head_dim**-0.5
        self.kv = nn.Linear(dim, 2 * head_dim * num_heads, bias=qkv_bias)
        self.q = nn.Linear(dim, head_dim * num_heads, bias=qkv_bias)
        self.proj = nn.Linear(head_dim * num_heads, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attend = cross_operator(backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 1 + N, C] -> [B, 1, C]``."""
        q = self.q(x[:, :1]).unflatten(2, (self.num_heads, -1))
        k, v = self.kv(x).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        out: Tensor = self.proj_drop(self.proj(self.attend(q, k, v, scale=self.scale).flatten(2)))
        return out


class ClassBlock(nn.Module):
    """The class token attends to all tokens and passes an MLP; the others stay.

    Args:
        dim, num_heads, head_dim, mlp_ratio, qkv_bias, qk_scale: of attention and MLP.
        drop: dropout after the attention and in the MLP.
        backend: of the operator.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ClassAttention(dim, num_heads, head_dim, qkv_bias, qk_scale, drop, backend=backend)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 1 + N, C] -> [B, 1 + N, C]``."""
        token = x[:, :1] + self.attn(self.norm1(x))
        token = token + self.mlp(self.norm2(token))
        return torch.cat([token, x[:, 1:]], 1)


class PatchEmbed(nn.Module):
    """7x7 convolution with stride 2 and two of 3x3, each with norm and ReLU, then patches of `patch` / 2: stride `patch`."""

    def __init__(self, in_chans: int, hidden: int, dim: int, patch: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, size, stride in ((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            layers += [nn.Conv2d(before, hidden, size, stride, size // 2, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, dim, patch // 2, patch // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, H / patch, W / patch, C]``."""
        x = self.conv(x.contiguous(memory_format=torch.channels_last))
        return conv_map(self.proj, x.permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """2x2 convolution with stride 2."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(before, after, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C] -> [B, H / 2, W / 2, C']``."""
        return conv_map(self.proj, x)


def _variants() -> dict[str, dict[str, Any]]:
    """By size and image; without a number at the end at 224 pixels."""
    sizes: dict[str, tuple[tuple[int, ...], int, tuple[int, int], tuple[int, ...]]] = {
        "d1": ((4, 4, 8, 2), 192, (6, 12), (224, 384)),
        "d2": ((6, 4, 10, 4), 256, (8, 16), (224, 384)),
        "d3": ((8, 8, 16, 4), 256, (8, 16), (224, 448)),
        "d4": ((8, 8, 16, 4), 384, (12, 16), (224, 448)),
        "d5": ((12, 12, 20, 4), 384, (12, 16), (224, 448, 512)),
    }
    return {
        f"volo_{name}{'' if image == 224 else f'_{image}'}": {
            "layers": layers,
            "img_size": image,
            "embed_dims": (dim, *(2 * dim,) * 3),
            "num_heads": (heads[0], *(heads[1],) * 3),
            "mlp_ratios": (4 if name == "d5" else 3,) * 4,
            "stem_hidden_dim": 128 if name == "d5" else 64,
        }
        for name, (layers, dim, heads, images) in sizes.items()
        for image in images
    }


@variants(**_variants())
class VOLO(Staged):
    """Image classifier or backbone for images ``[B, in_chans, *img_size]``.

    The logits are those of the class token plus half the largest ones of any token (token labelling), in training too; a
    trainer that labels tokens takes both apart from `forward_dense`, and mixes images itself.

    Args:
        layers: blocks per stage.
        img_size: rows and columns of the image, for which the position embedding is made.
        in_chans: channels of the image.
        num_classes, features_only, out_indices, grad_checkpointing: see `Staged`.
        patch_size: stride of the stem, even.
        stem_hidden_dim: channels inside the stem.
        embed_dims, num_heads, mlp_ratios: channels, heads and hidden width of the MLP over C, per stage.
        downsamples: whether a stage's map is halved after it.
        outlook_attention: whether a stage's blocks are Outlookers, not transformers.
        qkv_bias, qk_scale: of the attentions.
        drop_rate: dropout after the position embedding, after each attention and in the MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over all; Outlookers have none.
        post_layers: "ca" for each block of class attention; None leaves out the class token, and the first token takes its place.
        return_mean: whether the mean over the tokens takes its place; not together with `return_dense`.
        return_dense: whether there is a classifier of tokens, ``aux_head``.
        pooling_scale: how much the stages reduce the map before the position embedding.
        out_kernel, out_stride, out_padding: of outlook attention.
        backend: of the attnc operators.

    Raises:
        DeclarationError: an argument is out of range, or the stages differ in number.
    """

    def __init__(
        self,
        layers: Sequence[int],
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 8,
        stem_hidden_dim: int = 64,
        embed_dims: Sequence[int] = (192, 384, 384, 384),
        num_heads: Sequence[int] = (6, 12, 12, 12),
        downsamples: Sequence[bool] = (True, False, False, False),
        outlook_attention: Sequence[bool] = (True, False, False, False),
        mlp_ratios: Sequence[float] = (3.0, 3.0, 3.0, 3.0),
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        post_layers: Sequence[str] | None = ("ca", "ca"),
        return_mean: bool = False,
        return_dense: bool = True,
        pooling_scale: int = 2,
        out_kernel: int = 3,
        out_stride: int = 2,
        out_padding: int = 1,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        stages = len(layers)
        lengths = {len(each) for each in (layers, embed_dims, num_heads, mlp_ratios, downsamples, outlook_attention)}
        self.check(lengths == {stages}, f"{layers=}, embed_dims, num_heads, mlp_ratios, downsamples, ... differ in length")
        halved = [sum(downsamples[:i]) for i in range(stages)]
        super().__init__(
            embed_dims,
            [patch_size << n for n in halved],
            "network",
            num_classes=num_classes,
            features_only=features_only,
            out_indices=out_indices,
            grad_checkpointing=grad_checkpointing,
        )
        self.check(patch_size >= 2 and patch_size % 2 == 0, f"{patch_size=}: the stem's first convolution has stride 2")
        self.check(not downsamples[-1], f"{downsamples=}: nothing comes after the last stage")
        self.check(not (return_mean and return_dense), "return_mean and return_dense exclude each other: choose one")
        self.check(set(post_layers or ()) <= {"ca"}, f"{post_layers=}: 'ca' exists")

        def block(stage: int, i: int) -> nn.Module:
            dim, heads = embed_dims[stage], num_heads[stage]
            rate = 0.0
            attn: nn.Module
            if outlook_attention[stage]:
                kernel = (out_kernel, out_padding, out_stride)
                attn = OutlookAttention(dim, heads, *kernel, qkv_bias, qk_scale, drop_rate, backend=backend)
            else:
                attn = Attention(dim, heads, qkv_bias, qk_scale, drop_rate, backend=backend)
                rate = drop_path_rate * (i + sum(layers[:stage])) / max(sum(layers) - 1, 1)
            return PreNormBlock(dim, attn, mlp_ratio=mlp_ratios[stage], drop=drop_rate, drop_path=rate)

        self.patch_embed = PatchEmbed(in_chans, stem_hidden_dim, embed_dims[0], patch_size)
        network: list[nn.Module] = []
        self.stage_ends: list[int] = []  # their places in `network`, where downsampling has places of its own
        for stage, depth in enumerate(layers):
            self.stage_ends.append(len(network))
            network.append(nn.Sequential(*(block(stage, i) for i in range(depth))))
            if downsamples[stage]:
                network.append(Downsample(embed_dims[stage], embed_dims[stage + 1]))
        for info, i in zip(self.feature_info, self.out_indices, strict=True):
            info["module"] = f"network.{self.stage_ends[i]}"
        self.network = nn.ModuleList(network)
        grid = [side // patch_size // pooling_scale for side in pair(img_size)]
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *grid, embed_dims[-1]), std=0.02))
        self.pos_drop = nn.Dropout(drop_rate)
        self.return_mean = return_mean
        if not features_only:
            self.cls_token, self.post_network = None, None
            if post_layers is not None:
                self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.num_features), std=0.02))
                self.post_network = nn.ModuleList(
                    ClassBlock(
                        self.num_features, num_heads[-1], None, mlp_ratios[-1], qkv_bias, qk_scale, drop_rate, backend=backend
                    )
                    for _ in post_layers
                )
            self.norm = nn.LayerNorm(self.num_features)
            self.head = self._linear()
            self.aux_head = self._linear() if return_dense else None
        self.apply(init_vit)

    def _linear(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of all stages before they are halved, ``[B, C, H', W']``; ShapeError for another image size."""
        maps = []
        x = self.patch_embed(x)
        for i, part in enumerate(self.network):
            if i == 2:  # after the Outlookers and their downsampling
                if x.shape[1:] != self.pos_embed.shape[1:]:
                    expected, found = list(self.pos_embed.shape[1:]), list(x.shape[1:])
                    raise ShapeError(
                        f"VOLO: the position embedding {expected} meets a map {found}: build the model with this img_size"
                    )
                x = self.pos_drop(x + self.pos_embed)
            if isinstance(part, Downsample):
                x = part(x)
                continue
            for block in cast(nn.Sequential, part):
                x = self.run(block, x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def _tokens(self, x: Tensor) -> Tensor:
        """All tokens after the class attention and the last norm, the class token first if there is one."""
        x = x.flatten(2).transpose(1, 2)
        if self.post_network is not None and self.cls_token is not None:
            x = with_class_token(self.cls_token, x)
            for block in self.post_network:
                x = self.run(block, x)
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from ``[B, C, H', W']``; `pre_logits` gives what the classifier reads, the normalised class token."""
        tokens = self._tokens(x)
        pooled = tokens.mean(1) if self.return_mean else tokens[:, 0]
        if pre_logits or not self.num_classes:
            return pooled
        logits: Tensor = self.head(pooled)
        if self.aux_head is not None:
            logits = logits + 0.5 * self.aux_head(tokens[:, 1:]).amax(1)
        return logits

    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class token ``[B, num_classes]`` and of each token ``[B, N, num_classes]``, for token labelling.

        Raises:
            DeclarationError: the model has no classifier of tokens.
        """
        self.check(self.aux_head is not None, "there is no aux_head: build the model with return_dense=True to label tokens")
        tokens = self._tokens(self.forward_features(x))
        return self.head(tokens[:, 0]), cast(nn.Module, self.aux_head)(tokens[:, 1:])

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both classifiers by fresh ones; 0 classes leave the class token."""
        super().reset_classifier(num_classes)
        if self.aux_head is not None:
            self.aux_head = self._linear().apply(init_vit).to(next(self.parameters()))


timm_names("volo")  # the same names

IGNORED = ("attn_drop", "attn_drop_rate", "norm_layer", "act_layer", "mix_token", "drop_path")  # nothing here

official("volo", "OutlookAttention", ignores=IGNORED)(OutlookAttention)
official("volo", "Attention", ignores=IGNORED)(Attention)
official("volo", "ClassAttention", ignores=IGNORED)(ClassAttention)
official("volo", "ClassBlock", ignores=IGNORED)(ClassBlock)
official("volo", "VOLO", ignores=IGNORED, derived=("*.num_batches_tracked",))(VOLO)
