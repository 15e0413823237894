"""`@attnc.pattern` and the algebra of patterns. Tracing calls the user's function once with symbolic points."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any, TypeVar

from attnc import ir
from attnc.errors import DeclarationError
from attnc.lang.functions import Statement
from attnc.lang.recorded import Recorded, recorded
from attnc.lang.symbols import Point, Sym, Table, as_expr

Tracer = Callable[[Point, Point], Statement]
T = TypeVar("T")


class Pattern(Recorded):
    """A relation and a score, no tensors yet. Patterns combine: `a & b`, `a | b`, `~a`, shift, dilate, heads, on."""

    def __init__(self, name: str, tracer: Tracer) -> None:
        self.name = name
        self._tracer = tracer

    def __repr__(self) -> str:
        return f"<pattern {self.name}>"

    # ---------------------------------------------------------------------------------------------------------------- tracing
    def trace(self, axes: tuple[str, ...], *, same_grid: bool = True) -> ir.Attend:
        """The IR on a grid with these axes. Raises DeclarationError where the statement is wrong."""
        q, k = Point.on_grid("q", axes, "q"), Point.on_grid("k", axes, "q" if same_grid else "k")
        before = ir.TRACED.set(axes)
        try:
            s = self._tracer(q, k)
            return self._checked(s, axes)
        except DeclarationError as e:
            if str(e).startswith("pattern "):
                raise
            raise DeclarationError(f"pattern {self.name} on the grid ({', '.join(axes)}): {e}") from e
        finally:
            ir.TRACED.reset(before)

    def _checked(self, s: Statement, axes: tuple[str, ...]) -> ir.Attend:
        relation = s.relation
        if not s.typed:
            relation = ir.rewrite(relation, lambda n: ir.load(n.args[0], n.children, "int") if n.op == "load" else None)
        if relation.kind != "bool":
            raise DeclarationError(f"the relation `{ir.show(relation, axes)}` is not boolean but {relation.kind}")
        for n in ir.walk(relation):
            if n.op == "score" or (n.kind == "real" and not s.typed):
                what = "SCORE decides nothing about who attends to whom" if n.op == "score" else "a float used as a coordinate"
                text = f"`{ir.show(relation, axes)}` contains `{ir.show(n, axes)}`"
                raise DeclarationError(f"{text}: {what}; a relation compares integers (coordinates, sizes, HEAD, integer tables)")
        if s.score.kind == "bool":
            raise DeclarationError(f"the score `{ir.show(s.score, axes)}` is a condition; a score is a number")
        for e in (s.score, s.post):
            for n in ir.walk(e) if e is not None and not s.typed else ():
                if n.op == "load" and n.kind == "real" and n.args[0] in {m.args[0] for m in ir.walk(relation) if m.op == "load"}:
                    raise DeclarationError(f"the table `{n.args[0]}` is read by the relation (integers) and by the score (reals)")
        if s.post is not None and any(n.op == "score" for n in ir.walk(s.post)):
            raise DeclarationError("post multiplies the normalised weight and cannot read SCORE")
        ranks: dict[str, int] = {}
        for e in (relation, s.score, s.post):
            for n in ir.walk(e) if e is not None else ():
                if n.op == "load" and ranks.setdefault(n.args[0], len(n.args) - 1) != len(n.args) - 1:
                    raise DeclarationError(
                        f"the table `{n.args[0]}` is indexed with {ranks[n.args[0]]} and {len(n.args) - 1} indices"
                    )
        post = None if s.post is None else s.post
        return ir.Attend(self.name, len(axes), relation, s.score, s.normalizer, post, s.q_map, s.k_map)

    # ---------------------------------------------------------------------------------------------------------------- algebra
    @recorded
    def __and__(self, other: Pattern) -> Pattern:
        return _combine("and", self, other)

    @recorded
    def __or__(self, other: Pattern) -> Pattern:
        return _combine("or", self, other)

    @recorded
    def __invert__(self) -> Pattern:
        def tracer(q: Point, k: Point) -> Statement:
            s = self._tracer(q, k)
            return Statement(ir.make("not", s.relation), s.score, s.normalizer, s.post, s.q_map, s.k_map)

        return Pattern(f"~{self.name}", tracer)

    @recorded
    def shift(self, *amount: int) -> Pattern:
        """The pattern moved by `amount` (one int, or one per axis): borders at 0 come to lie at `amount`."""

        def tracer(q: Point, k: Point) -> Statement:
            by = iter(_per_axis(amount, q.axes, "shift"))
            moved = q.map(lambda c, n: (ir.make("sub", c, ir.const(next(by))), n))
            by = iter(_per_axis(amount, q.axes, "shift"))
            return self._tracer(moved, k.map(lambda c, n: (ir.make("sub", c, ir.const(next(by))), n)))

        return Pattern(f"{self.name}.shift({', '.join(map(str, amount))})", tracer)

    @recorded
    def dilate(self, *step: int) -> Pattern:
        """The pattern on each residue class modulo `step` (one int, or one per axis): tokens step apart become neighbours."""

        def tracer(q: Point, k: Point) -> Statement:
            steps = _per_axis(step, q.axes, "dilate")
            if min(steps) < 1:
                raise DeclarationError(f"dilate{step}: steps are positive")
            same = ir.TRUE
            for a, b, d in zip(q, k, steps, strict=True):
                if d > 1:
                    same = ir.make("and", same, (a % d == b % d).expr)

            def scaled(p: Point) -> Point:
                it = iter(steps)

                def one(c: ir.Expr, n: ir.Expr) -> tuple[ir.Expr, ir.Expr]:
                    d = ir.const(next(it))
                    left = ir.make("sub", n, ir.make("mod", c, d))  # length of c's residue class: ceil((n - c % d) / d)
                    return ir.make("floordiv", c, d), ir.make("floordiv", ir.make("add", left, ir.const(d.args[0] - 1)), d)

                return p.map(one)

            s = self._tracer(scaled(q), scaled(k))
            relation = ir.make("and", same, s.relation)
            return Statement(relation, s.score, s.normalizer, s.post, s.q_map, s.k_map)

        return Pattern(f"{self.name}.dilate({', '.join(map(str, step))})", tracer)

    @recorded
    def heads(self, which: Iterable[int]) -> Pattern:
        """The pattern for these heads only; other heads see no key. Join with `|` to give heads different patterns."""
        chosen: tuple[Any, ...] = tuple(which) if isinstance(which, Iterable) else ()
        if not chosen or any(isinstance(h, bool) or not isinstance(h, Integral) or int(h) < 0 for h in chosen):
            raise DeclarationError(f"heads({brief(which)}): a non-empty list of head numbers")
        chosen = tuple(map(int, chosen))

        def tracer(q: Point, k: Point) -> Statement:
            s = self._tracer(q, k)
            member = ir.FALSE
            for h in chosen:
                member = ir.make("or", member, ir.make("eq", ir.HEAD, ir.const(h)))
            return Statement(ir.make("and", member, s.relation), s.score, s.normalizer, s.post, s.q_map, s.k_map)

        return Pattern(f"{self.name}.heads({list(chosen)})", tracer)

    @recorded
    def on(self, *axes: str) -> Pattern:
        """The pattern stated on some axes of a larger grid; the other axes are unconstrained."""

        def tracer(q: Point, k: Point) -> Statement:
            for a in axes:
                if a not in q.axes:
                    raise DeclarationError(f".on({a!r}): this grid has the axes {', '.join(q.axes)}")
            return self._tracer(q.only(axes), k.only(axes))

        return Pattern(f"{self.name}.on({', '.join(axes)})", tracer)


def _per_axis(values: tuple[int, ...], axes: tuple[str, ...], what: str) -> tuple[int, ...]:
    out = values * len(axes) if len(values) == 1 else values
    if len(out) != len(axes) or any(not isinstance(v, int) or isinstance(v, bool) for v in out):
        raise DeclarationError(f"{what}{values}: one int, or one per axis ({', '.join(axes)})")
    return out


def per_axis(value: Any, axes: tuple[str, ...], what: str, *, least: int | None = 1) -> tuple[int, ...]:
    """One int (of at least `least`) per axis from an int or a sequence; DeclarationError names `what` otherwise."""
    values = (value,) * len(axes) if not isinstance(value, tuple | list) else tuple(value)
    if len(values) != len(axes) or any(
        not isinstance(v, int) or isinstance(v, bool) or (least is not None and v < least) for v in values
    ):
        kind = {None: "an int", 0: "a non-negative int", 1: "a positive int"}.get(least, f"an int of at least {least}")
        raise DeclarationError(f"{what}={value!r}: {kind}, or one per axis ({', '.join(axes)})")
    return values


def brief(value: object) -> str:
    """A hyper-parameter in one short line: a pattern's name goes into messages and the heads of generated files."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _agree(a: Pattern, b: Pattern, x: T, y: T, plain: T) -> T:
    """The choice of two patterns, of which one may be plain."""
    if x != y and plain not in (x, y):
        raise DeclarationError(f"`{a.name}` and `{b.name}` do not agree: {x} and {y}; give both the same")
    return y if x == plain else x


def a_pattern(value: object, what: str) -> Pattern:
    """`value`, where it is a pattern; DeclarationError names `what` otherwise."""
    if not isinstance(value, Pattern):
        hint = " (call it with its hyper-parameters first)" if callable(value) else ""
        raise DeclarationError(f"{what}: takes patterns, not {brief(value)}{hint}")
    return value


def _combine(op: str, a: Pattern, b: object) -> Pattern:
    """Join relations. A part with a score of its own gives it to the pairs it allows (`|`) or to all pairs (`&`)."""
    sign = "&" if op == "and" else "|"
    b = a_pattern(b, f"`{a.name} {sign} ...`")

    def tracer(q: Point, k: Point) -> Statement:
        s, t = a._tracer(q, k), b._tracer(q, k)
        relation = ir.make(op, s.relation, t.relation)
        normalizer = _agree(a, b, s.normalizer, t.normalizer, ir.SOFTMAX)
        post = _agree(a, b, s.post, t.post, None)
        q_map, k_map = _agree(a, b, s.q_map, t.q_map, None), _agree(a, b, s.k_map, t.k_map, None)
        score = t.score if s.score == ir.SCORE else s.score
        if s.score != t.score:
            if op == "or":
                score = ir.make("where", s.relation, s.score, t.score)  # pairs in both keep the first part's score
            elif ir.SCORE not in (s.score, t.score):
                raise DeclarationError(f"`{a.name} & {b.name}`: both parts change the score; say it in one pattern")
        return Statement(relation, score, normalizer, post, q_map, k_map)

    return Pattern(f"({a.name} {sign} {b.name})", tracer)


def statement_of(result: object) -> Statement:
    """What a user's function returned, as a statement."""
    if isinstance(result, Statement):
        return result
    if isinstance(result, Pattern):
        raise DeclarationError(f"the function returned the pattern {result.name}; return its relation, or call it without @pattern")
    if not isinstance(result, Sym | bool | int | float):
        raise DeclarationError(
            f"the function returned {type(result).__name__}: return a relation (a boolean of coordinates), a score, "
            "or attnc.where(relation, score)"
        )
    e = as_expr(result)
    if e.kind == "bool":
        return Statement(e)
    if e.kind == "int":
        raise DeclarationError(f"the relation `{ir.show(e)}` is not boolean but an integer: compare it with something")
    return Statement(ir.TRUE, e)


def pattern(fn: Callable[..., Any]) -> Callable[..., Pattern]:
    """Declare a pattern: `fn(q, k, *, hyper..., table: attnc.Table)`; the result called with its hyper-parameters is a Pattern."""
    signature = inspect.signature(fn)
    parameters = list(signature.parameters.values())
    if len(parameters) < 2 or any(p.kind is not p.KEYWORD_ONLY for p in parameters[2:]):
        raise DeclarationError(
            f"pattern {fn.__name__}: write `def {fn.__name__}(q, k, *, ...)`: hyper-parameters and tables by keyword"
        )
    tables = {p.name: Table(p.name) for p in parameters[2:] if p.annotation is Table or _names_table(p.annotation)}
    hypers = [p for p in parameters[2:] if p.name not in tables]

    def factory(*positional: object, **hyper: Any) -> Pattern:
        if positional:
            example = hypers[0].name if hypers else "name"
            raise DeclarationError(
                f"pattern {fn.__name__}: hyper-parameters are given by keyword, e.g. {fn.__name__}({example}={positional[0]!r})"
            )
        known = {p.name for p in hypers}
        for name in hyper:
            if name in tables:
                raise DeclarationError(
                    f"pattern {fn.__name__}: {name!r} is a runtime table, given when the operator runs: op(q, k, v, {name}=tensor)"
                )
            if name not in known:
                takes = ", ".join(sorted(known)) or "none"
                raise DeclarationError(f"pattern {fn.__name__}: unknown hyper-parameter {name!r} (it takes: {takes})")
        missing = [p.name for p in hypers if p.default is p.empty and p.name not in hyper]
        if missing:
            hint = "; annotate runtime tensors as `name: attnc.Table`"
            raise DeclarationError(f"pattern {fn.__name__}: hyper-parameter {missing[0]!r} has no value{hint}")

        def tracer(q: Point, k: Point) -> Statement:
            return statement_of(fn(q, k, **hyper, **tables))

        shown = ", ".join(f"{k}={brief(v)}" for k, v in hyper.items())
        return Pattern(f"{fn.__name__}({shown})", tracer)

    factory.__name__, factory.__doc__, factory.__module__ = fn.__name__, fn.__doc__, fn.__module__
    return factory


def _names_table(annotation: object) -> bool:
    """True for the string forms that `from __future__ import annotations` leaves."""
    return isinstance(annotation, str) and annotation.replace(" ", "").split("|")[0].split(".")[-1] == "Table"
