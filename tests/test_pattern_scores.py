"""Library scores against their papers' formulas, written here for all pairs at once: outputs and the gradient of every table."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnc
from attnc import patterns
from attnc.compiler import has_compiler

DOUBLE = torch.float64
GRID, H, B = (4, 6), 4, 2
Formula = Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor]  # (raw = scale q.k, q and k rows, tables) -> weights


def coordinates(grid: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """(query, key) coordinates of all pairs, per axis."""
    axes = [c.flatten() for c in torch.meshgrid(*map(torch.arange, grid), indexing="ij")]
    return [(c[:, None], c[None, :]) for c in axes]


def steps(grid: tuple[int, ...] = GRID) -> list[Tensor]:
    return [(a - b).double() for a, b in coordinates(grid)]


def masked(p: attnc.Pattern, grid: tuple[int, ...] = GRID) -> Tensor:
    return torch.where(attnc.mask(p, grid=grid)[0], 0.0, -math.inf).double()


def check(
    p: attnc.Pattern,
    weights: Formula,
    shapes: dict[str, tuple[int, ...]],
    backend: str,
    *,
    grid: tuple[int, ...] = GRID,
    scale: float | None = None,
    dtype: torch.dtype = DOUBLE,
    tolerance: float = 1e-9,
) -> None:
    """The operator against weights(raw, q, k, tables) @ v, and every gradient."""
    g = torch.Generator().manual_seed(0)
    n = math.prod(grid)
    rows = [torch.randn(B, H, n, d, generator=g, dtype=DOUBLE) for d in (8, 8, 5)]
    tables = {name: torch.randn(s, generator=g, dtype=DOUBLE) * 0.5 for name, s in shapes.items()}
    mine = [t.to(dtype).requires_grad_() for t in (*rows, *tables.values())]
    true = [t.detach().double().requires_grad_() for t in mine]
    options: dict[str, Any] = dict(zip(tables, mine[3:], strict=True))
    out = attnc.compile(p, grid=grid, backend=backend)(*mine[:3], scale=scale, **options)
    q, k, v = true[:3]
    raw = q @ k.transpose(-1, -2) * (8**-0.5 if scale is None else scale)
    wanted = weights(raw, q, k, dict(zip(tables, true[3:], strict=True))) @ v
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn(out.shape, generator=g, dtype=DOUBLE)
    found = torch.autograd.grad(out, mine, cotangent.to(dtype), allow_unused=True)
    expected = torch.autograd.grad(wanted, true, cotangent, allow_unused=True)
    for a, b, name in zip(found, expected, ("q", "k", "v", *tables), strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        torch.testing.assert_close(
            a.double() + 0 * b, b.double() + 0 * a.double(), rtol=10 * tolerance, atol=10 * tolerance, msg=name
        )


def euclidean() -> Tensor:
    return sum((d * d for d in steps()), torch.zeros(())).sqrt()  # type: ignore[arg-type]


def manhattan() -> Tensor:
    return sum((d.abs() for d in steps()), torch.zeros(()))  # type: ignore[arg-type]


def column(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1)


def relative(bias: Tensor, s: int, grid: tuple[int, ...] = GRID) -> Tensor:
    """[H, N, N] from [H, 2 s - 1, ...], query minus key; any number where the difference is out of range."""
    return bias[(slice(None), *((d.long() + s - 1).clamp(0, 2 * s - 2) for d in steps(grid)))]


def gaussian(alpha: Tensor, sigma: Tensor) -> Tensor:
    square = euclidean() ** 2
    parts = [column(a) * torch.exp(-square / (2 * (column(s) ** 2 + 1e-5))) for a, s in zip(alpha, sigma, strict=True)]
    return torch.stack(parts).sum(0)


def normal(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def swin_v2(raw: Tensor, q: Tensor, k: Tensor, t: dict[str, Tensor]) -> Tensor:
    """Swin v2's WindowAttention: cosine times exp(logit_scale), at most 100, plus the relative bias."""
    cos = normal(q) @ normal(k).transpose(-1, -2)
    score = cos * torch.clamp(column(t["logit_scale"]), max=math.log(1 / 0.01)).exp() + relative(t["bias"], 3)
    return (score + masked(patterns.window(3))).softmax(-1)


def path(t: dict[str, Tensor], swapped: bool) -> Tensor:
    """PPMA's M[(r, c), (r2, c2)] = -|Sw[r, c] - Sw[r, c2]| - |Sh[r, c2] - Sh[r2, c2]|, or its transpose."""
    across, down = (t[n].flatten(2) for n in ("across", "down"))
    (r, r2), (c, c2) = coordinates(GRID)
    x = GRID[1]
    lw = (across[:, :, r * x + c] - across[:, :, r * x + c2]).abs()
    lh = (down[:, :, r * x + c2] - down[:, :, r2 * x + c2]).abs()
    m = -(lw + lh)
    return m.transpose(-1, -2) if swapped else m


def features(weight: Tensor) -> Tensor:
    """ConViT: [dx, dy, dx^2 + dy^2], key minus query, columns first."""
    dy, dx = (-d for d in steps())
    return torch.stack([dx, dy, dx**2 + dy**2], -1) @ weight.T


def offsets(bias: Tensor) -> Tensor:
    """[H, N, N] from a table over all offsets of the grid, query minus key."""
    return bias[:, steps()[0].long() + GRID[0] - 1, steps()[1].long() + GRID[1] - 1]


def in_strip(bias: Tensor) -> Tensor:
    """[H, N, N] from a table over the places in a strip two rows wide."""
    row, column = (y % 2 * GRID[1] + x for y, x in zip(*coordinates(GRID), strict=True))
    return bias[:, row, column]


ALL = (2 * GRID[0] - 1, 2 * GRID[1] - 1)
CASES: dict[str, tuple[attnc.Pattern, Formula, dict[str, tuple[int, ...]], float | None]] = {
    "alibi": (
        patterns.alibi(),
        lambda raw, q, k, t: (raw - column(2.0 ** (-8 * (torch.arange(H).double() + 1) / H)) * manhattan()).softmax(-1),
        {},
        None,
    ),
    "decay of neighbours": (
        patterns.decay(patterns.neighborhood(3)),
        lambda raw, q, k, t: (raw - column(t["slopes"]) * manhattan() + masked(patterns.neighborhood(3))).softmax(-1),
        {"slopes": (H,)},
        None,
    ),
    "euclidean decay": (
        patterns.decay(metric="euclidean"),
        lambda raw, q, k, t: (raw - column(t["slopes"]) * euclidean()).softmax(-1),
        {"slopes": (H,)},
        0.3,
    ),
    "chebyshev decay, one slope": (
        patterns.decay(metric="chebyshev"),
        lambda raw, q, k, t: (raw - t["slopes"] * torch.stack([d.abs() for d in steps()]).amax(0)).softmax(-1),
        {"slopes": (1,)},
        None,
    ),
    "decay after the softmax": (
        patterns.decay(patterns.window(3), metric="squared", after=True),
        lambda raw, q, k, t: (
            (raw + masked(patterns.window(3))).softmax(-1) * torch.exp(-column(t["slopes"]) * (euclidean() ** 2).clamp(max=20))
        ),
        {"slopes": (H,)},
        None,
    ),
    "cosine windows of Swin v2": (
        patterns.cosine(patterns.window(3, bias="relative")),
        swin_v2,
        {"logit_scale": (H,), "bias": (H, 5, 5)},
        1.0,
    ),
    "a temperature per head": (
        patterns.head_scale(patterns.axial("x")),
        lambda raw, q, k, t: (raw * column(t["temperature"]) + masked(patterns.axial("x"))).softmax(-1),
        {"temperature": (H,)},
        1.0,
    ),
    "soft cap": (
        patterns.soft_cap(1.5, patterns.neighborhood(3, bias="relative")),
        lambda raw, q, k, t: (1.5 * torch.tanh((raw + relative(t["bias"], 3)) / 1.5) + masked(patterns.neighborhood(3))).softmax(
            -1
        ),
        {"bias": (H, 5, 5)},
        None,
    ),
    "Gaussian mixture": (
        patterns.gaussian_mixture(3),
        lambda raw, q, k, t: (raw * gaussian(t["alpha"], t["sigma"])).softmax(-1),
        {"alpha": (3, H), "sigma": (3, H)},
        None,
    ),
    "Gaussian mixture in windows with a bias": (
        patterns.gaussian_mixture(1, patterns.window(2, bias="relative")),
        lambda raw, q, k, t: (raw * gaussian(t["alpha"], t["sigma"]) + relative(t["bias"], 2) + masked(patterns.window(2))).softmax(
            -1
        ),
        {"alpha": (1, H), "sigma": (1, H), "bias": (H, 3, 3)},
        None,
    ),
    "polyline": (
        patterns.polyline(),
        lambda raw, q, k, t: (raw + path(t, False)).softmax(-1),
        {"across": (B, H, *GRID), "down": (B, H, *GRID)},
        None,
    ),
    "polyline, the other corner": (
        patterns.polyline(corner="key row"),
        lambda raw, q, k, t: (raw + path(t, True)).softmax(-1),
        {"across": (1, H, *GRID), "down": (1, H, *GRID)},
        None,
    ),
    "polyline along rows": (
        patterns.polyline(patterns.axial("x")),
        lambda raw, q, k, t: (raw + path(t, False) + masked(patterns.axial("x"))).softmax(-1),
        {"across": (B, H, *GRID), "down": (B, H, *GRID)},
        None,
    ),
    "positional": (
        patterns.positional(),
        lambda raw, q, k, t: features(t["weight"]).permute(2, 0, 1).softmax(-1).expand(B, -1, -1, -1),
        {"weight": (H, 3)},
        None,
    ),
    "absolute bias of all pairs": (
        patterns.full(bias="absolute"),
        lambda raw, q, k, t: (raw + t["bias"]).softmax(-1),
        {"bias": (1, 24, 24)},
        None,
    ),
    "relative bias of all pairs": (
        patterns.full(bias="relative"),
        lambda raw, q, k, t: (raw + offsets(t["bias"])).softmax(-1),
        {"bias": (H, *ALL)},
        None,
    ),
    "relative bias along an axis": (
        patterns.axial("y", bias="relative"),
        lambda raw, q, k, t: (raw + t["bias"][:, steps()[0].long() + 3, 0] + masked(patterns.axial("y"))).softmax(-1),
        {"bias": (H, 7, 1)},
        None,
    ),
    "relative bias of a cross": (
        patterns.cross(2, bias="relative"),
        lambda raw, q, k, t: (raw + offsets(t["bias"]) + masked(patterns.cross(2))).softmax(-1),
        {"bias": (H, *ALL)},
        None,
    ),
    "relative bias of causal attention": (
        patterns.causal(bias="relative"),
        lambda raw, q, k, t: (raw + offsets(t["bias"]) + masked(patterns.causal())).softmax(-1),
        {"bias": (1, *ALL)},
        None,
    ),
    "absolute bias of a strip": (
        patterns.strip("x", 2, bias="absolute"),
        lambda raw, q, k, t: (raw + in_strip(t["bias"]) + masked(patterns.strip("x", 2))).softmax(-1),
        {"bias": (H, 12, 12)},
        None,
    ),
}


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_a_score_is_its_papers_formula(name: str, backend: str) -> None:
    p, formula, shapes, scale = CASES[name]
    check(p, formula, shapes, backend, scale=scale)


# each builds a kernel for seconds, so these are the scores that no other test of that backend has
ON_CPUS = ("decay after the softmax", "polyline", "Gaussian mixture in windows with a bias", "positional")


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
@pytest.mark.parametrize("name", CASES if os.environ.get("ATTNC_TEST_MANY_KERNELS") else ON_CPUS)
def test_scores_in_cpp(name: str) -> None:
    p, formula, shapes, scale = CASES[name]
    try:
        check(p, formula, shapes, "cpp", scale=scale)
    except attnc.UnsupportedError as e:  # row maps
        if name != "cosine windows of Swin v2" or "backend=" not in str(e):
            raise


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_scores_in_interpreted_triton() -> None:
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, test_pattern_scores as t
for name in ("decay of neighbours", "Gaussian mixture", "polyline along rows", "relative bias along an axis"):
    p, formula, shapes, scale = t.CASES[name]
    t.check(p, formula, shapes, "triton", scale=scale, dtype=torch.float32, tolerance=2e-4)
print("held")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("held\n")


# --------------------------------------------------------------------------------------------------------------- tables and mixing
class ContinuousBias(nn.Module):
    """Swin v2's log-spaced coordinates through a small network; CrossFormer's dynamic position bias is alike."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        places = torch.arange(-(size - 1), size, dtype=DOUBLE)
        grid = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1) * 8 / (size - 1)
        self.coordinates = torch.sign(grid) * torch.log2(grid.abs() + 1) / 3
        self.mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, heads, bias=False)).double()

    def forward(self) -> Tensor:
        """[heads, 2 s - 1, 2 s - 1]."""
        out: Tensor = 16 * torch.sigmoid(self.mlp(self.coordinates)).permute(2, 0, 1)
        return out


def test_a_table_from_a_network_trains_the_network() -> None:
    net = ContinuousBias(3, H)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, H, 24, 8, generator=g, dtype=DOUBLE) for _ in range(3))
    out = attnc.compile(patterns.window(3, bias="relative"), grid=GRID, backend="torch")(q, k, v, bias=net())
    score = q @ k.transpose(-1, -2) * 8**-0.5 + relative(net(), 3) + masked(patterns.window(3))
    wanted = score.softmax(-1) @ v
    torch.testing.assert_close(out, wanted)
    cotangent = torch.randn(out.shape, generator=g, dtype=DOUBLE)
    found, expected = (torch.autograd.grad(o, list(net.parameters()), cotangent) for o in (out, wanted))
    torch.testing.assert_close(found, expected)


def test_convits_gate_is_a_mix_of_two_operators() -> None:
    """A = (1 - g) softmax(content) + g softmax(position), applied to one v."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(B, H, 24, 8, generator=g, dtype=DOUBLE).requires_grad_() for _ in range(3))
    weight = torch.randn(H, 3, generator=g, dtype=DOUBLE).requires_grad_()
    gate = torch.randn(H, 1, 1, generator=g, dtype=DOUBLE).requires_grad_()
    content = attnc.compile(patterns.full(), grid=GRID, backend="torch")(q, k, v)
    position = attnc.compile(patterns.positional(), grid=GRID, backend="torch")(q, k, v, weight=weight)
    out = torch.lerp(content, position, torch.sigmoid(gate))
    mixed = (1 - torch.sigmoid(gate)) * (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    wanted = (mixed + torch.sigmoid(gate) * features(weight).permute(2, 0, 1).softmax(-1)) @ v
    torch.testing.assert_close(out, wanted)
    leaves = [q, k, v, weight, gate]
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), leaves) for o in (out, wanted)))


def test_styleswins_two_tables_are_one() -> None:
    """Half the heads in plain windows, half in shifted ones, each half with a table of its own: heads tell them apart."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(B, H, 24, 8, generator=g, dtype=DOUBLE) for _ in range(3))
    bias = torch.randn(H, 3, 3, generator=g, dtype=DOUBLE)
    halves = [patterns.window(2, bias="relative"), patterns.window(2, shift=1, bias="relative")]
    out = attnc.compile(patterns.per_head(halves), grid=GRID, backend="torch")(q, k, v, bias=bias)
    for p, heads in zip(halves, (slice(0, 2), slice(2, 4)), strict=True):
        mine = [t[:, heads] for t in (q, k, v)]
        alone = attnc.compile(p, grid=GRID, backend="torch")(*mine, bias=bias[heads])
        torch.testing.assert_close(out[:, heads], alone)


def test_what_scores_refuse() -> None:
    for message, make in [
        ("metric='taxi'", lambda: patterns.decay(metric="taxi")),  # type: ignore[arg-type]
        ("positive number", lambda: patterns.soft_cap(0)),
        ("number of kernels", lambda: patterns.gaussian_mixture(0)),
        ("corner='left'", lambda: patterns.polyline(corner="left")),  # type: ignore[arg-type]
        ("a factor after the softmax already", lambda: patterns.decay(patterns.decay(after=True), after=True).trace(("x",))),
        ("band: bias='absolute'", lambda: patterns.band(1, 1, bias="absolute")),
    ]:
        with pytest.raises(attnc.DeclarationError, match=message):
            make()


def test_names_of_scores() -> None:
    assert patterns.cosine(patterns.window(7)).name == "cosine(window(7))"
    assert patterns.soft_cap(20, patterns.full()).name == "soft_cap(20)(full())"
    assert patterns.gaussian_mixture(3).name == "gaussian_mixture(3)"
    assert patterns.alibi().name == "alibi()"
