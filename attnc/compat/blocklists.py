"""The lists of blocks in torch's own BlockMask, and whether they say what its mask_mod says.

`create_block_mask` derives the lists from the mod, so they add nothing. `BlockMask.from_kv_blocks` takes any lists: then a pair is
allowed where its block is listed as full, or listed as partial and the mod allows it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc import ir
from attnc.analysis.evaluate import evaluate
from attnc.compat.statement import Lengths

PAIRS = 1 << 22  # evaluated at a time
_known: weakref.WeakKeyDictionary[Any, dict[Any, bool]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Lists:
    """Which blocks are listed, as integers 0 and 1 [B, H, query blocks, key blocks], and the tokens of a block."""

    full: Tensor
    partial: Tensor
    sizes: tuple[int, int]


def _dense(numbers: Tensor | None, indices: Tensor | None, like: tuple[Tensor, Tensor], columns: int) -> Tensor:
    """[..., rows, columns] from counts [..., rows] and column numbers [..., rows, any]."""
    if numbers is None or indices is None:
        return like[0].new_zeros((*like[0].shape, columns), dtype=torch.int32)
    listed = torch.arange(indices.shape[-1], device=indices.device) < numbers[..., None]
    out = numbers.new_zeros((*numbers.shape, columns + 1), dtype=torch.int32)
    at = torch.where(listed, indices, columns).long()
    return out.scatter_(-1, at, 1)[..., :columns].contiguous()


def lists_of(block_mask: Any) -> Lists:
    """The lists of torch's BlockMask as matrices of blocks."""
    kv, q = block_mask.kv_num_blocks, block_mask.kv_indices
    columns = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])
    partial = _dense(kv, q, (kv, q), columns)
    full = _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, (kv, q), columns)
    return Lists(full, partial, tuple(block_mask.BLOCK_SIZE))


def agree(
    block_mask: Any, lists: Lists, relation: ir.Expr, captured: dict[str, Tensor], derived: dict[str, Tensor], n: Lengths
) -> bool:
    """The lists leave exactly the pairs that the relation allows. Looked at once for each mask and size, a few rows at a time.

    derived: tables that follow from captured ones, made anew by each call.
    """
    seen = _known.setdefault(block_mask, {})
    key = relation, n, tuple((name, t.data_ptr(), t._version) for name, t in captured.items())
    if key not in seen:
        seen[key] = _agree(lists, relation, captured | derived, n)
    return seen[key]


def _agree(lists: Lists, relation: ir.Expr, tables: dict[str, Tensor], n: Lengths) -> bool:
    device = lists.full.device
    reads = {m.op for m in ir.walk(relation)}
    batch = max(lists.full.shape[0], n.batch if "batch" in reads else 1)
    heads = max(lists.full.shape[1], n.heads if "head" in reads else 1)
    k = torch.arange(n.keys, device=device)
    leaves: dict[ir.Expr, Any] = {
        ir.BATCH: torch.arange(batch, device=device).view(-1, 1, 1, 1),
        ir.HEAD: torch.arange(heads, device=device).view(-1, 1, 1),
        ir.coord("k", 0): k,
    }

    def load(name: str, indices: tuple[Any, ...]) -> Any:
        at = zip((torch.as_tensor(i, device=device) for i in indices), tables[name].shape, strict=True)
        return tables[name][tuple(torch.where(i < 0, i + m, i).clamp(0, m - 1) for i, m in at)]

    step = max(1, PAIRS // (n.keys * batch * heads))
    for first in range(0, n.queries, step):
        q = torch.arange(first, min(first + step, n.queries), device=device)
        leaves[ir.coord("q", 0)] = q[:, None]
        found = evaluate(relation, leaves, torch, load, lambda x: x.to(torch.float64))
        allowed = torch.as_tensor(found, device=device)
        full, partial = (x[:, :, q // lists.sizes[0]][..., k // lists.sizes[1]] > 0 for x in (lists.full, lists.partial))
        if not bool(((full | (partial & allowed)) == allowed).all()):
            return False
    return True
