"""How the C++ backend builds kernels: by which flags, for which machines, from which text, and as modules that stand alone."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from builds import QUICK, SHIPPED, built_with
from channel_checks import check_channel
from cpp_checks import check, make_program
from cpp_statements import biased, window
from test_cpp_bfloat16 import WORDS

from attnc import ir, patterns
from attnc.codegen.cpp import Spec, source
from attnc.codegen.cpp_module import emit_cpu
from attnc.errors import BuildError
from attnc.runtime import cpp
from attnc.runtime.call import Call
from attnc.schedule.geometry import geometry

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
R = torch.randn


def test_as_shipped(monkeypatch):
    """With the flags that users get; nothing is read from outputs that were never written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    with built_with(SHIPPED):
        check(biased(s=7), (14, 15), tables={"bias": R(2, 13, 13)}, dim=32)
        check(*WORDS["shifted window"][:2], dtype=torch.bfloat16, **WORDS["shifted window"][2])
        check_channel("channels first")


def test_libraries_share_nothing():
    """Kernels of several dtypes in one process, whose sums are cut: no constant of one stands for that of another."""
    for dtype in (torch.float32, torch.float64, torch.float32):
        check(patterns.full(), (300,), dtype=dtype)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 instruction sets")
@pytest.mark.parametrize("instructions", ["haswell", "x86-64"])
def test_other_instruction_sets(instructions):
    """Vectors of 8 and of 4 lanes."""
    with built_with([f"-march={instructions}" if f == "-march=native" else f for f in QUICK]):
        check(window(s=4), (9, 11), dim=24)
        check(*WORDS["shifted window"][:2], dtype=torch.bfloat16, **WORDS["shifted window"][2])
        for name in ("long", "channels first", "bfloat16 packed"):
            check_channel(name)


def test_a_failed_build_shows_its_output(tmp_path):
    with pytest.raises(BuildError, match=r"kept at [\s\S]*kernel\.cpp:1:.* error"):
        cpp._build("this is no C++\n", tmp_path)


def test_the_same_source_each_time():
    program = make_program(biased(s=7))
    for backward in (False, True):
        text = source(Spec(program, 32, 32, "float32"), backward)
        assert text == source(Spec(program, 32, 32, "float32"), backward)
        assert text.startswith("// Attention `biased(s=7)`")


def test_stand_alone_module(tmp_path):
    """The emitted module runs where attnc cannot be imported, and gives what the backend gives."""
    program = make_program(biased(s=4), multiple=(4, 4))
    (tmp_path / "made.py").write_text(emit_cpu(program, grid=(6, 9), heads=2, head_dim=8).replace('"-O2"', '"-O1"'))
    channel = ir.Program(ir.Channel(), ir.Tokens((None,)), ir.Tokens((None,)))
    (tmp_path / "channel.py").write_text(emit_cpu(channel, heads=2, head_dim=8).replace('"-O2"', '"-O1"'))
    torch.manual_seed(0)
    q, k, v, bias = R(1, 2, 54, 8), R(1, 2, 54, 8), R(1, 2, 54, 8), R(2, 7, 7)
    torch.save([q, k, v, bias], tmp_path / "in.pt")
    script = """if True:
        import sys
        sys.modules["attnc"] = None
        import torch, made, channel
        q, k, v, bias = (t.requires_grad_() for t in torch.load("in.pt"))
        out = made.attention(q, k, v, bias=bias)
        out.square().sum().backward()
        other = channel.attention(q, k, v)
        torch.save([out.detach(), bias.grad, other.detach()], "out.pt")
    """
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    out, bias_grad, other = torch.load(tmp_path / "out.pt")
    tables = {"bias": bias, "pad_k": torch.zeros(1, 8), "pad_v": torch.zeros(1, 8)}
    call = Call(program, geometry(program, (6, 9), (6, 9)), 8**-0.5, tables)
    expected, lse = cpp.forward(call, q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(bias_grad, cpp.backward(call, q, k, v, expected, lse, 2 * expected, None)[3]["bias"])
    torch.testing.assert_close(other, cpp.channel_forward(q, k, v, 8**-0.5))
