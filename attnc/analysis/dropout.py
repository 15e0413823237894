"""Dropout on weights: which pair is kept, as an expression of logical indices alone.

A weight is multiplied by 1 / (1 - p) or by 0. What decides is a word of 31 bits for each pair, a function of the seed, the batch
item, the query head and the numbers of the query and of the key: of nothing that a tile, a backend or a direction chooses. Tokens
are numbered from 0: the prefix tokens, then the grid row by row (the extended grid, where virtual rows pad it).

Each query has two words of Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), with the seed as
its key and (query, batch item, head, 0) as its counter. A pair's word mixes them with the number of its key by three rounds of
multiplying and folding (the constants are those of Wellons's 32-bit mixer "triple32"). A whole Philox for each pair would cost ten
times as much as the mixing, about what the rest of a pair's forward costs.

A call brings what is known at run time as a table of three integers: the seed's low and high half, and the last of the 2**31 words
that keep a pair. No kernel is built anew for another seed or another p.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attnc import ir

TABLE = "seed"  # no pattern's table can be called so
WORDS = 1 << 31
_MASK = 0xFFFFFFFF
_PHILOX, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_MIX = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))


def last_kept_word(p: float) -> int:
    """Words from 0 to this one, of the 2**31, keep a pair: all of them at p = 0 alone, one at least."""
    return min(max(round((1.0 - p) * 2**31), 1), 2**31 - (1 if p > 0 else 0)) - 1


def factor(q_prefix: int, k_prefix: int) -> ir.Expr:
    """What dropout multiplies a weight by. A prefix token's `index` is its number less the number of prefix tokens: negative."""
    low, high, last = (ir.load(TABLE, (ir.const(i),), "int") for i in range(3))
    query, key = ir.make("add", ir.index("q"), ir.const(q_prefix)), ir.make("add", ir.index("k"), ir.const(k_prefix))
    words = (ir.make("philox", ir.const(w), low, high, ir.BATCH, ir.HEAD, query) for w in range(2))
    keep, kept = ir.make("le", ir.make("mix", *words, key), last), ir.make("add", last, ir.const(1.0))
    return ir.make("where", keep, ir.make("truediv", ir.const(float(WORDS)), kept), ir.const(0.0))


def with_dropout(p: ir.Program) -> ir.Program:
    """The program whose weights are dropped out."""
    assert isinstance(p.attend, ir.Attend)
    return replace(p, attend=replace(p.attend, dropout=factor(p.queries.prefix, p.keys.prefix)))


# ------------------------------------------------------------------------- the two functions on integers, or arrays of 64-bit ones
def _low(x: Any, c: int) -> Any:
    """x * c modulo 2**32; no intermediate has more than 49 bits."""
    return (x * (c & 0xFFFF) + ((x * (c >> 16) & 0xFFFF) << 16)) & _MASK


def _high(x: Any, c: int) -> Any:
    """x * c // 2**32."""
    return ((x >> 16) * c + ((x & 0xFFFF) * c >> 16)) >> 16


def philox(word: int, low: Any, high: Any, batch: Any, head: Any, token: Any) -> Any:
    """Word 0 .. 3 of Philox-4x32-10 at the counter (token, batch, head, 0), from 0 to 2**32 - 1."""
    keys = [low & _MASK, high & _MASK]
    a, b, c, d = (x & _MASK for x in (token, batch, head, 0 * head))
    for _ in range(10):
        a, b, c, d = (
            _high(c, _PHILOX[1]) ^ b ^ keys[0],
            _low(c, _PHILOX[1]),
            _high(a, _PHILOX[0]) ^ d ^ keys[1],
            _low(a, _PHILOX[0]),
        )
        keys = [(k + step) & _MASK for k, step in zip(keys, _STEPS, strict=True)]
    return (a, b, c, d)[word]


def mix(first: Any, second: Any, token: Any) -> Any:
    """31 bits of two words and a token's number."""
    x = ((token & _MASK) + (first & _MASK)) & _MASK
    for i, (shift, by) in enumerate(_MIX):
        x = x ^ (x >> shift)
        if i == 1:
            x = x ^ (second & _MASK)
        x = _low(x, by)
    return (x ^ (x >> 14)) >> 1
