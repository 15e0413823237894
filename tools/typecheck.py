"""Run ``mypy --strict`` over the three folders as the one package they are imported as.

mypy reads the file system, where ``patterns/`` is no subfolder of ``attnc/``. So it is shown a tree of links
that has the shape of the installed package, and its messages are translated back to the real paths.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "typecheck"
MAPPED = ("patterns", "models")


def link() -> None:
    """Bring the tree of links up to date: ``attnc/*`` and the mapped folders, and nothing else."""
    package = TREE / "attnc"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {child.name: child for child in (ROOT / "attnc").iterdir() if child.name != "__pycache__"}
    wanted.update({name: ROOT / name for name in MAPPED if (ROOT / name / "__init__.py").exists()})
    for old in package.iterdir():
        if old.name not in wanted or not old.exists():
            old.unlink()
    for name, target in wanted.items():
        if not (package / name).exists():
            (package / name).symlink_to(target, target_is_directory=target.is_dir())


def real_path(line: str) -> str:
    """``build/typecheck/attnc/patterns/a.py:1: ...`` as ``patterns/a.py:1: ...``."""
    prefix = re.escape(str(TREE.relative_to(ROOT))) + "/"
    line = re.sub(rf"^{prefix}attnc/({'|'.join(MAPPED)})/", r"\1/", line)
    return re.sub(rf"^{prefix}", "", line)


def main() -> int:
    link()
    command = [sys.executable, "-m", "mypy", "--strict", "-p", "attnc", *sys.argv[1:]]
    environment = {"MYPYPATH": str(TREE.relative_to(ROOT))}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=False)
    print("\n".join(real_path(line) for line in done.stdout.splitlines()))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
