"""The picture of a fine-tune: its loss, step by step, and the learning rate below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrope_export.finetune.metrics import Step
from longrope_export.report.drawing import new_figure, save_png

LOSS = "loss.png"
SMOOTHING = 0.9  # of the line through the steps' losses: the share that stays from step to step


def draw_training(steps: Sequence[Step], size: tuple[float, float] = (8.0, 5.0)) -> Any:
    """A figure of loss and learning rate over steps.

    Args:
        size: inches.

    Raises:
        ToolError: matplotlib is not installed.
    """
    figure, (top, bottom) = new_figure(size, rows=2)
    numbers = [step.step for step in steps]
    top.plot(numbers, [step.loss for step in steps], ".", markersize=3, alpha=0.4, label="a step")
    top.plot(numbers, smooth([step.loss for step in steps]), label="running mean")
    top.set_ylabel("loss, nats per token")
    top.legend()
    bottom.plot(numbers, [step.learning_rate for step in steps])
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    return figure


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential mean of what has been so far, without a bias towards the first value."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        means.append(total / weight)
    return means


def write_training_plot(steps: Sequence[Step], folder: Path) -> Path:
    """loss.png, 150 dpi.

    Raises:
        ToolError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    save_png(draw_training(steps), folder / LOSS)
    return folder / LOSS
