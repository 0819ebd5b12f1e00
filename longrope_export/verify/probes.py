"""Short texts that an export runs when it is certified, and again for `verify --check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longrope_export.config import LongRopeConfig
from longrope_export.runtimes.base import Logits, Runtime
from longrope_export.verify.compare import (
    LOGITS_PER_RADIAN,
    Limit,
    compare_log_probabilities,
    float32_angle_error,
    log_softmax,
)
from longrope_export.verify.plan import Case, rows_of
from longrope_export.verify.rows import ReferenceRows

# KL of a row in nats, of any precision but fp32, from what the same export computed when it was
# certified: another machine sums in another order, and activations in blocks of 8 bits may then be
# rounded the other way
MACHINE_KL = 0.01

_ROWS, _TOP = 8, 32
_ROUNDING = 1e-5  # of log probabilities that are written with six digits

TopRows = list[list[float]]


@dataclass(frozen=True)
class Probe:
    """A short text, and the tokens whose probabilities are written down behind its end.

    Attributes:
        tokens: the text.
        origin: position of its first token.
        declared_length: to be told to the runtime, see Case.
        top_tokens: (rows, top) behind each of the last tokens, the likeliest by the reference.
    """

    tokens: list[int]
    origin: int
    declared_length: int | None
    top_tokens: list[list[int]]


def make_probes(
    reference: ReferenceRows, cases: Sequence[Case], config: LongRopeConfig, tokens: Sequence[int]
) -> list[Probe]:
    """One at the beginning, one at the end of the last tier."""
    far = [case for case in cases if case.origin and len(case.appends) == 1]
    return [_probe(reference, case, config, tokens) for case in (cases[0], *far[-1:])]


def _probe(
    reference: ReferenceRows, case: Case, config: LongRopeConfig, tokens: Sequence[int]
) -> Probe:
    first = case.appends[0]  # the rows of one call lie side by side
    rows = rows_of(case, config)[: first.keep][-_ROWS:]
    top = np.argsort(-reference.of(rows), axis=1)[:, :_TOP]
    return Probe(
        tokens=list(tokens[: rows[-1].position - case.origin + 1]),
        origin=case.origin,
        declared_length=case.declared_length,
        top_tokens=top.tolist(),
    )


def top_log_probabilities(runtime: Runtime, probe: Probe) -> TopRows | None:
    """(rows, top) of the probe's top tokens on this runtime, six digits; None where it cannot begin
    at the probe's position.
    """
    logits = _run(runtime, probe)
    if logits is None:
        return None
    log_p = log_softmax(logits.astype(np.float64))
    found: TopRows = np.take_along_axis(log_p, np.asarray(probe.top_tokens), 1).round(6).tolist()
    return found


def probe_problems(
    runtime: Runtime, probe: Probe, certified: TopRows | None, precision: str, limit: Limit
) -> list[str]:
    """What the runtime computes otherwise than when its export was certified; empty if nothing.

    Args:
        certified: see top_log_probabilities; None: nothing is compared.
        precision: of the export; all but fp32 are held to MACHINE_KL.
        limit: of fp32.
    """
    logits = None if certified is None else _run(runtime, probe)
    if logits is None:
        return []
    given = np.full_like(logits, np.nan)
    np.put_along_axis(given, np.asarray(probe.top_tokens), np.asarray(certified, np.float32), 1)
    found = compare_log_probabilities(given, logits, [None] * len(logits))
    kl, difference = float(found.kl.max()), float(found.difference.max())
    end = probe.origin + len(probe.tokens)
    angle = float(float32_angle_error([end])[0]) if runtime.info.float32_angles else 0.0
    most, most_kl = None, MACHINE_KL
    if precision == "fp32":
        most, most_kl = limit.difference, limit.kl + _ROUNDING
    # of log probabilities, not of logits: both the logit and the sum may be off
    if kl <= most_kl + angle**2 and (
        most is None or difference <= 2 * (most + LOGITS_PER_RADIAN * angle)
    ):
        return []
    return [
        f"{runtime.info.path}: {runtime.info.name} here differs from what it computed when it was "
        f"certified, at position {end - 1} and up to {_ROWS - 1} before: KL {kl:.2g}, expected at "
        f"most {most_kl + angle**2:.2g}; log probabilities by up to {difference:.2g}; compare its "
        "version with the certificate's, or verify the export against its source model"
    ]


def _run(runtime: Runtime, probe: Probe) -> Logits | None:
    if probe.origin and not runtime.info.any_position:
        return None
    sequence = runtime.start(declared_length=probe.declared_length, first_position=probe.origin)
    return sequence.append(probe.tokens, keep=len(probe.top_tokens))
