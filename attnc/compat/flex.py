"""FlexAttention's own calls (`torch.nn.attention.flex_attention`) on attnc: mods are taken as they are, and traced.

    from attnc.compat.flex import create_block_mask, flex_attention

What differs: the mask is read from its mod, so nothing of size N x N is built and `create_block_mask` costs nothing; every captured
tensor of floats gets a gradient, on CPUs too; head dimensions go from 1 to 256. A mod that cannot be traced is refused with an
error that names what it asked for.

Mods may compare and round floats (`gate[h, q_idx] > 0.5`, T5's `torch.log(distance.float()).long()`); no gradient goes through it.
What depends on few integers torch itself computes, in the mod's own dtype, once for each of their values (see compat.listed): who
attends to whom is then the same on every backend. Floats of the query against floats of the key are compared pair by pair, in
float32, or in float64 where q, k and v are: pairs within its rounding of the threshold may fall on either side. Rounded numbers
stop at 2 ** 30 on either side, and a table's index that comes from floats is kept inside of the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc import ir
from attnc.compat import blocklists
from attnc.compat.listed import listed
from attnc.compat.statement import Lengths, check_finite, excluded, operator, with_blocks
from attnc.compat.tracing import Symbol, Tracer
from attnc.errors import DeclarationError, ShapeError, UnsupportedError
from attnc.lang.pattern import Pattern

Mod = Callable[..., Any]

__all__ = ["BlockMask", "Mods", "and_masks", "create_block_mask", "flex_attention", "noop_mask", "or_masks", "trace"]


# ------------------------------------------------------------------------------------------------------------------------- masks
@dataclass(frozen=True, eq=False)
class BlockMask:
    """What `create_block_mask` gives here: the mod and the sizes it is for. Kernels find their blocks from the mod itself."""

    mask_mod: Mod
    shape: tuple[int, int, int, int]

    @property
    def seq_lengths(self) -> tuple[int, int]:
        """Numbers of queries and of keys."""
        return self.shape[2:]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"attnc's BlockMask has no {name!r}: it holds mask_mod and sizes, and no lists of blocks; to look at a mask use "
            "attnc.explain or attnc.draw on trace(mask_mod=...).pattern"
        )


def create_block_mask(
    mask_mod: Mod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> BlockMask:
    """FlexAttention's signature. Costs nothing: device, BLOCK_SIZE and what follows them tune kernels that are not used here."""
    if not callable(mask_mod):
        raise DeclarationError(f"create_block_mask: mask_mod={mask_mod!r} is no function of (batch, head, q_idx, kv_idx)")
    return BlockMask(mask_mod, (B or 1, H or 1, Q_LEN, KV_LEN))


def noop_mask(batch: Tensor, head: Tensor, token_q: Tensor, token_kv: Tensor) -> Tensor:
    """Every pair is allowed."""
    return batch.new_ones(size=(), dtype=torch.bool, device=batch.device)


def or_masks(*mask_mods: Mod) -> Mod:
    """The union of mask mods."""
    return _joined(mask_mods, "or_masks", lambda a, b: a | b)


def and_masks(*mask_mods: Mod) -> Mod:
    """The intersection of mask mods."""
    return _joined(mask_mods, "and_masks", lambda a, b: a & b)


def _joined(mods: tuple[Mod, ...], name: str, join: Callable[[Any, Any], Any]) -> Mod:
    if not mods or not all(callable(m) for m in mods):
        raise DeclarationError(f"{name}{mods!r}: one function of (batch, head, q_idx, kv_idx) or more")

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result: Tensor = functools.reduce(join, (m(b, h, q_idx, kv_idx) for m in mods))
        return result

    mask.__name__ = f"{name}({', '.join(_name(m) for m in mods)})"
    return mask


# ----------------------------------------------------------------------------------------------------------------------- tracing
@dataclass(frozen=True, eq=False)
class Mods:
    """Traced mods: a pattern on a 1-D grid, or on the grid that its `//` and `%` speak of, and the tables it reads.

    `attnc.compile(mods.pattern, grid=mods.grid, kv_grid=mods.kv_grid)(q, k, v, **mods.tables)` is what `flex_attention` runs. Lists
    of what the mods round or compare are of the values that captured tensors have now: trace again where these change.
    """

    pattern: Pattern
    grid: tuple[int, ...]
    kv_grid: tuple[int, ...] | None
    tables: dict[str, Tensor]


def trace(
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    *,
    Q_LEN: int,
    KV_LEN: int | None = None,
    B: int = 1,
    H: int = 1,
    device: Any = "cpu",
) -> Mods:
    """Trace mods once, for `attnc.explain`, `attnc.draw`, `attnc.emit`, or to call the operator without tracing again."""
    n = Lengths(Q_LEN, Q_LEN if KV_LEN is None else KV_LEN, H, H, B)
    statement = _statement(score_mod, mask_mod, torch.device(device), n)
    op, tables = _operator(statement, n, "auto", None)
    assert isinstance(op.source, Pattern)
    grid = tuple(int(x or 0) for x in op.grid or ())
    kv_grid = None if op.kv_grid is None else tuple(int(x or 0) for x in op.kv_grid)
    return Mods(op.source, grid, kv_grid, tables)


@dataclass
class _Traced:
    name: str
    relation: ir.Expr
    score: ir.Expr
    captured: dict[str, Tensor]
    lists: dict[str, Tensor]
    wide: ir.Expr | None  # what kernels compare, and torch in float64

    @property
    def tables(self) -> dict[str, Tensor]:
        """All that it may read."""
        return self.captured | self.lists


def _name(mod: Any) -> str:
    while isinstance(mod, functools.partial):
        mod = mod.func
    return str(getattr(mod, "__name__", type(mod).__name__))


def _statement(score_mod: Mod | None, mask_mod: Mod | None, device: torch.device, n: Lengths) -> _Traced:
    """Both mods as expressions of the flat indices, and the tensors they read: captured ones, and lists of what they round."""
    tracer = Tracer(device)
    at = [Symbol.of(e, torch.int64) for e in (ir.BATCH, ir.HEAD, ir.coord("q", 0), ir.coord("k", 0))]
    relation, score = ir.TRUE, ir.SCORE
    names = [_name(m) for m in (score_mod, mask_mod) if m is not None]
    name = f"flex({', '.join(names)})"
    if mask_mod is not None:
        what = f"mask_mod {_name(mask_mod)}"
        relation = tracer.number(tracer.run(_callable(mask_mod, what), what, *at))
        if relation.kind != "bool":
            raise DeclarationError(f"{what} returns `{ir.show(relation)}`, a number: a mask is a condition")
    if score_mod is not None:
        what = f"score_mod {_name(score_mod)}"
        symbols = Symbol.of(ir.SCORE, torch.float32), *at
        score = tracer.number(tracer.run(_callable(score_mod, what), what, *symbols))
        if score.kind == "bool":
            raise DeclarationError(f"{what} returns the condition `{ir.show(score)}`: a score is a number; give a mask as mask_mod")
        keep, score = excluded(score)
        check_finite(what, score)
        relation = ir.make("and", relation, keep)
    relation, score, lists = listed(relation, score, n, tracer.dtypes, tracer.tables, device)
    wide = next((e for e in ir.walk(relation) if tracer.dtypes.get(e) == torch.float64), None)
    return _Traced(name, relation, score, tracer.tables, lists, wide)


def _callable(mod: Any, what: str) -> Mod:
    if not callable(mod):
        raise DeclarationError(f"flex_attention: {what} = {mod!r} is no function")
    return mod  # type: ignore[no-any-return]


def _operator(t: _Traced, n: Lengths, backend: str, fallback: str | None) -> tuple[Any, dict[str, Tensor]]:
    """The operator, and the tables cut to the heads and batch items there are."""
    reads = {m.args[0] for s in (t.relation, t.score) for m in ir.walk(s) if m.op == "load"}
    tables = {name: x for name, x in t.tables.items() if name in reads}
    counts = {ir.HEAD: n.heads, ir.BATCH: n.batch}
    for e in {m for s in (t.relation, t.score) for m in ir.walk(s) if m.op == "load"}:
        for d, index in enumerate(e.children):
            at, many = tables[e.args[0]], counts.get(index)
            if many is not None and at.shape[d] > many and _always(t, e.args[0], d, index):
                tables[e.args[0]] = at.narrow(d, 0, many)
    shapes = tuple((name, tuple(x.shape)) for name, x in tables.items())
    return operator(t.name, t.relation, t.score, n, shapes, backend, fallback), tables


def _always(t: _Traced, table: str, d: int, index: ir.Expr) -> bool:
    reads = [m for s in (t.relation, t.score) for m in ir.walk(s) if m.op == "load" and m.args[0] == table]
    return all(m.children[d] == index for m in reads)


# ------------------------------------------------------------------------------------------------------------------------- calls
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Mod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
    mask_mod: Mod | None = None,
    backend: str = "auto",
    fallback: Any = None,
) -> Any:
    """FlexAttention's signature and meaning, forward and backward on every backend.

    Args:
        query, key, value: [B, Hq, L, E], [B, Hkv, S, E], [B, Hkv, S, Ev]; any strides, any E and Ev from 1 to 256.
        score_mod: score_mod(score, batch, head, q_idx, kv_idx), unchanged.
        block_mask: a BlockMask (this module's, or torch's own), or the mask_mod itself.
        scale, enable_gqa, return_lse, return_aux: as there; `return_aux` gives `lse` only.
        kernel_options: accepted and not used: they tune kernels that are not these.
        mask_mod: the mask as a mod, where there is no block_mask.
        backend, fallback: as for `attnc.compile`.

    Raises:
        DeclarationError: a mod branches on its arguments, or returns no score or no condition.
        UnsupportedError: a mod asks for something that the language lacks.
        ShapeError: tensors, heads, batch or lengths do not fit each other or the mask.
    """
    call = _eagerly() if torch.compiler.is_dynamo_compiling() else _attend
    return call(
        query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse, return_aux, mask_mod, backend, fallback
    )  # fmt: skip


_outside: list[Any] = []


def _eagerly() -> Any:
    """`_attend` outside of torch.compile's graph: mods are traced here, not by Dynamo."""
    if not _outside:
        why = (
            "attnc.compat.flex.flex_attention traces its mods itself: call attnc.compat.flex.trace once, outside, and use "
            "attnc.compile(mods.pattern, grid=mods.grid)(q, k, v, **mods.tables) in the compiled function"
        )
        _outside.append(torch.compiler.disable(_attend, reason=why))  # type: ignore[no-untyped-call]
    return _outside[0]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Mod | None,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    return_aux: Any,
    mask_mod: Mod | None,
    backend: str,
    fallback: Any,
) -> Any:
    for what, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(f"flex_attention: {what} is {given}, expected a tensor [batch, heads, tokens, channels]")
    if return_lse and return_aux is not None:
        raise DeclarationError(
            "flex_attention: return_lse and return_aux are both given: return_aux=AuxRequest(lse=True) says it all"
        )
    if return_aux is not None and getattr(return_aux, "max_scores", False):
        raise UnsupportedError("flex_attention: AuxRequest(max_scores=True): no backend keeps the largest score; ask for lse")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ShapeError(
            f"flex_attention: {query.shape[1]} query heads and {key.shape[1]} key heads: enable_gqa=True shares keys among heads"
        )
    if block_mask is not None and mask_mod is not None:
        raise DeclarationError("flex_attention: block_mask and mask_mod are both given; join them with and_masks")
    if callable(block_mask):
        block_mask, mask_mod = None, block_mask
    if block_mask is not None:
        mask_mod = block_mask.mask_mod
        if getattr(mask_mod, "__name__", "") == "_sliced_mask_mod_error":
            raise DeclarationError(
                "flex_attention: this BlockMask was sliced, which forgets its mask_mod: give the mod of the whole mask again"
            )
        _check_mask(block_mask.shape, query, key)
        if query.shape[0] > 1 and key.shape[0] == value.shape[0] == 1:
            key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
    n = Lengths(query.shape[2], key.shape[2], query.shape[1], key.shape[1], query.shape[0])
    t = _statement(score_mod, mask_mod, query.device, n)
    if t.wide is not None and query.dtype != torch.float64:
        raise UnsupportedError(
            f"{t.name}: the mask decides `{ir.show(t.wide)}` in float64, pair by pair, and kernels for {query.dtype} compute in "
            "float32: capture float32 tensors (take off first what large numbers share), or give query, key and value in float64"
        )
    if block_mask is not None and not isinstance(block_mask, BlockMask):
        _join_lists(t, block_mask, n)
    op, tables = _operator(t, n, backend, fallback)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        if not return_aux.lse:
            return op(query, key, value, scale=scale, **tables), AuxOutput()
        out, lse = op(query, key, value, scale=scale, return_lse=True, **tables)
        return out, AuxOutput(lse=lse)
    return op(query, key, value, scale=scale, return_lse=return_lse, **tables)


def _check_mask(shape: Iterable[int], query: Tensor, key: Tensor) -> None:
    b, h, q_len, kv_len = shape
    if (q_len, kv_len) != (query.shape[2], key.shape[2]):
        raise ShapeError(
            f"flex_attention: the block_mask is for {q_len} queries and {kv_len} keys, the call has {query.shape[2]} and "
            f"{key.shape[2]}: create it for these lengths"
        )
    for what, mine, theirs in (("batch items", b, query.shape[0]), ("heads", h, query.shape[1])):
        if mine not in (1, theirs):
            raise ShapeError(
                f"flex_attention: the block_mask is for {mine} {what}, the call has {theirs}: make it for 1 or {theirs}"
            )


def _join_lists(t: _Traced, block_mask: Any, n: Lengths) -> None:
    """torch's BlockMask: its lists count where they say something else than its mod (BlockMask.from_kv_blocks)."""
    lists = blocklists.lists_of(block_mask)
    if blocklists.agree(block_mask, lists, t.relation, t.captured, t.lists, n):
        return
    rows = ir.make("floordiv", ir.coord("q", 0), ir.const(lists.sizes[0]))
    columns = ir.make("floordiv", ir.coord("k", 0), ir.const(lists.sizes[1]))
    at = (ir.BATCH, ir.HEAD, rows, columns)
    loads = [ir.load(name, at, "int") for name in ("full_blocks", "partial_blocks")]
    t.lists |= {"full_blocks": lists.full, "partial_blocks": lists.partial}
    t.relation = with_blocks(t.relation, *loads)
