"""Writes docs/patterns.md and its pictures from the library itself: `python docs/make_patterns.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch

import attnc
from attnc import patterns
from attnc.codegen.cpp import Spec
from attnc.report.draw import thumbnail
from attnc.report.issued import issued
from attnc.report.subject import subject
from attnc.schedule.choose import choose
from attnc.schedule.geometry import geometry
from attnc.schedule.split import split
from attnc.schedule.tiles import tiles

HERE = Path(__file__).parent
GRID, QUERY = (28, 28), (11, 12)

# where the first sentence of the docstring does not say what the arguments do
MEANINGS = {
    "window(7, shift=3)": "Windows whose borders lie at 3 mod 7: what Swin's roll by -3 with its mask computes, with neither.",
    "neighborhood(7, dilation=3)": "The neighbourhood among tokens 3 apart (DiNAT).",
    "neighborhood(7, stride=4)": "Groups of 4 queries share the window of their middle one (GNA).",
    "neighborhood(7, causal=True)": "The last 7 keys up to the query, on every axis.",
    "sliding_window(5, 2)": "The taps of a dilated convolution; TiC keeps the zeros outside as keys, by `pad=`.",
    "inward_window((2, 4))": 'Windows of 5 x 9 keys, pushed inside at the borders (FreeSwim, by `.on("y", "x")`).',
    "cross_scale(5)": "The 5 keys per axis around a query's place on a coarser grid of keys (pooled keys), kept inside it.",
    "cross_scale(2)": "On a grid of keys twice as fine: the 2 keys per axis under the query.",
}
# the call as a user writes it, the pattern, options of the picture
SHOWN: list[tuple[str, Any, dict[str, Any]]] = [
    ("full()", patterns.full(), {}),
    ("window(7)", patterns.window(7), {}),
    ("window(7, shift=3)", patterns.window(7, shift=3), {}),
    ("blocks((14, 4))", patterns.blocks((14, 4)), {}),
    ("neighborhood(7)", patterns.neighborhood(7), {}),
    ("neighborhood(7, dilation=3)", patterns.neighborhood(7, dilation=3), {}),
    ("neighborhood(7, stride=4)", patterns.neighborhood(7, stride=4), {}),
    ("neighborhood(7, causal=True)", patterns.neighborhood(7, causal=True), {}),
    ("inward_window((2, 4))", patterns.inward_window((2, 4)), {}),
    ("sliding_window(5, 2)", patterns.sliding_window(5, 2), {}),
    ("dilated(5, 2)", patterns.dilated(5, 2), {}),
    ("dilated_blocks(4, 3)", patterns.dilated_blocks(4, 3), {}),
    ("grid(7)", patterns.grid(7), {}),
    ('axial("x")', patterns.axial("x"), {}),
    ('strip("y", 4)', patterns.strip("y", 4), {}),
    ("cross(4)", patterns.cross(4), {}),
    ("overlapping_window(7, 11)", patterns.overlapping_window(7, 11), {}),
    ("cross_scale(5)", patterns.cross_scale(5), {"kv_grid": (14, 14)}),
    ("cross_scale(2)", patterns.cross_scale(2), {"kv_grid": (56, 56)}),
    ("causal()", patterns.causal(), {}),
    ("band(2, 5)", patterns.band(2, 5), {}),
    ("per_head([window(7), grid(7)])", patterns.per_head([patterns.window(7), patterns.grid(7)]), {"heads": 4, "head": 3}),
]

# score, the call, tables it reads
SCORES: list[tuple[str, Any]] = [
    ("alibi(of)", patterns.alibi),
    ("decay(of, metric=, after=)", patterns.decay),
    ("soft_cap(cap, of)", patterns.soft_cap),
    ("head_scale(of)", patterns.head_scale),
    ("cosine(of, most=100)", patterns.cosine),
    ("gaussian_mixture(kernels, of, vanish=)", patterns.gaussian_mixture),
    ("learned_mask(of)", patterns.learned_mask),
    ("polyline(of, corner=)", patterns.polyline),
    ("positional(of)", patterns.positional),
    ("reversed_attention(of)", patterns.reversed_attention),
]

# grids of models, and what is asked of the waste: GPU, CPU
WASTE: list[tuple[str, Any, tuple[int, ...], float | None, float | None]] = [
    ("window(7)", patterns.window(7), (56, 56), 1.71, 1.35),
    ("window(7, shift=3)", patterns.window(7, 3), (56, 56), 1.95, None),
    ("window(8)", patterns.window(8), (64, 64), 1.1, None),
    ("grid(7)", patterns.grid(7), (56, 56), 1.71, None),
    ("neighborhood(7)", patterns.neighborhood(7), (56, 56), 3.3, 3.0),
    ("neighborhood(7, dilation=4)", patterns.neighborhood(7, 4), (56, 56), 3.3, 3.0),
    ("neighborhood(13)", patterns.neighborhood(13), (56, 56), None, None),
    ("overlapping_window(7, 11)", patterns.overlapping_window(7, 11), (56, 56), None, None),
    ("dilated_blocks(7, 8)", patterns.dilated_blocks(7, 8), (56, 56), None, None),
    ('axial("x")', patterns.axial("x"), (56, 56), 1.31, None),
    ('axial("x")', patterns.axial("x"), (64, 64), 1.1, None),
    ('strip("y", 8)', patterns.strip("y", 8), (64, 64), 1.1, None),
    ("cross(8)", patterns.cross(8), (64, 64), None, None),
    ("causal(), one axis", patterns.causal(), (4096,), None, None),
    ("full()", patterns.full(), (56, 56), None, None),
]
HEADS, DIM = 4, 32

HEAD = """# The library of patterns

Written by `python docs/make_patterns.py`. Each picture shows the keys (blue) of one query (red) on a {grid} grid; *share* is what
the pattern allows of the dense score elements there, *strategy* is how it runs (`attnc.explain(p, grid=...)` says why, axis by
axis). Every pattern works on a grid of any rank unless it names an axis. Sizes are an int, or one per axis; sizes that do not
divide the grid are legal and mean what the formula says, and `pad="multiple"` turns the missing rows into real, virtual keys.

`bias="relative"` adds a runtime table `bias` `[H or 1, 2s-1, ...]` at query - key + s - 1, in units of the dilation;
`bias="absolute"` a table `[H or 1, s*s, s*s]` at the places of query and key in their group (not where windows slide). On an axis
that a pattern leaves whole s is the axis's length. Either table gets a gradient, and may come from a small network (Swin v2,
CrossFormer). Pictures of `cross_scale` show keys on a grid of their own, 14x14 and 56x56.

| pattern | meaning | strategy | share | keys of a query |
|---|---|---|---|---|
"""

TAIL = """
## Scores

Each takes a pattern `of` (every key where it is left out) and changes its score; they nest, `soft_cap(30, decay(window(7)))`.

| score | meaning |
|---|---|
{scores}
## Lengths and generated weights

| pattern | meaning |
|---|---|
| `at_least(length, of)` | {at_least} |
| `outlook(size, stride=, padding=)` | {outlook} |
| `taps(size, dilation)` | {taps} |

## Mechanisms

| mechanism | meaning |
|---|---|
| `channel()` | {channel} |

## Waste

Score elements that the kernels compute over those that the pattern allows, at grids of models, with the tiles that the cost
model chooses for heads of {dim}: on the GPU in float16 (rows x keys of a tile, per axis), on the CPU in float32 on 2 threads for 8
images of {heads} heads (sides of a tile of queries; a *band* has 16 queries of a row in the lanes of a vector). *FlexAttention*:
128x128 blocks of the flat sequence with a pair in them, which is what its block mask visits. *asked*: what the project asks of
itself, on GPU and CPU.

| pattern | grid | allowed | GPU tile | GPU | CPU | CPU | FlexAttention | asked |
|---|---|---|---|---|---|---|---|---|
{waste}
A pattern is a function of two points, so what is missing here is usually a few lines of your own: see [language.md](language.md).
"""


def sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    line = " ".join(text.split("\n\n", maxsplit=1)[0].split())
    return re.split(r"(?<!al)(?<=\.) ", line)[0].replace("|", "\\|")


def paragraphs(text: str) -> str:
    """A docstring on one line."""
    return " ".join(text.split()).replace("|", "\\|")


def row(call: str, p: attnc.Pattern, options: dict[str, Any]) -> str:
    """One line of the table, and its picture."""
    name = call.split("(", maxsplit=1)[0]
    slug = re.sub(r"\W+", "_", call).strip("_")
    thumbnail(p, grid=GRID, query=QUERY, path=HERE / "img" / f"{slug}.png", **options)
    s = subject(p, grid=GRID, kv_grid=options.get("kv_grid"), heads=options.get("heads", 1))
    allowed = s.allowed()
    assert allowed is not None
    share = f"{100 * allowed / s.dense():.1f} %"
    meaning = MEANINGS.get(call) or sentence(inspect.getdoc(getattr(patterns, name)) or "")
    return f"| `{call}` | {meaning} | {s.strategy} | {share} | ![{call}](img/{slug}.png) |\n"


def blocks_of_flex(p: attnc.Pattern, grid: tuple[int, ...], side: int = 128) -> int:
    """Score elements of the blocks that a mask over the flat sequence visits."""
    mask = attnc.mask(p, grid=grid)[0]
    short = -len(mask) % side
    mask = torch.nn.functional.pad(mask, (0, short, 0, short))
    n = len(mask) // side
    return int(mask.view(n, side, n, side).any(3).any(1).sum()) * side * side


def waste(call: str, p: attnc.Pattern, grid: tuple[int, ...], gpu: float | None, cpu: float | None) -> str:
    """One line of the table of waste. A union's parts add up."""
    program = attnc.compile(p, grid=grid).program(len(grid))
    parts = [part for run in split(program, grid, grid, HEADS, HEADS) for part in run.parts]
    places = [geometry(part, grid, grid) for part in parts]
    allowed = sum(g.allowed(1) for g in places)
    sizes = {"heads": 1, "head_dim": DIM, "value_dim": DIM}
    found = [
        sum(issued(b, part, g, dtype=t, **sizes) for part, g in zip(parts, places, strict=True)) / allowed
        for b, t in (("triton", "float16"), ("cpp", "float32"))
    ]
    tile = tiles(places[0], DIM, DIM, 2).forward
    shown = f"{'x'.join(map(str, tile.rows))} x {'x'.join(map(str, tile.chunk))}"
    choice = choose(places[0], Spec(parts[0], DIM, DIM, "float32").kernel(backward=False), 8 * HEADS, 2)
    sides = "band" if choice.band else " x ".join(str(s or "all") for s in choice.sides)
    asked = ", ".join("-" if n is None else f"{n:g}" for n in (gpu, cpu)) if gpu or cpu else "-"
    n = 1
    for length in grid:
        n *= length
    flex = blocks_of_flex(p, grid) / allowed
    cells = [f"`{call}`", "x".join(map(str, grid)), f"{100 * allowed / n**2:.2f} %", shown, f"{found[0]:.2f}", sides]
    return f"| {' | '.join([*cells, f'{found[1]:.2f}', f'{flex:.1f}', asked])} |\n"


def main() -> None:
    (HERE / "img").mkdir(exist_ok=True)
    rows = "".join(row(*each) for each in SHOWN)
    channel = sentence(inspect.getdoc(patterns.channel) or "")
    scores = "".join(f"| `{call}` | {paragraphs(inspect.getdoc(f) or '')} |\n" for call, f in SCORES)
    others = (patterns.at_least, patterns.outlook, patterns.taps)
    at_least, outlook, taps = (paragraphs(inspect.getdoc(f) or "") for f in others)
    wasted = "".join(waste(*each) for each in WASTE)
    told = {"channel": channel, "scores": scores, "at_least": at_least, "outlook": outlook, "taps": taps, "waste": wasted}
    tail = TAIL.format(**told, heads=HEADS, dim=DIM)
    text = HEAD.format(grid="x".join(map(str, GRID))) + rows + tail
    (HERE / "patterns.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
