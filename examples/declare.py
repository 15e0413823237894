"""The language in one screen: a pattern of your own, a table with a gradient, algebra, a packed layout, torch.compile."""

from __future__ import annotations

from typing import Any

import torch

import attnc
from attnc.patterns import axial, neighborhood, per_head, window


@attnc.pattern
def near(q: Any, k: Any, *, reach: int, bias: attnc.Table) -> Any:
    """Who attends to whom, and how the score of q and k becomes a logit. The function runs once, on symbols."""
    close = (abs(q.y - k.y) <= reach) & (abs(q.x - k.x) <= reach)
    return attnc.where(close, attnc.SCORE + bias[attnc.HEAD, q.y - k.y + reach, q.x - k.x + reach])


def main() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 14 * 14, 32)  # [batch, heads, tokens, channels], as scaled_dot_product_attention takes them
    bias = torch.zeros(4, 7, 7, requires_grad=True)

    op = attnc.compile(near(reach=3), grid=(14, 14))
    out = op(q, k, v, bias=bias)
    out.square().sum().backward()
    print("a pattern of your own    ", tuple(out.shape), "| gradient of its table", tuple(bias.grad.shape))

    meaning = attnc.reference(near(reach=3), grid=(14, 14))(q.double(), k.double(), v.double(), bias=bias.detach().double())
    print("against its meaning      ", f"largest difference {float((out.detach() - meaning).abs().max()):.1e}")

    either = window(7) | axial("x")  # a union: each key counts once, whatever the overlap
    both = neighborhood(5) & ~window(7)  # neighbours across a window border
    print("algebra                  ", tuple(attnc.compile(either, grid=(14, 14))(q, k, v).shape), "and", both)

    mixed = per_head([window(7), window(7, shift=3)])  # heads 0, 1 and heads 2, 3
    print("heads that differ        ", tuple(attnc.compile(mixed, grid=(14, 14))(q, k, v).shape))

    packed = torch.randn(2, 14, 14, 3 * 4 * 32)  # what nn.Linear gives; nothing is permuted, padded or copied
    op = attnc.compile(window(7), layout="b y x (three h d)", heads=4)
    print("a packed layout          ", tuple(op(packed).shape), "| another size, same kernel", tuple(op(packed[:, :9, :11]).shape))

    def block(x: torch.Tensor) -> torch.Tensor:
        return op(x).relu()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    print("inside torch.compile     ", bool(torch.allclose(compiled(packed), block(packed), atol=1e-6)))

    try:
        attnc.compile(attnc.pattern(lambda q, k: q.y // 7)(), grid=(14, 14))
    except attnc.DeclarationError as e:
        print("an error                 ", str(e).splitlines()[0])


if __name__ == "__main__":
    main()
