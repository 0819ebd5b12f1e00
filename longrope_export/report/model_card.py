"""A model card: Markdown with the YAML header that model hubs read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from longrope_export.evaluate.needle import KINDS, MULTIKEY
from longrope_export.evaluate.perplexity import perplexity_of
from longrope_export.evaluate.results import cells_of, labels, markdown_table, pooled_loss, tables
from longrope_export.evaluate.settings import PERPLEXITY
from longrope_export.report.inputs import ReportInputs
from longrope_export.report.ours import COMMENT
from longrope_export.report.sections import describe, run_commands
from longrope_export.verify.report import markdown as certificate_markdown

_FORMATS = {
    "llama.cpp": "gguf",
    "llama.cpp-stock": "gguf",
    "onnxruntime": "onnx",
    "genai": "onnx",
}


def make_model_card(
    inputs: ReportInputs,
    title: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    images: Sequence[str] = (),
) -> str:
    """The card, ending in a newline.

    Args:
        base_model: hub id of the model that was extended.
        license: as hubs spell it: apache-2.0.
        images: paths of plots, relative to the card.
    """
    lines = [
        "---",
        *_header(inputs, title, base_model, license),
        "---",
        "",
        f"# {_plain(title)}",
        "",
    ]
    configs = inputs.configs()
    if configs:
        lines += ["## Context extension", ""]
        for name, config in configs:
            lines += [f"**{_plain(name)}.** {describe(config)}", ""]
    for _, results in inputs.results:
        for table in tables(results):
            lines += [f"## {table.title}", "", markdown_table(table)]
            if table.note:
                lines += [table.note, ""]
    lines += [line for image in images for line in (f"![{Path(image).stem}]({quote(image)})", "")]
    for _, certificate in inputs.certificates:
        lines += [certificate_markdown(certificate)]
    lines += _usage(inputs)
    return "\n".join(lines).rstrip() + f"\n\n{COMMENT}\n"


def _plain(text: str) -> str:
    """Text in which Markdown and HTML find nothing."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in flat)


def _header(
    inputs: ReportInputs, title: str, base_model: str | None, license: str | None
) -> Iterator[str]:
    """YAML, whose strings are written as JSON's, which YAML reads."""
    if license:
        yield f"license: {json.dumps(license)}"
    if base_model:
        yield f"base_model: {json.dumps(base_model)}"
    names = {m["runtime_name"] for _, results in inputs.results for m in results["models"]}
    formats = sorted({_FORMATS[name] for name in names if name in _FORMATS})
    if names and all(name.startswith("transformers") for name in names):
        yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("longrope", "long-context", *formats))
    cells = [*_metrics(inputs)]
    if not cells:
        return
    yield "model-index:"
    for label in dict.fromkeys(label for label, _, _ in cells):
        yield f"- name: {json.dumps(f'{title}: {label}')}"
        yield "  results:"
        for dataset in dict.fromkeys(text for model, text, _ in cells if model == label):
            yield "  - task:"
            yield "      type: text-generation"
            yield "    dataset:"
            yield f"      name: {json.dumps(dataset)}"
            yield f"      type: {json.dumps(dataset)}"
            yield "    metrics:"
            for model, text, (kind, name, value) in cells:
                if (model, text) == (label, dataset):
                    yield f"    - type: {json.dumps(kind)}"
                    yield f"      name: {json.dumps(name)}"
                    yield f"      value: {json.dumps(value)}"


def _metrics(inputs: ReportInputs) -> Iterator[tuple[str, str, tuple[str, str, float]]]:
    """(model, text, (kind, name, value)) of perplexities and hidden numbers."""
    for _, results in inputs.results:
        for label in labels(results):
            for task in (PERPLEXITY, *KINDS):
                groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
                for cell in cells_of(results, task, label):
                    groups.setdefault((cell["text"], cell["length"]), []).append(cell)
                for (text, length), cells in groups.items():
                    metric = _metric(task, length, cells)
                    if math.isfinite(metric[2]):
                        yield label, text, metric


def _metric(task: str, length: int, cells: Sequence[Mapping[str, Any]]) -> tuple[str, str, float]:
    if task == PERPLEXITY:
        value = perplexity_of(pooled_loss(cells))
        return "perplexity", f"Perplexity, windows of {length} tokens", round(value, 4)
    share = sum(c["numbers_right"] for c in cells) / sum(c["numbers"] for c in cells)
    how = ", compared with the right answers" if task == MULTIKEY else ""
    return "accuracy", f"{task} in {length} tokens, numbers found{how}", round(share, 4)


def _usage(inputs: ReportInputs) -> Iterator[str]:
    shown: list[str] = []
    for name, command in run_commands(inputs):
        if command in shown:
            continue
        if not shown:
            yield "## How to run it"
            yield ""
        shown.append(command)
        yield f"**{_plain(name)}**"
        yield ""
        yield from (f"    {line}" for line in command.splitlines())
        yield ""
