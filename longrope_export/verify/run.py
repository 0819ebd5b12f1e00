"""Run one text through the reference and through exports, and compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import LongRopeError, ModelError
from longrope_export.runtimes.base import Runtime, RuntimeInfo
from longrope_export.runtimes.open import Export, open_runtime
from longrope_export.verify.compare import (
    Difference,
    Limit,
    compare,
    compare_log_probabilities,
    float32_angle_error,
    limit_for,
    log_softmax,
)
from longrope_export.verify.layers import (
    LAYER_LIMITS,
    MOST_TOKENS,
    Hidden,
    first_departure,
    layer_outputs_of,
)
from longrope_export.verify.plan import Case, Row, of_prefixes, rows_of
from longrope_export.verify.reference import Reference

_PROBE_ROWS, _PROBE_TOP = 8, 32

Say = Callable[[str, float], None]  # (what is being done, share that is done, 0 to 1)


@dataclass(frozen=True)
class CaseResult:
    """One case on one runtime.

    Attributes:
        rows: what was compared.
        difference: of those rows.
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


@dataclass(frozen=True)
class ExportResult:
    """One export.

    Attributes:
        info: None if it could not be loaded.
        problems: what was wrong apart from the numbers: a config or a tokenizer that differs, an
            error of the runtime. Empty for a good export.
    """

    export: Export
    info: RuntimeInfo | None
    limit: Limit | None
    cases: list[CaseResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return (
            bool(self.cases)
            and not self.problems
            and all(result.first_miss is None for result in self.cases)
        )


@dataclass(frozen=True)
class Probe:
    """What the reference says at the end of a short text.

    Attributes:
        tokens: the text.
        origin: position of its first token.
        declared_length: to be told to the runtime, see Case.
        top_tokens: (rows, top) the likeliest tokens behind each of the last tokens.
        log_probabilities: (rows, top) of those.
    """

    tokens: list[int]
    origin: int
    declared_length: int | None
    top_tokens: list[list[int]]
    log_probabilities: list[list[float]]


class ReferenceRows:
    """Reference logits of every row that any case asks for, computed once.

    Args:
        path: the source model.
        tokens: (n,) ids of the text.
        say: progress.

    Raises:
        LongRopeError: the model cannot be loaded.
    """

    def __init__(
        self,
        path: Path,
        config: LongRopeConfig,
        tokens: Sequence[int],
        cases: Sequence[Case],
        say: Say = lambda what, share: None,
    ) -> None:
        wanted = {row for case in cases for row in rows_of(case, config)}
        self._path, self._config, self._tokens, self._say = path, config, tokens, say
        self._causal = causal = config.switch is SwitchPolicy.CAUSAL
        self._logits: dict[Row, npt.NDArray[np.float32]] = {}
        self._layers: dict[Row, Hidden] = {}
        self._again: Reference | None = None
        reference = self._load()
        # one pass serves all rows of a sequence that is long enough; under `sequence`, of a tier
        passes: dict[tuple[int, int | None], list[Row]] = {}
        for row in sorted(wanted, key=lambda row: row.position):
            passes.setdefault((row.origin, None if causal else row.tier), []).append(row)
        for (origin, tier), rows in passes.items():
            keep = [row.position - origin for row in rows]
            logits = reference.logits(
                tokens[: keep[-1] + 1],
                keep=keep,
                length=self._length_of(tier),
                first_position=origin,
            )
            self._logits.update(zip(rows, logits, strict=True))

    def _load(self) -> Reference:
        return Reference(self._path, self._config, lambda share: self._say("reference", share))

    def _length_of(self, tier: int | None) -> int | None:
        return None if tier is None else self._config.tiers[tier].max_length

    def layer_outputs(self, row: Row) -> Hidden:
        """(layers, n, width): what each layer hands to the next one, up to a row's token.

        Loads the model again, which `forget_model` then drops.
        """
        if row not in self._layers:
            self._again = self._again or self._load()
            count = row.position - row.origin + 1
            self._layers[row] = self._again.layer_outputs(
                self._tokens[:count],
                min(count, MOST_TOKENS),
                length=self._length_of(None if self._causal else row.tier),
                first_position=row.origin,
            )
        return self._layers[row]

    def forget_model(self) -> None:
        """Give back its memory; rows and outputs of layers stay."""
        self._again = None

    def probes(
        self, cases: Sequence[Case], config: LongRopeConfig, tokens: Sequence[int]
    ) -> list[Probe]:
        """Short texts for a rerun without the source model: the beginning, and the last tier."""
        far = [case for case in cases if case.origin and len(case.appends) == 1]
        return [self._probe(case, config, tokens) for case in (cases[0], *far[-1:])]

    def _probe(self, case: Case, config: LongRopeConfig, tokens: Sequence[int]) -> Probe:
        first = case.appends[0]  # the rows of one call lie side by side
        rows = rows_of(case, config)[: first.keep][-_PROBE_ROWS:]
        log_p = log_softmax(self.of(rows).astype(np.float64))
        top = np.argsort(-log_p, axis=1)[:, :_PROBE_TOP]
        return Probe(
            tokens=list(tokens[: rows[-1].position - case.origin + 1]),
            origin=case.origin,
            declared_length=case.declared_length,
            top_tokens=top.tolist(),
            log_probabilities=np.take_along_axis(log_p, top, 1).round(6).tolist(),
        )

    @property
    def vocabulary(self) -> int:
        """Tokens that a row of logits is about."""
        return len(next(iter(self._logits.values())))

    def of(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        """(len(rows), vocabulary)."""
        return np.stack([self._logits[row] for row in rows])


def verify_export(
    export: Export,
    config: LongRopeConfig,
    tokens: Sequence[int],
    cases: Sequence[Case],
    reference: ReferenceRows,
    *,
    limits: dict[str, Limit] | None = None,
    text: str | None = None,
    threads: int | None = None,
    build: bool = False,
    say: Say = lambda what, share: None,
) -> ExportResult:
    """Run every case on an export. Errors of the runtime become problems of the result.

    Args:
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
    try:
        limit = limit_for(runtime.info.precision, limits)
        result = ExportResult(export, runtime.info, limit)
        cases = [case for case in cases if runtime.info.any_position or not case.origin]
        if runtime.info.log_probabilities is not None:
            cases = [of_prefixes(case, config) for case in cases]
        _check_room(runtime.info, max(case.num_tokens for case in cases))
        if runtime.config is not None:
            result.problems.extend(config_differences(config, runtime.config))
        elif export.runtime == "transformers":
            result.problems.append(
                "carries no definition: write it with longrope-export safetensors"
            )
        if text is not None:
            result.problems.extend(_tokenizer_differences(list(tokens), runtime.tokenize(text)))
        for number, case in enumerate(cases):
            say(f"{runtime.info.name}: {case.name}", number / len(cases))
            result.cases.append(_run_case(runtime, case, config, tokens, reference, limit))
        missed = [i for i, case_ in enumerate(result.cases) if case_.first_miss is not None]
        for number, index in enumerate(missed):
            say(f"{runtime.info.name}: the layer of a miss", number / len(missed))
            result.cases[index] = _with_layer(runtime, result.cases[index], tokens, reference)
        say(runtime.info.name, 1.0)
    except Exception as error:  # whatever a runtime raises, the others go on
        result.problems.append(_describe(error))
    finally:
        runtime.close()
        reference.forget_model()
    return result


def _with_layer(
    runtime: Runtime, result: CaseResult, tokens: Sequence[int], reference: ReferenceRows
) -> CaseResult:
    row = next(row for row in result.rows if row.position == result.first_miss)
    outputs = layer_outputs_of(runtime, result.case, result.rows, row, tokens)
    if outputs is None:
        return result
    limit = LAYER_LIMITS.get(runtime.info.precision, 0.2)
    if runtime.info.float32_angles:
        limit += float(float32_angle_error([row.position])[0])
    departure = first_departure(outputs, reference.layer_outputs(row), limit)
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
    reference: ReferenceRows,
    limit: Limit,
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
    difference = compare_rows(np.concatenate(parts), reference.of(rows), following)
    angle_error = float32_angle_error([row.position for row in rows])
    misses = difference.misses(limit, angle_error if runtime.info.float32_angles else 0.0)
    first = min((row.position for row, bad in zip(rows, misses, strict=True) if bad), default=None)
    return CaseResult(case, rows, difference, first, seconds)


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
