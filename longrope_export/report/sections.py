"""The sections of a report: headings, words, tables and plots, as markup."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope_export.config import LongRopeConfig
from longrope_export.evaluate.needle import MULTIKEY, MULTIVALUE, PASSKEY
from longrope_export.evaluate.results import tables
from longrope_export.finetune import tables as finetune_tables
from longrope_export.report.drawing import Plot, inline_svg
from longrope_export.report.inputs import ReportInputs
from longrope_export.report.markup import Html, element, join, table
from longrope_export.search.tables import HEADER, test_rows
from longrope_export.verify.report import COLUMNS, table_rows, title_of

_MOST_TIERS = 12  # of a ladder that are listed
_PROGRAMS = {
    "llama.cpp": "longrope-export llama-cpp run llama-server -m {path} -c {length}",
    "llama.cpp-stock": "llama-server -m {path} -c {length}",
    "transformers-stock": "vllm serve {path} --max-model-len {length}",
}
_LIVE = """from pathlib import Path
from transformers import AutoModelForCausalLM
from longrope_export.factor_files import read_factors
from longrope_export.hf_runtime import apply_longrope

model = AutoModelForCausalLM.from_pretrained({source})
apply_longrope(model, read_factors(Path({factors})))"""
_REMOTE = """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path}, trust_remote_code=True)"""
_ONNX = """from pathlib import Path
from longrope_export.runtimes.onnx import OnnxModel

model = OnnxModel(Path({path}))
for token in model.generate(model.tokenize("Once upon a time"), 100):
    print(model.detokenize([token]), end="", flush=True)"""
_GENAI = """import onnxruntime_genai
model = onnxruntime_genai.Model({path})"""

_MULTIKEY_WORDS = (
    "Several keys with a number each; all are asked for, in turn, with the right answers to those before. Digits "
    "count up to the first that is wrong. A model that copies any of k numbers has 1/k of them right, at ln k nats."
)


def make_sections(inputs: ReportInputs, plots: Sequence[Plot]) -> list[tuple[str, str, Html]]:
    """(anchor, heading, content) of every section that has something to say."""
    found = [
        ("done", "What was done", join([*_done(inputs)])),
        ("factors", "Factors and wavelengths", join([*_factors(inputs), _plots(plots, "wavelengths")])),
        ("search", "Search", join([*_searches(inputs), _plots(plots, "search")])),
        ("training", "Fine-tuning", join([*_finetunes(inputs), _plots(plots, "training")])),
        ("perplexity", "Perplexity", join([*_tables(inputs, "Perplexity"), _plots(plots, "perplexity")])),
        ("needles", "Hidden numbers", join([*_needle_words(inputs), _plots(plots, "needles")])),
        ("tasks", "Tasks", join([*_tables(inputs, "lm-eval")])),
        ("cost", "Speed and memory", join([*_tables(inputs, "Speed")])),
        ("parity", "Parity certificate", join([*_parity(inputs), _plots(plots, "parity")])),
        ("run", "How to run it", join([*_how_to_run(inputs)])),
    ]  # fmt: skip
    return [section for section in found if section[2].strip()]


def _plots(plots: Sequence[Plot], section: str) -> Html:
    figures = [
        element(
            "figure",
            element("figcaption", plot.title),
            Html(inline_svg(plot)),
            class_="plot",
            id=plot.name,
        )
        for plot in plots
        if plot.section == section
    ]
    return element("div", *figures, class_="plots") if figures else Html("")


def _done(inputs: ReportInputs) -> Iterator[Html]:
    for name, results in inputs.results:
        texts = ", ".join(f"{t['name']} ({t['characters']:,} characters)" for t in results["texts"])
        settings = results["settings"]
        stride = settings["stride"] or "the whole window"
        yield element(
            "p",
            f"{name}: evaluated on {results['created'][:10]} by {results['tool']} "
            f"({results['platform']}). Text: {texts or 'none'}. Lengths: "
            f"{', '.join(f'{n:,}' for n in settings['lengths'])} tokens; stride: {stride}; "
            f"seed {settings['seed']}.",
        )
        rows = [
            (
                model["label"],
                _runtime(model),
                (model["runtime"] or {}).get("precision") or "-",
                _reach(model["config"]),
                model["note"] or _method(model["config"]),
            )
            for model in results["models"]
        ]
        header = ("model", "runtime", "weights", "window, target", "definition")
        yield table(header, rows, words=(1, 4))
    for name, certificate in inputs.certificates:
        verdict = "passed" if certificate["passed"] else "FAILED"
        yield element(
            "p",
            f"{name}: exports of {certificate['reference']['path']} ({len(certificate['exports'])}) were "
            f"compared with the definition on {certificate['created'][:10]}: {verdict}.",
        )


def _runtime(model: Mapping[str, Any]) -> str:
    runtime = model["runtime"]
    return f"{runtime['name']} ({runtime['version']})" if runtime else str(model["runtime_name"])


def _reach(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return "-"
    window, target = (config[f"{name}max_position_embeddings"] for name in ("original_", ""))
    return f"{window:,}" if window == target else f"{window:,}, {target:,}"


def _method(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return "unknown"
    method = config.get("provenance", {}).get("method", "unknown method")
    count = len(config["tiers"])
    return f"{method}, {count} tier{'s' if count > 1 else ''}, {config['switch']}"


def _factors(inputs: ReportInputs) -> Iterator[Html]:
    for name, config in inputs.configs():
        yield element("h3", name)
        yield element("p", describe(config))
        step = max(1, -(-len(config.tiers) // _MOST_TIERS))
        shown = [*config.tiers[:-1:step], config.tiers[-1]]
        rows = [
            (
                f"{tier.max_length:,}",
                f"{tier.attention_factor:.4g}",
                str(tier.num_start_tokens),
                f"{tier.rescale_factors[0]:.4g}",
                f"{tier.rescale_factors[len(tier.rescale_factors) // 2]:.4g}",
                f"{tier.rescale_factors[-1]:.4g}",
            )
            for tier in shown
        ]
        header = ("up to tokens", "attention factor", "start tokens", "fastest pair", "middle", "slowest")  # fmt: skip
        yield table(header, rows)


def describe(config: LongRopeConfig) -> str:
    """A definition in words."""
    method = config.provenance.get("method", "not named")
    scaling, count = config.logit_scaling, len(config.tiers)
    tiers = f"{count} tiers, rule {config.switch} at their borders" if count > 1 else "one tier"
    parts = [
        f"Method {method}: from {config.original_max_position_embeddings:,} to "
        f"{config.max_position_embeddings:,} tokens ({config.extension_ratio:.4g} times), {tiers}; "
        f"base {config.rope_theta:g}, {config.num_pairs} pairs."
    ]
    if scaling is not None:
        parts.append(f"Queries are scaled by ln(position) / ln({scaling.base_length}).")
    if config.layers is not None:
        parts.append(f"Rescaled layers: {', '.join(map(str, config.layers))}.")
    return " ".join(parts)


def _searches(inputs: ReportInputs) -> Iterator[Html]:
    for run in inputs.searches:
        yield element("h3", run.name)
        yield table(HEADER, list(test_rows(run.result)))
        spent = run.result["spent"]
        yield element(
            "p",
            f"Chosen: {run.result['chosen']}, after {spent['evaluations']:,} passes and "
            f"{spent['tokens']:,} forward tokens. Test documents; standard errors are over windows; "
            f"{run.result['held_out']}.",
        )


def _finetunes(inputs: ReportInputs) -> Iterator[Html]:
    for run in inputs.finetunes:
        yield element("h3", run.name)
        yield element("p", finetune_tables.words(run.result))
        rows = list(finetune_tables.rule_rows(run.result))
        if rows:
            yield table(finetune_tables.HEADER, rows)
            yield element("p", f"On the validation text; written: {run.result['switch']}.")


def _tables(inputs: ReportInputs, title: str) -> Iterator[Html]:
    for _, results in inputs.results:
        for each in tables(results):
            if each.title.startswith(title):
                yield table(each.header, each.rows)
                if each.note:
                    yield element("p", each.note, class_="bad")


def _needle_words(inputs: ReportInputs) -> Iterator[Html]:
    for kind, words in (
        (PASSKEY, "One number, hidden at several depths of a text of the given length."),
        (MULTIKEY, _MULTIKEY_WORDS),
        (MULTIVALUE, "Several numbers of one key, asked for at once."),
    ):
        found = [*_tables(inputs, kind)]
        if found:
            yield element("h3", kind)
            yield element("p", words)
            yield from found


def _parity(inputs: ReportInputs) -> Iterator[Html]:
    for name, certificate in inputs.certificates:
        verdict = "passed" if certificate["passed"] else "FAILED"
        yield element(
            "p",
            f"{name}, {certificate['created'][:10]}: ",
            element("span", verdict, class_="good" if certificate["passed"] else "bad"),
            f". Logits of {certificate['tokens']['count']:,} tokens against the definition, computed "
            "apart in float32. d: difference of a logit; KL in nats.",
        )
        for export in certificate["exports"]:
            rows = table_rows(export)
            kind = "good" if export["passed"] else "bad"
            summary = element("summary", element("span", title_of(export), class_=kind))
            yield element("details", summary, table(COLUMNS, rows, words=(len(COLUMNS) - 1,)))


def _how_to_run(inputs: ReportInputs) -> Iterator[Html]:
    shown = set()
    for title, command in run_commands(inputs):
        if command not in shown:
            shown.add(command)
            yield element("h3", title)
            yield element("pre", element("code", command))


def run_commands(inputs: ReportInputs) -> Iterator[tuple[str, str]]:
    """(name, how it is run) of every export that was evaluated or verified."""
    for _, results in inputs.results:
        for model in results["models"]:
            if command := how_to_run(model):
                yield model["label"], command
    for _, certificate in inputs.certificates:
        for export in certificate["exports"]:
            if command := how_to_run({**export, "config": certificate["config"], "note": None}):
                yield title_of(export).rpartition(":")[0], command


def how_to_run(model: Mapping[str, Any]) -> str:
    """A command or a few lines of Python for one export; empty for a running server.

    Args:
        model: `runtime_name`, `path`, `config` and, for the live runtime, `note` and `factors`.
    """
    path, name = str(model["path"]), str(model["runtime_name"])
    config = model["config"]
    length = config["max_position_embeddings"] if config else 4096
    if name in _PROGRAMS:
        return _PROGRAMS[name].format(path=shlex.quote(path), length=length)
    if name == "onnxruntime":
        return _ONNX.format(path=json.dumps(path))
    if name == "genai":
        return _GENAI.format(path=json.dumps(path))
    if name == "transformers-remote":
        return _REMOTE.format(path=json.dumps(path))
    if name == "transformers":
        if model.get("note"):  # as it was trained
            return ""
        factors = model.get("factors") or _definition_file(Path(path))
        return _LIVE.format(source=_source(Path(path)), factors=json.dumps(str(factors)))
    return ""


def _source(path: Path) -> str:
    """What transformers' from_pretrained is to be given, as Python."""
    if path.is_file() or path.suffix == ".gguf":
        return f"{json.dumps(str(path.parent))}, gguf_file={json.dumps(path.name)}"
    return json.dumps(str(path))


def _definition_file(path: Path) -> Path:
    """Where a folder or a GGUF carries its definition."""
    whole = path / "longrope.json"
    return path if path.is_file() else whole if whole.is_file() else path / "config.json"
