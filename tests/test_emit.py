"""Emitted modules: short, the same bytes every time, and running in a process that cannot import attnc."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys

import pytest
import torch
from test_triton import program

import attnc
from attnc import ir, patterns
from attnc.codegen.triton import emit_triton
from attnc.errors import DeclarationError, UnsupportedError
from attnc.report.package import package

OPTIONS = {"heads": 2, "head_dim": 32, "value_dim": 32, "dtype": "float16", "target": "cuda:90"}
SCRIPT = """
import importlib.util, sys

class Nobody:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attnc":
            raise ImportError("attnc is not here")

sys.meta_path.insert(0, Nobody())
import torch

spec = importlib.util.spec_from_file_location("module", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["module"] = module
spec.loader.exec_module(module)
torch.manual_seed(0)
q, k, v = (torch.randn(2, 2, 36, 16, requires_grad=True) for _ in range(3))
tables = {"bias": torch.randn(2, 5, 5, requires_grad=True)} if sys.argv[2] == "bias" else {}
out = module.attention(q, k, v, **tables)
y, x = torch.arange(36) // 6, torch.arange(36) % 6
if sys.argv[3] == "window":
    mask = (y[:, None] // 3 == y // 3) & (x[:, None] // 3 == x // 3)
elif sys.argv[3] == "neighborhood":
    start = lambda c: (c - 1).clamp(0, 3)
    mask = ((start(y)[:, None] <= y) & (y <= start(y)[:, None] + 2)) & ((start(x)[:, None] <= x) & (x <= start(x)[:, None] + 2))
elif sys.argv[3] == "axial":
    mask = (y[:, None] == y) | (x[:, None] == x)
if sys.argv[3] == "channel":
    weight = torch.softmax(q.transpose(-1, -2) @ k / 4, -1)
    want = v @ weight.transpose(-1, -2)
else:
    score = q @ k.transpose(-1, -2) / 4
    if tables:
        score = score + tables["bias"][:, (y[:, None] - y + 2).clamp(0, 4), (x[:, None] - x + 2).clamp(0, 4)]
    want = torch.softmax(score.masked_fill(~mask, float("-inf")), -1) @ v
torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
g = torch.randn_like(out)
leaves = [q, k, v, *tables.values()]
for a, b in zip(torch.autograd.grad(out, leaves, g), torch.autograd.grad(want, leaves, g)):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
if hasattr(module, "NAME"):  # a second copy of the module finds the operator of the first
    operator = getattr(torch.ops.attnc_emitted, module.NAME)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert getattr(torch.ops.attnc_emitted, again.NAME) is operator
refused = 0
for wrong in ((q[:, :, 1:], k, v), (q, k[:1], v), (q.double(), k, v)):
    try:
        module.attention(*wrong, **tables)
    except ValueError as e:
        refused += "wants" in str(e) or "wanted" in str(e)
for scale in (float("nan"), float("inf"), -float("inf")):
    try:
        module.attention(q, k, v, **tables, scale=scale)
    except ValueError as e:
        refused += f"scale={scale}; this module wants a finite" in str(e)
assert refused == 6, refused
assert not any(name.partition(".")[0] == "attnc" for name in sys.modules)
"""
MODULES = {
    "window": (lambda: program(patterns.window(3)), "no", "window"),
    "window-bias": (lambda: program(patterns.window(3, bias="relative")), "bias", "window"),
    "neighborhood": (lambda: program(patterns.neighborhood(3)), "no", "neighborhood"),
    "neighborhood-bias": (lambda: program(patterns.neighborhood(3, bias="relative")), "bias", "neighborhood"),
    "union": (lambda: program(patterns.axial("y") | patterns.axial("x")), "no", "axial"),
    "channel": (lambda: ir.Program(ir.Channel(), ir.Tokens((None, None)), ir.Tokens((None, None))), "no", "channel"),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", list(MODULES))
def test_modules_stand_alone(name, tmp_path):
    make, tables, formula = MODULES[name]
    path = tmp_path / "module.py"
    path.write_text(emit_triton(make(), (6, 6), (6, 6), **OPTIONS | {"head_dim": 16, "value_dim": 16, "dtype": "float32"}))
    environment = {n: x for n, x in os.environ.items() if n != "PYTHONPATH"} | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(path), tables, formula]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "dim, dtype", [(16, "float16"), (32, "float16"), (32, "float32"), (64, "bfloat16"), (100, "float16"), (128, "float16")]
)
@pytest.mark.parametrize("pattern", [patterns.window(7, bias="relative"), patterns.neighborhood(7)], ids=str)
def test_modules_are_short_and_deterministic(pattern, dim, dtype):
    options = OPTIONS | {"head_dim": dim, "value_dim": dim, "dtype": dtype}
    texts = {emit_triton(program(pattern), (56, 56), (56, 56), **options) for _ in range(2)}
    assert len(texts) == 1
    (text,) = texts
    assert len(text.splitlines()) < 300
    assert "import attnc" not in text
    assert text.startswith('"""Attention with the pattern')
    compile(text, "module.py", "exec")


@pytest.mark.parametrize("pattern", [patterns.window(3), patterns.channel()], ids=str)
def test_cpu_modules_take_finite_scales_alone(pattern, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(attnc.emit(pattern, grid=(6, 6), heads=2, head_dim=16, dtype="float32", target="cpu"))
    attention, x = runpy.run_path(str(path))["attention"], torch.randn(1, 2, 36, 16)
    for scale in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"^scale={scale}; this module wants a finite one$"):
            attention(x, x, x, scale=scale)


def test_a_union_is_printed_as_its_parts():
    text = attnc.emit(patterns.axial("y") | patterns.axial("x"), grid=(64, 64), heads=2, head_dim=64)
    assert "parts:    2" in text
    assert "waste:    1.01" in text
    assert "def forward_2(" in text
    assert "def backward_dkv_2(" in text


HEADS = """
import importlib.util, sys
import torch

spec = importlib.util.spec_from_file_location("module", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["module"] = module
spec.loader.exec_module(module)
torch.manual_seed(0)
y, x = torch.arange(36) // 6, torch.arange(36) % 6
window = (y[:, None] // 3 == y // 3) & (x[:, None] // 3 == x // 3)
causal = (y[:, None] >= y) & (x[:, None] >= x)
mask = torch.stack([window, window, causal, causal])
for kv in (4, 2):
    q, k, v = (torch.randn(2, h, 36, 16, requires_grad=True) for h in (4, kv, kv))
    out = module.attention(q, k, v)
    wide = [t.repeat_interleave(4 // kv, 1) for t in (k, v)]
    want = torch.softmax((q @ wide[0].transpose(-1, -2) / 4).masked_fill(~mask, float("-inf")), -1) @ wide[1]
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
for heads, kv in ((4, 1), (2, 2)):
    q, k, v = (torch.randn(2, h, 36, 16) for h in (heads, kv, kv))
    try:
        module.attention(q, k, v)
    except ValueError as e:
        assert f"{heads} heads on {kv} of keys; this module wants 4, and key heads that no two of 0 to 1, 2 to 3 share" in str(e), e
    else:
        raise AssertionError("taken")
"""


@pytest.mark.interpret
def test_heads_with_patterns_of_their_own_have_kernels_of_their_own(tmp_path):
    path = tmp_path / "module.py"
    p = patterns.per_head([patterns.window(3), patterns.causal()])
    path.write_text(attnc.emit(p, grid=(6, 6), heads=4, head_dim=16, dtype="float32"))
    assert "heads:    0, 1\nstrategy: grouped (y: block, x: block)" in path.read_text()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HEADS, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


PACKAGED = """
import sys
import torch
import some_kernels

assert not any(name.partition(".")[0] == "attnc" for name in sys.modules)
q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))
out = some_kernels.window_size_2.attention(q, k, v)
places = torch.arange(16).view(4, 4)
group = places // 8 * 2 + places % 4 // 2
mask = group.view(-1, 1) == group.view(1, -1)
want = torch.softmax((q @ k.transpose(-1, -2) / 4).masked_fill(~mask, float("-inf")), -1) @ v
torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
for wrong in (q.half(), q.to("meta")):
    try:
        other = q if wrong.is_meta else wrong
        some_kernels.window_size_2.attention(other, wrong, wrong)
    except ValueError as e:
        assert "wants" in str(e), e
    else:
        raise AssertionError("taken")
"""


@pytest.mark.interpret
def test_several_patterns_are_a_folder_that_pip_installs(tmp_path):
    calls = [("window:size=2", patterns.window(2)), ("some/file.py:near", patterns.neighborhood(3))]
    calls.append(("window:size=2", patterns.window(2, shift=1)))
    folder = tmp_path / "some-kernels"
    files = package(calls, folder, grid=(4, 4), heads=2, head_dim=16, dtype="float32")
    inside = "build/torch-universal/some_kernels/"
    names = ("__init__.py", "window_size_2.py", "file_near.py", "window_size_2_2.py")
    assert set(files) == {"pyproject.toml", *(inside + n for n in names)}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(tmp_path / "there"), str(folder)], check=True, capture_output=True, text=True)
    environment = {n: x for n, x in os.environ.items() if n != "PYTHONPATH"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "there")}
    command = [sys.executable, "-c", PACKAGED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_is_no_package_is_refused(tmp_path):
    calls = [("window", patterns.window(2))]
    with pytest.raises(UnsupportedError, match="target cpu writes one module at a time"):
        package(calls, tmp_path / "a", grid=(4, 4), heads=1, head_dim=16, target="cpu")
    with pytest.raises(DeclarationError, match=r"'---': the folder's name becomes the package's"):
        package(calls, tmp_path / "---", grid=(4, 4), heads=1, head_dim=16)
