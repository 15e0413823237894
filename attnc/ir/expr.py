"""Expressions: small, immutable trees of integers, reals and booleans over coordinates, sizes, the head and batch index, the raw
score and runtime tables.

`//` and `%` are floor division and its remainder, as in Python, whatever the signs. `floor` makes an integer of a real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["int", "bool", "real"]
Role = Literal["q", "k"]
ROLES: tuple[Role, Role] = ("q", "k")

# op -> (number of expression arguments, how it prints). Leaves have none; "load" takes a table name and any number of indices.
LEAVES = ("const", "coord", "index", "size", "head", "heads", "batch", "score", "var")
ARITY: dict[str, int] = {
    **dict.fromkeys(("add", "sub", "mul", "floordiv", "mod", "truediv", "min", "max"), 2),
    **dict.fromkeys(("eq", "ne", "lt", "le", "and", "or"), 2),
    **dict.fromkeys(("neg", "abs", "not", "exp", "log", "tanh", "sqrt", "sigmoid", "floor"), 1),
    "where": 3,
    # random integers, see analysis.dropout: philox(word, key low, key high, batch, head, token), mix(word, word, token)
    "philox": 6,
    "mix": 3,
}
INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "floordiv": "//",
    "mod": "%",
    "truediv": "/",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "and": "&",
    "or": "|",
}
PRECEDENCE = {"or": 1, "and": 2, "eq": 3, "ne": 3, "lt": 3, "le": 3, "add": 5, "sub": 5, "neg": 7}
PRECEDENCE |= {"mul": 6, "floordiv": 6, "mod": 6, "truediv": 6, "not": 7}
TRACED: ContextVar[tuple[str, ...] | None] = ContextVar("attnc_traced_axes", default=None)
AXES = {1: ("x",), 2: ("y", "x"), 3: ("t", "y", "x")}


@dataclass(frozen=True, slots=True)
class Expr:
    """One node. `args` holds sub-expressions, or the payload of a leaf (a number, a role, an axis number, a name)."""

    op: str
    args: tuple[Any, ...] = ()
    kind: Kind = "int"
    _hash: int = field(default=0, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.op, self.args, self.kind)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return show(self)

    def __reduce__(self) -> tuple[type[Expr], tuple[Any, ...]]:
        return Expr, (self.op, self.args, self.kind)  # hashes of strings differ from process to process

    @property
    def children(self) -> tuple[Expr, ...]:
        """Sub-expressions only."""
        return tuple(a for a in self.args if isinstance(a, Expr))


def const(value: float | int | bool) -> Expr:
    """A literal; its Python type decides the kind."""
    kind: Kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "real"
    return Expr("const", (value,), kind)


TRUE, FALSE, ZERO, ONE = const(True), const(False), const(0), const(1)
SCORE = Expr("score", (), "real")
HEAD = Expr("head")
HEADS = Expr("heads")  # number of query heads
BATCH = Expr("batch")


def coord(role: Role, axis: int) -> Expr:
    """Coordinate of the query or key on one axis of its grid (of the extended grid where padding exists)."""
    return Expr("coord", (role, axis))


def size(role: Role, axis: int) -> Expr:
    """Length of an axis of the query or key grid (extended by padding where there is some)."""
    return Expr("size", (role, axis))


def index(role: Role) -> Expr:
    """Row-major index of the token on its grid."""
    return Expr("index", (role,))


def var(name: str) -> Expr:
    """A named integer introduced by a proof: j (index in a residue class), r (the residue), i (a key's index)."""
    return Expr("var", (name,))


_FOLD: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "min": min,
    "max": max,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "neg": lambda a: -a,
    "abs": abs,
}


def make(op: str, *args: Expr) -> Expr:
    """Build an operation, folding constants and the identities that keep printed code short."""
    if op in _FOLD and all(a.op == "const" for a in args):
        values = [a.args[0] for a in args]
        if not (op in ("floordiv", "mod") and values[1] == 0):
            return const(_FOLD[op](*values))
    if op == "where":
        test, yes, no = args
        if test.op == "const":
            return yes if test.args[0] else no
        return Expr(op, args, "real" if "real" in (yes.kind, no.kind) else yes.kind)
    if op in ("and", "or"):
        a, b = args
        absorb, keep = (FALSE, TRUE) if op == "and" else (TRUE, FALSE)
        if absorb in (a, b):
            return absorb
        if a in (keep, b):
            return b
        return a if b == keep else Expr(op, args, "bool")
    if op == "not":
        a = args[0]
        if a.op == "const":
            return const(not a.args[0])
        return a.args[0] if a.op == "not" else Expr(op, args, "bool")
    if op in ("eq", "ne", "lt", "le"):
        if args[0] == args[1]:
            return const(op in ("eq", "le"))
        return Expr(op, args, "bool")
    if op in ("min", "max") and args[0] == args[1]:
        return args[0]
    if len(args) == 2 and all(a.kind == "int" for a in args):
        a, b = args
        if op in ("add", "sub") and b == ZERO:
            return a
        if op == "add" and a == ZERO:
            return b
        if op == "mul" and ZERO in args:
            return ZERO
        if op in ("mul", "floordiv") and b == ONE:
            return a
        if op == "mul" and a == ONE:
            return b
        if op == "mod" and b == ONE:
            return ZERO
    if op == "floor":  # of a real, an integer: see analysis.evaluate
        a = args[0]
        if a.op == "const" and a.kind == "real" and abs(a.args[0]) < 1 << 30:
            return const(math.floor(a.args[0]))
        return a if a.kind == "int" else Expr(op, args, "int")
    real = op in ("truediv", "exp", "log", "tanh", "sqrt", "sigmoid") or any(a.kind == "real" for a in args)
    return Expr(op, args, "real" if real else "int")


def load(table: str, indices: tuple[Expr, ...], kind: Kind = "real") -> Expr:
    """An element of a runtime table; negative indices are not wrapped."""
    return Expr("load", (table, *indices), kind)


def walk(e: Expr) -> Iterator[Expr]:
    """Every node, parents first."""
    yield e
    for c in e.children:
        yield from walk(c)


def rewrite(e: Expr, rule: Callable[[Expr], Expr | None]) -> Expr:
    """Replace nodes from the top: where `rule` gives an expression it stands, elsewhere the children are rewritten."""
    new = rule(e)
    if new is not None:
        return new
    if not e.children:
        return e
    args = tuple(rewrite(a, rule) if isinstance(a, Expr) else a for a in e.args)
    if args == e.args:
        return e
    return make(e.op, *args) if e.op in ARITY else Expr(e.op, args, e.kind)


def substitute(e: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """Replace each occurrence of the mapping's keys."""
    return rewrite(e, mapping.get)


def conjuncts(e: Expr) -> tuple[Expr, ...]:
    """The terms of a conjunction, left to right."""
    return conjuncts(e.args[0]) + conjuncts(e.args[1]) if e.op == "and" else () if e == TRUE else (e,)


def all_of(terms: tuple[Expr, ...]) -> Expr:
    """Conjunction of any number of terms."""
    out = TRUE
    for t in terms:
        out = make("and", out, t)
    return out


def flatten_index(e: Expr, rank: int, same_grid: bool) -> Expr:
    """Write `index` out as coordinates: ((t * ny) + y) * nx + x. Queries and keys on one grid share the query's sizes."""

    def rule(n: Expr) -> Expr | None:
        if n.op != "index":
            return None
        role: Role = n.args[0]
        out = coord(role, 0)
        for a in range(1, rank):
            out = make("add", make("mul", out, size("q" if same_grid else role, a)), coord(role, a))
        return out

    return rewrite(e, rule)


def show(e: Expr, axes: tuple[str, ...] | None = None) -> str:
    """The expression as a user would write it; without `axes`, with the names of the grid that is being traced."""
    axes = axes or TRACED.get()
    rank = 1 + max((n.args[1] for n in walk(e) if n.op in ("coord", "size")), default=0)
    rank_names = axes or AXES.get(rank) or tuple(f"a{i}" for i in range(rank))

    def sub(c: Expr, level: int, right: bool = False) -> str:
        text, mine = go(c), PRECEDENCE.get(c.op, 9)
        return f"({text})" if mine < level or (right and mine == level) else text

    def go(n: Expr) -> str:
        match n.op:
            case "const":
                return str(n.args[0])
            case "coord":
                return f"{n.args[0]}.{rank_names[n.args[1]]}"
            case "size":
                return f"{n.args[0]}.size.{rank_names[n.args[1]]}"
            case "index":
                return f"{n.args[0]}.index"
            case "var":
                return str(n.args[0])
            case "head" | "heads" | "batch" | "score":
                return n.op.upper()
            case "load":
                return f"{n.args[0]}[{', '.join(go(i) for i in n.children)}]"
            case "neg":
                return "-" + sub(n.args[0], 7)
            case "not":
                return "~" + sub(n.args[0], 8)
            case _ if n.op in INFIX:
                p = PRECEDENCE[n.op]
                # & and | bind tighter than comparisons in Python, so comparisons under them need their brackets
                # and a comparison of comparisons needs them on both sides, or Python would read a chain
                inner = 4 if p <= 3 else p
                text = [sub(n.args[0], inner), sub(n.args[1], inner, right=n.op not in ("and", "or"))]
                if n.op in ("and", "or"):
                    text = [go(c) if c.op == n.op else t for c, t in zip(n.args, text, strict=True)]
                return f"{text[0]} {INFIX[n.op]} {text[1]}"
        return f"{n.op}({', '.join(go(c) for c in n.args)})"

    return go(e)
