"""What `accelerate` did, module by module."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One attention module.

    path: its name in the model, "" for the model itself. kind: its class before. patterns: what computes it now; none where it
    was left alone. reason: why it was left alone, or in which calls the original's code still runs.
    """

    path: str
    kind: str
    patterns: tuple[str, ...] = ()
    reason: str = ""

    @property
    def replaced(self) -> bool:
        """Whether attnc computes it now."""
        return bool(self.patterns)


@dataclass
class Report:
    """The attention modules of a model, in its order. `print(report)`, `rich.print(report)`, `report.to_dict()`.

    linear: how many linear layers became `attnc.models.blocks.linear.Linear`. mlps: how many feed-forward layers compute their GELU
    in the same pass. stems: how many networks lay their maps channels last from the image on.
    """

    model: str
    rows: list[Row] = field(default_factory=list)
    linear: int = 0
    mlps: int = 0
    stems: int = 0

    @property
    def replaced(self) -> list[Row]:
        """What attnc computes now."""
        return [r for r in self.rows if r.replaced]

    @property
    def left(self) -> list[Row]:
        """What was left alone."""
        return [r for r in self.rows if not r.replaced]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the model's class and one dict per row."""
        rows = [asdict(r) | {"patterns": list(r.patterns), "replaced": r.replaced} for r in self.rows]
        counts = {"linear": self.linear, "mlps": self.mlps, "stems": self.stems}
        return {"model": self.model, "replaced": len(self.replaced), "left": len(self.left), **counts, "rows": rows}

    def _head(self) -> str:
        beside = f"; {self.linear} linear layers by the faster library" if self.linear else ""
        beside += f", {self.mlps} with their GELU" if self.mlps else ""
        beside += "; maps channels last from the image on" if self.stems else ""
        return f"{self.model}: {len(self.replaced)} attention modules replaced, {len(self.left)} left alone{beside}"

    def __str__(self) -> str:
        lines = [self._head()]
        for r in self.rows:
            what = f"{' and '.join(r.patterns)}{f'; {r.reason}' if r.reason else ''}" if r.replaced else f"left alone: {r.reason}"
            lines.append(f"  {r.path or '(the model)'} ({r.kind}): {what}")
        return "\n".join(lines)

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self._head()), title_justify="left")
        for name in ("module", "class", "computed by", "remark"):
            table.add_column(name, overflow="fold")
        for r in self.rows:
            by = escape(", ".join(r.patterns)) if r.replaced else "[yellow]as before[/yellow]"
            table.add_row(escape(r.path), escape(r.kind.rpartition(".")[2]), by, escape(r.reason))
        return table
