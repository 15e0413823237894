"""Runs a function of scalar tensors once on symbols: what it asks of torch becomes an expression of the IR.

The symbols are tensors without data (on the meta device), so `isinstance`, `.dtype`, `.shape` and type promotion are torch's own.
A torch function mode sees every call that takes one and looks up its meaning in `torch_ops`; calls on captured tensors alone run as
usual. A captured tensor that symbols index becomes a runtime table.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnc import ir
from attnc.errors import DeclarationError, UnsupportedError

INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_OURS = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<frozen"
_TRUTH = "`if`, `and`, `or`, `not` and chained comparisons ask for its truth"
_VALUE = "int(), float(), range() and list indices ask for its value"
# what Python does to a value that it branches on, converts or iterates
_PYTHON = {
    "__bool__": _TRUTH,
    **dict.fromkeys(("__int__", "__float__", "__index__", "__complex__"), _VALUE),
    **dict.fromkeys(("item", "tolist", "numpy", "__array__", "__dlpack__"), "it is known only when the kernel runs"),
    **dict.fromkeys(("__len__", "__iter__", "__contains__", "__reversed__"), "it is a scalar"),
}
_PLAIN = ("__hash__", "dim", "size", "ndimension", "numel", "nelement", "is_floating_point", "stride")
_ATTRIBUTES = ("shape", "dtype", "ndim", "requires_grad", "layout", "names", "is_sparse", "is_nested", "is_quantized")
_dtypes: dict[Any, torch.dtype] = {}
_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bool": torch.bool,
    "int": torch.int32,
    "long": torch.int64,
    "short": torch.int16,
    "char": torch.int8,
    "byte": torch.uint8,
}


def _cast_to(x: Tensor, *args: Any, **kwargs: Any) -> torch.dtype:
    """The dtype that `x.to(...)` has: given as such, or another tensor's."""
    for a in (*args, *kwargs.values()):
        if isinstance(a, torch.dtype):
            return a
        if isinstance(a, Tensor):
            return a.dtype
    return x.dtype


class Symbol(Tensor):
    """A scalar of the traced function: an expression and, as a tensor on the meta device, its dtype."""

    expr: ir.Expr
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(expr: ir.Expr, dtype: torch.dtype) -> Symbol:
        """A symbol of an expression."""
        made: Symbol = torch.Tensor._make_subclass(Symbol, torch.empty((), dtype=dtype, device="meta"))
        made.expr = expr
        return made


class Rows(Tensor):
    """A captured tensor of which only the first dimensions are indexed so far: `bias[h]`, before `[q_idx - kv_idx]`."""

    table: Tensor
    taken: tuple[ir.Expr, ...]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(table: Tensor, indices: tuple[ir.Expr, ...]) -> Rows:
        """The rest of `table` after these indices."""
        rest = torch.empty(table.shape[len(indices) :], dtype=table.dtype, device="meta")
        made: Rows = torch.Tensor._make_subclass(Rows, rest)
        made.table, made.taken = table, indices
        return made


def _any_symbol(x: Any) -> bool:
    if isinstance(x, Symbol | Rows):
        return True
    if isinstance(x, tuple | list):
        return any(map(_any_symbol, x))
    if isinstance(x, slice):
        return any(map(_any_symbol, (x.start, x.stop, x.step)))
    return isinstance(x, dict) and any(map(_any_symbol, x.values()))


def _shadow(x: Any) -> Any:
    """Arguments of a call with ones for tensors: what torch does to those tells the dtype and shape of the result."""
    if isinstance(x, Tensor):
        return torch.ones((), dtype=x.dtype).expand(x.shape)
    if isinstance(x, tuple | list):
        return type(x)(map(_shadow, x))
    return x


def _kind(x: Any) -> Any:
    """What the dtype of a result depends on in an argument."""
    if isinstance(x, Tensor):
        return x.dtype, x.shape
    if isinstance(x, tuple | list):
        return tuple(map(_kind, x))
    return type(x) if isinstance(x, bool | int | float) else str(x)


def place() -> str:
    """Where the user's function is, for messages: ' (file.py:12)'."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_OURS):
            return f" ({Path(file).name}:{frame.f_lineno})"
        frame = frame.f_back
    return ""


class Tracer(TorchFunctionMode):
    """The mode, and the captured tensors it met: name -> tensor, in order of first use."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.tables: dict[str, Tensor] = {}
        self.dtypes: dict[ir.Expr, torch.dtype] = {}  # what torch computes each rounding and comparison of reals in
        self._names: dict[Any, str] = {}
        self._alive: list[Tensor] = []  # names are kept by address, so what was seen must not be freed
        self.subject = "the function"

    def run(self, fn: Callable[..., Any], name: str, *symbols: Symbol) -> Any:
        """What `fn` returns for these symbols; `name` says in messages what fn is."""
        self.subject = name
        with self:
            return fn(*symbols)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _any_symbol(args) and not _any_symbol(kwargs):
            return func(*args, **kwargs)
        from attnc.compat.torch_ops import RULES

        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._attribute(func, args)
        if name in ("__repr__", "__str__", "__format__"):
            return ir.show(args[0].expr) if isinstance(args[0], Symbol) else "<rows of a captured tensor>"
        if name in _PYTHON:
            self.wrong(
                f"uses the value of `{self.show(args[0])}`: {_PYTHON[name]}; write torch.where(condition, a, b), `&`, `|`, `~`"
            )
        if name in _PLAIN:
            return func(*args, **kwargs)
        if name == "__getitem__":
            return self.getitem(*args)
        name = name.strip("_") if name.startswith("__") else name
        if name not in RULES:
            self.refuse(f"calls `{_spelt(func)}`")
        if any(isinstance(a, Rows) for a in (*args, *kwargs.values())):
            self.wrong(f"gives rows of a captured tensor to `{_spelt(func)}`: index all its dimensions")
        if name in ("to", "type", "type_as"):
            dtype = _cast_to(*args, **kwargs)
        else:
            dtype = _CASTS.get(name) or self._dtype(func, args, kwargs)
        if name == "where" and type(func).__name__ == "method_descriptor":  # x.where(condition, y)
            args = (args[1], args[0], *args[2:])
        return Symbol.of(RULES[name](self, dtype, *args, **kwargs), dtype)

    def _dtype(self, func: Any, args: Any, kwargs: Any) -> torch.dtype:
        """The dtype of a call's result, which torch itself finds out."""
        key = (func, *map(_kind, args), *((k, _kind(v)) for k, v in kwargs.items()))
        if key in _dtypes:
            return _dtypes[key]
        try:
            made = func(*_shadow(args), **{k: _shadow(v) for k, v in kwargs.items() if k != "device"})
        except (RuntimeError, TypeError, ValueError, IndexError) as e:
            self.wrong(f"calls `{_spelt(func)}` with arguments that torch refuses: {str(e).splitlines()[0]}")
        if not isinstance(made, Tensor) or made.shape != ():
            self.wrong(f"makes more than one element with `{_spelt(func)}`: it computes scalars; index captured tensors")
        return _dtypes.setdefault(key, made.dtype)

    # ------------------------------------------------------------------------------------------------------------------ values
    def number(self, x: Any) -> ir.Expr:
        """The expression of an operand: a symbol, a Python number, or a captured tensor of no dimensions."""
        if isinstance(x, Symbol):
            return x.expr
        if isinstance(x, Tensor):
            if x.dim():
                self.wrong(f"uses a captured tensor of shape {tuple(x.shape)} as a whole: index it, so that one element remains")
            return self.element(x.view(1), (ir.ZERO,))
        if isinstance(x, float) and math.isnan(x):
            self.wrong("computes with nan")
        if isinstance(x, bool | int | float):
            return ir.const(x)
        if hasattr(x, "item"):  # a numpy scalar
            return self.number(x.item())
        return self.wrong(f"computes with {x!r} ({type(x).__name__}): use indices, the score, captured tensors and Python numbers")

    def inexact(self, e: ir.Expr, *of: Any) -> ir.Expr:
        """A rounding or comparison of operands; what these are computed in is kept."""
        kinds = [x.dtype for x in of if isinstance(x, Tensor) and x.is_floating_point()]
        self.dtypes[e] = functools.reduce(torch.promote_types, kinds) if kinds else torch.get_default_dtype()
        return e

    def element(self, table: Tensor, indices: tuple[ir.Expr, ...]) -> ir.Expr:
        """One element of a captured tensor. Tensors of conditions are kept as integers."""
        if table.dtype not in (torch.bool, *INTS) and not table.is_floating_point():
            self.refuse(f"reads a captured tensor of {table.dtype}")
        key = (table.data_ptr(), table.shape, table.stride(), table.dtype, table.requires_grad)  # the same view of the same memory
        if key not in self._names:
            self._names[key] = f"captured{len(self.tables)}"
            self.tables[self._names[key]] = table.to(torch.int32) if table.dtype == torch.bool else table
            self._alive.append(table)
        name = self._names[key]
        load = ir.load(name, indices, "real" if table.is_floating_point() else "int")
        return ir.make("ne", load, ir.ZERO) if table.dtype == torch.bool else load

    def getitem(self, table: Any, item: Any) -> Any:
        """table[item]: dimensions without symbols are taken by torch itself, the others become indices of a table's element."""
        before: tuple[ir.Expr, ...] = ()
        if isinstance(table, Symbol):
            if item == () or item is Ellipsis:
                return table
            self.wrong(f"indexes `{self.show(table)}`, which is a scalar")
        items = item if isinstance(item, tuple) else (item,)
        if isinstance(table, Rows):
            if not all(isinstance(i, Symbol | int) for i in items):
                self.wrong("indexes rows of a captured tensor with more than integers: write all indices in one pair of brackets")
            table, before = table.table, table.taken
        known: list[Any] = [slice(None)] * len(before)
        places: list[tuple[int, ir.Expr]] = [(d, e) for d, e in enumerate(before)]
        dimensions = len(before)
        if sum(i is Ellipsis for i in items) > 1:
            self.wrong("indexes a captured tensor with two `...`")
        for i in items:
            if i is Ellipsis:
                room = table.dim() - len(before) - sum(x is not None and x is not Ellipsis for x in items)
                known += [slice(None)] * room
                dimensions += room
            elif isinstance(i, Symbol):
                if i.expr.kind != "int" or i.dtype not in INTS:
                    self.wrong(f"indexes a captured tensor with `{ir.show(i.expr)}`, which is no integer: use // and %, or .long()")
                if ir.SCORE in ir.walk(i.expr):
                    self.refuse(f"indexes a captured tensor with `{ir.show(i.expr)}`, which the score decides")
                places.append((dimensions, i.expr))
                known.append(slice(None))
                dimensions += 1
            elif isinstance(i, int) or (isinstance(i, Tensor) and i.dim() == 0 and i.dtype in INTS):
                if isinstance(i, bool):
                    self.wrong("indexes a captured tensor with a condition")
                if isinstance(i, Tensor):
                    places.append((dimensions, self.number(i)))
                    known.append(slice(None))
                    dimensions += 1
                else:
                    known.append(i)
            elif isinstance(i, slice) and not _any_symbol(i):
                known.append(i)
                dimensions += 1
            else:
                self.refuse(f"indexes a captured tensor with {'a slice of symbols' if isinstance(i, slice) else type(i).__name__}")
        if len(known) > table.dim():
            self.wrong(f"indexes a captured tensor of shape {tuple(table.shape)} with {len(known)} indices")
        rest = table[tuple(known)] if any(not (isinstance(i, slice) and i == slice(None)) for i in known) else table
        left = [d for d in range(rest.dim()) if d not in {p for p, _ in places}]
        if left and places and max(p for p, _ in places) > left[0]:
            rest = rest.permute([p for p, _ in places] + left)
        indices = tuple(e for _, e in places)
        if left:
            return Rows.of(rest, indices)
        e = self.element(rest, indices)
        return Symbol.of(e, rest.dtype)

    def _attribute(self, func: Any, args: Any) -> Any:
        name = getattr(func.__self__, "__name__", "")
        if name == "device":
            return self.device
        if name in ("data", "real"):
            return args[0]
        if name in _ATTRIBUTES:
            return func(*args)
        if name.startswith("is_"):
            return getattr(torch.empty(0, device=self.device), name)
        return self.refuse(f"reads the attribute `.{name}`")

    # ------------------------------------------------------------------------------------------------------------------ messages
    def show(self, x: Any) -> str:
        """An argument as its expression."""
        return ir.show(x.expr) if isinstance(x, Symbol) else "rows of a captured tensor" if isinstance(x, Rows) else repr(x)

    def wrong(self, what: str) -> NoReturn:
        """The function does what no scalar function may."""
        raise DeclarationError(f"{self.subject}{place()} {what}")

    def refuse(self, what: str) -> NoReturn:
        """The function asks for something that the language lacks."""
        raise UnsupportedError(
            f"{self.subject}{place()} {what}, which the language has no word for: compute it on captured tensors outside of the "
            "function and index the result, or say the same with + - * / // % & | ~, comparisons, abs, minimum, maximum, clamp, "
            "where, floor, ceil, round, exp, log, sqrt, tanh, sigmoid"
        )


def _spelt(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return f"Tensor.{name}" if name.startswith("__") or type(func).__name__ == "method_descriptor" else f"torch.{name}"
