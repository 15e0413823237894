"""Text snapshots: `ATTNC_UPDATE_SNAPSHOTS=1 pytest` writes them, a plain run compares."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "snapshots"


def matches(name: str, text: str) -> None:
    """Assert that `text` is what tests/snapshots/<name> holds."""
    path = FOLDER / name
    if os.environ.get("ATTNC_UPDATE_SNAPSHOTS") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"no snapshot {path.name}; write it with ATTNC_UPDATE_SNAPSHOTS=1 and read it"
    assert text == path.read_text(encoding="utf-8"), f"{path.name} changed; ATTNC_UPDATE_SNAPSHOTS=1 writes it anew"
