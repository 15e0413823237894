"""Channel attention of DaViT (Ding et al. 2022), also XCiT-like transposed attention without its norms."""

from __future__ import annotations

from attnc.lang.mechanism import Mechanism, Rows, channel_attend, mechanism
from attnc.lang.recorded import recorded


@mechanism
def _channel(q: Rows, k: Rows, v: Rows) -> Rows:
    return channel_attend(q, k, v)


@recorded
def channel() -> Mechanism:
    """Heads are groups of channels: S[i, j] = scale * sum_n q[n, i] k[n, j]; A = softmax over j; out[n, i] = sum_j A[i, j]
    v[n, j].

    DaViT calls `op(k, v, q)`.
    """
    made = _channel()
    made.name = "channel()"
    return made
