"""Statements that tests of the C++ backend run: relations and scores of every form that it tells apart."""

from __future__ import annotations

from attnc.lang import functions as fn
from attnc.lang.functions import BATCH, HEAD, SCORE, where
from attnc.lang.pattern import pattern
from attnc.lang.symbols import Table


@pattern
def window(q, k, *, s, t=0):
    r = True
    for a, b in zip(q, k, strict=True):
        same = (a - t) // s == (b - t) // s
        r = same if r is True else r & same
    return r


@pattern
def biased(q, k, *, s, t=0, bias: Table):
    (qy, qx), (ky, kx) = q, k
    same = ((qy - t) // s == (ky - t) // s) & ((qx - t) // s == (kx - t) // s)
    b = bias[HEAD, (qy - t) % s - (ky - t) % s + s - 1, (qx - t) % s - (kx - t) % s + s - 1]
    return where(same, SCORE + b)


@pattern
def neighborhood(q, k, *, s, d=1):
    r = None
    for a, b, n in zip(q, k, q.size, strict=True):
        g = (n - a % d + d - 1) // d
        low = fn.maximum(fn.minimum(a // d - s // 2, g - s), 0)
        c = (a % d == b % d) & (b // d >= low) & (b // d <= low + s - 1)
        r = c if r is None else r & c
    return r


@pattern
def near_bias(q, k, *, s, bias: Table):
    r = None
    for a, b, n in zip(q, k, q.size, strict=True):
        low = fn.maximum(fn.minimum(a - s // 2, n - s), 0)
        c = (b >= low) & (b <= low + s - 1)
        r = c if r is None else r & c
    return where(r, SCORE + bias[HEAD, q.y - k.y + s - 1, q.x - k.x + s - 1])


@pattern
def axial(q, k):
    return q.y == k.y


@pattern
def causal(q, k):
    return q.index >= k.index


@pattern
def causal_axes(q, k):
    return (q.y >= k.y) & (q.x >= k.x)


@pattern
def full(q, k):
    return q.x >= 0


@pattern
def grid(q, k):
    return (q.y % ((q.size.y + 2) // 3) == k.y % ((q.size.y + 2) // 3)) & ((q.x - k.x) % 4 == 0)


@pattern
def odd(q, k):
    near = (q.y - k.y) * (q.y - k.y) + (q.x - k.x) * (q.x - k.x) <= 9
    return (k.y == q.size.y - 1 - q.y) & (k.x <= q.x) & (k.x >= q.x - 5) & near


@pattern
def far(q, k):
    return (k.x > q.x // 3 * 2) & (k.x <= q.x // 3 * 2 + 301)


@pattern
def none_left(q, k):
    return (k.x > q.x + 1) & (k.y == q.y)


@pattern
def documents(q, k, *, ids: Table):
    return (ids[BATCH, q.index] == ids[BATCH, k.index]) & (q.index >= k.index)


@pattern
def soft_cap(q, k, *, temperature: Table):
    return where(abs(q.x - k.x) <= 4, 5.0 * fn.tanh(SCORE * temperature[HEAD] / 5.0))


@pattern
def located(q, k, *, slope: Table):
    distance = abs(q.y - k.y) + abs(q.x - k.x)
    return where(q.y >= k.y - 3, SCORE - slope[HEAD] * distance + 0.1 * (q.x % 3) - fn.exp(-0.2 * k.y))


@pattern
def no_product(q, k, *, bias: Table):
    return where(q.x // 4 == k.x // 4, bias[HEAD, q.x % 4, k.x % 4])


@pattern
def absolute(q, k, *, bias: Table):
    return where(q.x >= 0, SCORE + bias[HEAD, q.index, k.index])


@pattern
def mixed_index(q, k, *, bias: Table):
    return where(abs(q.x - k.x) <= 6, SCORE * bias[abs(q.x - k.x), HEAD])


@pattern
def decaying(q, k, *, bias: Table):
    return where(k.x <= q.x, SCORE + bias[HEAD, q.x - k.x])


@pattern
def factored(q, k, *, gate: Table):
    return where(q.x // 5 == k.x // 5, SCORE, post=gate[HEAD, q.x % 5, k.x % 5] * 0.5 + 1.0)


@pattern
def factored_by_place(q, k, *, gate: Table):
    return where(q.x // 5 == k.x // 5, SCORE, post=gate[HEAD, q.x - k.x + 4] * 0.5 + 1.0)


@pattern
def overlapping(q, k, *, s):
    return (k.y // s >= q.y // s - 1) & (k.y // s <= q.y // s + 1) & (k.x // s == q.x // s)


@pattern
def pooled(q, k, *, r):
    return (k.y == q.y // r) & (abs(k.x - q.x // r) <= 1)


@pattern
def over_queries(q, k):
    return where(q.x >= 0, SCORE, normalizer=fn.softmax(over="queries"))
