"""IR expressions as Triton or Python text. Triton's `//` and `%` truncate, the IR's are floor: the floor form is printed where the
numerator may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from attnc import ir
from attnc.analysis.algebra import NotAlgebraic, to_sympy

Loader = Callable[[ir.Expr, tuple[str, ...]], str]

FLOOR_DIV = '''\
@triton.jit
def floor_div(a, b):
    """a // b rounded down, for b > 0; Triton's own rounds towards zero."""
    return tl.where(a < 0, -((b - 1 - a) // b), a // b)
'''
FLOOR_MOD = '''\
@triton.jit
def floor_mod(a, b):
    """a - b * floor(a / b), from 0 to b - 1, for b > 0; Triton's own follows the sign of a."""
    return a - b * tl.where(a < 0, -((b - 1 - a) // b), a // b)
'''
FLOOR_INTEGER = '''\
@triton.jit
def floor_integer(x):
    """The integer at or below x, which stops at 2 ** 30 on either side; the lowest for NaN."""
    return tl.where(x >= -1073741824.0, tl.minimum(tl.floor(x), 1073741824.0), -1073741824.0).to(tl.int32)
'''
FUNCTIONS = {"floor_div": FLOOR_DIV, "floor_mod": FLOOR_MOD, "floor_integer": FLOOR_INTEGER}

# precedence in Python's grammar; comparisons are bracketed under & and |
_LEVEL = {"or": 1, "and": 3, "eq": 0, "ne": 0, "lt": 0, "le": 0, "add": 5, "sub": 5, "mul": 6}
_LEVEL |= {"floordiv": 6, "mod": 6, "truediv": 6, "neg": 7, "not": 7}
_TRITON = {"abs": "tl.abs", "min": "tl.minimum", "max": "tl.maximum", "where": "tl.where", "exp": "tl.exp"}
_TRITON |= {"log": "tl.log", "sqrt": "tl.sqrt", "sigmoid": "tl.sigmoid"}


def nonnegative(e: ir.Expr) -> bool:
    """Proved to be at least 0 (coordinates are, sizes are positive)."""
    try:
        return bool(to_sympy(e).is_nonnegative)
    except NotAlgebraic:
        return False


def text(e: ir.Expr, names: Mapping[ir.Expr, str], load: Loader | None = None, *, host: bool = False) -> str:
    """One expression; `names` maps leaves to text. With host it is Python on ints, else Triton."""

    def go(n: ir.Expr, level: int = -1) -> str:
        if n in names:
            out = names[n]
            return out if level < 0 or _atomic(out) else f"({out})"
        out = step(n)
        mine = _LEVEL.get(n.op, 9)
        if n.op in ("floordiv", "mod") and not host and not nonnegative(n.args[0]):
            mine = 9
        return f"({out})" if mine <= level else out

    def step(n: ir.Expr) -> str:
        a = n.args
        match n.op:
            case "const":
                return literal(a[0])
            case "load":
                assert load is not None
                return load(n, tuple(go(i) for i in n.children))
            case "add" | "sub" | "mul" | "truediv" | "eq" | "ne" | "lt" | "le":
                mine = _LEVEL[n.op]
                return f"{go(a[0], mine - 1 if mine else 0)} {ir.INFIX[n.op]} {go(a[1], mine)}"
            case "and" | "or":
                return f" {ir.INFIX[n.op]} ".join(go(c, _LEVEL[n.op] - (c.op == n.op)) for c in a)
            case "floordiv" | "mod":
                if host or nonnegative(a[0]):
                    return f"{go(a[0], 5)} {ir.INFIX[n.op]} {go(a[1], 6)}"
                return f"floor_{'div' if n.op == 'floordiv' else 'mod'}({go(a[0])}, {go(a[1])})"
            case "neg":
                return f"-{go(a[0], 6)}"
            case "not":
                return f"~{go(a[0], 7)}"
            case "floor":
                return f"floor_integer({go(a[0])})"
            case "tanh":  # no tanh in triton.language
                twice = f"2 * {go(a[0], 6)}" if a[0].kind == "real" else f"(2 * {go(a[0], 6)}).to(tl.float32)"
                return f"(2 * tl.sigmoid({twice}) - 1)"
        if host:
            if n.op == "where":
                return f"({go(a[1], 0)} if {go(a[0], 0)} else {go(a[2], 0)})"
            return f"{n.op}({', '.join(go(c) for c in a)})"
        inner = [go(c) for c in a]
        if n.op in ("exp", "log", "sqrt", "sigmoid") and a[0].kind == "int":
            inner = [f"({inner[0]}).to(tl.float32)"]
        return f"{_TRITON[n.op]}({', '.join(inner)})"

    return go(e)


def _atomic(s: str) -> bool:
    """Needs no brackets anywhere: a name, perhaps indexed."""
    return s.split("[", 1)[0].isidentifier() and (s.isidentifier() or s.endswith("]"))


def literal(x: float | int | bool) -> str:
    """A constant as source text."""
    if isinstance(x, float) and not math.isfinite(x):
        return f'float("{x}")'
    return repr(x)
