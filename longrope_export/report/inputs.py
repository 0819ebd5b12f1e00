"""What a report is made of: results, certificates, factors, folders of searches and fine-tunes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longrope_export.config import LongRopeConfig
from longrope_export.definition import FORMAT as FACTORS
from longrope_export.definition import from_json
from longrope_export.errors import ModelError
from longrope_export.evaluate.results import FORMAT as RESULTS
from longrope_export.evaluate.results import read_results, tables
from longrope_export.finetune.metrics import Step, read_metrics
from longrope_export.finetune.tables import FORMAT as FINETUNE_RESULT
from longrope_export.finetune.tables import rule_rows, words
from longrope_export.search.tables import FORMAT as SEARCH_RESULT
from longrope_export.search.tables import test_rows
from longrope_export.verify.certificate import FORMAT as CERTIFICATE
from longrope_export.verify.certificate import read_certificate
from longrope_export.verify.report import table_rows, title_of

_DAMAGES = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)


@dataclass(frozen=True)
class SearchRun:
    """A folder that a search wrote.

    Attributes:
        name: of the folder.
        result: what its result.json says.
    """

    name: str
    result: Mapping[str, Any]


@dataclass(frozen=True)
class FinetuneRun:
    """A folder that a fine-tune wrote.

    Attributes:
        name: of the folder.
        result: what its result.json says.
        steps: what its metrics.jsonl holds.
    """

    name: str
    result: Mapping[str, Any]
    steps: Sequence[Step]


@dataclass
class ReportInputs:
    """All that was given, each with a name for headings."""

    results: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    certificates: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    factors: list[tuple[str, LongRopeConfig]] = field(default_factory=list)
    searches: list[SearchRun] = field(default_factory=list)
    finetunes: list[FinetuneRun] = field(default_factory=list)

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
    """Read files, each by what it says it is, and folders of searches and fine-tunes.

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
                    f"folder of a search or a fine-tune; its format is {kind!r}"
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
            for position, _, *numbers in case["rows"]:  # None for what was not finite
                float(position), [float(number) for number in numbers if number is not None]
                if len(numbers) != 2:
                    raise ValueError(f"a row has {len(numbers) + 2} values, expected 4")
    return certificate


def _read_run(folder: Path, found: ReportInputs) -> None:
    """factors.json and result.json of a search or a fine-tune that has ended."""
    factors, result = folder / "factors.json", folder / "result.json"
    if not (factors.is_file() and result.is_file()):
        raise ModelError(
            f"{folder}: no search or fine-tune that has ended: expected factors.json and "
            f"result.json in it"
        )
    kind = _format_of(result)
    if kind not in (SEARCH_RESULT, FINETUNE_RESULT):
        raise ModelError(
            f"{result}: expected format {SEARCH_RESULT!r} or {FINETUNE_RESULT!r}, got {kind!r}"
        )
    values = json.loads(factors.read_text(encoding="utf-8"))
    name = folder.resolve().name
    found.factors.append((name, from_json(values, str(factors))))
    if kind == SEARCH_RESULT:
        found.searches.append(SearchRun(name, _checked_search(result)))
    else:
        try:
            found.finetunes.append(
                FinetuneRun(name, _checked_finetune(result), read_metrics(folder))
            )
        except _DAMAGES as error:
            raise ModelError(f"{result}: damaged: {error!r}") from error


def _checked_finetune(path: Path) -> dict[str, Any]:
    """A fine-tune's result with everything in it that a report looks at."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    words(result), list(rule_rows(result)), str(result["switch"])
    return result


def _checked_search(path: Path) -> dict[str, Any]:
    """A search's result with everything in it that a report looks at."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    f"{result['chosen']} {result['held_out']} {result['spent']['tokens']:,}"
    list(test_rows(result))
    for entry in result["history"]:
        str(entry["phase"]), float(entry["tokens"]), float(entry["loss"])
    for loss in result["seeds"].values():
        float(loss)
    return result


def _same(one: LongRopeConfig, other: LongRopeConfig) -> bool:
    """Whether they say the same, wherever they come from."""
    return replace(one, provenance={}) == replace(other, provenance={})
