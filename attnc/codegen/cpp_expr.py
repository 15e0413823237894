"""Expressions as C++: what depends on the query only is computed once per query, on the key only once per key, on the head's table
elements once per head, the rest on vectors.

Names that the printed text uses: `P` (the problem), `numbers` (scale, batch, head, its terms), `q` (terms of one query),
`keys` (arrays of terms of a chunk's keys), `k` (the first of L keys), `elements[l]` (a row of table elements per load), `s` (q . k
of L keys).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from attnc import ir
from attnc.errors import UnsupportedError
from attnc.ir import Expr, Kind

TYPES: dict[Kind, str] = {"int": "integer", "bool": "bool", "real": "real"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Text:
    """C++ text of an expression: of one value (`vector` False) or of one per lane. A vector of conditions is 0 or -1 per lane."""

    code: str
    kind: Kind
    vector: bool


@dataclass
class Terms:
    """What a kernel's expressions share: terms per head, query and key, loads, and where tables lie in the problem."""

    axes: tuple[str, ...]
    tables: tuple[str, ...]
    int_tables: tuple[str, ...]
    head: dict[Expr, str] = field(default_factory=dict)
    query: dict[Expr, str] = field(default_factory=dict)
    key: dict[Expr, str] = field(default_factory=dict)
    loads: list[Expr] = field(default_factory=list)

    def name(self, e: Expr, among: dict[Expr, str]) -> str:
        """The name of a term, given on first use."""
        if e not in among:
            among[e] = self.axes[e.args[1]] if e.op == "coord" else f"term{sum(n.startswith('term') for n in among.values())}"
        return among[e]

    def load_number(self, e: Expr) -> int:
        """The number of a real load."""
        if e not in self.loads:
            self.loads.append(e)
        return self.loads.index(e)


def depends(e: Expr, *, learned: bool = True) -> frozenset[str]:
    """Any of q, k (coordinates), s (SCORE), t (an element of a real table, where these are learned)."""
    if e.op == "coord":
        return frozenset(e.args[0])
    if e.op == "score":
        return frozenset("s")
    out = frozenset("t") if learned and e.op == "load" and e.kind == "real" else frozenset[str]()
    for c in e.children:
        out |= depends(c, learned=learned)
    return out


def literal(e: Expr) -> str:
    """A constant as C++."""
    value = e.args[0]
    if e.kind == "bool":
        return "true" if value else "false"
    if e.kind == "int":
        return f"integer({value})"
    if not math.isfinite(value):
        return "(INF - INF)" if math.isnan(value) else "INF" if value > 0 else "-INF"
    return f"real({value!r})"


def _scalar_op(e: Expr, a: list[str]) -> str:
    kinds: list[Kind] = [c.kind for c in e.children]
    if e.op in ("add", "sub", "mul", "truediv", "min", "max", "floordiv", "mod", *COMPARE):
        common: Kind = "real" if "real" in kinds or e.op == "truediv" else "int"
        a = [x if k == common else f"{TYPES[common]}({x})" for x, k in zip(a, kinds, strict=True)]
    elif e.op == "where" and e.kind != "bool":
        a = [a[0], *(x if k == e.kind else f"{TYPES[e.kind]}({x})" for x, k in zip(a[1:], kinds[1:], strict=True))]
    elif e.op in ("exp", "log", "tanh", "sqrt", "sigmoid", "floor"):
        a = [x if k == "real" else f"real({x})" for x, k in zip(a, kinds, strict=True)]
    match e.op:
        case "add" | "sub" | "mul" | "truediv":
            return f"({a[0]} {ir.INFIX[e.op]} {a[1]})"
        case "floordiv" | "mod":
            return f"floor_{'div' if e.op == 'floordiv' else 'mod'}({a[0]}, {a[1]})"
        case "min" | "max":
            return f"{e.op}({a[0]}, {a[1]})"
        case "and" | "or":
            return f"({a[0]} {'&&' if e.op == 'and' else '||'} {a[1]})"
        case "not":
            return f"!{a[0]}"
        case "neg":
            return f"(-{a[0]})"
        case "abs":
            return f"({a[0]} < 0 ? -{a[0]} : {a[0]})"
        case "where":
            return f"({a[0]} ? {a[1]} : {a[2]})"
        case "philox":
            return f"philox({', '.join(a)})"
        case "floor":
            return f"floor_integer({a[0]})"
        case _ if e.op in COMPARE:
            return f"({a[0]} {COMPARE[e.op]} {a[1]})"
    return f"{e.op}({a[0]})"


def _uniform(e: Expr) -> str | None:
    """Leaves that are the same for a whole call or (batch, head)."""
    match e.op:
        case "const":
            return literal(e)
        case "size":
            return f"integer(P.{e.args[0]}_size[{e.args[1]}])"
        case "head" | "batch":
            return f"integer(numbers.{e.op})"
    return None


class Printer:
    """Prints expressions of one kernel, collecting its terms. learned: tables of reals get a gradient from what is printed."""

    def __init__(self, terms: Terms, *, learned: bool = True) -> None:
        self.terms, self.learned = terms, learned

    # ------------------------------------------------------------------------------------------------------------ one value
    def at_point(self, e: Expr) -> str:
        """One value where `c` holds the coordinates of the point (a query's or a key's, as the expression mentions)."""
        leaf = _uniform(e)
        if leaf is not None:
            return leaf
        if e.op == "coord":
            return f"c[{e.args[1]}]"
        inner = [self.at_point(c) for c in e.children]
        return self._load(e, inner) if e.op == "load" else _scalar_op(e, inner)

    def of_pair(self, e: Expr) -> str:
        """One value for the query of `q` and key number k."""
        leaf = _uniform(e)
        if leaf is not None:
            return leaf
        d = depends(e, learned=self.learned)
        if d <= {"q"}:
            return f"q.{self.terms.name(e, self.terms.query)}"
        if d == {"k"}:
            return f"keys.{self.terms.name(e, self.terms.key)}[k]"
        inner = [self.of_pair(c) for c in e.children]
        return self._load(e, inner) if e.op == "load" else _scalar_op(e, inner)

    def _load(self, e: Expr, indices: list[str]) -> str:
        group, names = ("tables", self.terms.tables) if e.kind == "real" else ("int_tables", self.terms.int_tables)
        table = f"P.{group}[{names.index(e.args[0])}]"
        total = " + ".join(f"{x} * {table}.stride[{d}]" for d, x in enumerate(indices)) or "0"
        return f"at({table}, {total})"

    # ------------------------------------------------------------------------------------------------------------ L keys at once
    def vector(self, e: Expr) -> Text:
        """L values, for the query of `q` and the keys k .. k + L - 1."""
        leaf = _uniform(e)
        if leaf is not None:
            return Text(leaf, e.kind, False)
        if e.op == "score":
            return Text("raw", "real", True)
        d = depends(e, learned=self.learned)
        if d == {"t"}:
            return Text(f"numbers.{self.terms.name(e, self.terms.head)}", e.kind, False)
        if e.op == "load" and e.kind == "real" and self.learned:
            return Text(f"load(elements[{self.terms.load_number(e)}] + k)", "real", True)
        if d <= {"q"}:
            return Text(f"q.{self.terms.name(e, self.terms.query)}", e.kind, False)
        if d == {"k"}:
            return Text(f"load(keys.{self.terms.name(e, self.terms.key)} + k)", e.kind, True)
        a = [self.vector(c) for c in e.children]
        if e.op == "load":
            group, names = ("tables", self.terms.tables) if e.kind == "real" else ("int_tables", self.terms.int_tables)
            table = f"P.{group}[{names.index(e.args[0])}]"
            steps = [f"{self.wide(x, 'int')} * splat_integer({table}.stride[{i}])" for i, x in enumerate(a)]
            return Text(f"at({table}, {' + '.join(steps)})", e.kind, True)
        return Text(self._vector_op(e, a), e.kind, True)

    def wide(self, x: Text, kind: Kind) -> str:
        """The text as a vector of this kind."""
        if not x.vector:
            if kind == "bool":
                return f"mask_of({x.code})"
            return f"splat(real({x.code}))" if kind == "real" else f"splat_integer({x.code})"
        code = x.code
        if x.kind == "bool" and kind != "bool":
            code = f"(-{code})"
        return f"to_real({code})" if kind == "real" and x.kind != "real" else code

    def _vector_op(self, e: Expr, a: list[Text]) -> str:
        common: Kind = "real" if "real" in (e.kind, *(x.kind for x in a)) else "int"
        match e.op:
            case "add" | "sub" | "mul" | "truediv":
                return f"({self.wide(a[0], common)} {ir.INFIX[e.op]} {self.wide(a[1], common)})"
            case "floordiv" | "mod":
                name = "div" if e.op == "floordiv" else "mod"
                return f"floor_{name}({self.wide(a[0], common)}, {self.wide(a[1], common)})"
            case "min" | "max":
                x, y = self.wide(a[0], common), self.wide(a[1], common)
                return f"select({x} {'<' if e.op == 'min' else '>'} {y}, {x}, {y})"
            case "and" | "or":
                return f"({self.wide(a[0], 'bool')} {ir.INFIX[e.op]} {self.wide(a[1], 'bool')})"
            case "not":
                return f"~{self.wide(a[0], 'bool')}"
            case "neg":
                return f"(-{self.wide(a[0], e.kind)})"
            case "abs":
                return f"magnitude({self.wide(a[0], e.kind)})"
            case "where":
                yes, no = self.wide(a[1], e.kind), self.wide(a[2], e.kind)
                return f"select({self.wide(a[0], 'bool')}, {yes}, {no})"
            case "floor":
                return f"floor_integer({self.wide(a[0], 'real')})"
            case "mix":
                return f"mix({', '.join(self.wide(x, 'int') for x in a)})"
            case _ if e.op in COMPARE:
                return f"({self.wide(a[0], common)} {COMPARE[e.op]} {self.wide(a[1], common)})"
        return f"{e.op}({self.wide(a[0], 'real')})"

    def real(self, e: Expr) -> str:
        """A vector of reals."""
        return self.wide(self.vector(e), "real")

    # ------------------------------------------------------------------------------------------------------------ table offsets
    def load_offset(self, e: Expr) -> tuple[str, str, str, str | None]:
        """Where a load reads: the offset's part of the query, of the key, of head and batch, of the pair (None: nothing)."""
        name, *indices = e.args
        t = self.terms.tables.index(name)
        parts: dict[str, list[str]] = {"q": [], "k": [], "one": [], "both": []}
        for dim, index in enumerate(indices):
            stride = f"P.tables[{t}].stride[{dim}]"
            for sign, term in summands(index):
                d = depends(term, learned=False)
                side = "one" if not d else "k" if d == {"k"} else "q" if d == {"q"} else "both"
                if "s" in d:
                    raise UnsupportedError(
                        f"the index `{ir.show(term)}` of table {name} is decided by the score; "
                        'backend "cpp" cannot lower it, backend="eager" can'
                    )
                text = Printer(self.terms, learned=False).of_pair(term) if side == "both" else self.at_point(term)
                parts[side].append(f"{'-' if sign < 0 else '+'} {stride} * {text}")

        def total(terms: list[str]) -> str:
            return " ".join(terms).removeprefix("+ ") or "0"

        return total(parts["q"]), total(parts["k"]), total(parts["one"]), total(parts["both"]) if parts["both"] else None


def summands(e: Expr) -> list[tuple[int, Expr]]:
    """An integer expression as a sum of signed terms, products with a constant multiplied out."""
    match e.op:
        case "add":
            return summands(e.args[0]) + summands(e.args[1])
        case "sub":
            return summands(e.args[0]) + [(-s, t) for s, t in summands(e.args[1])]
        case "neg":
            return [(-s, t) for s, t in summands(e.args[0])]
        case "mul":
            for a, b in (e.args, e.args[::-1]):
                if not depends(a):
                    return [(s, ir.make("mul", t, a)) for s, t in summands(b)]
    return [(1, e)]
