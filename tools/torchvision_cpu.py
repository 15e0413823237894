"""Let torchvision (and timm, which imports it) load next to a CPU build of PyTorch.

The usual torchvision wheel is linked against CUDA libraries. Beside a CPU-only torch its compiled operators
cannot load, and its import then stops at the two operators it registers shapes for without asking whether
they exist. Declaring those two by name is enough: models and transforms are plain Python. Nothing else is
touched, and beside a torch with CUDA or ROCm nothing is declared at all.

``python tools/torchvision_cpu.py`` installs this file into the running interpreter's site-packages, for
development environments only, when (and only when) torchvision cannot be imported without it. As an import
hook it costs nothing until torchvision is imported. attnc itself never depends on it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

MODULE = "_torchvision_cpu"
OPERATORS = ("nms", "qnms")
_KEEP: list[Any] = []  # torch drops an operator when the Library that declared it is collected


class DeclareOperators(MetaPathFinder):
    """Declares the missing operators just before torchvision is found, then steps aside for good."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEEP.append(library)
        return importlib.util.find_spec(name)


def _imports() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0


def install() -> None:
    """Copy this file and a one-line ``.pth`` into site-packages if torchvision does not import otherwise."""
    import sysconfig

    site = Path(sysconfig.get_path("purelib"))
    if importlib.util.find_spec("torchvision") is None or _imports():
        return
    (site / f"{MODULE}.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (site / f"{MODULE}.pth").write_text(f"import {MODULE}\n", encoding="utf-8")
    if not _imports():
        raise SystemExit("torchvision does not import beside this torch; its tests and timm's will not run")
    print("torchvision: two operators declared by name (its compiled ones need CUDA libraries)")


if __name__ == "__main__":
    install()
elif __name__ == MODULE:
    sys.meta_path.insert(0, DeclareOperators())
