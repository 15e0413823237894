"""What a proof says about one axis, as data: neither sympy nor a rule is needed to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from attnc import ir
from attnc.errors import CacheError

J, R, I = ir.var("j"), ir.var("r"), ir.var("i")


@dataclass(frozen=True)
class AxisForm:
    """What was proved about one axis. Ends are IR integers over j, r and sizes (inverses: over i, r and sizes).

    kind (for people): full, block, shifted block, residue, band, clamped band, point, causal, interval; `residue` parts are
    named in front, e.g. "residue 4 of clamped band". block: tokens per block where both ends are piecewise constant, and shift.
    """

    kind: str
    split: ir.Expr
    lo: ir.Expr
    hi: ir.Expr
    inverse_lo: ir.Expr | None
    inverse_hi: ir.Expr | None
    block: ir.Expr | None = None
    shift: ir.Expr = ir.ZERO

    def map(self, change: Callable[[ir.Expr], ir.Expr]) -> AxisForm:
        """The form with each of its expressions changed."""
        changed: dict[str, Any] = {name: change(e) for name in ENDS if (e := getattr(self, name)) is not None}
        return replace(self, **changed)

    @property
    def full(self) -> bool:
        """Every key of the axis is allowed."""
        return self.kind == "full"

    @property
    def equivalence(self) -> bool:
        """The axis falls into groups whose members see each other and nobody else."""
        return self.kind.split(" of ")[-1] in ("full", "residue", "point", "block", "shifted block")


ENDS = ("split", "lo", "hi", "inverse_lo", "inverse_hi", "block", "shift")


def to_data(form: AxisForm) -> dict[str, Any]:
    """For JSON; `from_data` reads it back equal."""
    ends = {name: getattr(form, name) for name in ENDS}
    return {"kind": form.kind, **{name: None if e is None else ir.expr_to_data(e) for name, e in ends.items()}}


def from_data(data: Any) -> AxisForm:
    """The form of `to_data`. Raises CacheError on anything else."""
    try:
        ends: dict[str, Any] = {
            name: None if data[name] is None else ir.expr_from_data(data[name], variables=True) for name in ENDS
        }
        whole = all(e is None or e.kind == "int" for e in ends.values())
        if not whole or any(ends[name] is None for name in ("split", "lo", "hi", "shift")):
            raise CacheError(f"not the form of an axis: {str(data)[:80]}")
        return AxisForm(str(data["kind"]), **ends)
    except (KeyError, TypeError) as e:
        raise CacheError(f"not the form of an axis: {e}") from e
