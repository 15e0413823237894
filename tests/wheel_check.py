"""Build the wheel, install it into a fresh environment and use it there: ``python tests/wheel_check.py``.

What is checked is attnc as installed: the wheel holds every source file, and attnc, attnc.patterns and
attnc.models come from the fresh environment. Its dependencies (torch alone is most of a gigabyte) are
borrowed from the environment that runs this check, by a path entry after the fresh one's own packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"attnc": "attnc", "patterns": "attnc/patterns", "models": "attnc/models"}
DATA = {".typed", ".json", ".h", ".cpp"}

USE = """
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import attnc
import attnc.models
import attnc.patterns

fresh = Path(sys.argv[1])
for module in (attnc, attnc.patterns, attnc.models):
    assert Path(module.__file__).is_relative_to(fresh), f"{module.__name__} comes from {module.__file__}"
versions = attnc.__version__, version("attnc"), sys.argv[2]
assert len(set(versions)) == 1, f"attnc.__version__, the metadata and pyproject.toml differ: {versions}"
names = attnc.models.list_models()
assert names, "no models are registered"
print(f"  attnc {attnc.__version__}, {len(names)} models: {', '.join(names[:3])}, ...")

q, k, v = torch.randn(3, 1, 2, 16, 8).unbind(0)
out = attnc.compile(attnc.patterns.window(2), grid=(4, 4), backend="eager")(q, k, v)
blocks = [t.reshape(1, 2, 2, 2, 2, 2, 8).transpose(3, 4).reshape(1, 2, 4, 4, 8) for t in (q, k, v)]
want = torch.nn.functional.scaled_dot_product_attention(*blocks)
want = want.reshape(1, 2, 2, 2, 2, 2, 8).transpose(3, 4).reshape(1, 2, 16, 8)
torch.testing.assert_close(out, want)
print("  window(2) on a 4x4 grid equals attention inside each 2x2 block")
"""


def build(work: Path) -> Path:
    """The wheel, built from a copy: a stale build folder in the checkout must not leak into it."""
    source = work / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for file in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy2(ROOT / file, source / file)
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(work / "dist"), str(source)])
    (wheel,) = (work / "dist").glob("*.whl")
    return wheel


def check_contents(wheel: Path, source: Path) -> int:
    """Every module and data file of the three folders is in the wheel; returns how many there are."""
    wanted = set()
    for folder, target in FOLDERS.items():
        for path in (source / folder).rglob("*"):
            if path.suffix == ".py" or path.suffix in DATA or path.name == "py.typed":
                wanted.add(f"{target}/{path.relative_to(source / folder).as_posix()}")
    with zipfile.ZipFile(wheel) as archive:
        missing = sorted(wanted - set(archive.namelist()))
    if missing:
        raise SystemExit(f"wheel check: not in the wheel (no __init__.py?): {', '.join(missing)}")
    return len(wanted)


def install(wheel: Path, work: Path) -> tuple[Path, Path]:
    """A fresh environment with the wheel in it; returns its interpreter and its site-packages."""
    venv.create(work / "env", with_pip=False, symlinks=os.name == "posix")
    python = work / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)])
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    fresh = Path(run([str(python), "-I", "-c", ask]).strip())
    # Searched after the fresh environment; its own path files are not read, so no editable attnc comes along.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (fresh / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n", encoding="utf-8")
    return python, fresh


def run(command: list[str], **environment: str) -> str:
    # Outside the checkout, where the folder attnc/ would be found first.
    done = subprocess.run(
        command,
        cwd=tempfile.gettempdir(),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"wheel check: {' '.join(command[:3])} ... failed\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    start = time.perf_counter()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        print("wheel check: building")
        wheel = build(work)
        print(f"wheel check: {wheel.name} holds all {check_contents(wheel, work / 'source')} files; installing")
        python, fresh = install(wheel, work)
        print("wheel check: using it")
        cache = {"ATTNC_CACHE_DIR": str(work / "cache")}
        print(run([str(python), "-I", "-c", USE, str(fresh), version], **cache), end="")
        command = python.with_name("attnc.exe" if os.name == "nt" else "attnc")
        print(f"  attnc list: {len(run([str(command), 'list'], **cache).splitlines())} lines")
    print(f"wheel check: passed in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
