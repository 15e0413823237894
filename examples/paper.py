"""Watching a network's attentions: which attnc operator ran, on what, and the same attention in eager PyTorch.

A `TorchDispatchMode` sees the operators that really ran, with their arguments, whatever module called them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.codegen import blocks, eager
from attnc.report.issued import issued
from attnc.runtime.call import Call
from attnc.runtime.parts import table_names
from attnc.schedule.geometry import Geometry, geometry


def _chunks(call: Call, device: torch.device, _: int) -> Iterator[blocks.Tile]:
    """256 queries at a time, with every key that the relation, evaluated on all of them, allows one of them."""
    queries, keys = eager.token_sets(call.geometry, device)
    relation = ir.flatten_index(call.attend.relation, call.attend.rank, call.program.same_grid)
    for q in queries.split(256, 1):
        leaves: dict[ir.Expr, Any] = dict(call.geometry.sizes)
        leaves |= {ir.coord("q", i): c[:, None] for i, c in enumerate(q[1:])}
        leaves |= {ir.coord("k", i): c[None, :] for i, c in enumerate(keys[1:])}
        k = keys[:, evaluate(relation, leaves, torch).any(0)]
        yield blocks.Tile(q[:1], k[:1], tuple(q[1:, None]), tuple(k[1:, None]))


@dataclass
class Attention:
    """One call of an attnc operator: its arguments as the dispatcher saw them, and its output."""

    layer: str
    operator: str
    args: tuple[Any, ...]
    output: Tensor
    windows: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def backend(self) -> str:
        """The backend that ran."""
        return str(self.args[4 if self.operator == "channel" else 8])

    @property
    def heads(self) -> int:
        """Heads, or channel groups."""
        return int(self.args[0].shape[1])

    @property
    def program(self) -> ir.Program | None:
        """The statement, None for channel attention."""
        return None if self.operator == "channel" else ir.from_json(self.args[7])

    @property
    def geometry(self) -> Geometry | None:
        """The statement at this call's sizes."""
        p = self.program
        return None if p is None else geometry(p, tuple(self.args[5]), tuple(self.args[6]))

    @property
    def grid(self) -> tuple[int, ...]:
        """The tokens' grid."""
        return tuple(self.args[0].shape[2:-1]) if self.operator == "channel" else tuple(self.args[5])

    @property
    def pattern(self) -> str:
        """The declared name."""
        p = self.program
        return "channel()" if p is None else p.attend.name

    @property
    def strategy(self) -> str:
        """How it ran."""
        g = self.geometry
        return "channel" if g is None else g.structure.strategy

    @property
    def allowed(self) -> int:
        """Score elements of one image that the statement allows."""
        g, (q, k) = self.geometry, self.args[:2]
        return self.heads * q.shape[-1] * k.shape[-1] if g is None else g.allowed(self.heads)

    @property
    def issued(self) -> int:
        """Score elements of one image that the kernels compute."""
        g, p = self.geometry, self.program
        if g is None or p is None:
            return self.allowed
        q, v = self.args[0], self.args[2]
        sizes = {"heads": self.heads, "head_dim": q.shape[-1], "value_dim": v.shape[-1]}
        return issued(self.backend, p, g, dtype=str(q.dtype).removeprefix("torch."), **sizes)

    def run(self) -> Tensor:
        """The operator again."""
        out = getattr(torch.ops.attnc, self.operator)(*self.args)
        return out if isinstance(out, Tensor) else out[0]

    def meaning(self) -> Tensor:
        """What the statement means, in float64: as `attnc.reference` computes it, from the relation as written and no proof.

        Keys that no query of a chunk may see are left out before anything is multiplied; otherwise 17,120 tokens take a minute.
        """
        q, k, v, *rest = self.args
        wide = [t.double() for t in (q, k, v)]
        p, g = self.program, self.geometry
        if p is None or g is None:
            return torch.ops.attnc.channel(*wide, *rest[:-1], "eager")
        tables, scale = [t.double() if t.is_floating_point() else t for t in rest[0]], rest[1]
        call = Call(p, g, scale, dict(zip(table_names(p), tables, strict=True)))
        return blocks.forward(call, *wide, _chunks)[0]

    def eager(self) -> Tensor:
        """The paper's own way. [B, heads, *grid, D]."""
        return self._channel() if self.operator == "channel" else self._windows()

    def _channel(self) -> Tensor:
        q, k, v = (t.flatten(2, -2) for t in self.args[:3])
        weight = torch.softmax(self.args[3] * (q.transpose(-1, -2) @ k), -1)
        return (weight @ v.transpose(-1, -2)).transpose(-1, -2).reshape(self.output.shape)

    def _windows(self) -> Tensor:
        """Pad and partition the map, softmax(q k^T) v in each window, reverse and crop.

        The paper partitions the map of C channels before the projection to q, k and v, which is no part of the attention:
        q, k and v of the windows are made ready once, and the partition that is timed is that of a C-channel map.
        """
        q = self.args[0]
        b, h, height, width, d = q.shape
        p = self.program
        assert p is not None
        side = p.keys.pad_multiple or (height, width)
        below, right = -height % side[0], -width % side[1]
        if self.windows is None:
            tables = self.args[3]
            rows = [_rows(t, below, right) for t in self.args[:3]]
            if len(tables) == 2 and (below or right):
                for t, pad in zip(rows[1:], tables, strict=True):
                    t[:, height:], t[:, :, width:] = pad, pad
            ready = torch.stack([_partition(t.flatten(-2), side).unflatten(-1, (h, d)) for t in rows])
            wq, wk, wv = ready.permute(0, 1, 3, 2, 4).unbind(0)
            self.windows = (wq, wk, wv)
            self.map = q.permute(0, 2, 3, 1, 4).reshape(b, height, width, h * d)
        _partition(F.pad(self.map, (0, 0, 0, right, 0, below)), side)
        wq, wk, wv = self.windows
        weight = torch.softmax((wq * self.args[4]) @ wk.transpose(-1, -2), -1)
        out = (weight @ wv).transpose(1, 2).flatten(2)  # [windows, side * side, C]
        grid = (b, (height + below) // side[0], (width + right) // side[1], *side, h * d)
        whole = out.view(grid).permute(0, 1, 3, 2, 4, 5).reshape(b, height + below, width + right, h * d)
        return whole[:, :height, :width].contiguous().unflatten(-1, (h, d)).permute(0, 3, 1, 2, 4)


def _rows(t: Tensor, below: int, right: int) -> Tensor:
    """[B, H, y, x, D] as [B, y + below, x + right, H, D]."""
    return F.pad(t.permute(0, 2, 3, 1, 4), (0, 0, 0, 0, 0, right, 0, below))


def _partition(x: Tensor, side: tuple[int, ...]) -> Tensor:
    """[B, y, x, C] into windows [B * windows, side * side, C]."""
    b, height, width, c = x.shape
    x = x.view(b, height // side[0], side[0], width // side[1], side[1], c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side[0] * side[1], c)


class _Watch(TorchDispatchMode):
    """Notes every attnc operator that runs, with the layer that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ""
        self.calls: list[Attention] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "attnc":
            first, name = out if isinstance(out, Tensor) else out[0], func._schema.name.split("::")[1]
            if name == "attend_packed":  # the same, on q, k and v in one tensor
                name, args = "attend", (*args[0].unbind(0), *args[1:])
            self.calls.append(Attention(self.layer, name, tuple(args), first))
        return out


def recorded(model: nn.Module, image: Tensor) -> list[Attention]:
    """Run the model once and give every attention in the order it ran."""
    watch = _Watch()
    hooks = []
    for name, module in model.named_modules():
        if name.endswith(".attn"):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: setattr(watch, "layer", name)))
    try:
        with watch:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return watch.calls
