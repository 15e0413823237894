"""Generated source is golden: what printers say of some statements, so that a change of a kernel's text is read before it is kept.

`ATTNC_UPDATE_SNAPSHOTS=1 pytest tests/test_printed.py` writes the snapshots anew; `git diff tests/snapshots` is then what to read.
"""

from __future__ import annotations

from typing import Any

import pytest
import snapshot
import strategies as draws
from strategies import weighted

import attnc
from attnc import ir, patterns
from attnc.analysis.dropout import with_dropout
from attnc.codegen.around import core_program
from attnc.codegen.cpp import Spec, header, source
from attnc.codegen.cpp_module import emit_cpu
from attnc.codegen.triton import emit_triton
from attnc.codegen.triton_channel import emit_channel
from attnc.lang import functions as fn
from attnc.runtime.triton import text_for
from attnc.schedule.tiles import Tiles
from attnc.schedule.walks import Tile


@attnc.pattern
def pooled(q: Any, k: Any, *, bias: attnc.Table, gain: attnc.Table) -> Any:
    near = (q.y // 2 == k.y) & (q.x // 2 <= k.x) & (k.x <= q.x // 2 + 1)
    return fn.where(near, attnc.SCORE + bias[attnc.HEAD, q.x - 2 * k.x + 2], post=fn.exp(gain[k.y]))


@attnc.pattern
def triangle(q: Any, k: Any, *, slope: attnc.Table) -> Any:
    """No product of axes: a predicate is left."""
    return fn.where(
        (q.y - k.y) * (q.y - k.y) + abs(q.x - k.x) <= 9, 5 * fn.tanh(attnc.SCORE / 5) - slope[attnc.HEAD] * ((q.x - k.x) % 3)
    )


STATEMENTS: dict[str, tuple[attnc.Pattern, tuple[int, ...], dict[str, Any]]] = {
    "window_bias": (patterns.window(7, bias="relative"), (14, 14), {}),
    "shifted_window": (patterns.window(7, shift=3), (14, 21), {"dtype": "float32"}),
    "padded_window": (patterns.window(4, shift=-1), (10, 7), {"pad": ((1, 1), (0, 2))}),
    "padded_blocks": (patterns.window(4), (6, 7), {"pad": ((1, 1), (0, 1))}),
    "neighborhood": (patterns.neighborhood(7), (16, 24), {"target": "cuda:90"}),
    "dilated_bias": (patterns.neighborhood(3, 2, bias="relative"), (11, 14), {"value_dim": 24}),
    "causal_prefix": (patterns.causal(), (150,), {"prefix": 2}),
    "pooled": (pooled(), (6, 8), {"kv_grid": (3, 5)}),
    "predicate": (triangle(), (9, 12), {"dropout": True}),
    "sigmoid": (weighted(patterns.strip("x", 2), "sigmoid", post=True), (5, 18), {}),
    "documents": (patterns.window(4) & draws.documents(), (8, 9), {"dtype": "float32"}),
    "joined_bias": (patterns.window(3, shift=1, bias="relative"), (6, 6), {"dtype": "float32"}),
    "volume": (patterns.neighborhood(3), (3, 6, 8), {}),
    "grid": (patterns.grid(2), (5, 6), {}),
    "parts": (patterns.cross(1), (9, 12), {}),
}


def program(name: str) -> tuple[ir.Program, tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    p, grid, options = STATEMENTS[name]
    options = {"dtype": "float16", "target": "cuda:80", "value_dim": 32, **options}
    keys = options.pop("kv_grid", grid)
    unknown, prefix, pad = (None,) * len(grid), options.pop("prefix", 0), options.pop("pad", None)
    tokens = ir.Tokens(unknown, prefix, pad)
    made = ir.Program(p.trace(ir.AXES[len(grid)], same_grid=keys == grid), tokens, tokens, keys == grid)
    if options.pop("dropout", False):
        made = with_dropout(made)
    return core_program(made), grid, keys, options


@pytest.mark.parametrize("name", STATEMENTS)
def test_text_for_gpus(name: str) -> None:
    made, grid, keys, options = program(name)
    snapshot.matches(f"triton_{name}.txt", emit_triton(made, grid, keys, heads=2, head_dim=32, **options))


@pytest.mark.parametrize("name", ["padded_window", "dilated_bias", "volume"])
def test_text_for_every_grid(name: str) -> None:
    """What operators run on grids beyond the first: sizes are arguments."""
    made, grid, keys, options = program(name)
    text = text_for(made, grid, keys, 32, options["value_dim"], 2, plain=True, target=options["target"])
    snapshot.matches(f"triton_{name}_any_size.txt", text)


@pytest.mark.parametrize(
    "p, grid, keys, fused",
    [
        (patterns.window(4), (8, 8), None, True),
        (patterns.window(8), (16, 16), None, True),
        (patterns.window(10), (20, 20), None, False),
        (patterns.window(4), (8, 8), (16, 8), False),
        (patterns.full(), (4, 4), (4, 4), False),
    ],
    ids=str,
)
def test_one_kernel_of_all_gradients_is_of_one_small_group(p: attnc.Pattern, grid: Any, keys: Any, fused: bool) -> None:
    """Of tokens that see each other and nobody else, 64 at most; not of keys on a grid of their own."""
    queries = ir.Tokens((None, None))
    made = ir.Program(
        p.trace(("y", "x"), same_grid=keys is None), queries, queries if keys is None else ir.Tokens(keys), keys is None
    )
    options = {"heads": 2, "head_dim": 32, "value_dim": 32, "dtype": "float16", "target": "cuda:80"}
    text = emit_triton(made, grid, keys or grid, **options)  # type: ignore[arg-type]
    assert ("def backward_dq(" not in text) == fused


def test_keys_that_one_row_sees_at_once_are_no_group() -> None:
    """Rows of one query on an axis of every length, whose few keys are one chunk: others see these keys too."""

    @attnc.pattern
    def beside(q: Any, k: Any, *, bias: attnc.Table) -> Any:
        near = (q.y // 4 == k.y // 4) & (abs(q.x - k.x) <= 1)
        return fn.where(near, attnc.SCORE + bias[attnc.HEAD, q.x - k.x + 1])

    tokens, tile = ir.Tokens((None, None)), Tile((4, 1), (4, 4), 1)
    made = ir.Program(beside().trace(("y", "x")), tokens, tokens)
    text = text_for(made, (8, 9), (8, 9), 32, 32, 2, plain=True, chosen=Tiles(tile, tile, tile, Tile((16,), (16,))))
    assert "def backward_dq(" in text and "atomic_add(d_bias" in text


def test_text_of_channel_attention() -> None:
    snapshot.matches("triton_channel.txt", emit_channel())


@pytest.mark.parametrize("name", STATEMENTS)
def test_text_for_cpus(name: str) -> None:
    """What is printed between the headers, which are read as they are."""
    made, _, _, options = program(name)
    known = {
        line
        for file in ("vec", "random", "tile", "tables", "forward", "backward")
        for line in header(f"{file}.h").replace("@DROPOUT@", "").splitlines()
    }
    spec = Spec(made, 32, options["value_dim"], "float32")
    text = "\n".join(line for backward in (False, True) for line in source(spec, backward).splitlines() if line not in known)
    snapshot.matches(f"cpp_{name}.txt", text + "\n")


def test_cpu_modules() -> None:
    """The tables of axes that a module holds, and what it gives its kernels."""
    for name in ("padded_window", "dilated_bias"):
        made, grid, keys, options = program(name)
        text = emit_cpu(made, grid=grid, kv_grid=keys, heads=2, head_dim=32, value_dim=options["value_dim"])
        between = text[text.index("TABLES = ") : text.index("\nFORWARD = (")]
        snapshot.matches(f"module_{name}.txt", between)


def test_a_band_s_module_has_the_other_kernel_too() -> None:
    """The band's own kernel comes first; on a machine whose vectors are too long for the grid's rows the other one runs."""
    tokens = ir.Tokens((None, None))
    made = ir.Program(patterns.neighborhood(7).trace(("y", "x")), tokens, tokens)
    text = emit_cpu(made, grid=(56, 56), heads=4, head_dim=32)
    for one in text[text.index("\nFORWARD = (") :].split("\nBACKWARD = ("):
        assert ["constexpr int BAND = 7" in kernel for kernel in one.split('r"""')[1:]] == [True, False]
