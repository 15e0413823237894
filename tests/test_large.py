"""More than 2**31 elements: batch items, heads, rows and channels that lie 2**31 elements and more apart in memory.

The memory is one allocation of 8.6 GB of which few pages are touched, so none but those is ever there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnc
from attnc import patterns
from attnc.compiler import has_compiler
from attnc.runtime import call, operator
from attnc.runtime.call import Call
from attnc.schedule.geometry import geometry

FAR = 2**32
GRID, HEADS, WIDTH = (5, 3), 3, 8
BIAS = 5
# strides of [B, H, y, x, D]: which dimension is far apart
APART: dict[str, tuple[int, ...]] = {
    "batch": (FAR, 120, 24, 8, 1),
    "heads": (240, FAR // 2, 24, 8, 1),
    "rows": (360, 120, FAR // 4, 8, 1),
    "channels": (135, 45, 3, 1, FAR // 8),
}


class Far:
    """Tensors in memory that reaches over more than 2**32 elements."""

    def __init__(self, apart: str) -> None:
        self.room, self.apart, self.used = torch.empty(FAR + 2**20, dtype=torch.float16), APART[apart], 0

    def like(self, t: Tensor) -> Tensor:
        """[B, H, y, x, D] or [B, H, N, D], uninitialised."""
        shape = (*t.shape[:2], *GRID, t.shape[-1])
        self.used += 2048
        return self.room.as_strided(shape, self.apart, self.used)

    def copy(self, t: Tensor) -> Tensor:
        """The same values, far apart."""
        return self.like(t).copy_(t.view(*t.shape[:2], *GRID, -1))


def rows(heads: int = HEADS) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 15, WIDTH, generator=g).half() for _ in range(4)]


def near(apart: str, t: Tensor) -> Tensor:
    """A dense tensor whose dimensions lie in the order that those far apart have."""
    order = sorted(range(5), key=lambda d: -APART[apart][d])
    room = torch.empty([(*t.shape[:2], *GRID, t.shape[-1])[d] for d in order], dtype=t.dtype)
    return room.permute([order.index(d) for d in range(5)]).copy_(t.view(*t.shape[:2], *GRID, -1))


def differences(backend: str, apart: str) -> list[float]:
    """Largest differences of outputs and gradients between tensors far apart and dense ones; C++ writes them far apart, too."""
    p = patterns.neighborhood(3, bias="relative")
    program = attnc.compile(p, grid=GRID).program(2)
    table = torch.randn(HEADS, BIAS, BIAS, generator=torch.Generator().manual_seed(1))
    module = operator.backend_module(backend)
    found = []
    for far in (Far(apart), None):
        q, k, v, g = (near(apart, t) if far is None else far.copy(t) for t in rows())
        c = Call(program, geometry(program, GRID, GRID), 0.3, {"bias": table})
        if far is not None and backend == "cpp":
            c.into = far.like(q), call.lse_like(q)
        out, lse = module.forward(c, q, k, v)
        if far is not None and backend == "cpp":
            c.into = far.like(q), far.like(k), far.like(v)
        *gradients, tables = module.backward(c, q, k, v, out, lse, g, None)
        if far is not None and backend == "cpp":
            assert out.stride() == gradients[0].stride() == APART[apart]
        found.append([out.clone(), lse, *(t.clone() for t in gradients), tables["bias"]])
    return [float((a - b).abs().max()) for a, b in zip(*found, strict=True)]


BACKENDS = ("torch", *(("cpp",) if has_compiler() else ()))


@pytest.mark.parametrize("apart", APART)
@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_far_apart(backend: str, apart: str) -> None:
    assert differences(backend, apart) == [0.0] * 6


SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
import test_large as t
import torch

plain = torch.empty_like
for apart in ("heads", "rows", "channels"):  # the batch item's number has 64 bits in every kernel
    made = t.Far(apart)
    # what is made like a tensor far apart is far apart, too
    torch.empty_like = lambda x, **more: made.like(x) if x.stride() == t.APART[apart] else plain(x, **more)
    assert t.differences("triton", apart) == [0.0] * 6, apart
    assert made.used == 2048 * 4, made.used
# a table far apart
room = torch.empty(t.FAR + 2**20, dtype=torch.float16)
op = t.attnc.compile(t.patterns.window(3, bias="relative"), grid=t.GRID, backend="triton")
table = torch.randn(t.HEADS, 5, 5).half()
far = room.as_strided((t.HEADS, 5, 5), (t.FAR // 2, 5, 1), 64).copy_(table)
outs = []
for bias in (table, far):
    x = [y.clone().requires_grad_() for y in (*t.rows()[:3], bias)]
    out = op(*x[:3], bias=x[3])
    outs.append([out, *torch.autograd.grad(out.float().square().sum(), x)])
assert all(torch.equal(a, b) for a, b in zip(*outs))
# channels as tokens
c = t.attnc.compile(t.patterns.channel(), backend="triton")
x = t.rows()[:3]
far = [room.as_strided(y.shape, (120, t.FAR // 2, 8, 1), 4096 * (i + 1)).copy_(y) for i, y in enumerate(x)]
assert torch.equal(c(*far), c(*x))
print("held")
"""


@pytest.mark.interpret
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_elements_far_apart_in_interpreted_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(Path(__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("held\n")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_modules_of_large_grids_count_in_64_bits() -> None:
    """Each product with a stride is one of 64 bits; of small grids' modules, which refuse what spans more, only those that must."""
    options = {"heads": 8, "head_dim": 64, "target": "cuda:90"}
    p = patterns.neighborhood(3, bias="relative")
    large, small = (attnc.emit(p, grid=(n, n), **options) for n in (2048, 64))
    body = large[large.index("@triton.jit") : large.index("def strides")]
    products = re.findall(r"\(?(\S+) \* \w*st\[\d\]", body)
    assert len(products) > 10
    assert {x for x in products if "int64" not in x} == {"b"}, products  # which is program_id(2).to(tl.int64)
    assert "spans 2**31 elements" in small
    assert "spans 2**31 elements" not in large


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_offsets_have_32_bits_where_they_reach() -> None:
    from attnc.runtime.triton import _large

    program = attnc.compile(patterns.window(3), grid=GRID).program(2)
    c = Call(program, geometry(program, GRID, GRID), 1.0, {})
    whole = torch.empty(2, HEADS, 2**24, 128, dtype=torch.float16, device="meta")
    assert _large(c, *[whole] * 3)
    assert not _large(c, *[whole[:, :1]] * 3)  # one head of it at a time, whose strides are those of all
    assert not _large(c, *rows()[:3])
    many = torch.empty(2**12, HEADS, 2**12, 128, dtype=torch.float16, device="meta")
    assert not _large(c, *[many] * 3)  # a batch item's number has 64 bits in every kernel
