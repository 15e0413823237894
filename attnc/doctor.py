"""What `attnc doctor` finds: versions, devices, the cache, and which backends work, each by trying it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from attnc.errors import AttncError

if TYPE_CHECKING:
    from attnc.compiler import Backend

PACKAGES = ("attnc", "torch", "triton", "sympy", "networkx", "numpy", "timm")
OPTIONAL = {"triton": "generates and compiles GPU kernels", "timm": "registers the models as timm's"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` says in one line what would change it (empty where nothing is wrong)."""

    what: str
    good: bool
    found: str
    fix: str = ""


def examine() -> Iterator[Finding]:
    """All findings, the cheap ones first; the last ones build and run a small operator for each backend."""
    yield Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from map(_package, PACKAGES)
    yield _gpu()
    yield _compiler()
    yield _cache()
    yield _winners()
    backends: tuple[Backend, ...] = ("eager", "torch", "cpp", "triton")
    yield from map(_backend, backends)


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        purpose = f" ({OPTIONAL[name]})" if name in OPTIONAL else ""
        return Finding(name, name in OPTIONAL, "not installed", f"pip install {name}{purpose}")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("gpu", True, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    built = torch.version.cuda or torch.version.hip
    why = "no driver answers" if built else "this torch is a CPU build"
    fix = "see that nvidia-smi or rocminfo finds it" if built else "install a CUDA or ROCm build of torch, where you have a GPU"
    return Finding("gpu", True, f"none ({why}); kernels still compile for named targets", fix)


def _compiler() -> Finding:
    name = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if name is None or shutil.which(name) is None:
        return Finding("c++ compiler", False, "none", "install g++ or clang++, or set CXX")
    done = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
    return Finding("c++ compiler", True, (done.stdout.splitlines() or [name])[0])


def _cache() -> Finding:
    from attnc.runtime import cache

    try:
        kinds = cache.info().values()
        size = sum(kind.bytes for kind in kinds) / 1e6
        return Finding("cache", True, f"{cache.root()}: {sum(kind.entries for kind in kinds)} entries, {size:.1f} MB")
    except AttncError as error:
        return Finding("cache", False, "unusable", first_line(error))


def _winners() -> Finding:
    from attnc.runtime import winners

    try:
        devices = Counter(k["device"]["name"] for k, _ in winners.every())
    except AttncError as error:
        return Finding("tuned", False, "unusable", first_line(error))
    if not devices:
        return Finding("tuned", True, "nothing; kernels run as the cost model says", "attnc tune SPEC --grid HxW measures")
    return Finding("tuned", True, ", ".join(f"{n} choices on {name}" for name, n in sorted(devices.items())))


def _backend(backend: Backend) -> Finding:
    """Run 2x2 windows on a 4x4 grid with this backend and hold the result to the meaning."""
    import torch

    import attnc
    import attnc.patterns

    name = f"backend {backend}"
    device = "cuda" if backend == "triton" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return Finding(name, True, "prints and compiles kernels; running them needs a GPU")
    q, k, v = torch.randn(3, 1, 2, 16, 8, device=device).unbind(0)
    window = attnc.patterns.window(2)
    try:
        out = attnc.compile(window, grid=(4, 4), backend=backend)(q, k, v)
    except AttncError as error:
        return Finding(name, False, "does not run", first_line(error))
    want = attnc.reference(window, grid=(4, 4))(q.double(), k.double(), v.double())
    assert isinstance(out, torch.Tensor)
    assert isinstance(want, torch.Tensor)  # no lse was asked for
    off = (out.double() - want).abs().max().item()
    if not off < 1e-4:
        return Finding(name, False, f"wrong by {off:.1e}", "attnc cache clear, then try again")
    return Finding(name, True, f"works (error {off:.0e})")


def first_line(error: BaseException) -> str:
    """An error's message on one line; a toolchain's output, say, follows in the rest."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
