"""Generated modules whose kernels count what they compute: each adds the score elements of every chunk to a counter of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable

from attnc.codegen.triton_kernels import Kernel
from attnc.schedule import walks
from attnc.schedule.geometry import Geometry

WEIGHTS = re.compile(r"^( +)(p = tl\.(?:exp2|sigmoid)\(.*)$", re.MULTILINE)


def counting(text: str) -> tuple[str, list[str]]:
    """The module's text with a counter as each kernel's first argument, COUNTED[name], and the names of the kernels that count."""
    blocks, names = text.split("\n\n\n"), []
    for i, block in enumerate(blocks):
        head = re.match(r"@triton\.jit\ndef (\w+)\(\n", block)
        if head and WEIGHTS.search(block):
            names.append(head[1])
            block = block.replace(f"def {head[1]}(\n", f"def {head[1]}(\n    Counter,\n", 1)
            blocks[i] = WEIGHTS.sub(r"\1\2\n\1tl.atomic_add(Counter, p.shape[0] * p.shape[1])", block)
    text = "\n\n\n".join(blocks)
    for name in names:
        text, calls = re.subn(rf"^( +)({name}\[\(.*\)\]\()$", rf'\1\2\n\1    COUNTED["{name}"],', text, flags=re.MULTILINE)
        assert calls == 1, f"{calls} launches of {name}"
    return text, names


def issued(kernels: Iterable[tuple[Geometry, Kernel]], heads: int, batch: int) -> dict[str, int]:
    """What the report says that each kernel computes, by its name."""
    return {k.name: heads * batch * walks.issued(g, k.side, k.tile_choice) for g, k in kernels}
