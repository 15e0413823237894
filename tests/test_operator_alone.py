"""Operators away from the call: copied, pickled, held in memory, listened to by modes and profilers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest
import strategies as draws
import torch
from heard import Heard
from test_operator import Block, compiled, rows

import attnc
from attnc import patterns


def test_operators_are_copied_and_pickled_with_their_modules() -> None:
    block, x = Block(), torch.randn(2, 4, 5, 16)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), copy.copy(block)):  # noqa: S301
        assert torch.equal(other(x), block(x))
    twin = copy.deepcopy(block)
    twin.bias.data.zero_()
    assert not torch.equal(twin(x), block(x))
    for p in (patterns.channel(), patterns.axial("y"), draws.decay()):
        op = attnc.compile(p, backend="torch")
        again = pickle.loads(pickle.dumps(op))  # noqa: S301
        assert repr(again) == repr(op)
        assert again.source.name == p.name
    with pytest.raises(attnc.DeclarationError, match="was unpickled: it runs, and its declaration cannot be traced again"):
        again.source.trace(("x",))


def test_a_pickle_runs_in_another_process(tmp_path: Any) -> None:
    op = compiled(patterns.neighborhood(3, 2, bias="relative"))
    q, k, v = rows()
    bias = torch.randn(2, 5, 5)
    torch.save({"op": op, "rows": (q, k, v), "bias": bias, "out": op(q, k, v, bias=bias)}, tmp_path / "saved.pt")
    script = (
        "import sys, torch, attnc; d = torch.load(sys.argv[1], weights_only=False); "
        "print(torch.equal(d['op'](*d['rows'], bias=d['bias']), d['out']))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "saved.pt")], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


# ------------------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.slow
def test_eager_streams() -> None:
    """The meaning of 4,096 tokens is 16 million scores a head; no more than 256 MiB beside the inputs and outputs are held."""
    script = """
import resource, torch, attnc
torch.set_num_threads(1)
x = torch.randn(1, 8, 4096, 16)
attnc.reference(attnc.patterns.full(), grid=(16, 16))(*[x[:, :, :256]] * 3)  # what torch itself loads is not meant
op = attnc.reference(attnc.patterns.full(), grid=(64, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
op(x, x, x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    extra = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert extra < 256, f"{extra} MiB"


def test_an_operator_costs_little_to_hold() -> None:
    tracemalloc.start()
    kept = [compiled(patterns.window(7), grid=(n, n)) for n in range(8, 28)]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == 20
    assert size < 20 << 20


# ------------------------------------------------------------------------------------------------------------- past the dispatcher
@pytest.mark.parametrize("packed", [False, True])
def test_who_listens_hears_the_operators(packed: bool) -> None:
    layout = "b x (three h d)" if packed else "b x h d"
    op = attnc.compile(patterns.window(4), layout=layout, heads=2, backend="torch")
    x = torch.randn(1, 12, 48 if packed else 2, *(() if packed else (8,)), requires_grad=True)
    rows = (x,) if packed else (x, x, x)
    quiet = op(*rows)
    (gradient,) = torch.autograd.grad(quiet.square().sum(), x)
    name = "attend_packed" if packed else "attend"
    with Heard() as heard:
        out = op(*rows)
        (same,) = torch.autograd.grad(out.square().sum(), x)
    assert {f"attnc.{name}.default", f"attnc.{name}_backward.default"} <= set(heard.names)
    assert torch.equal(out, quiet)
    assert torch.equal(same, gradient)
    out = op(*rows)  # recorded past the dispatcher, run backward under a mode
    with Heard() as heard:
        (same,) = torch.autograd.grad(out.square().sum(), x)
    assert f"attnc.{name}_backward.default" in heard.names
    assert torch.equal(same, gradient)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op(*rows)
    assert f"attnc::{name}" in {e.name for e in profile.events()}
    with torch.inference_mode():
        assert torch.equal(op(*rows), quiet)
