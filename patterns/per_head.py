"""Different patterns for different heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attnc import ir
from attnc.errors import DeclarationError
from attnc.lang.functions import Statement
from attnc.lang.pattern import Pattern, a_pattern
from attnc.lang.recorded import recorded
from attnc.lang.symbols import Point


@recorded
def per_head(patterns: Sequence[Pattern]) -> Pattern:
    """Equal contiguous runs of heads, one pattern each: head h of H follows patterns[h * len(patterns) // H]."""
    parts = tuple(a_pattern(p, "per_head") for p in patterns) if isinstance(patterns, Iterable) else ()
    if not parts:
        raise DeclarationError(f"per_head({patterns!r}): at least one pattern, in a list")

    def tracer(q: Point, k: Point) -> Statement:
        statements = [p._tracer(q, k) for p in parts]
        first = statements[0]
        run = ir.make("floordiv", ir.make("mul", ir.HEAD, ir.const(len(parts))), ir.HEADS)
        relation, score = ir.FALSE, statements[-1].score
        for n, s in reversed(list(enumerate(statements))):
            if (s.normalizer, s.post, s.q_map, s.k_map) != (
                first.normalizer,
                first.post,
                first.q_map,
                first.k_map,
            ):
                raise DeclarationError("per_head: all patterns share one normalizer, post factor and row maps")
            mine = ir.make("eq", run, ir.const(n))
            relation = ir.make("or", ir.make("and", mine, s.relation), relation)
            score = s.score if s.score == score else ir.make("where", mine, s.score, score)
        return Statement(relation, score, first.normalizer, first.post, first.q_map, first.k_map)

    return Pattern(f"per_head([{', '.join(p.name for p in parts)}])", tracer)
