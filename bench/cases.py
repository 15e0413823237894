"""What is measured: patterns at the stages of real models, each with its peers and the bars that the project set itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

import attnc
from attnc import patterns
from bench import peers

Run = Callable[..., Tensor]
MASK_MOST = 1 << 24  # elements of a dense mask that SDPA is given: beyond, nobody would call it so


@dataclass(frozen=True)
class Bar:
    """What is asked of a row: times faster than the best peer, share of the machine's GEMM, times our own float32."""

    ratio: float = 1.0
    share: float | None = None
    float32: float | None = None


@dataclass(frozen=True)
class Case:
    """One statement at one stage of a model. Peers are made when asked for: a name and what makes the runner."""

    family: str
    name: str
    model: str  # where these sizes come from
    grid: tuple[int, ...]
    heads: int
    dim: int  # of a head
    pairs: int  # allowed (query, key) pairs of one head
    pattern: attnc.Pattern | None  # None: channel attention
    peers: dict[str, Callable[[], Run | None]]
    table: tuple[int, ...] | None = None  # shape of the bias
    slow_peers: dict[str, Callable[[], Run | None]] = field(default_factory=dict)  # those that take long to compile
    batch: int | None = None  # where it is not the row's

    @property
    def size(self) -> str:
        """56x56x96, 196x384: the grid and the channels."""
        return "x".join(map(str, (*self.grid, self.heads * self.dim)))

    def ours(self, *, tune: bool = False) -> Run:
        """attnc's operator as a runner."""
        if self.pattern is None:
            channel, heads = attnc.compile(patterns.channel()), self.heads

            def run(qkv: Tensor) -> Tensor:
                q, k, v = peers.split(qkv, heads)
                return peers.merge(channel(k, v, q))

            return run
        axes = "x" if len(self.grid) == 1 else "y x"
        op = attnc.compile(self.pattern, grid=self.grid, layout=f"b {axes} (three h d)", heads=self.heads, tune=tune)
        return lambda qkv, *bias: op(qkv, **({"bias": bias[0]} if bias else {}))

    def runners(self, *, slow: bool = False) -> dict[str, Run]:
        """Ours first, then every peer that is there."""
        made = {"attnc": self.ours()}
        for name, make in (self.peers | (self.slow_peers if slow else {})).items():
            run = make()
            made |= {} if run is None else {name: run}
        return made

    def inputs(self, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The packed projection [B, *grid, 3 C], and the bias."""
        qkv = torch.randn(self.batch or batch, *self.grid, 3 * self.heads * self.dim, dtype=dtype)
        return (qkv,) if self.table is None else (qkv, torch.randn(self.table, dtype=dtype))

    def flops(self, batch: int, backward: bool) -> float:
        """Useful floating-point operations: two products over the allowed pairs, and five more in the backward."""
        return 4.0 * (self.batch or batch) * self.heads * self.dim * self.pairs * (3.5 if backward else 1.0)


# rows at batch 8 and 2 threads are held to these; all others to 1: no slower than the best peer
BARS: dict[tuple[str, str, str], Bar] = {
    ("window", "float32", "forward"): Bar(3.3, 0.55),
    ("shifted window", "float32", "forward"): Bar(3.5, 0.47),
    ("grid", "float32", "forward"): Bar(3.3, 0.55),
    ("axial", "float32", "forward"): Bar(2.7, 0.60),
    ("strip", "float32", "forward"): Bar(2.0, 0.88),
    ("cross", "float32", "forward"): Bar(2.0, 0.88),
    ("global 196", "float32", "forward"): Bar(1.4, 0.85),
    ("global 1024", "float32", "forward"): Bar(1.1, 0.85),
    ("causal", "float32", "forward"): Bar(1.3, 0.85),
    ("channel", "float32", "forward"): Bar(2.3, 0.55),
    ("neighbourhood", "float32", "forward"): Bar(5.0, 0.40),
    ("dilated", "float32", "forward"): Bar(5.0, 0.40),
    ("window", "bfloat16", "forward"): Bar(2.7, None, 1.45),
    ("neighbourhood", "bfloat16", "forward"): Bar(2.7, None, 1.0),
    ("global 196", "bfloat16", "forward"): Bar(1.4, None, 1.65),
    ("global 1024", "bfloat16", "forward"): Bar(1.4, None, 1.65),
    ("causal", "bfloat16", "forward"): Bar(2.3, None, 1.65),
    ("window", "float32", "forward + backward"): Bar(2.2, 0.45),
    ("shifted window", "float32", "forward + backward"): Bar(2.7, 0.45),
    ("neighbourhood", "float32", "forward + backward"): Bar(4.5, 0.35),
    ("dilated", "float32", "forward + backward"): Bar(4.5, 0.35),
    ("global 196", "float32", "forward + backward"): Bar(1.2),
    ("global 1024", "float32", "forward + backward"): Bar(1.2),
    ("causal", "float32", "forward + backward"): Bar(1.2),
    ("axial", "float32", "forward + backward"): Bar(2.0),
    ("channel", "float32", "forward + backward"): Bar(1.5),
}


def bar(case: Case, dtype: str, what: str, batch: int, threads: int) -> Bar:
    """The bar of a row."""
    if (batch, threads) != (8, 2):
        return Bar()
    found = BARS.get((case.family, dtype, what), Bar())
    small = case.family == "neighbourhood" and case.grid[0] <= 14 and what == "forward" and dtype == "float32"
    return Bar(3.8, found.share) if small else found


def _grouped(groups: peers.Windows, heads: int, relative: int = 0, shift: int = 0) -> dict[str, Callable[[], Run | None]]:
    make = partial(peers.grouped, heads=heads, groups=groups, relative=relative, shift=shift)
    return {"eager": lambda: make(peers.eager), "sdpa partitioned": lambda: make(peers.sdpa)}


def _windows(model: str, side: int, size: int, shift: int, heads: int) -> Case:
    runs = _grouped(peers.Windows(size, size), heads, size, shift)
    runs["timm"] = lambda: peers.timm_window(heads, size, shift)
    pattern, grid = patterns.window(size, shift, bias="relative"), (side, side)
    edges = [0, *range(shift or size, side, size), side]
    pairs = sum((b - a) ** 2 for a, b in pairwise(edges)) ** 2
    family = "shifted window" if shift else "window"
    table = (heads, 2 * size - 1, 2 * size - 1)
    return Case(family, f"{family} {size} + bias", model, grid, heads, 32, pairs, pattern, runs, table)


def _grid(side: int, size: int, heads: int) -> Case:
    runs = _grouped(peers.Spread(size, size), heads, size)
    runs["timm"] = lambda: peers.timm_grid(heads, size)
    grid, table = (side, side), (heads, 2 * size - 1, 2 * size - 1)
    pattern = patterns.grid(size, bias="relative")
    pairs = side * side * size * size
    return Case("grid", f"grid {size} + bias", "MaxViT", grid, heads, 32, pairs, pattern, runs, table)


def _strips(family: str, side: int, width: int, heads: int) -> Case:
    grid, n = (side, side), side * side
    tall, wide = peers.Windows(side, width), peers.Windows(width, side)
    if family == "axial":
        pattern, pairs, runs, name = patterns.axial("x"), n * side, _grouped(peers.Windows(1, side), heads), "axial"
    elif family == "strip":
        pattern, pairs, runs, name = patterns.strip("y", width), n * side * width, _grouped(tall, heads), f"strip {width}"
    elif family == "cswin":
        pattern, name = patterns.per_head([patterns.strip("y", width), patterns.strip("x", width)]), f"CSWin strips {width}"
        pairs = n * side * width
        runs = {}
        for inner, peer in (("eager", peers.eager), ("sdpa partitioned", peers.sdpa)):
            runs[inner] = lambda peer=peer: peers.by_halves(peer, heads, tall, wide)
    else:
        pattern, pairs, name = patterns.cross(width), n * width * (2 * side - width), f"cross {width}"
        runs = {"eager": lambda: peers.crossed(heads, width)}
        if n * n <= MASK_MOST:
            mask = partial(_cross_mask, side, width)
            runs["sdpa mask"] = lambda: peers.rows(partial(peers.sdpa, bias=mask()), heads)
    model = "CSWin" if family != "axial" else "axial"
    return Case(family, name, model, grid, heads, 32, pairs, pattern, runs)


def _cross_mask(side: int, width: int) -> Tensor:
    block = torch.arange(side) // width
    same = block[:, None] == block[None]
    return (same[:, None, :, None] | same[None, :, None, :]).reshape(side * side, side * side)


def _dense(n: int, heads: int, *, causal: bool = False, batch: int | None = None) -> Case:
    pattern = patterns.causal() if causal else patterns.full()
    inner = peers.causal_sdpa if causal else peers.sdpa
    runs: dict[str, Callable[[], Run | None]] = {"sdpa": lambda: peers.rows(inner, heads)}
    if not causal:
        runs |= {"eager": lambda: peers.rows(peers.eager, heads), "timm": lambda: peers.timm_rows(heads, 64 * heads)}
    runs["flash attention"] = lambda: peers.flash(heads, causal=causal)
    slow: dict[str, Callable[[], Run | None]] = {"flex compiled": lambda: peers.rows(peers.causal_flex(n), heads)} if causal else {}
    pairs = n * (n + 1) // 2 if causal else n * n
    name = f"{'causal' if causal else 'global'} {n}"
    family = "causal" if causal else name
    return Case(family, name, "ViT", (n,), heads, 64, pairs, pattern, runs, slow_peers=slow, batch=batch)


def _channel(n: int, heads: int) -> Case:
    runs: dict[str, Callable[[], Run | None]] = {
        "eager": lambda: peers.rows(peers.channel, heads),
        "timm": lambda: peers.timm_channel(heads, 32 * heads),
    }
    return Case("channel", f"channel {n}x32", "DaViT", (n,), heads, 32, n * 32, None, runs)


def _neighborhood(side: int, size: int, dilation: int, heads: int) -> Case:
    grid, n = (side, side), side * side
    pattern = patterns.neighborhood(size, dilation)
    runs: dict[str, Callable[[], Run | None]] = {
        "halo tiles": lambda: peers.rows(peers.Halo(grid, size, dilation), heads),
        "natten": lambda: peers.natten(heads, size, dilation),
    }
    if n * n <= MASK_MOST:
        mask = partial(peers.neighborhood_mask, grid, size, dilation)
        runs["sdpa mask"] = lambda: peers.rows(partial(peers.sdpa, bias=mask()), heads)
    slow: dict[str, Callable[[], Run | None]] = {"flex compiled": lambda: peers.rows(peers.flex(grid, size, dilation), heads)}
    family = "dilated" if dilation > 1 else "neighbourhood"
    name = f"neighbourhood {size}" + (f" dilated {dilation}" if dilation > 1 else "")
    model = "DiNAT" if dilation > 1 else "NAT"
    return Case(family, name, model, grid, heads, 32, n * size * size, pattern, runs, slow_peers=slow)


def cases() -> Iterator[Case]:
    """All cases, family by family, the stages of a model in order."""
    for side, heads in ((56, 3), (28, 6), (14, 12), (7, 24)):
        yield _windows("Swin, DaViT", side, 7, 0, heads)
    for side, heads in ((56, 3), (28, 6), (14, 12)):
        yield _windows("Swin", side, 7, 3, heads)
    for side, heads in ((64, 3), (32, 6), (16, 12), (8, 24)):
        yield _windows("SwinV2", side, 8, 0, heads)
    for side, heads in ((56, 2), (28, 4), (14, 8), (7, 16)):
        yield _grid(side, 7, heads)
    for side, heads in ((56, 3), (28, 6), (14, 12)):
        yield _strips("axial", side, 1, heads)
    for family in ("strip", "cross", "cswin"):
        for side, heads in ((56, 2), (28, 4), (14, 8)):
            yield _strips(family, side, 7, heads)
    yield _dense(196, 6)
    yield _dense(1024, 6)
    yield _dense(4096, 6, causal=True, batch=1)
    for side, heads in ((56, 3), (28, 6), (14, 12), (7, 24)):
        yield _channel(side * side, heads)
    for side, heads in ((56, 2), (28, 4), (14, 8), (7, 16)):
        yield _neighborhood(side, 7, 1, heads)
    for side, dilation, heads in ((56, 8, 2), (56, 4, 2), (28, 4, 4), (14, 2, 8)):
        yield _neighborhood(side, 7, dilation, heads)
