"""From the expressions of a traced mod to an operator: what is -inf becomes the relation, a flat index becomes a grid where that
helps, and indices that torch would wrap around are wrapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attnc import ir
from attnc.analysis.lift import Digits, chains, grid_of
from attnc.compiler import Operator
from attnc.errors import UnsupportedError
from attnc.ir import Expr, make
from attnc.lang.functions import Statement
from attnc.lang.pattern import Pattern
from attnc.schedule.bounds import Box
from attnc.schedule.geometry import geometry
from attnc.schedule.split import split

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
GAIN = 0.9  # a grid is worth while where its boxes hold less than this share of the flat ones
MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class Lengths:
    """Sizes of a call that a mod may depend on."""

    queries: int
    keys: int
    heads: int
    kv_heads: int
    batch: int


def excluded(score: Expr) -> tuple[Expr, Expr]:
    """(relation, score) of a score that is -inf for some pairs: where(c, s, -inf) is s for the pairs with c."""
    if score.op == "const" and score.args[0] == MINUS_INFINITY:
        return ir.FALSE, ir.const(0.0)
    a = score.args
    if score.op == "where":
        (keep_yes, yes), (keep_no, no) = excluded(a[1]), excluded(a[2])
        if keep_yes == keep_no == ir.TRUE:
            return ir.TRUE, score
        if ir.SCORE in ir.walk(a[0]):
            return ir.TRUE, score
        relation = make("or", make("and", a[0], keep_yes), make("and", make("not", a[0]), keep_no))
        if ir.FALSE in (keep_yes, keep_no):
            return relation, no if keep_yes == ir.FALSE else yes
        return relation, make("where", a[0], yes, no)
    if score.op == "add" or (score.op == "sub" and excluded(a[1])[0] == ir.TRUE):
        (keep_a, x), (keep_b, y) = excluded(a[0]), excluded(a[1])
        if keep_a == keep_b == ir.TRUE:
            return ir.TRUE, score
        zero = ir.const(0.0)
        if score.op == "add" and zero in (x, y):  # score + where(c, 0, -inf)
            return make("and", keep_a, keep_b), y if x == zero else x
        return make("and", keep_a, keep_b), make(score.op, x, y)
    if score.op in ("mul", "truediv") and a[1].op == "const" and a[1].args[0] > 0:
        keep, x = excluded(a[0])
        return (keep, make(score.op, x, a[1])) if keep != ir.TRUE else (ir.TRUE, score)
    return ir.TRUE, score


def check_finite(name: str, score: Expr) -> None:
    """Refuse -inf that a relation cannot say."""
    if any(n.op == "const" and n.args[0] in (MINUS_INFINITY, -MINUS_INFINITY) for n in ir.walk(score)):
        raise UnsupportedError(
            f"{name}: the score `{ir.show(score)}` is infinite where the score decides (or in a function): who attends to whom "
            "follows from indices and captured tensors, not from q . k; use a large finite number such as -1e9"
        )


@lru_cache(maxsize=256)
def operator(name: str, relation: Expr, score: Expr, n: Lengths, shapes: Shapes, backend: str, fallback: str | None) -> Operator:
    """The operator of a statement on flat indices (coordinate 0 of queries and keys)."""
    same = n.queries == n.keys
    Pattern(name, lambda q, k: Statement(relation, score, typed=True)).trace(
        ir.AXES[1], same_grid=same
    )  # refuses what no pattern may say
    best: tuple[Expr, Expr, tuple[int, ...], tuple[int, ...]] = (relation, score, (n.queries,), (n.keys,))
    work = _boxes(name, *best, n)
    for chain in chains((relation, score), (n.queries, n.keys)):
        grids = grid_of(n.queries, chain), grid_of(n.keys, chain)
        digits = Digits(chain, {"q": grids[0], "k": grids[1]})
        lifted = (digits.rewrite(relation), digits.rewrite(score), *grids)
        boxes = _boxes(name, *lifted, n)
        if boxes < GAIN * work:
            best, work = lifted, boxes
    relation, score, q_grid, k_grid = best
    relation, score = _wrapped(name, relation, score, q_grid, k_grid, n, dict(shapes))
    pattern = Pattern(name, lambda q, k: Statement(relation, score, typed=True))
    options = {"backend": backend, "fallback": fallback}
    return Operator(pattern, grid=q_grid, kv_grid=None if same else k_grid, **options)  # type: ignore[arg-type]


def flat_program(name: str, relation: Expr, score: Expr, rank: int, n: Lengths) -> ir.Program:
    tokens = ir.Tokens((None,) * rank)
    return ir.Program(ir.Attend(name, rank, relation, score), tokens, tokens, n.queries == n.keys)


def _boxes(name: str, relation: Expr, score: Expr, q_grid: tuple[int, ...], k_grid: tuple[int, ...], n: Lengths) -> int:
    """Score elements that the intervals of all heads hold."""
    total = 0
    for run in split(flat_program(name, relation, score, len(q_grid), n), q_grid, k_grid, n.heads, n.kv_heads):
        for part in run.parts:
            pairs = run.last - run.first
            for axis in geometry(part, q_grid, k_grid).axes:
                pairs *= axis.pairs()
            total += pairs
    return total


def _wrapped(
    name: str,
    relation: Expr,
    score: Expr,
    q_grid: tuple[int, ...],
    k_grid: tuple[int, ...],
    n: Lengths,
    shapes: dict[str, tuple[int, ...]],
) -> tuple[Expr, Expr]:
    """Table indices that can be negative for an allowed pair count from the table's end, as torch's do."""
    g = geometry(flat_program(name, relation, score, len(q_grid), n), q_grid, k_grid)
    box, conditions = Box(g, n.heads, n.batch), ir.conjuncts(g.structure.residual)

    def of(e: Expr, guards: tuple[Expr, ...]) -> Expr:
        if e.op == "where":
            test, yes, no = e.args
            return make("where", of(test, guards), of(yes, guards + ir.conjuncts(test)), of(no, (*guards, make("not", test))))
        if not e.children:
            return e
        args = tuple(of(a, guards) if isinstance(a, Expr) else a for a in e.args)
        if e.op != "load":
            return make(e.op, *args)
        indices = []
        for index, length in zip(args[1:], shapes[e.args[0]], strict=True):
            if any(m.op in ("load", "floor") for m in ir.walk(index)):  # values of another table: kept inside this one
                wrapped = make("where", make("lt", index, ir.ZERO), make("add", index, ir.const(length)), index)
                index = make("min", make("max", wrapped, ir.ZERO), ir.const(length - 1))
            else:
                r = box.of(index, guards + conditions)
                if r.low <= r.high and r.low < 0:
                    index = make("where", make("lt", index, ir.ZERO), make("add", index, ir.const(length)), index)
            indices.append(index)
        return ir.load(e.args[0], tuple(indices), e.kind)

    return of(relation, ()), of(score, ())


def with_blocks(relation: Expr, full: Expr, partial: Expr) -> Expr:
    """A relation limited to lists of blocks: full ones are allowed as a whole, partial ones where the relation says so."""
    return make("or", make("ne", full, ir.ZERO), make("and", make("ne", partial, ir.ZERO), relation))


__all__ = ["Lengths", "check_finite", "excluded", "flat_program", "operator", "with_blocks"]
