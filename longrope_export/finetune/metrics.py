"""What the steps of a training gave, on disk as JSON lines."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.errors import OutputError
from longrope_export.outputs import write_text

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: from 1 on.
        steps: how many there will be.
        loss: mean over the step's targets before the update, nats per token.
        learning_rate: of the update.
        gradient_norm: before clipping.
        targets: tokens that were predicted.
        tokens: that were computed, padding included.
        seconds: wall time.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    targets: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Metrics:
    """metrics.jsonl of a training.

    Args:
        folder: that it lies in.
        step: of the checkpoint that the training goes on from; later lines are dropped, since those
            steps are computed again.
        is_writer: False in all but one of several processes.

    Attributes:
        steps: every step so far.
    """

    def __init__(self, folder: Path, step: int, *, is_writer: bool = True) -> None:
        self._path, self._is_writer = folder / METRICS, is_writer
        self.steps = [known for known in read_metrics(folder) if known.step <= step]
        if is_writer:
            write_text(self._path, "".join(_line(known) for known in self.steps))

    def add(self, step: Step) -> None:
        """Append a step.

        Raises:
            OutputError: the disk is full.
        """
        self.steps.append(step)
        if not self._is_writer:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(step))
        except OSError as error:
            raise OutputError(
                f"cannot write {self._path}: {error.strerror}: free some space and go on with "
                f"--resume"
            ) from error


def read_metrics(folder: Path) -> list[Step]:
    """The steps that are logged; a last line that a kill has torn is left out."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Step(**json.loads(line)) for line in lines if line.endswith("\n")]


def _line(step: Step) -> str:
    return json.dumps(step.to_json()) + "\n"
