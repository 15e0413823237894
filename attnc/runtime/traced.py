"""A traced statement as operators take it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnc import ir
from attnc.analysis.dropout import with_dropout
from attnc.codegen.around import core_program
from attnc.runtime import parts


@dataclass(frozen=True)
class Traced:
    """A pattern traced on grids of one rank: its program, as text for the operators, and the tables a call gives.

    core: what kernels run, where row maps or a sink surround them (see codegen.around; `eager` runs the whole).
    dropped: the same with its weights dropped out, which reads one more table.
    """

    text: str
    program: ir.Program
    tables: tuple[parts.TableSpec, ...]
    core: Traced | None
    dropped: Traced | None = None

    @property
    def attend(self) -> ir.Attend:
        """The statement."""
        assert isinstance(self.program.attend, ir.Attend)
        return self.program.attend

    @classmethod
    def of(cls, text: str) -> Traced:
        """From a program's text (see ir.to_json)."""
        plain = cls._of(text)
        return replace(plain, dropped=cls._of(ir.to_json(with_dropout(plain.program))))

    @classmethod
    def _of(cls, text: str) -> Traced:
        program = parts.program_of(text)  # the object that the operators' caches know: lookups compare by identity
        core = ir.to_json(core_program(program))
        return cls(text, program, parts.table_specs(program), None if core == text else cls._of(core))
