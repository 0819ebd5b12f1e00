"""What `finetune` shows: steps while they are computed, and the result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.cli.common import is_quiet, say

if TYPE_CHECKING:
    from longrope_export.finetune.run import Event


def silence(_: Any) -> None:
    """What all processes but the first say."""


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[Event], None]]:
    """Steps, the loss and what is left, on a terminal; else a line now and then."""
    if is_quiet():
        yield lambda event: None
        return
    if not sys.stderr.isatty():
        yield say_seldom
        return
    from rich.console import Console
    from rich.progress import (  # fmt: skip
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=None, loss="")

        def observe(event: Event) -> None:
            step = event.step
            if step is None:
                progress.update(task, description=event.phase, loss=event.progress)
            else:
                loss = f"loss {step.loss:.4f}, {step.tokens / step.seconds:,.0f} tokens/s"
                progress.update(
                    task, description=event.phase, total=step.steps, completed=step.step, loss=loss
                )

        yield observe


def say_seldom(event: Event) -> None:
    """For a log: every phase, and every tenth of the steps."""
    step = event.step
    if step is None:
        if not event.progress:
            say(event.phase)
    elif step.step % max(1, step.steps // 10) == 0:
        say(f"step {step.step} of {step.steps}: loss {step.loss:.4f}, {step.seconds:.1f} s")


def write_plot(steps: list[Any], folder: Path) -> None:
    """loss.png, or a word why there is none."""
    from longrope_export.errors import ToolError
    from longrope_export.report.finetune_plots import write_training_plot

    try:
        write_training_plot(steps, folder)
    except ToolError as error:
        say(f"no plot: {error}")


def say_result(result: dict[str, Any], folder: Path) -> None:
    """What was trained, what it gave, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    from longrope_export.finetune.tables import HEADER, rule_rows, words

    say(words(result))
    rows = list(rule_rows(result))
    if rows:
        title = f"{len(result['validation'])} windows of {result['validation_length']:,} tokens"
        table = Table(*HEADER, title=title)
        for row in rows:
            table.add_row(*row)
        Console(stderr=True).print(table)
    say(f"switch {result['switch']}; {folder}/model and {folder}/factors.json")
    say(f"next: longrope-export gguf {folder}/model --factors {folder}/factors.json")
