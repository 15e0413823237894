"""The typed, immutable, printable IR. Its equality is the cache key; its JSON form is what operators and caches carry.

Two layers. `Expr` is a small integer/real/boolean expression over coordinates, sizes, the head and batch index, the raw score
and runtime tables. `Attend` and `Channel` are the statements made of them: which key a query may see, how a score becomes a
weight. `Tokens` says where rows live (prefix tokens, then a grid, perhaps extended by virtual padded keys), and `Program` ties
them together.

`//` and `%` are floor division and its remainder, as in Python, whatever the signs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from attnc.errors import CacheError

Kind = Literal["int", "bool", "real"]
Role = Literal["q", "k"]
ROLES: tuple[Role, Role] = ("q", "k")

# op -> (number of expression arguments, how it prints). Leaves have none; "load" takes a table name and any number of indices.
LEAVES = ("const", "coord", "index", "size", "head", "heads", "batch", "score", "var")
ARITY: dict[str, int] = {
    **dict.fromkeys(("add", "sub", "mul", "floordiv", "mod", "truediv", "min", "max"), 2),
    **dict.fromkeys(("eq", "ne", "lt", "le", "and", "or"), 2),
    **dict.fromkeys(("neg", "abs", "not", "exp", "log", "tanh", "sqrt", "sigmoid"), 1),
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


# ------------------------------------------------------------------------------------------------------------------- statements
@dataclass(frozen=True, slots=True)
class Normalizer:
    """How scores become weights. softmax: over "keys" or "queries", `sink` names a table of one extra logit per head."""

    kind: Literal["softmax", "sigmoid", "relu"] = "softmax"
    over: Literal["keys", "queries"] = "keys"
    sink: str | None = None
    power: int = 1


SOFTMAX = Normalizer()


@dataclass(frozen=True, slots=True)
class RowMap:
    """A map applied to each row of q or k before the product: "l2norm" (y = x / max(|x|, eps)), or "rotary" (see
    codegen.around.rotated_rows), by powers of `base`, of neighbouring channels where they are interleaved."""

    kind: Literal["l2norm", "rotary"] = "l2norm"
    eps: float = 1e-12
    base: float = 10000.0
    interleaved: bool = False


@dataclass(frozen=True)
class Attend:
    """out[i] = sum over keys j with relation(i, j) of normalizer(score(i, j)) * post(i, j) * v[j].

    dropout is one more factor, which prefix tokens have, too (see analysis.dropout).
    """

    name: str
    rank: int
    relation: Expr = TRUE
    score: Expr = SCORE
    normalizer: Normalizer = SOFTMAX
    post: Expr | None = None
    q_map: RowMap | None = None
    k_map: RowMap | None = None
    dropout: Expr | None = None

    @cached_property
    def loads(self) -> dict[str, Expr]:
        """The runtime tables in order of first use, each with one of its elements as the statement reads it."""
        found: dict[str, Expr] = {}
        for e in (self.relation, self.score, self.post, self.dropout):
            for n in walk(e) if e is not None else ():
                if n.op == "load":
                    found.setdefault(n.args[0], n)
        if self.normalizer.sink:
            found.setdefault(self.normalizer.sink, load(self.normalizer.sink, (HEAD,)))
        return found

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """Names of the runtime tables, in order of first use."""
        return tuple(self.loads)

    @cached_property
    def int_tables(self) -> tuple[str, ...]:
        """Tables that the relation or dropout reads: integers, without a gradient."""
        return tuple(name for name, e in self.loads.items() if e.kind == "int")

    def table_rank(self, name: str) -> int:
        """Number of dimensions of a table."""
        return len(self.loads[name].children)


@dataclass(frozen=True, slots=True)
class Channel:
    """Tokens are contracted: S[i, j] = scale * sum_n q[n, i] k[n, j]; out[n, i] = sum_j softmax_j(S)[i, j] v[n, j] (DaViT)."""

    name: str = "channel"


@dataclass(frozen=True, slots=True)
class Tokens:
    """An ordered token set: `prefix` tokens, then a row-major grid. None is a length known only when the operator runs.

    `pad` extends each axis by (before, after) virtual rows; "multiple" was resolved to `pad_multiple` per axis (1: none). The
    relation alone gives virtual keys to queries: prefix tokens, which it does not tell of, see the keys that are tokens.
    """

    grid: tuple[int | None, ...]
    prefix: int = 0
    pad: tuple[tuple[int, int], ...] | None = None
    pad_multiple: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """A statement over a query token set and a key token set: all that a backend needs to know besides tensors.

    same_grid: keys lie on the queries' grid, and the statement's sizes are the query's; otherwise each grid has its own.
    """

    attend: Attend | Channel
    queries: Tokens
    keys: Tokens
    same_grid: bool = True


# ------------------------------------------------------------------------------------------------------------------ JSON, as
# data
def expr_to_data(e: Expr) -> Any:
    """An expression as nested lists, for JSON."""
    return [e.op, e.kind, *[expr_to_data(a) if isinstance(a, Expr) else a for a in e.args]]


def _expected_kind(op: str, args: tuple[Any, ...]) -> Kind | None:
    """The kind that an operation on these arguments has; None where an argument has a kind it cannot take."""
    kinds = [a.kind for a in args]
    if op in ("and", "or", "not"):
        return "bool" if set(kinds) == {"bool"} else None
    if op == "where":
        return None if kinds[0] != "bool" else "real" if "real" in kinds[1:] else kinds[1]
    if op in ("eq", "ne", "lt", "le"):
        return "bool"
    if "bool" in kinds:
        return None
    return "real" if "real" in kinds or op in ("truediv", "exp", "log", "tanh", "sqrt", "sigmoid") else "int"


def expr_from_data(data: Any, *, variables: bool = False) -> Expr:
    """Read an expression back. Raises CacheError on anything that is not one. variables: those of proofs may occur in it."""
    if not (isinstance(data, list) and len(data) >= 2 and isinstance(data[0], str) and data[1] in ("int", "bool", "real")):
        raise CacheError(f"not an attnc expression: {str(data)[:80]}")
    op, kind, *rest = data
    args = tuple(expr_from_data(a, variables=variables) if isinstance(a, list) else a for a in rest)
    if op in ARITY:
        ok = len(args) == ARITY[op] and all(isinstance(a, Expr) for a in args) and _expected_kind(op, args) == kind
    elif op == "load":
        ok = bool(args) and isinstance(args[0], str) and args[0].isidentifier() and all(isinstance(a, Expr) for a in args[1:])
        ok = ok and all(a.kind == "int" for a in args[1:]) and kind != "bool"
    elif op == "const":
        ok = len(args) == 1 and type(args[0]) is {"int": int, "bool": bool, "real": float}[kind] and args[0] == args[0]
    elif op in ("coord", "size"):
        ok = len(args) == 2 and args[0] in ("q", "k") and type(args[1]) is int and args[1] >= 0 and kind == "int"
    elif op == "index":
        ok = len(args) == 1 and args[0] in ("q", "k") and kind == "int"
    elif op == "var":
        ok = variables and len(args) == 1 and args[0] in ("j", "r", "i") and kind == "int"
    else:
        ok = op in ("head", "heads", "batch", "score") and not args and kind == ("real" if op == "score" else "int")
    if not ok:
        raise CacheError(f"not an attnc expression: {str(data)[:80]}")
    return Expr(op, args, kind)


def _tokens_in(d: dict[str, Any]) -> Tokens:
    pad = None if d["pad"] is None else tuple((int(a), int(b)) for a, b in d["pad"])
    multiple = None if d["pad_multiple"] is None else tuple(int(m) for m in d["pad_multiple"])
    return Tokens(tuple(None if n is None else int(n) for n in d["grid"]), int(d["prefix"]), pad, multiple)


def _map_out(m: RowMap) -> list[Any]:
    return [m.kind, m.eps] if m.kind == "l2norm" else [m.kind, m.base, m.interleaved]


def _map_in(d: list[Any]) -> RowMap:
    if d[0] == "rotary" and type(d[2]) is bool:
        return RowMap("rotary", base=float(d[1]), interleaved=d[2])
    if d[0] != "l2norm":
        raise CacheError(f"unknown row map {d!r}")
    return RowMap("l2norm", float(d[1]))


def to_json(p: Program) -> str:
    """The program as one line of JSON; `from_json` reads it back equal."""
    a = p.attend
    body: dict[str, Any] = {"op": "channel", "name": a.name}
    if isinstance(a, Attend):
        body = {
            "op": "attend",
            "name": a.name,
            "rank": a.rank,
            "relation": expr_to_data(a.relation),
            "score": expr_to_data(a.score),
        }
        n = a.normalizer
        body["normalizer"] = [n.kind, n.over, n.sink, n.power]
        body["post"] = None if a.post is None else expr_to_data(a.post)
        body["maps"] = [None if m is None else _map_out(m) for m in (a.q_map, a.k_map)]
        if a.dropout is not None:
            body["dropout"] = expr_to_data(a.dropout)
    tokens = [{"grid": t.grid, "prefix": t.prefix, "pad": t.pad, "pad_multiple": t.pad_multiple} for t in (p.queries, p.keys)]
    return json.dumps({"attend": body, "tokens": tokens, "same_grid": p.same_grid}, separators=(",", ":"))


def _check_statement(a: Attend) -> None:
    """Refuse a statement that no declaration makes."""
    spoken = [e for e in (a.relation, a.score, a.post, a.dropout) if e is not None]
    axes = [n.args[1] for e in spoken for n in walk(e) if n.op in ("coord", "size")]
    ranks = {(n.args[0], len(n.args)) for e in spoken for n in walk(e) if n.op == "load"}
    kinds_fit = a.relation.kind == "bool" and "bool" not in (a.score.kind, a.post.kind if a.post else "real")
    if not kinds_fit or a.rank < 1 or max(axes, default=0) >= a.rank or len(ranks) != len({name for name, _ in ranks}):
        raise CacheError(f"not an attnc statement: {a.name[:80]} of rank {a.rank}")


def from_json(text: str) -> Program:
    """Read a program back. Raises CacheError on anything that is not one: the text is data and never executed."""
    try:
        d = json.loads(text)
        b, (tq, tk) = d["attend"], d["tokens"]
        node: Attend | Channel
        if b["op"] == "channel":
            node = Channel(str(b["name"]))
        elif b["op"] != "attend":
            raise CacheError(f"unknown statement {str(b['op'])[:80]!r}")
        else:
            kind, over, sink, power = b["normalizer"]
            if kind not in ("softmax", "sigmoid", "relu") or over not in ("keys", "queries"):
                raise CacheError(f"unknown normalizer {kind!r} over {over!r}")
            if not (sink is None or (isinstance(sink, str) and sink.isidentifier())) or type(power) is not int or power < 1:
                raise CacheError(f"not a normalizer: sink {sink!r}, power {power!r}")
            maps = [None if m is None else _map_in(m) for m in b["maps"]]
            post, dropout = (None if b.get(n) is None else expr_from_data(b[n]) for n in ("post", "dropout"))
            norm = Normalizer(kind, over, sink, int(power))
            statement = (expr_from_data(b["relation"]), expr_from_data(b["score"]), norm, post)
            node = Attend(str(b["name"]), int(b["rank"]), *statement, maps[0], maps[1], dropout)
            _check_statement(node)
        return Program(node, _tokens_in(tq), _tokens_in(tk), bool(d["same_grid"]))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as e:
        raise CacheError(f"not an attnc program: {e}") from e
