"""Expressions and programs as JSON: data, which is checked when it is read and never evaluated."""

from __future__ import annotations

import json
from typing import Any

from attnc.errors import CacheError
from attnc.ir.expr import ARITY, Expr, Kind, walk
from attnc.ir.statement import Attend, Channel, Normalizer, Program, RowMap, Tokens


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
    if op == "floor":
        return "int" if kinds == ["real"] else None
    if op in ("floordiv", "mod"):
        return "int" if kinds == ["int", "int"] else None
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
