"""What is measured: patterns at the sizes of real models, each with its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import attnc
from attnc import patterns
from attnc.schedule.geometry import geometry
from bench import peers

Run = Callable[..., Tensor]


@dataclass
class Case:
    """One row: inputs are made `copies` times over so that caches do not flatter; every runner takes one set of them."""

    name: str
    inputs: Callable[[], tuple[Tensor, ...]]
    runners: dict[str, Run]
    flops: float  # of the forward: two products over the allowed score elements
    bars: dict[str, float]  # ratio to the best peer asked of the forward and of forward + backward


def _flops(op: attnc.Operator, grid: tuple[int, ...], batch: int, heads: int, d: int) -> float:
    return 4.0 * batch * d * geometry(op.program(len(grid)), grid, grid).allowed(heads)


def _rows(batch: int, heads: int, n: int, d: int, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(batch, n, heads, d, dtype=dtype).transpose(1, 2) for _ in range(3))


def _windows(batch: int, side: int, size: int, shift: int, heads: int, dtype: torch.dtype) -> Case:
    d, c = 32, 32 * heads
    pattern = patterns.window(size, shift, bias="relative")
    op = attnc.compile(pattern, layout="b y x (three h d)", heads=heads)
    coords = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    delta = coords[:, :, None] - coords[:, None, :] + size - 1
    index = delta[0] * (2 * size - 1) + delta[1]

    def inputs() -> tuple[Tensor, ...]:
        return torch.randn(batch, side, side, 3 * c, dtype=dtype), torch.randn(heads, 2 * size - 1, 2 * size - 1, dtype=dtype)

    def paper(inner: Run) -> Run:
        def run(qkv: Tensor, table: Tensor) -> Tensor:
            return peers.swin(qkv, heads, size, table.flatten(1)[:, index], shift, inner)

        return run

    runners: dict[str, Run] = {"attnc": lambda qkv, table: op(qkv, bias=table)}
    runners |= {"eager": paper(peers.eager), "sdpa partitioned": paper(peers.sdpa)}
    name = f"{'shifted ' if shift else ''}window {size} + bias {side}x{side}x{c}"
    bars = {"forward": 3.5, "backward": 2.7} if shift else {"forward": 3.3, "backward": 2.2}
    return Case(name, inputs, runners, _flops(op, (side, side), batch, heads, d), bars)


def _dense(batch: int, n: int, heads: int, dtype: torch.dtype, bar: float, *, causal: bool = False) -> Case:
    d = 64
    op = attnc.compile(patterns.causal() if causal else patterns.full(), grid=(n,))

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    runners: dict[str, Run] = {"attnc": op, "sdpa": sdpa}
    if not causal:
        runners["eager"] = peers.eager
    name = f"{'causal' if causal else 'global'} {n}"
    return Case(
        name, _rows(batch, heads, n, d, dtype), runners, _flops(op, (n,), batch, heads, d), {"forward": bar, "backward": 1.2}
    )


def _neighborhood(batch: int, side: int, size: int, dilation: int, heads: int, dtype: torch.dtype, *, flex: bool) -> Case:
    d, grid = 32, (side, side)
    op = attnc.compile(patterns.neighborhood(size, dilation), grid=grid)
    mask = peers.neighborhood_mask(grid, size, dilation)
    runners: dict[str, Run] = {"attnc": op, "halo tiles": peers.Halo(grid, size, dilation)}
    runners["sdpa mask"] = lambda q, k, v: peers.sdpa(q, k, v, mask)
    if flex and dilation == 1:

        def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            y = (q // side - size // 2).clamp(0, side - size)
            x = (q % side - size // 2).clamp(0, side - size)
            return (k // side >= y) & (k // side < y + size) & (k % side >= x) & (k % side < x + size)

        runners["flex compiled"] = peers.flex(mod, side * side)
    name = f"neighbourhood {size}{f' dilated {dilation}' if dilation > 1 else ''} {side}x{side}"
    bars = {"forward": 3.8 if side == 14 else 5.0, "backward": 4.5}
    return Case(name, _rows(batch, heads, side * side, d, dtype), runners, _flops(op, grid, batch, heads, d), bars)


def _axial(batch: int, side: int, heads: int, dtype: torch.dtype) -> Case:
    d = 32
    op = attnc.compile(patterns.axial("x"), grid=(side, side))

    def paper(inner: Run) -> Run:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            b, h = q.shape[:2]
            lines = (t.unflatten(2, (side, side)).transpose(1, 2).reshape(b * side, h, side, d) for t in (q, k, v))
            return inner(*lines).view(b, side, h, side, d).transpose(1, 2).reshape(b, h, side * side, d)

        return run

    runners: dict[str, Run] = {"attnc": op, "eager": paper(peers.eager), "sdpa partitioned": paper(peers.sdpa)}
    flops = _flops(op, (side, side), batch, heads, d)
    return Case(
        f"axial {side}x{side}", _rows(batch, heads, side * side, d, dtype), runners, flops, {"forward": 2.7, "backward": 2.0}
    )


def _channel(batch: int, n: int, heads: int, dtype: torch.dtype) -> Case:
    op = attnc.compile(patterns.channel())
    runners: dict[str, Run] = {"attnc": lambda q, k, v: op(k, v, q), "eager": peers.channel}
    bars = {"forward": 2.3, "backward": 1.5}
    return Case(f"channel {n}x32", _rows(batch, heads, n, 32, dtype), runners, 4.0 * batch * heads * n * 32 * 32, bars)


def cases(batch: int, dtype: torch.dtype, *, flex: bool) -> Iterator[Case]:
    """All rows."""
    for side, heads in ((56, 3), (28, 6), (14, 12)):
        yield _windows(batch, side, 7, 0, heads, dtype)
        yield _windows(batch, side, 7, 3, heads, dtype)
    yield _windows(batch, 64, 8, 0, 3, dtype)
    yield _axial(batch, 56, 3, dtype)
    yield _dense(batch, 196, 12, dtype, 1.4)
    yield _dense(batch, 1024, 6, dtype, 1.1)
    yield _dense(1, 4096, 6, dtype, 1.3, causal=True)
    yield _channel(batch, 3136, 3, dtype)
    for side, heads in ((56, 2), (28, 4), (14, 8)):
        yield _neighborhood(batch, side, 7, 1, heads, dtype, flex=flex and side == 56)
    yield _neighborhood(batch, 56, 7, 4, 2, dtype, flex=False)
