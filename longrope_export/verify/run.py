"""Run one text through the reference and through exports, and compare."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from longrope_export.config import LongRopeConfig
from longrope_export.errors import LongRopeError, ModelError, UnsupportedError
from longrope_export.runtimes.base import Runtime, RuntimeInfo
from longrope_export.runtimes.open import RUNS_CODE, Export, open_runtime
from longrope_export.verify.compare import (
    UNPACKED_LIMIT,
    Difference,
    Limit,
    compare,
    compare_log_probabilities,
    float32_angle_error,
    is_quantized,
    limit_for,
)
from longrope_export.verify.layers import first_departure, layer_limit, layer_outputs_of
from longrope_export.verify.plan import Case, Row, cases_for, rows_of
from longrope_export.verify.probes import Probe, TopRows, top_log_probabilities
from longrope_export.verify.rows import ReferenceRows, Say
from longrope_export.verify.stored import as_stored

# runtimes whose quantized exports can be unpacked for the reference
UNPACKED = ("llama.cpp", "llama.cpp-stock", "onnxruntime", "genai")


@dataclass(frozen=True)
class CaseResult:
    """One case on one runtime.

    Attributes:
        rows: what was compared.
        difference: of those rows, from the reference.
        from_source: None, or for a quantized export whose reference ran on its own weights: the
            difference from the reference on the source's, what quantization costs included.
        first_miss: position of the first row beyond the limit; None where all are within.
        first_layer: the first layer that departs at that position, from 0; None if nothing missed,
            or the runtime does not tell.
        seconds: that the runtime took.
    """

    case: Case
    rows: list[Row]
    difference: Difference
    first_miss: int | None
    seconds: float
    first_layer: int | None = None
    from_source: Difference | None = None


@dataclass(frozen=True)
class ExportResult:
    """One export.

    Attributes:
        info: None if it could not be loaded. For transformers' runtimes with the precision that the
            weights were rounded to, see as_stored.
        limit: of the difference from the reference on the source's weights.
        own_limit: of that from the reference on the export's own weights, unpacked; None where
            there is no such comparison.
        weights: of the reference that the cases' differences are from, in a few words.
        problems: what was wrong apart from the numbers: a config or a tokenizer that differs, an
            error of the runtime. Empty for a good export.
        probe_rows: for each probe, see top_log_probabilities. Empty where `--check` cannot run the
            export, and where it did not pass.
    """

    export: Export
    info: RuntimeInfo | None
    limit: Limit | None
    cases: list[CaseResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    own_limit: Limit | None = None
    weights: str = "the source's"
    probe_rows: list[TopRows | None] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return (
            bool(self.cases)
            and not self.problems
            and all(result.first_miss is None for result in self.cases)
        )


@dataclass(frozen=True)
class _Standard:
    """What an export is held to, and how closely. The first of several is the one that is shown."""

    reference: ReferenceRows
    limit: Limit
    layer_limit: float


def verify_export(
    export: Export,
    config: LongRopeConfig,
    tokens: Sequence[int],
    cases: Sequence[Case],
    reference: ReferenceRows,
    *,
    probes: Sequence[Probe] = (),
    limits: dict[str, Limit] | None = None,
    text: str | None = None,
    threads: int | None = None,
    build: bool = False,
    say: Say = lambda what, share: None,
) -> ExportResult:
    """Run every case on an export. Errors of the runtime become problems of the result.

    Args:
        probes: run at the end if all is well; the result holds what the runtime said.
        limits: by precision, before the standard ones.
        text: if given, the export's tokenizer must give `tokens` for its beginning.
        threads: of the runtime.
        build: compile llama.cpp where it is missing.
    """
    result = ExportResult(export, None, None)
    try:
        context = max(sum(case.batch) or case.num_tokens for case in cases) + 1
        runtime = open_runtime(
            export,
            context=context,
            config=config,
            vocabulary=reference.vocabulary,
            threads=threads,
            build=build,
        )
    except Exception as error:  # whatever a runtime raises, the others go on
        result.problems.append(_describe(error))
        return result
    standards: list[_Standard] = []
    try:
        info = runtime.info
        if export.runtime.startswith("transformers"):
            info = as_stored(info, reference.path)
        limit = limit_for(info.precision, limits)
        result = ExportResult(export, info, limit)
        cases = cases_for(info, cases, config)
        _check_room(info, max(case.num_tokens for case in cases))
        if runtime.config is not None:
            result.problems.extend(config_differences(config, runtime.config))
        elif export.runtime == "transformers":
            result.problems.append(
                "carries no definition: write it with longrope-export safetensors"
            )
        if text is not None:
            result.problems.extend(_tokenizer_differences(list(tokens), runtime.tokenize(text)))
        standards = [_Standard(reference, limit, layer_limit(info.precision))]
        if export.runtime in UNPACKED and is_quantized(info.precision):
            try:
                own = reference.on_weights_of(Path(export.path), cases)
            except UnsupportedError as error:
                result = replace(result, weights=f"the source's ({error})")
            else:
                result.problems.extend(own.problems)
                own_limit = limit_for(UNPACKED_LIMIT, limits)
                standards.insert(0, _Standard(own, own_limit, layer_limit(UNPACKED_LIMIT)))
                result = replace(result, own_limit=own_limit, weights="the export's own, unpacked")
        for number, case in enumerate(cases):
            say(f"{info.name}: {case.name}", number / len(cases))
            result.cases.append(_run_case(runtime, case, config, tokens, standards))
        missed = [i for i, case_ in enumerate(result.cases) if case_.first_miss is not None]
        for number, index in enumerate(missed):
            say(f"{info.name}: the layer of a miss", number / len(missed))
            result.cases[index] = _with_layer(runtime, result.cases[index], tokens, standards[0])
        if result.passed and info.log_probabilities is None and export.runtime != RUNS_CODE:
            result.probe_rows.extend(top_log_probabilities(runtime, probe) for probe in probes)
        say(info.name, 1.0)
    except Exception as error:  # whatever a runtime raises, the others go on
        result.problems.append(_describe(error))
    finally:
        runtime.close()
        for standard in standards:
            standard.reference.forget_model()
    return result


def _with_layer(
    runtime: Runtime, result: CaseResult, tokens: Sequence[int], standard: _Standard
) -> CaseResult:
    row = next(row for row in result.rows if row.position == result.first_miss)
    outputs = layer_outputs_of(runtime, result.case, result.rows, row, tokens)
    if outputs is None:
        return result
    limit = standard.layer_limit
    if runtime.info.float32_angles:
        limit += float(float32_angle_error([row.position])[0])
    departure = first_departure(outputs, standard.reference.layer_outputs(row), limit)
    return replace(result, first_layer=departure)


def _check_room(info: RuntimeInfo, length: int) -> None:
    if info.longest is not None and length > info.longest:
        raise ModelError(
            f"{info.path}: {info.name} has room for sequences of {info.longest} tokens, the plan has "
            f"{length}: start it with more room, or give --length {info.longest}"
        )


def _run_case(
    runtime: Runtime,
    case: Case,
    config: LongRopeConfig,
    tokens: Sequence[int],
    standards: Sequence[_Standard],
) -> CaseResult:
    rows = rows_of(case, config)
    begun = time.perf_counter()
    if case.batch:
        parts = runtime.batch([tokens[:length] for length in case.batch], case.batch_keep)
    else:
        sequence = runtime.start(
            declared_length=case.declared_length,
            chunk_size=case.chunk_size,
            first_position=case.origin,
        )
        parts, position = [], 0
        for append in case.appends:
            part = tokens[position : position + append.count]
            parts.append(sequence.append(part, keep=append.keep))
            position += append.count
    seconds = time.perf_counter() - begun
    next_tokens = (row.position - row.origin + 1 for row in rows)
    following = [tokens[index] if index < len(tokens) else None for index in next_tokens]
    compare_rows = compare if runtime.info.log_probabilities is None else compare_log_probabilities
    logits = np.concatenate(parts)
    angle_error = float32_angle_error([row.position for row in rows])
    if not runtime.info.float32_angles:
        angle_error = np.zeros_like(angle_error)
    differences = [compare_rows(logits, s.reference.of(rows), following) for s in standards]
    misses = [
        difference.misses(standard.limit, angle_error)
        for difference, standard in zip(differences, standards, strict=True)
    ]
    beyond = np.flatnonzero(np.any(misses, axis=0))
    first = min((rows[index].position for index in beyond), default=None)
    from_source = differences[-1] if len(standards) > 1 else None
    return CaseResult(case, rows, differences[0], first, seconds, from_source=from_source)


def config_differences(expected: LongRopeConfig, got: LongRopeConfig) -> list[str]:
    """What an export's own definition says otherwise; float32 is as exact as a file has to be."""
    problems = []
    for name in ("rotary_dim", "max_position_embeddings", "switch", "logit_scaling", "layers"):
        want, have = getattr(expected, name), getattr(got, name)
        if want != have:
            problems.append(f"{name} is {have}, expected {want}")
    if abs(got.rope_theta / expected.rope_theta - 1) > 1e-6:
        problems.append(f"rope_theta is {got.rope_theta}, expected {expected.rope_theta}")
    if len(got.tiers) != len(expected.tiers):
        return [*problems, f"{len(got.tiers)} tiers, expected {len(expected.tiers)}"]
    for index, (want, have) in enumerate(zip(expected.tiers, got.tiers, strict=True)):
        for name in ("max_length", "num_start_tokens"):
            if getattr(want, name) != getattr(have, name):
                problems.append(
                    f"tiers[{index}].{name} is {getattr(have, name)}, expected {getattr(want, name)}"
                )
        if abs(have.attention_factor / want.attention_factor - 1) > 1e-6:
            problems.append(
                f"tiers[{index}].attention_factor is {have.attention_factor}, "
                f"expected {want.attention_factor}"
            )
        pairs = zip(have.rescale_factors, want.rescale_factors, strict=False)
        wrong = [pair for pair, (a, b) in enumerate(pairs) if abs(a / b - 1) > 1e-6]
        if wrong:
            problems.append(
                f"tiers[{index}].rescale_factors[{wrong[0]}] is {have.rescale_factors[wrong[0]]}, "
                f"expected {want.rescale_factors[wrong[0]]} ({len(wrong)} factors differ)"
            )
    return problems


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, LongRopeError) else f"{type(error).__name__}: {error}"


def _tokenizer_differences(expected: list[int], got: list[int] | None) -> list[str]:
    if got is None:
        return ["tokenizer: none that can be asked"]
    for index, (want, have) in enumerate(zip(expected, got, strict=False)):
        if want != have:
            return [f"tokenizer: token {index} of the text is {have}, the source's is {want}"]
    if len(got) < len(expected):
        return [f"tokenizer: gives {len(got)} tokens, the source's gives {len(expected)} or more"]
    return []
