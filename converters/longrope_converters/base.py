"""What every exporter takes and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from longrope_export.config import LongRopeConfig
from longrope_export.honours import Cell
from longrope_export.models.model import Model

Progress = Callable[[int], None]  # told the number of bytes finished since the last call


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what the runtimes that will read it do with it.

    Attributes:
        notes: what a user has to know before using the file; empty when there is nothing.
        honours: runtime -> field of the config -> what the runtime does with it.
    """

    output: Path
    source: Path
    format: str
    route: str
    num_bytes: int
    config: LongRopeConfig | None
    notes: tuple[str, ...] = ()
    honours: dict[str, dict[str, Cell]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "source": str(self.source),
            "format": self.format,
            "route": self.route,
            "num_bytes": self.num_bytes,
            "tiers": None if self.config is None else [t.max_length for t in self.config.tiers],
            "notes": list(self.notes),
            "honours": {
                runtime: {name: {"verdict": c.verdict, "note": c.note} for name, c in cells.items()}
                for runtime, cells in self.honours.items()
            },
        }


class Converter(Protocol):
    """An exporter: check everything, then write."""

    def check(self, model: Model, config: LongRopeConfig | None) -> None:
        """Refuse what cannot be written, before anything is written.

        Raises:
            LongRopeError: naming the field that the target cannot express, or what is missing.
        """

    def convert(
        self, model: Model, config: LongRopeConfig | None, output: Path, progress: Progress
    ) -> ExportReport:
        """Write `output` completely or not at all."""
