"""The language: every mistake a declaration can make is a DeclarationError that shows the expression and the way out."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attnc
from attnc import DeclarationError, ir

Body = Callable[..., Any]


def traced(body: Body, axes: tuple[str, ...] = ("y", "x"), **hyper: Any) -> ir.Attend:
    body.__name__ = "mine"
    return attnc.pattern(body)(**hyper).trace(axes)


table = attnc.Table("table")
# what is wrong: (the declaration, the expression its message shows, the way out it names)
MISTAKES: dict[str, tuple[Body, str, str]] = {
    "if": (lambda q, k: q.y == k.y if q.y > 3 else q.x == k.x, "`3 < q.y`", "attnc.where"),
    "and": (lambda q, k: q.y == k.y and q.x == k.x, "`q.y == k.y`", "`&`"),
    "or": (lambda q, k: q.y == k.y or q.x == k.x, "`q.y == k.y`", "`|`"),
    "not": (lambda q, k: not (q.y <= k.y), "`q.y <= k.y`", "`~`"),
    "in": (lambda q, k: q.y in (k.y, k.x), "`k.y == q.y`", "attnc.where"),
    "chained comparison": (lambda q, k: q.y - 3 <= k.y <= q.y, "`q.y - 3 <= k.y`", "chained"),
    "builtin min": (lambda q, k: min(q.y, 3) == k.y, "`3 < q.y`", "attnc.min"),
    "builtin max": (lambda q, k: max(q.y, k.x) == k.y, "`q.y < k.x`", "attnc.max"),
    "assert": (lambda q, k: [None for _ in (1,) if q.y < 2], "`q.y < 2`", "attnc.where"),
    "range": (lambda q, k: list(range(q.y)), "`q.y`", "symbol"),
    "list index": (lambda q, k: [1, 2][q.y], "`q.y`", "symbol"),
    "int": (lambda q, k: int(q.y) == k.y, "`q.y`", "symbol"),
    "float": (lambda q, k: float(q.size.y) == k.y, "`q.size.y`", "symbol"),
    "math": (lambda q, k: math.sqrt(q.y) == k.y, "`q.y`", "symbol"),
    "round": (lambda q, k: round(q.y / 2) == k.y, "`q.y / 2`", "//"),
    "floor": (lambda q, k: math.floor(q.y / 2) == k.y, "`q.y / 2`", "//"),
    "shift left": (lambda q, k: q.y << 1 == k.y, "`q.y`", "* /"),
    "exclusive or": (lambda q, k: (q.y == 1) ^ (k.y == 1), "`q.y == 1`", "comparisons"),
    "power of a symbol": (lambda q, k: 2**q.y == k.y, "`q.y`", "**n"),
    "a negative power": (lambda q, k: q.y**-1 == k.y, "`q.y ** -1`", "attnc.exp"),
    "iterating a symbol": (lambda q, k: [*q.y], "`q.y`", "iterated"),
    "indexing a symbol": (lambda q, k: q.y[0] == k.y, "`q.y`", "[]"),
    "calling a symbol": (lambda q, k: q.y(1) == k.y, "`q.y`", "comparisons"),
    "len of a symbol": (lambda q, k: len(q.y) == k.y, "`q.y`", "len()"),
    "a relation that is a number": (lambda q, k: q.y - k.y, "`q.y - k.y`", "compare"),
    "a negated number": (lambda q, k: ~(q.y - k.y), "`q.y - k.y`", "number"),
    "joined numbers": (lambda q, k: q.y & k.y, "`q.y`", "comparisons"),
    "a minus before a condition": (lambda q, k: -(q.y == k.y) == 0, "`q.y == k.y`", "attnc.where"),
    "a sum of conditions": (lambda q, k: (q.y == k.y) + (q.x == k.x) == 1, "`q.y == k.y`", "attnc.where"),
    "abs of a condition": (lambda q, k: abs(q.y == k.y) == 1, "`q.y == k.y`", "attnc.where"),
    "min of a condition": (lambda q, k: attnc.min(q.y == k.y, 1) == 1, "`q.y == k.y`", "attnc.where"),
    "exp of a condition": (lambda q, k: attnc.where(q.y == k.y, attnc.exp(q.y == 1)), "`q.y == 1`", "attnc.where"),
    "where of a number": (lambda q, k: attnc.where(q.y - k.y, attnc.SCORE), "`q.y - k.y`", "compare"),
    "where of two kinds": (lambda q, k: attnc.where(q.y < 1, q.y == k.y, 3), "`q.y == k.y`", "alike"),
    "an unknown axis": (lambda q, k: q.z == k.z, "`z`", "the axes y, x"),
    "an unknown size": (lambda q, k: q.size.z == k.y, "`size.z`", "the axes y, x"),
    "a float as a coordinate": (lambda q, k: q.y // 1.5 == k.y, "`q.y // 1.5`", "integer operands"),
    "a quotient as a coordinate": (lambda q, k: q.y / 2 % 3 == k.y, "`q.y / 2 % 3`", "integer operands"),
    "a float in a relation": (lambda q, k: q.y <= k.y + 0.5, "`q.y <= k.y + 0.5`", "compares integers"),
    "SCORE in a relation": (lambda q, k: attnc.SCORE > 0, "`SCORE`", "compares integers"),
    "division by zero": (lambda q, k: q.y // 0 == k.y, "`q.y // 0`", "zero"),
    "a table index that is real": (lambda q, k: attnc.SCORE + table[q.y / 2], "`table[... q.y / 2 ...]`", "integer"),
    "a table index that is a condition": (lambda q, k: attnc.SCORE + table[q.y == k.y], "`table[... q.y == k.y ...]`", "integer"),
    "a table without an index": (lambda q, k: attnc.SCORE + table, "Table('table')", "a table's element"),
    "a table compared as a whole": (lambda q, k: table == 1, "`table`", "table[attnc.HEAD]"),
    "a table of two ranks": (lambda q, k: attnc.SCORE + table[q.y] + table[q.y, k.y], "`table`", "1 and 2 indices"),
    "a table in relation and score": (
        lambda q, k: attnc.where(table[q.y] == 1, attnc.SCORE + table[k.y]),
        "`table`",
        "relation (integers)",
    ),
    "points compared": (lambda q, k: q == k, "a point", "q.index == k.index"),
    "points ordered": (lambda q, k: q <= k, "a point", "coordinates"),
    "sizes compared": (lambda q, k: q.size == k.size, "the sizes", "axis by axis"),
    "a tensor": (lambda q, k: q.y == torch.ones(3), "tensor([1., 1., 1.])", "attnc.Table"),
    "an array": (lambda q, k: k.y < np.float32(3), "3.0", "Python numbers"),
    "a string": (lambda q, k: q.y == "y", "'y'", "coordinates"),
    "nan": (lambda q, k: attnc.where(q.y == k.y, attnc.SCORE + float("nan")), "nan", "number"),
    "a logarithm of zero": (lambda q, k: attnc.where(q.y == k.y, attnc.SCORE + attnc.log(0)), "attnc.log(0)", "domain"),
    "min of one value": (lambda q, k: attnc.min(q.y) == k.y, "attnc.min", "two values"),
    "a post that reads SCORE": (lambda q, k: attnc.where(q.y == k.y, attnc.SCORE, post=attnc.SCORE), "post", "SCORE"),
    "a post that is a condition": (lambda q, k: attnc.where(q.y == k.y, attnc.SCORE, post=q.y == 1), "`q.y == 1`", "attnc.where"),
    "a score that is a condition": (lambda q, k: attnc.where(q.y == k.y, q.x == k.x), "`q.x == k.x`", "a number"),
    "a normalizer that is none": (
        lambda q, k: attnc.where(q.y == k.y, attnc.SCORE, normalizer="softmax"),
        "'softmax'",
        "attnc.softmax()",
    ),
    "a row map that is none": (lambda q, k: attnc.where(q.y == k.y, attnc.SCORE, q_map="l2"), "'l2'", "attnc.l2norm()"),
    "a sink that is no table": (
        lambda q, k: attnc.where(q.y == k.y, attnc.SCORE, normalizer=attnc.softmax(sink=0.0)),
        "sink=0.0",
        "attnc.Table",
    ),
    "softmax over heads": (
        lambda q, k: attnc.where(q.y == k.y, attnc.SCORE, normalizer=attnc.softmax(over="heads")),
        "over='heads'",
        "'keys' or 'queries'",
    ),
    "relu to a broken power": (
        lambda q, k: attnc.where(q.y == k.y, attnc.SCORE, normalizer=attnc.relu(1.5)),
        "power=1.5",
        "positive integer",
    ),
    "nothing returned": (lambda q, k: None, "NoneType", "attnc.where(relation, score)"),
    "a tuple returned": (lambda q, k: (q.y == k.y, attnc.SCORE), "tuple", "attnc.where(relation, score)"),
    "a list returned": (lambda q, k: [q.y == k.y], "list", "return a relation"),
    "a pattern returned": (lambda q, k: attnc.patterns.window(7), "window(7)", "without @pattern"),
    "an integer returned": (lambda q, k: 1, "`1`", "compare"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_named_where_it_was_written(what: str) -> None:
    body, expression, way_out = MISTAKES[what]
    with pytest.raises(DeclarationError) as caught:
        traced(body)
    message = str(caught.value)
    assert message.startswith("pattern mine() on the grid (y, x): ")
    assert expression in message
    assert way_out in message


def test_expressions_are_shown_with_the_names_of_the_grid() -> None:
    body, *_ = MISTAKES["a quotient as a coordinate"]
    with pytest.raises(DeclarationError, match=r"`q\.y / 2 % 3`"):
        traced(body, ("t", "y", "x"))
    with pytest.raises(DeclarationError, match=r"`q\.depth // 1.5`"):
        traced(lambda q, k: q.depth // 1.5 == k.depth, ("depth", "row"))


@attnc.pattern
def sized(q: Any, k: Any, *, size: int, weight: attnc.Table, extra: int = 0) -> Any:
    return attnc.where(q.x // size == k.x // size, attnc.SCORE + weight[attnc.HEAD] + extra)


@attnc.pattern
def optional(q: Any, k: Any, *, weight: attnc.Table | None) -> Any:
    return attnc.SCORE + weight[attnc.HEAD]


def test_hyper_parameters() -> None:
    assert sized(size=7).name == "sized(size=7)"
    assert sized(size=7, extra=2).trace(("x",)).tables == ("weight",)
    assert optional().trace(("x",)).tables == ("weight",)
    with pytest.raises(DeclarationError, match=r"pattern sized: unknown hyper-parameter 'sise' \(it takes: extra, size\)"):
        sized(sise=7)
    with pytest.raises(DeclarationError, match="pattern sized: hyper-parameter 'size' has no value; annotate runtime tensors"):
        sized()
    with pytest.raises(DeclarationError, match=r"by keyword, e.g. sized\(size=7\)"):
        sized(7)
    with pytest.raises(DeclarationError, match=r"'weight' is a runtime table, given when the operator runs: op\(q, k, v, weight="):
        sized(size=7, weight=torch.ones(3))


def test_names_are_one_short_line() -> None:
    """They go into messages and into the heads of generated files, as comments."""

    @attnc.pattern
    def mine(q: Any, k: Any, *, value: Any) -> Any:
        return q.x == k.x

    name = mine(value=np.zeros((40, 40))).name
    assert "\n" not in name
    assert len(name) < 120


@pytest.mark.parametrize("bad", [lambda q: q.x, lambda q, k, size: q.x == k.x, lambda q, k, *more: q.x == k.x])
def test_signatures(bad: Body) -> None:
    with pytest.raises(DeclarationError, match=r"write `def <lambda>\(q, k, \*, ...\)`"):
        attnc.pattern(bad)
    with pytest.raises(DeclarationError, match=r"write `def <lambda>\(q, k, v, \*, ...\)`"):
        attnc.mechanism(lambda q, k: q)


def test_mechanisms() -> None:
    @attnc.mechanism
    def twice(q: Any, k: Any, v: Any, *, times: int) -> Any:
        for _ in range(times):
            v = attnc.channel_attend(q, k, v)
        return v

    assert len(twice(times=3).trace().steps) == 3
    with pytest.raises(DeclarationError, match="mechanism twice: unknown hyper-parameter 'time'"):
        twice(time=3)
    with pytest.raises(DeclarationError, match="mechanism twice: hyper-parameter 'times' has no value"):
        twice()
    with pytest.raises(DeclarationError, match="mechanism twice: hyper-parameters are given by keyword"):
        twice(3)
    with pytest.raises(DeclarationError, match=r"mechanism wrong\(\): returned int; return a token set"):
        _wrong().trace()
    with pytest.raises(DeclarationError, match="takes token sets of a mechanism, not Tensor"):
        attnc.channel_attend(torch.ones(1), torch.ones(1), torch.ones(1))  # type: ignore[arg-type]


def _wrong() -> attnc.Mechanism:
    @attnc.mechanism
    def wrong(q: Any, k: Any, v: Any) -> Any:
        return 3

    return wrong()


window = attnc.patterns.window


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window(2).shift(1, 2, 3), r"shift\(1, 2, 3\): one int, or one per axis \(y, x\)"),
        (lambda: window(2).shift(1.5), r"shift\(1.5,\): one int"),
        (lambda: window(2).dilate(0), r"dilate\(0,\): steps are positive"),
        (lambda: window(2).on("z"), r"\.on\('z'\): this grid has the axes y, x"),
        (lambda: window(2, bias="relative") & attnc.patterns.neighborhood(3, bias="relative"), "both parts change the score"),
        (lambda: _with(attnc.sigmoid()) | _with(attnc.relu()), "do not agree"),
        (lambda: attnc.patterns.per_head([_with(attnc.sigmoid()), window(2)]), "all patterns share one normalizer"),
        (lambda: window(0), r"size=0: a positive int, or one per axis \(y, x\)"),
        (lambda: window((2, 2, 2)), r"size=\(2, 2, 2\): a positive int, or one per axis"),
        (lambda: window(2.0), r"size=2.0: a positive int"),
        (lambda: window("22"), r"size='22': a positive int"),
        (lambda: window(True), r"size=True: a positive int"),
        (lambda: window(2, shift=(1,)), r"shift=\(1,\): an int, or one per axis"),
        (lambda: window(2, shift=0.5), r"shift=0.5: an int, or one per axis"),
        (lambda: window(2, bias="both"), "bias='both': None, 'relative' or 'absolute'"),
        (lambda: attnc.patterns.neighborhood(3, stride=4), "stride=4 is greater than size=3"),
        (lambda: attnc.patterns.neighborhood(3, causal=(True,)), r"causal=\(True,\): a bool, or one per axis"),
        (lambda: attnc.patterns.neighborhood(3, bias="absolute"), "use 'relative'"),
        (lambda: attnc.patterns.band(-1, 2), r"left=-1: a non-negative int, or one per axis"),
        (lambda: attnc.patterns.band(1, (2, 2, 2)), r"right=\(2, 2, 2\): a non-negative int, or one per axis"),
        (lambda: attnc.patterns.axial("z"), r"axial\('z'\): this grid has the axes y, x"),
        (lambda: attnc.patterns.strip("y", 0), r"strip\('y', 0\): an axis of \(y, x\) and a positive width"),
        (lambda: attnc.patterns.grid(0), "size=0: a positive int"),
        (lambda: attnc.patterns.dilated_blocks(2, 0), "interval=0: a positive int"),
    ],
)
def test_the_algebra_and_the_library_refuse(make: Callable[[], attnc.Pattern], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        make().trace(("y", "x"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window(2).heads([]), r"heads\(\[\]\): a non-empty list"),
        (lambda: window(2).heads([-1]), r"heads\(\[-1\]\)"),
        (lambda: attnc.patterns.per_head([]), r"per_head\(\[\]\): at least one pattern"),
    ],
)
def test_heads_refuse(make: Callable[[], attnc.Pattern], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        make()


def _with(normalizer: ir.Normalizer) -> attnc.Pattern:
    @attnc.pattern
    def weighted(q: Any, k: Any) -> Any:
        return attnc.where(q.x == k.x, attnc.SCORE, normalizer=normalizer)

    return weighted()


def test_what_a_declaration_may_say() -> None:
    """The other side of the mistakes: none of this is refused, and it means what Python says."""
    grid = (4, 5)
    y, x = (c.flatten() for c in torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij"))
    qy, qx, ky, kx = y[:, None], x[:, None], y[None], x[None]
    index_q, index_k = torch.arange(20)[:, None], torch.arange(20)[None]
    said: list[tuple[Body, Any]] = [
        (lambda q, k: (q.x == k.x) * (q.y == k.y) + 2 * (q.x == k.x) == 3, (qx == kx) & (qy == ky)),
        (lambda q, k: divmod(q.x, 2)[0] == k.x % 2, qx // 2 == kx % 2),
        (lambda q, k: np.int64(3) + q.x == k.x + np.int32(2), qx + 3 == kx + 2),
        (lambda q, k: (q.x == k.x) == (q.y == k.y), (qx == kx) == (qy == ky)),
        (lambda q, k: (q.x == k.x) != (q.y == k.y), (qx == kx) != (qy == ky)),
        (lambda q, k: q.x**2 + q.y**2 <= k.x**2, qx**2 + qy**2 <= kx**2),
        (lambda q, k: sum((a - b) ** 2 for a, b in zip(q, k, strict=True)) <= 4, (qx - kx) ** 2 + (qy - ky) ** 2 <= 4),
        (lambda q, k: q.index >= k.index, index_q >= index_k),
        (lambda q, k: q[0] == k[1], qy == kx),
        (lambda q, k: attnc.where(q.y > 1, q.x == k.x, q.y == k.y), torch.where(qy > 1, qx == kx, qy == ky)),
        (lambda q, k: attnc.clamp(q.x - 2, 0, 1) == k.y, (qx - 2).clamp(0, 1) == ky),
        (lambda q, k: -q.x // 2 == -k.x // 2, -qx // 2 == -kx // 2),
        (lambda q, k: (q.x - k.x) % -3 == -1, (qx - kx) % -3 == -1),
        (lambda q, k: len(q) == 2, torch.ones(20, 20, dtype=torch.bool)),
        (lambda q, k: True, torch.ones(20, 20, dtype=torch.bool)),
        (lambda q, k: q.x != q.x, torch.zeros(20, 20, dtype=torch.bool)),
    ]
    for body, expected in said:
        found = attnc.mask(attnc.pattern(body)(), grid=grid)[0]
        assert torch.equal(found, expected.expand(20, 20)), ir.show(attnc.pattern(body)().trace(("y", "x")).relation)


def test_the_algebra_means_what_sets_mean() -> None:
    a, b, grid = window(2), attnc.patterns.neighborhood(3), (5, 6)

    def of(p: attnc.Pattern, heads: int = 1) -> torch.Tensor:
        return attnc.mask(p, grid=grid, heads=heads)

    assert torch.equal(of(a & b), of(a) & of(b))
    assert torch.equal(of(a | b), of(a) | of(b))
    assert torch.equal(of(~a), ~of(a))
    assert torch.equal(of(~(a | b)), of(~a & ~b))
    assert torch.equal(of(a.heads([0, 2]) | b.heads([1]), 4), torch.cat([of(a), of(b), of(a), torch.zeros_like(of(a))]))
    assert torch.equal(of(attnc.patterns.per_head([a, b]), 4), torch.cat([of(a), of(a), of(b), of(b)]))
    assert torch.equal(of(attnc.patterns.per_head([a, b]), 3), torch.cat([of(a), of(a), of(b)]))
    whole = of(a).view(5, 6, 5, 6)
    assert torch.equal(of(a.shift(1)).view(5, 6, 5, 6)[1:, 1:, 1:, 1:], whole[:-1, :-1, :-1, :-1])
    assert torch.equal(of(window(2).on("y")), of(attnc.patterns.strip("x", 2)))
    assert torch.equal(of(a.dilate(2)).view(5, 6, 5, 6)[::2, ::2, ::2, ::2], attnc.mask(a, grid=(3, 3)).view(3, 3, 3, 3))
    assert not of(a.dilate(2)).view(5, 6, 5, 6)[::2, ::2, 1::2].any()


def test_the_meaning_of_a_plain_l2norm_and_a_called_one() -> None:
    def made(m: Any) -> ir.Attend:
        return traced(lambda q, k: attnc.where(q.x == k.x, attnc.SCORE, q_map=m, k_map=m, normalizer=attnc.sigmoid))

    assert made(attnc.l2norm) == made(attnc.l2norm())
    assert made(attnc.l2norm).normalizer == attnc.sigmoid()


def test_import_brings_nothing_heavy() -> None:
    """The compiler, Triton and the drawing libraries load when first used: what is imported is checked, not how long it takes."""
    heavy = ("sympy", "networkx", "triton", "matplotlib", "scipy", "timm", "torchvision", "attnc.compiler", "attnc.analysis.forms")
    look = (
        "import sys, torch; before = set(sys.modules); import attnc; new = set(sys.modules) - before; "
        f"print([m for m in {heavy} if m in new], len(new))"
    )
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.split("] ")
    assert found[0] == "["
    assert int(found[1]) < 60


def test_a_declaration_needs_no_compiler_and_no_triton() -> None:
    hidden = """
import sys
for name in ("triton", "networkx", "matplotlib", "timm", "torchvision", "rich", "typer"):
    sys.modules[name] = None
import os; os.environ["PATH"] = ""
import torch, attnc
x = torch.randn(1, 2, 20, 8)
op = attnc.compile(attnc.patterns.window(2), grid=(4, 5))
print(op._backend("cpu"), tuple(op(x, x, x).shape))
"""
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 1) == ["torch", "(1, 2, 20, 8)\n"]
