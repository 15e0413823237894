"""What `attnc.explain` says of lists of blocks: how many tiles visit, how many of them in full, what the lists weigh."""

from __future__ import annotations

import math

from attnc import ir
from attnc.report import boxes
from attnc.report.subject import Part, Subject
from attnc.runtime.triton_lists import obstacle
from attnc.schedule.list_choice import Limits, Listed, listed, mentions

YARDSTICK = Limits(boxes.TOKENS, boxes.TOKENS)  # of about 64 queries and 64 keys, whatever a backend's are


def found(p: Part) -> Listed | None:
    """A part's lists at the yardstick's tiles, for one batch item; None where boxes are walked instead."""
    assert p.geometry is not None
    return listed(p.geometry, YARDSTICK, boxes.tile_sides(p.geometry), p.heads, 1)


def lines(s: Subject, allowed: int | None) -> list[str]:
    """For people; none where every part is intervals alone. allowed: score elements of all parts, where they are known."""
    out = []
    for n, p in enumerate(s.parts):
        if p.structure.residual == ir.TRUE or p.geometry is None:
            continue
        who = f"part {n + 1}: " if len(s.parts) > 1 else ""
        if mentions(p.geometry, "load"):
            out.append(
                f"  lists       {who}made of blocks when it runs, where the values of its tables are in CPU memory and skip enough"
            )
            continue
        x = found(p)
        if x is None:
            out.append(f"  lists       {who}none, they would save too little of the boxes' work")
            continue
        q, k = ("x".join(map(str, sides)) for sides in (x.query_sides, x.key_sides))
        full, share = int(x.lists.full.sum()), 100 * x.lists.visited / max(x.lists.boxed, 1)
        total = len(x.lists.full) * x.lists.columns
        out.append(
            f"  lists       {who}tiles of {q} queries visit {x.lists.visited:,} blocks of {k} keys, {full:,} of them in full;"
        )
        out.append(
            f"  {'':11} {share:.1f} % of the boxes' {x.lists.boxed:,}, of {total:,} in all; {x.lists.bytes:,} bytes of lists"
        )
        if allowed and len(s.parts) == 1:
            g = p.geometry
            own = allowed - s.heads * (g.q_prefix * g.n_keys + math.prod(g.q_grid) * g.k_prefix)
            out.append(
                f"  {'':11} {s.heads * x.elements():,} score elements in them, {s.heads * x.elements() / own:.2f} for each allowed"
            )
        why = obstacle(p.geometry)
        if why is None:
            said = "operators walk them, in tiles of their backend's own, and modules for the CPU; Triton modules walk boxes"
        else:
            said = f"walked on cpp and torch, in tiles of their own; Triton kernels walk boxes, because of {why}"
        out.append(f"  {'':11} {said}")
    return out
