"""What a report is about: a pattern traced, proved, and taken apart into the programs that run."""

from __future__ import annotations

from dataclasses import dataclass

from attnc import ir
from attnc.analysis.structure import Structure, analyse
from attnc.arguments import GridLike, PadLike
from attnc.codegen.around import core_program
from attnc.compiler import Operator, compile
from attnc.errors import AttncError, UnsupportedError
from attnc.lang.pattern import Pattern
from attnc.report import boxes
from attnc.schedule.geometry import Geometry, geometry
from attnc.schedule.split import split

MOST_COUNTED = 1 << 26  # pairs a residual predicate is evaluated for, to count what it allows


@dataclass(frozen=True)
class Part:
    """One program that runs on heads first .. last - 1: the whole statement, or a part of a union or of the heads."""

    first: int
    last: int
    program: ir.Program
    structure: Structure
    geometry: Geometry | None

    @property
    def attend(self) -> ir.Attend:
        """The part's statement."""
        assert isinstance(self.program.attend, ir.Attend)
        return self.program.attend

    @property
    def heads(self) -> int:
        """How many heads run it."""
        return self.last - self.first


@dataclass(frozen=True)
class Subject:
    """A pattern's program on named axes; its geometry and the parts that run where sizes are known."""

    program: ir.Program
    structure: Structure
    axes: tuple[str, ...]
    geometry: Geometry | None
    heads: int
    parts: tuple[Part, ...]
    refused: tuple[str, ...]

    @property
    def attend(self) -> ir.Attend:
        """The whole statement."""
        assert isinstance(self.program.attend, ir.Attend)
        return self.program.attend

    @property
    def union(self) -> bool:
        """Some heads run several parts, whose results are merged."""
        return len({p.first for p in self.parts}) < len(self.parts)

    @property
    def strategy(self) -> str:
        """dense, grouped or banded; several of them where parts differ."""
        return " + ".join(p.structure.strategy for p in self.parts) or "no keys"

    def allowed(self) -> int | None:
        """Allowed score elements over all heads; None where too many pairs would have to be asked.

        Raises ShapeError where a relation reads runtime tables.
        """
        total = 0
        for p in self.parts:
            assert p.geometry is not None
            heads_differ = any(n.op in ("head", "heads") for n in ir.walk(p.structure.residual))
            counted = p.heads if heads_differ else 1
            if p.structure.residual != ir.TRUE and counted * boxes.count(p.geometry).elements > MOST_COUNTED:
                return None
            total += p.geometry.allowed(counted) * (p.heads // counted)
        return total

    def dense(self) -> int:
        """Score elements of dense attention over all heads."""
        assert self.geometry is not None
        return self.heads * self.geometry.n_queries * self.geometry.n_keys


def subject(
    p: Pattern,
    *,
    grid: GridLike = None,
    kv_grid: GridLike = None,
    prefix: int = 0,
    pad: PadLike = None,
    heads: int = 1,
) -> Subject:
    """Trace and prove a pattern. Without a grid: on two axes, or on the first rank that the statement fits."""
    refused: list[str] = []

    def compiled(pad: PadLike) -> Operator:
        return compile(p, grid=grid, kv_grid=kv_grid, prefix=prefix, pad=pad)

    try:
        op = compiled(pad)
    except UnsupportedError as e:
        refused.append(str(e))
        op = compiled(None)
    if op.axes is None:
        program, axes = _first_fit(op)
    else:
        program, axes = op.program(len(op.axes)), op.axes
    s = _proved(program)
    if op.grid is None or None in op.grid or None in (op.kv_grid or ()):
        return Subject(program, s, axes, None, heads, (Part(0, heads, program, s, None),), tuple(refused))
    q_grid = tuple(int(n) for n in op.grid if n is not None)
    k_grid = q_grid if op.kv_grid is None else tuple(int(n) for n in op.kv_grid if n is not None)
    g = geometry(program, q_grid, k_grid)
    parts = tuple(
        Part(run.first, run.last, part, _proved(part), geometry(part, q_grid, k_grid))
        for run in split(core_program(program), q_grid, k_grid, heads, heads)
        for part in run.parts
    )
    return Subject(program, s, axes, g, heads, parts, tuple(refused))


def _proved(program: ir.Program) -> Structure:
    assert isinstance(program.attend, ir.Attend)
    padded = program.keys.pad is not None or program.keys.pad_multiple is not None
    return analyse(program.attend, program.same_grid, padded)


def _first_fit(op: Operator) -> tuple[ir.Program, tuple[str, ...]]:
    errors = []
    for rank in (2, 1, 3):
        try:
            return op.program(rank), ir.AXES[rank]
        except AttncError as e:
            errors.append(e)
    raise errors[0]
