"""The library of patterns: one mechanism per file, each reads like its paper's equation."""

from __future__ import annotations

from attnc.patterns.at_least import at_least
from attnc.patterns.axial import axial
from attnc.patterns.bands import band, causal, full
from attnc.patterns.channel import channel
from attnc.patterns.cosine import cosine, head_scale
from attnc.patterns.cross_scale import cross_scale
from attnc.patterns.decay import alibi, decay
from attnc.patterns.dilated import dilated, dilated_blocks
from attnc.patterns.gaussian import gaussian_mixture, learned_mask
from attnc.patterns.grid import grid
from attnc.patterns.inward import inward_window
from attnc.patterns.neighborhood import neighborhood
from attnc.patterns.outlook import outlook
from attnc.patterns.overlapping import overlapping_window
from attnc.patterns.per_head import per_head
from attnc.patterns.polyline import polyline
from attnc.patterns.positional import positional
from attnc.patterns.reversed import reversed_attention
from attnc.patterns.sliding import sliding_window, taps
from attnc.patterns.soft_cap import soft_cap
from attnc.patterns.strip import cross, strip
from attnc.patterns.window import blocks, window

__all__ = [
    "alibi",
    "at_least",
    "axial",
    "band",
    "blocks",
    "causal",
    "channel",
    "cosine",
    "cross",
    "cross_scale",
    "decay",
    "dilated",
    "dilated_blocks",
    "full",
    "gaussian_mixture",
    "grid",
    "head_scale",
    "inward_window",
    "learned_mask",
    "neighborhood",
    "outlook",
    "overlapping_window",
    "per_head",
    "polyline",
    "positional",
    "reversed_attention",
    "sliding_window",
    "soft_cap",
    "strip",
    "taps",
    "window",
]
