"""What a report is made of: results, certificates, factors, folders of search runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longrope_export.config import LongRopeConfig
from longrope_export.definition import FORMAT as FACTORS
from longrope_export.definition import from_json
from longrope_export.errors import ModelError
from longrope_export.evaluate.results import FORMAT as RESULTS
from longrope_export.evaluate.results import read_results, tables
from longrope_export.verify.certificate import FORMAT as CERTIFICATE
from longrope_export.verify.certificate import read_certificate
from longrope_export.verify.report import table_rows, title_of

# names under which a search may log how far it is, and how good the best is
_PROGRESS = ("evaluations", "evaluation", "iteration", "generation", "step")
_BEST = ("best", "best_loss", "best_fitness", "loss", "fitness", "perplexity")


_DAMAGES = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)


@dataclass(frozen=True)
class SearchRun:
    """A folder that a search wrote.

    Attributes:
        name: of the folder.
        progress: (x, best so far) of each line that the log says it in; x rises.
        progress_name, best_name: what the log calls them.
        result: what result.json says; empty without one.
    """

    name: str
    progress: tuple[tuple[float, float], ...]
    progress_name: str
    best_name: str
    result: Mapping[str, Any]


@dataclass
class ReportInputs:
    """All that was given, each with a name for headings."""

    results: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    certificates: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    factors: list[tuple[str, LongRopeConfig]] = field(default_factory=list)
    searches: list[SearchRun] = field(default_factory=list)

    def configs(self) -> list[tuple[str, LongRopeConfig]]:
        """Every definition that says something, once: of factors, certificates and models."""
        found = list(self.factors)
        found += [(name, from_json(c["config"], name)) for name, c in self.certificates]
        for name, results in self.results:
            found += [
                (model["label"], from_json(model["config"], name))
                for model in results["models"]
                if model["config"]
            ]
        shown: list[tuple[str, LongRopeConfig]] = []
        for name, config in found:
            plain = all(tier.is_plain for tier in config.tiers) and not config.logit_scaling
            if not plain and not any(_same(config, other) for _, other in shown):
                shown.append((name, config))
        return shown


def read_inputs(paths: Sequence[Path]) -> ReportInputs:
    """Read files, each by what it says it is, and folders of search runs.

    Raises:
        ModelError: a path cannot be read, or is nothing that a report knows.
        FactorFileError: a definition in it is damaged.
    """
    found = ReportInputs()
    for path in paths:
        if path.is_dir():
            _read_run(path, found)
            continue
        kind = _format_of(path)
        try:
            if kind == RESULTS:
                found.results.append((path.name, _checked_results(path)))
            elif kind == CERTIFICATE:
                found.certificates.append((path.name, _checked_certificate(path)))
            elif kind == FACTORS:
                values = json.loads(path.read_text(encoding="utf-8"))
                found.factors.append((path.name, from_json(values, str(path))))
            else:
                raise ModelError(
                    f"{path}: expected results of evaluate, a certificate of verify, factors, or the "
                    f"folder of a search run; its format is {kind!r}"
                )
        except _DAMAGES as error:
            raise ModelError(f"{path}: damaged: {error!r}") from error
    return found


def _format_of(path: Path) -> object:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    return values.get("format") if isinstance(values, dict) else type(values).__name__


def _checked_results(path: Path) -> dict[str, Any]:
    """Results with everything in them that a report looks at."""
    results = read_results(path)
    for model in results["models"]:
        if model["config"]:
            from_json(model["config"], str(path))
        str(model["label"]), str(model["path"]), model["runtime"], model["note"]
    for cell in results["cells"]:
        cell["depth"], int(cell["length"])
        for begin, end, loss, tokens in cell.get("stretches", ()):
            float(begin), float(end), float(loss), float(tokens)
    for text in results["texts"]:
        f"{text['name']} {text['characters']:,}"
    for name in ("lengths", "stride", "seed"):
        results["settings"][name]
    list(tables(results))
    return results


def _checked_certificate(path: Path) -> dict[str, Any]:
    certificate = read_certificate(path)
    from_json(certificate["config"], str(path))
    f"{certificate['tokens']['count']:,} {certificate['reference']['path']}"
    for export in certificate["exports"]:
        title_of(export), table_rows(export), export["runtime_name"]
        for case in export["cases"]:
            for position, _, difference, kl in case["rows"]:
                float(position), float(difference), float(kl)
    return certificate


def _read_run(folder: Path, found: ReportInputs) -> None:
    """factors.json, log.jsonl and result.json, whichever are there."""
    names = ("factors.json", "log.jsonl", "result.json")
    if not any((folder / name).is_file() for name in names):
        raise ModelError(f"{folder}: no search run: none of {', '.join(names)} in it")
    factors = folder / names[0]
    if factors.is_file() and _format_of(factors) == FACTORS:
        values = json.loads(factors.read_text(encoding="utf-8"))
        found.factors.append((folder.resolve().name, from_json(values, str(factors))))
    result = folder / names[2]
    values = _json_object(result.read_text(encoding="utf-8")) if result.is_file() else {}
    progress, x_name, y_name = _progress(folder / names[1])
    if progress or values:
        run = SearchRun(folder.resolve().name, tuple(progress), x_name, y_name, values)
        found.searches.append(run)


def _progress(path: Path) -> tuple[list[tuple[float, float]], str, str]:
    points: list[tuple[float, float]] = []
    x_name, y_name = "line of the log", "best"
    for line, values in enumerate(_lines(path)):
        y = next((name for name in _BEST if _is_number(values.get(name))), None)
        if y is None:
            continue
        x = next((name for name in _PROGRESS if _is_number(values.get(name))), None)
        x_name, y_name = x or x_name, y
        best = float(values[y])
        before = points[-1][1] if points else best
        points.append((float(values[x]) if x else float(line), min(best, before)))
    return points, x_name, y_name


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            yield _json_object(line)


def _json_object(text: str) -> dict[str, Any]:
    """Empty for what is none: a log may end in half a line."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _same(one: LongRopeConfig, other: LongRopeConfig) -> bool:
    return (one.tiers, one.switch, one.logit_scaling) == (
        other.tiers,
        other.switch,
        other.logit_scaling,
    )
