"""The whole of `verify`: a plan, the reference, every export, one certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope_export.config import LongRopeConfig
from longrope_export.errors import ConfigError
from longrope_export.models.hf_config import refuse_quantized
from longrope_export.models.model import Model
from longrope_export.runtimes.open import Export
from longrope_export.verify.certificate import make_certificate
from longrope_export.verify.compare import LIMITS, UNPACKED_LIMIT, Limit, limit_name
from longrope_export.verify.memory import available_bytes, count_parameters, longest_length
from longrope_export.verify.plan import Case, make_cases
from longrope_export.verify.probes import make_probes
from longrope_export.verify.rows import ReferenceRows, Say
from longrope_export.verify.run import ExportResult, verify_export
from longrope_export.verify.tokens import make_tokens

#: tokens from the start in a short run; what happens at the borders is seen by the cases there
SHORT_LENGTH = 600


@dataclass(frozen=True)
class Prepared:
    """What every export is run on and held to: one reference serves any number of them.

    Attributes:
        model: the source.
        config: the definition.
        cases: what is run.
        tokens: (n,) ids of the text.
        reference: its logits of all rows that the cases ask for.
        text: that the exports' tokenizers are tried on; None for random tokens.
        seed: of those.
    """

    model: Model
    config: LongRopeConfig
    cases: list[Case]
    tokens: Sequence[int]
    reference: ReferenceRows
    text: str | None
    seed: int


def prepare(
    model: Model,
    config: LongRopeConfig,
    length: int,
    *,
    text: str | None = None,
    seed: int = 0,
    say: Say = lambda what, share: None,
) -> Prepared:
    """Run the reference.

    Args:
        model: the source, with the weights that the exports were made from.
        config: the definition that the exports are held to.
        length: tokens of the longest sequence, see check_length.
        text: what is run, and what the exports' tokenizers are tried on; random tokens if None.
        seed: of those.
        say: progress.

    Raises:
        LongRopeError: the source cannot be run, or the text is too short.
    """
    refuse_quantized(model.path)
    cases = make_cases(config, length)
    tokens = make_tokens(model, text, max(case.num_tokens for case in cases), seed)
    reference = ReferenceRows(model.path, config, tokens, cases, say)
    return Prepared(model, config, cases, tokens, reference, text, seed)


def verify_exports(
    prepared: Prepared,
    exports: Sequence[Export],
    *,
    limits: dict[str, Limit] | None = None,
    threads: int | None = None,
    build: bool = False,
    say: Say = lambda what, share: None,
) -> tuple[dict[str, Any], list[ExportResult]]:
    """Run each export, one at a time in memory.

    Args:
        limits: by precision, before the standard ones.
        threads: of the runtimes.
        build: compile llama.cpp where it is missing.
        say: progress.

    Returns:
        The certificate as JSON values, and the results that it was made of. What goes wrong with
        an export is in its result.
    """
    p = prepared
    probes = make_probes(p.reference, p.cases, p.config, p.tokens)
    results = [
        verify_export(
            export,
            p.config,
            p.tokens,
            p.cases,
            p.reference,
            probes=probes,
            limits=limits,
            text=p.text,
            threads=threads,
            build=build,
            say=say,
        )
        for export in exports
    ]
    seed = p.seed if p.text is None else None
    made = make_certificate(p.model.path, p.config, p.tokens, results, probes, seed)
    return made, results


def unused_limits(limits: Mapping[str, Limit], results: Sequence[ExportResult]) -> list[str]:
    """The names of given limits that no export was held to."""
    known = {**LIMITS, **limits}
    used = {
        limit_name(result.info.precision, known)
        for result in results
        if result.limit and result.info
    }
    if any(result.own_limit for result in results):
        used.add(UNPACKED_LIMIT)
    return [name for name in limits if name not in used]


def check_length(model: Model, config: LongRopeConfig, wanted: int | None) -> int:
    """The longest sequence to run: what is wanted, else the target or what fits into the memory.

    Raises:
        ConfigError: beyond the target, or nothing fits.
    """
    target = config.max_position_embeddings
    if wanted is not None:
        if not 2 <= wanted <= target:
            raise ConfigError(f"the length must be 2 to {target} tokens, the target, got {wanted}")
        return wanted
    fits = longest_length(model, count_parameters(model.path), available_bytes())
    if fits < 2:
        raise ConfigError("not enough free memory for this model in float32: give a length")
    return min(target, fits)
