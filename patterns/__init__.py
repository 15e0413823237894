"""The library of patterns: one mechanism per file, each reads like its paper's equation."""

from __future__ import annotations

from attnc.patterns.axial import axial
from attnc.patterns.bands import band, causal, full
from attnc.patterns.channel import channel
from attnc.patterns.dilated import dilated, dilated_blocks
from attnc.patterns.grid import grid
from attnc.patterns.neighborhood import neighborhood
from attnc.patterns.per_head import per_head
from attnc.patterns.strip import cross, strip
from attnc.patterns.window import blocks, window

__all__ = [
    "axial",
    "band",
    "blocks",
    "causal",
    "channel",
    "cross",
    "dilated",
    "dilated_blocks",
    "full",
    "grid",
    "neighborhood",
    "per_head",
    "strip",
    "window",
]
