"""What torch's scalar functions mean in the IR: name -> rule(tracer, dtype of the result, *args, **kwargs) -> expression.

Integers that went through `.float()` stay integers here while they are added, subtracted, multiplied and compared: the result is
the same number, and a relation can be made of it. What is rounded (`floor`, `ceil`, `round`, `.long()`, `//` and `%` of floats) is
an integer, too; it stops at 2 ** 30 on either side, and is the lowest for what is no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnc import ir
from attnc.ir import Expr, make

if TYPE_CHECKING:
    from attnc.compat.tracing import Tracer

Rule = Callable[..., Expr]
LN2 = math.log(2.0)


def _as_number(e: Expr) -> Expr:
    return make("where", e, ir.ONE, ir.ZERO) if e.kind == "bool" else e


def _whole(e: Expr) -> bool:
    """A float literal that is an integer."""
    return e.op == "const" and e.kind == "real" and math.isfinite(e.args[0]) and e.args[0] == int(e.args[0])


def _alike(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Two numbers; a literal like 3.0 beside an integer becomes one."""
    a, b = _as_number(a), _as_number(b)
    if a.kind == "int" and _whole(b):
        b = ir.const(int(b.args[0]))
    elif b.kind == "int" and _whole(a):
        a = ir.const(int(a.args[0]))
    return a, b


def nonnegative(e: Expr) -> bool:
    """Plainly at least 0."""
    match e.op:
        case "const":
            return e.kind != "bool" and e.args[0] >= 0
        case "coord" | "size" | "head" | "heads" | "batch" | "index" | "abs":
            return True
        case "add" | "mul" | "floordiv" | "truediv" | "min":
            return all(map(nonnegative, e.children))
        case "max":
            return any(map(nonnegative, e.children))
        case "mod":
            return nonnegative(e.args[1])
        case "where":
            return nonnegative(e.args[1]) and nonnegative(e.args[2])
    return False


# ------------------------------------------------------------------------------------------------------------------- arithmetic
def _add(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any, *, alpha: Any = 1) -> Expr:
    a, b = t.number(x), t.number(y)
    if dtype == torch.bool:
        return make("or", a, b)
    if alpha != 1:
        b = make("mul", *_alike(_as_number(b), t.number(alpha)))
    return make("add", *_alike(a, b))


def _sub(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any, *, alpha: Any = 1) -> Expr:
    b = t.number(y)
    if alpha != 1:
        b = make("mul", *_alike(_as_number(b), t.number(alpha)))
    return make("sub", *_alike(t.number(x), b))


def _mul(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
    a, b = t.number(x), t.number(y)
    return make("and", a, b) if dtype == torch.bool else make("mul", *_alike(a, b))


def _div(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any, *, rounding_mode: str | None = None) -> Expr:
    if rounding_mode == "floor":
        return _floordiv(t, dtype, x, y)
    a, b = _as_number(t.number(x)), _as_number(t.number(y))
    if rounding_mode == "trunc":
        return _trunc(t, make("truediv", *_alike(a, b)), x, y)
    if b.op == "const" and b.args[0] == 0:
        t.wrong(f"divides `{ir.show(a)}` by zero")
    return make("truediv", *_alike(a, b))


def _divided(t: Tracer, x: Any, y: Any) -> tuple[Expr, Expr, bool]:
    """Two numbers of which the second is not plainly zero, and whether one is real."""
    a, b = _alike(t.number(x), t.number(y))
    if b.op == "const" and b.args[0] == 0:
        t.wrong(f"divides `{ir.show(a)}` by zero")
    return a, b, "real" in (a.kind, b.kind)


def _floordiv(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
    a, b, real = _divided(t, x, y)
    return t.inexact(make("floor", make("truediv", a, b)), x, y) if real else make("floordiv", a, b)


def _remainder(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
    a, b, real = _divided(t, x, y)
    if real:
        return make("sub", a, make("mul", b, t.inexact(make("floor", make("truediv", a, b)), x, y)))
    return make("mod", a, b)


def _fmod(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
    a, b, real = _divided(t, x, y)
    if real:
        return make("sub", a, make("mul", b, _trunc(t, make("truediv", a, b), x, y)))
    if nonnegative(a) and nonnegative(b):
        return make("mod", a, b)
    if b.op != "const":
        t.refuse(f"takes the truncated remainder of `{ir.show(a)}`, which may be negative (`%` is the floored one)")
    size = ir.const(abs(b.args[0]))  # the remainder has the sign of a
    return make("where", make("lt", a, ir.ZERO), make("neg", make("mod", make("neg", a), size)), make("mod", a, size))


def _trunc(t: Tracer, e: Expr, *of: Any) -> Expr:
    """Rounded towards zero; `of` are the operands that e was made of."""
    if e.kind == "int":
        return e
    if e.op == "truediv" and all(c.kind == "int" for c in e.children):
        a, b = e.children
        if nonnegative(a) and nonnegative(b):
            return make("floordiv", a, b)
        if b.op == "const" and b.args[0] > 0:
            return make("where", make("lt", a, ir.ZERO), make("neg", make("floordiv", make("neg", a), b)), make("floordiv", a, b))
    down = t.inexact(make("floor", e), *of)
    if nonnegative(e):
        return down
    below = t.inexact(make("lt", e, ir.const(0.0)), *of)
    return make("where", below, make("neg", t.inexact(make("floor", make("neg", e)), *of)), down)


def _floor(t: Tracer, dtype: torch.dtype, /, x: Any) -> Expr:
    e = _as_number(t.number(x))
    if e.op == "truediv" and all(c.kind == "int" for c in e.children):
        return make("floordiv", *e.children)
    return t.inexact(make("floor", e), x)


def _ceil(t: Tracer, dtype: torch.dtype, /, x: Any) -> Expr:
    e = _as_number(t.number(x))
    if e.op == "truediv" and all(c.kind == "int" for c in e.children):
        return make("neg", make("floordiv", make("neg", e.args[0]), e.args[1]))
    return make("neg", t.inexact(make("floor", make("neg", e)), x))


def _round(t: Tracer, dtype: torch.dtype, /, x: Any, *, decimals: int = 0) -> Expr:
    e = _as_number(t.number(x))
    if decimals:
        t.refuse(f"rounds `{ir.show(e)}` to {decimals} decimals")
    if e.kind == "int":
        return e
    down = t.inexact(make("floor", e), x)
    rest, half = make("sub", e, down), ir.const(0.5)  # halves go to the even neighbour
    odd = make("eq", make("mod", down, ir.const(2)), ir.ONE)
    up = make("or", t.inexact(make("lt", half, rest), x), make("and", t.inexact(make("eq", rest, half), x), odd))
    return make("where", up, make("add", down, ir.ONE), down)


def _pow(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
    a, b = _as_number(t.number(x)), _as_number(t.number(y))
    if b.op != "const":
        if a.op == "const" and a.args[0] > 0:  # 2 ** x
            return make("exp", make("mul", b, ir.const(math.log(a.args[0]))))
        t.refuse(f"raises `{ir.show(a)}` to the power `{ir.show(b)}`")
    n = b.args[0]
    if n in (0.5, -0.5):
        root = make("sqrt", a)
        return root if n > 0 else make("truediv", ir.const(1.0), root)
    if n != int(n) or not -8 <= n <= 8:
        t.refuse(f"raises `{ir.show(a)}` to the power {n}")
    out = ir.ONE
    for i in range(abs(int(n))):
        out = a if i == 0 else make("mul", out, a)
    return out if n >= 0 else make("truediv", ir.const(1.0), out)


def _neg(t: Tracer, dtype: torch.dtype, /, x: Any) -> Expr:
    return make("neg", _as_number(t.number(x)))


def _abs(t: Tracer, dtype: torch.dtype, /, x: Any) -> Expr:
    return make("abs", _as_number(t.number(x)))


def _same(t: Tracer, dtype: torch.dtype, /, x: Any, *_: Any, **__: Any) -> Expr:
    return t.number(x)


def _detach(t: Tracer, dtype: torch.dtype, /, x: Any) -> Expr:
    e = t.number(x)
    return e if e.kind != "real" else t.refuse(f"stops the gradient of `{ir.show(e)}`")


def _function(op: str, before: Callable[[Expr], Expr] = lambda e: e, after: Callable[[Expr], Expr] = lambda e: e) -> Rule:
    def rule(t: Tracer, dtype: torch.dtype, /, x: Any) -> Expr:
        e = before(_as_number(t.number(x)))
        if e.op == "const":
            try:
                return after(ir.const(float(getattr(math, op)(e.args[0]))))
            except (ValueError, OverflowError) as error:
                t.wrong(f"takes {op}({e.args[0]}): {error}")
        return after(make(op, e))

    return rule


def _times(factor: float) -> Callable[[Expr], Expr]:
    return lambda e: make("mul", e, ir.const(factor))


def _clamp(t: Tracer, dtype: torch.dtype, /, x: Any, min: Any = None, max: Any = None) -> Expr:
    e = _as_number(t.number(x))
    for op, bound in (("max", min), ("min", max)):
        if bound is not None:
            e = make(op, *_alike(e, t.number(bound)))
    return e


def _extreme(op: str) -> Rule:
    def rule(t: Tracer, dtype: torch.dtype, /, x: Any, *others: Any, **named: Any) -> Expr:
        y = named.pop("other", *others[:1]) if others or "other" in named else None
        if named or len(others) > 1 or isinstance(y, bool | int):
            t.refuse(f"takes the {op} over a dimension")
        a = t.number(x)
        if y is None:  # of one element
            return a
        b = t.number(y)
        if dtype == torch.bool:
            return make("and" if op == "min" else "or", a, b)
        return make(op, *_alike(a, b))

    return rule


# -------------------------------------------------------------------------------------------------------------------- conditions
def _compare(op: str, *, swap: bool = False) -> Rule:
    def rule(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
        a, b = t.number(x), t.number(y)
        if swap:
            a, b = b, a
        if a.kind == "bool" and b.kind == "bool" and op in ("eq", "ne"):
            same = make("or", make("and", a, b), make("and", make("not", a), make("not", b)))
            return same if op == "eq" else make("not", same)
        a, b = _alike(a, b)
        if a.kind == "int" and b.op == "const" and b.kind == "real":
            return _with_fraction(op, a, b.args[0])
        if b.kind == "int" and a.op == "const" and a.kind == "real":
            if op in ("eq", "ne"):
                return _with_fraction(op, b, a.args[0])
            return make("not", _with_fraction("le" if op == "lt" else "lt", b, a.args[0]))
        return t.inexact(make(op, a, b), x, y)

    return rule


def _with_fraction(op: str, a: Expr, x: float) -> Expr:
    """An integer compared with a float that is none (or infinite)."""
    if op in ("eq", "ne"):
        return ir.const(op == "ne")
    if not math.isfinite(x):
        return ir.const(x > 0)
    return make("le", a, ir.const(math.floor(x)))


def _logical(op: str) -> Rule:
    def rule(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
        return make(op, _truth(t.number(x)), _truth(t.number(y)))

    return rule


def _truth(e: Expr) -> Expr:
    return e if e.kind == "bool" else make("ne", e, ir.ZERO)


def _not(t: Tracer, dtype: torch.dtype, /, x: Any) -> Expr:
    e = t.number(x)
    if dtype == torch.bool:
        return make("not", _truth(e))
    return make("sub", make("neg", e), ir.ONE)  # bitwise, two's complement


def _xor(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
    if dtype != torch.bool:
        t.refuse("takes the exclusive or of integers")
    a, b = _truth(t.number(x)), _truth(t.number(y))
    return make("or", make("and", a, make("not", b)), make("and", make("not", a), b))


def _and(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
    a, b = t.number(x), t.number(y)
    if dtype == torch.bool:
        return make("and", a, b)
    if a.op == "const":
        a, b = b, a
    if a.op == b.op == "const":
        return ir.const(int(a.args[0]) & int(b.args[0]))
    if a.kind == "int" and b.op == "const" and b.args[0] >= 0 and (b.args[0] + 1) & b.args[0] == 0:
        return make("mod", a, ir.const(b.args[0] + 1))  # the lowest bits
    return t.refuse(f"joins the bits of `{ir.show(a)}` and `{ir.show(b)}`")


def _or(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
    a, b = t.number(x), t.number(y)
    return make("or", a, b) if dtype == torch.bool else t.refuse(f"joins the bits of `{ir.show(a)}` and `{ir.show(b)}`")


def _shift(op: str) -> Rule:
    def rule(t: Tracer, dtype: torch.dtype, /, x: Any, y: Any) -> Expr:
        a, b = _as_number(t.number(x)), t.number(y)
        if b.op != "const" or not 0 <= b.args[0] < 31:
            t.refuse(f"shifts `{ir.show(a)}` by `{ir.show(b)}` bits")
        return make(op, a, ir.const(1 << b.args[0]))

    return rule


def _where(t: Tracer, dtype: torch.dtype, /, test: Any, x: Any, y: Any) -> Expr:
    a, b = t.number(x), t.number(y)
    if dtype == torch.bool:
        c = t.number(test)
        return make("or", make("and", c, a), make("and", make("not", c), b))
    return make("where", _truth(t.number(test)), _as_number(a), _as_number(b))


def _masked_fill(t: Tracer, dtype: torch.dtype, /, x: Any, mask: Any, value: Any) -> Expr:
    return _where(t, dtype, mask, value, x)


# ------------------------------------------------------------------------------------------------------------- types and literals
def _cast(t: Tracer, dtype: torch.dtype, /, x: Any, *_: Any, **__: Any) -> Expr:
    e = t.number(x)
    if dtype == torch.bool:
        return _truth(e)
    e = _as_number(e)
    return e if dtype.is_floating_point else _trunc(t, e, x)


def _literal(value: Any) -> Rule:
    def rule(t: Tracer, dtype: torch.dtype, /, *_: Any, **__: Any) -> Expr:
        return ir.const(bool(value) if dtype == torch.bool else float(value) if dtype.is_floating_point else int(value))

    return rule


def _full(t: Tracer, dtype: torch.dtype, /, x: Any, *rest: Any, fill_value: Any = None, **__: Any) -> Expr:
    value = fill_value if fill_value is not None else rest[-1]
    e = t.number(value)
    return e if e.op != "const" else _literal(value)(t, dtype)


def _sign(t: Tracer, dtype: torch.dtype, /, x: Any) -> Expr:
    e = _as_number(t.number(x))
    below = make("where", make("lt", e, ir.ZERO), ir.const(-1), ir.ZERO)
    return make("where", make("lt", ir.ZERO, e), ir.ONE, below)


def _rsqrt(t: Tracer, dtype: torch.dtype, /, x: Any) -> Expr:
    return make("truediv", ir.const(1.0), make("sqrt", _as_number(t.number(x))))


def _reciprocal(t: Tracer, dtype: torch.dtype, /, x: Any) -> Expr:
    return make("truediv", ir.const(1.0), _as_number(t.number(x)))


def _relu(t: Tracer, dtype: torch.dtype, /, x: Any, *_: Any, **__: Any) -> Expr:
    return make("max", *_alike(t.number(x), ir.ZERO if not dtype.is_floating_point else ir.const(0.0)))


def _swapped(rule: Rule) -> Rule:
    return lambda t, dtype, x, y, **named: rule(t, dtype, y, x, **named)


def _all_names(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_all_names("add radd", _add),
    **_all_names("sub subtract", _sub),
    **_all_names("rsub", _swapped(_sub)),
    **_all_names("mul multiply rmul", _mul),
    **_all_names("div divide true_divide truediv", _div),
    **_all_names("rdiv rtruediv", _swapped(_div)),
    **_all_names("floor_divide floordiv", _floordiv),
    **_all_names("rfloordiv", _swapped(_floordiv)),
    **_all_names("remainder mod", _remainder),
    **_all_names("rmod", _swapped(_remainder)),
    **_all_names("fmod", _fmod),
    **_all_names("floor", _floor),
    **_all_names("ceil", _ceil),
    **_all_names("trunc fix", lambda t, dtype, x: _trunc(t, _as_number(t.number(x)), x)),
    **_all_names("frac", lambda t, dtype, x: make("sub", _as_number(t.number(x)), _trunc(t, _as_number(t.number(x)), x))),
    **_all_names("round", _round),
    **_all_names("pow float_power", _pow),
    **_all_names("rpow", _swapped(_pow)),
    **_all_names("neg negative", _neg),
    **_all_names("abs absolute", _abs),
    **_all_names("pos positive clone contiguous view_as alias lift_fresh", _same),
    **_all_names("detach", _detach),
    **_all_names("square", lambda t, dtype, x: make("mul", _as_number(t.number(x)), _as_number(t.number(x)))),
    **_all_names("exp", _function("exp")),
    **_all_names("exp2", _function("exp", _times(LN2))),
    **_all_names("expm1", _function("exp", after=lambda e: make("sub", e, ir.const(1.0)))),
    **_all_names("log", _function("log")),
    **_all_names("log2", _function("log", after=_times(1 / LN2))),
    **_all_names("log10", _function("log", after=_times(1 / math.log(10.0)))),
    **_all_names("log1p", _function("log", lambda e: make("add", e, ir.const(1.0)))),
    **_all_names("sqrt", _function("sqrt")),
    **_all_names("tanh", _function("tanh")),
    **_all_names("sigmoid expit", lambda t, dtype, x: make("sigmoid", _as_number(t.number(x)))),
    **_all_names("rsqrt", _rsqrt),
    **_all_names("reciprocal", _reciprocal),
    **_all_names("relu", _relu),
    **_all_names("sign sgn", _sign),
    **_all_names("clamp clip", _clamp),
    **_all_names("clamp_min", lambda t, dtype, x, min: _clamp(t, dtype, x, min=min)),
    **_all_names("clamp_max", lambda t, dtype, x, max: _clamp(t, dtype, x, max=max)),
    **_all_names("min minimum fmin", _extreme("min")),
    **_all_names("max maximum fmax", _extreme("max")),
    **_all_names("eq", _compare("eq")),
    **_all_names("ne not_equal", _compare("ne")),
    **_all_names("lt less", _compare("lt")),
    **_all_names("le less_equal", _compare("le")),
    **_all_names("gt greater", _compare("lt", swap=True)),
    **_all_names("ge greater_equal", _compare("le", swap=True)),
    **_all_names("logical_and", _logical("and")),
    **_all_names("logical_or", _logical("or")),
    **_all_names("logical_not invert bitwise_not", _not),
    **_all_names("logical_xor bitwise_xor xor rxor", _xor),
    **_all_names("and rand bitwise_and", _and),
    **_all_names("or ror bitwise_or", _or),
    **_all_names("rshift bitwise_right_shift", _shift("floordiv")),
    **_all_names("lshift bitwise_left_shift", _shift("mul")),
    **_all_names("where", _where),
    **_all_names("masked_fill", _masked_fill),
    **_all_names("to type type_as float double half bfloat16 bool int long short char byte", _cast),
    **_all_names("new_zeros zeros_like", _literal(0)),
    **_all_names("new_ones ones_like", _literal(1)),
    **_all_names("new_full full_like new_tensor", _full),
}
