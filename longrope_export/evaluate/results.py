"""results.json, and the tables that are made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.definition import to_json
from longrope_export.errors import ModelError
from longrope_export.evaluate.needle import KINDS, MULTIKEY, MULTIVALUE, PASSKEY
from longrope_export.evaluate.perplexity import perplexity_of
from longrope_export.evaluate.settings import LM_EVAL, PERPLEXITY, Cell, Settings, Text
from longrope_export.evaluate.subjects import Subject
from longrope_export.stamp import stamp

if TYPE_CHECKING:
    from rich.table import Table as RichTable

FORMAT = "longrope-evaluation"
VERSION = 2
_MIB = 1 << 20
_RIGHT = "numbers right of all (digits right"
_KIND_TITLES = {
    PASSKEY: f"passkey: {_RIGHT})",
    MULTIKEY: f"multikey: {_RIGHT}; -ln p of a number)",
    MULTIVALUE: f"multivalue: {_RIGHT})",
}


def make_results(
    subjects: Sequence[Subject],
    texts: Sequence[Text],
    settings: Settings,
    measured: Iterable[tuple[Cell, Mapping[str, Any]]],
) -> dict[str, Any]:
    """Everything that was measured, as JSON values."""
    cells = []
    runtimes: dict[str, Any] = {}
    for cell, result in measured:
        inner = dict(result)
        runtimes.setdefault(cell.model, inner.pop("runtime", None))
        cells.append({**asdict(cell), **inner})
    return {
        **stamp(FORMAT, VERSION),
        "settings": settings.to_json(),
        "texts": [
            {"name": text.name, "sha256": text.sha256, "characters": len(text.content)}
            for text in texts
        ],
        "models": [
            {
                "label": subject.label,
                "path": str(subject.export.path),
                "runtime_name": subject.export.runtime,
                "runtime": runtimes.get(subject.label),
                "sha256": subject.sha256,
                "config": None if subject.definition is None else to_json(subject.definition),
                "note": subject.note,
                "factors": None if subject.factors is None else str(subject.factors),
            }
            for subject in subjects
        ],
        "cells": cells,
    }


def read_results(path: Path) -> dict[str, Any]:
    """A results.json.

    Raises:
        ModelError: it cannot be read, or is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ModelError(f"{path}: not the results of longrope-export evaluate")
    if values.get("version") != VERSION:
        raise ModelError(
            f"{path}: version is {values.get('version')}, this tool reads {VERSION}: evaluate again"
        )
    return values


def is_results(path: Path) -> bool:
    """It says that it is a results.json, of whatever version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


@dataclass(frozen=True)
class Table:
    """Text in rows.

    Attributes:
        header: of the columns; the first is for names, the others for numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def pooled_loss(cells: Sequence[Mapping[str, Any]]) -> float:
    """Mean loss over all scored tokens of several texts, nats; NaN without any."""
    tokens = sum(cell["scored_tokens"] for cell in cells)
    return sum(c["loss"] * c["scored_tokens"] for c in cells) / tokens if tokens else math.nan


def pooled_stretches(cells: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, float]]:
    """(begin, end, mean loss) by position in a window, over several texts of one length."""
    sums: dict[tuple[int, int], tuple[float, int]] = {}
    for cell in cells:
        for begin, end, loss, tokens in cell["stretches"]:
            total, count = sums.get((begin, end), (0.0, 0))
            sums[begin, end] = (total + loss * tokens, count + tokens)
    return [(begin, end, total / count) for (begin, end), (total, count) in sorted(sums.items())]


def cells_of(
    results: Mapping[str, Any], task: str, model: str | None = None, length: int | None = None
) -> list[dict[str, Any]]:
    """The cells of a task, of one model and length if they are given."""
    return [
        cell
        for cell in results["cells"]
        if cell["task"] == task
        and model in (None, cell["model"])
        and length in (None, cell["length"])
    ]


def labels(results: Mapping[str, Any]) -> list[str]:
    """Of the models, in order."""
    return [model["label"] for model in results["models"]]


def lengths_of(results: Mapping[str, Any], task: str) -> list[int]:
    """Lengths at which a task was run, rising."""
    return sorted({cell["length"] for cell in cells_of(results, task)})


def tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """One for each kind of task that was run, then speed and memory."""
    models = labels(results)
    lengths = lengths_of(results, PERPLEXITY)
    if lengths:
        yield Table(
            "Perplexity",
            ("model", *(f"{n:,}" for n in lengths)),
            tuple((m, *(_perplexity(cells_of(results, PERPLEXITY, m, n)) for n in lengths)) for m in models),
            _perplexity_note(results),
        )  # fmt: skip
    for kind in KINDS:
        lengths = lengths_of(results, kind)
        if lengths:
            yield Table(
                _KIND_TITLES[kind],
                ("model", *(f"{n:,}" for n in lengths)),
                tuple((m, *(_found(cells_of(results, kind, m, n)) for n in lengths)) for m in models),
            )  # fmt: skip
    yield from _task_tables(results, models)
    yield from _cost_table(results, models)


def _perplexity(cells: Sequence[Mapping[str, Any]]) -> str:
    if not cells:
        return "-"
    return number(perplexity_of(pooled_loss(cells)))


def number(value: float | None) -> str:
    """Four digits or so."""
    if value is None:
        return "-"
    return f"{value:#.4g}" if abs(value) < 999.95 or not math.isfinite(value) else f"{value:,.0f}"


def _perplexity_note(results: Mapping[str, Any]) -> str:
    cells = cells_of(results, PERPLEXITY)
    for text in {cell["text"] for cell in cells}:
        if len({cell["tokens_sha256"] for cell in cells if cell["text"] == text and cell["num_tokens"] == cells[0]["num_tokens"]}) > 1:  # fmt: skip
            return (
                "The models cut the text into different tokens: their perplexities do not compare."
            )
    return ""


def _found(cells: Sequence[Mapping[str, Any]]) -> str:
    if not cells:
        return "-"
    right, asked = (sum(c[name] for c in cells) for name in ("numbers_right", "numbers"))
    digits = sum(c["digits_right"] for c in cells) / sum(c["digits"] for c in cells)
    if cells[0]["task"] != MULTIKEY:
        return f"{right}/{asked} ({digits:.0%})"
    losses = [cell["loss"] for cell in cells]
    nats = "-" if None in losses else f"{sum(losses) / len(losses):.1f}"
    return f"{right}/{asked} ({digits:.0%}; {nats})"


def _task_tables(results: Mapping[str, Any], models: Sequence[str]) -> Iterator[Table]:
    cells = cells_of(results, LM_EVAL)
    if not cells:
        return
    columns = list(dict.fromkeys((c["text"], name) for c in cells for name in c["metrics"]))

    def value(model: str, task: str, name: str) -> str:
        found = [c["metrics"].get(name) for c in cells if (c["model"], c["text"]) == (model, task)]
        return number(found[0]) if found else "-"

    yield Table(
        "lm-eval",
        ("model", *(f"{task} {name}" for task, name in columns)),
        tuple((m, *(value(m, task, name) for task, name in columns)) for m in models),
    )


def _cost_table(results: Mapping[str, Any], models: Sequence[str]) -> Iterator[Table]:
    rows = []
    for model in models:
        cells = [cell for cell in results["cells"] if cell["model"] == model]
        longest = max((cell["length"] for cell in cells), default=0)
        at = [cell for cell in cells if cell["length"] == longest and "tokens_per_second" in cell]
        if not at:
            continue
        speeds = [cell["tokens_per_second"] for cell in at]
        made = [c["generated_per_second"] for c in at if c.get("generated_per_second")]
        peaks = [cell["peak_memory_bytes"] for cell in cells if cell.get("peak_memory_bytes")]
        rows.append(
            (
                model,
                f"{longest:,}",
                number(sum(speeds) / len(speeds)),
                number(sum(made) / len(made)) if made else "-",
                f"{max(peaks) / _MIB:,.0f}" if peaks else "-",
            )
        )
    if rows:
        header = ("model", "at length", "tokens/s read", "tokens/s made", "peak MiB")
        yield Table("Speed and memory", header, tuple(rows))


def rich_tables(results: Mapping[str, Any]) -> Iterator[RichTable]:
    """For a terminal."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    for table in tables(results):
        caption = escape(table.note) or None
        shown = RichTable(title=escape(table.title), title_justify="left", caption=caption)
        for index, name in enumerate(table.header):
            shown.add_column(escape(name), justify="right" if index else "left")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        yield shown


def markdown_table(table: Table) -> str:
    """As Markdown, without the title; ends in a newline."""
    rule = "|---|" + "---:|" * (len(table.header) - 1)
    lines = [_line(table.header), rule, *map(_line, table.rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
