"""What `attnc.compat.flex` refuses: mods that cannot be traced, calls that do not fit. Its signatures are torch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as theirs
from test_compat_flex import BIAS, SLOPES, Mod, N, causal, rows
from torch import Tensor

import attnc
from attnc.compat import flex


def branching(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Any:
    return q_idx > kv_idx if h > 1 else q_idx == kv_idx


WRONG: list[tuple[Mod | None, Mod | None, type[attnc.AttncError], str]] = [
    (
        None,
        branching,
        attnc.DeclarationError,
        r"branching \(test_compat_flex_refusals.py:\d+\) uses the value of `1 < HEAD`: `if`",
    ),
    (None, lambda b, h, q, k: [True, False][h], attnc.DeclarationError, "uses the value of `HEAD`: int"),
    (None, lambda b, h, q, k: q.item() > 3, attnc.DeclarationError, "uses the value of `q.x`"),
    (None, lambda b, h, q, k: q - k, attnc.DeclarationError, r"returns `q.x - k.x`, a number: a mask is a condition"),
    (lambda s, b, h, q, k: q > k, None, attnc.DeclarationError, "returns the condition `k.x < q.x`"),
    (lambda s, b, h, q, k: s + torch.sin(q), None, attnc.UnsupportedError, r"calls `torch.sin`.*index the result"),
    (lambda s, b, h, q, k: s.erf(), None, attnc.UnsupportedError, "calls `Tensor.erf`"),
    (lambda s, b, h, q, k: s + SLOPES, None, attnc.DeclarationError, "more than one element with `Tensor.add`"),
    (lambda s, b, h, q, k: s + BIAS[h], None, attnc.DeclarationError, "rows of a captured tensor to `Tensor.add`: index all"),
    (lambda s, b, h, q, k: BIAS[h, 0, 0, 0], None, attnc.DeclarationError, r"of shape \(4, 15, 15\) with 4 indices"),
    (
        lambda s, b, h, q, k: s + SLOPES[s],
        None,
        attnc.DeclarationError,
        "with `SCORE`, which is no integer",
    ),
    (lambda s, b, h, q, k: s + SLOPES[h:], None, attnc.UnsupportedError, "a slice of symbols"),
    (lambda s, b, h, q, k: s[0], None, attnc.DeclarationError, "indexes `SCORE`, which is a scalar"),
    (lambda s, b, h, q, k: torch.where(s > 0, s, -math.inf), None, attnc.UnsupportedError, "infinite where the score decides"),
    (lambda s, b, h, q, k: s + math.nan, None, attnc.DeclarationError, "computes with nan"),
    (lambda s, b, h, q, k: s.round(decimals=1), None, attnc.UnsupportedError, "rounds `SCORE` to 1 decimals"),
    (lambda s, b, h, q, k: s // 0.0, None, attnc.DeclarationError, "divides `SCORE` by zero"),
    (lambda s, b, h, q, k: s + SLOPES[s.long() % 4], None, attnc.UnsupportedError, "which the score decides"),
    (lambda s, b, h, q, k: s.detach(), None, attnc.UnsupportedError, "stops the gradient of `SCORE`"),
    (lambda s, b, h, q, k: s**b, None, attnc.UnsupportedError, "to the power `BATCH`"),
    (lambda s, b, h, q, k: q % 0, None, attnc.DeclarationError, "divides `q.x` by zero"),
    (None, lambda b, h, q, k: q ^ k > 2, attnc.UnsupportedError, "the exclusive or of integers"),
    (None, lambda b, h, q, k: (q, k), attnc.DeclarationError, "tuple"),
    (lambda s, b, h, q, k: s + SLOPES[q], None, attnc.ShapeError, r"has shape \(4,\), but `q.x`.*comes to 47"),
]


@pytest.mark.parametrize(("score_mod", "mask_mod", "error", "message"), WRONG, ids=[w[3][:30] for w in WRONG])
def test_what_cannot_be_traced_is_refused(
    score_mod: Mod | None, mask_mod: Mod | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        flex.flex_attention(*rows(), score_mod, mask_mod, backend="torch")


def test_calls_that_do_not_fit_are_refused() -> None:
    q, k, v = rows()
    short, most = flex.create_block_mask(causal, None, None, 32, 32), theirs.AuxRequest(max_scores=True)
    for error, message, call in [
        (attnc.ShapeError, "enable_gqa=True", lambda: flex.flex_attention(q, k[:, :2], v[:, :2])),
        (attnc.ShapeError, r"query is \(4, 48, 6\)", lambda: flex.flex_attention(q[0], k, v)),
        (attnc.ShapeError, "for 32 queries and 32 keys", lambda: flex.flex_attention(q, k, v, block_mask=short)),
        (
            attnc.ShapeError,
            "for 3 heads, the call has 4",
            lambda: flex.flex_attention(q, k, v, block_mask=flex.create_block_mask(causal, 1, 3, N, N)),
        ),
        (attnc.DeclarationError, "join them", lambda: flex.flex_attention(q, k, v, block_mask=short, mask_mod=causal)),
        (attnc.UnsupportedError, "max_scores", lambda: flex.flex_attention(q, k, v, return_aux=most)),
        (
            attnc.DeclarationError,
            "both given",
            lambda: flex.flex_attention(q, k, v, return_lse=True, return_aux=theirs.AuxRequest()),
        ),
        (attnc.DeclarationError, "is no function", lambda: flex.flex_attention(q, k, v, score_mod=3)),
        (attnc.DeclarationError, "no function of", lambda: flex.create_block_mask(3, 1, 1, N, N)),  # type: ignore[arg-type]
        (attnc.DeclarationError, "or_masks", lambda: flex.or_masks()),
        (
            attnc.DeclarationError,
            "sliced",
            lambda: flex.flex_attention(
                q[:, :, :16],
                k,
                v,
                block_mask=theirs.create_block_mask(causal, None, None, N, N, device="cpu", BLOCK_SIZE=16)[:, :, :1],
            ),
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(AttributeError, match="no lists of blocks"):
        _ = short.kv_indices


def test_signatures_are_torchs() -> None:
    import inspect

    for name in ("flex_attention", "create_block_mask", "noop_mask"):
        mine, other = (list(inspect.signature(getattr(m, name)).parameters.values()) for m in (flex, theirs))
        plain = [p.name for p in other if p.kind is not p.KEYWORD_ONLY]
        assert [p.name for p in mine if p.kind is not p.KEYWORD_ONLY][: len(plain)] == plain
        defaults = {p.name: p.default for p in mine}
        assert all(defaults[p.name] == p.default for p in other if p.name in defaults)
