"""How far two sets of logits are apart, and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from longrope_export.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Limit:
    """What a runtime may differ by.

    Attributes:
        difference: largest |logit - reference|, over all rows; None for no limit.
        kl: largest Kullback-Leibler divergence of a row's distribution from the reference's, nats.
        mean_kl: its mean over the rows of a case.
    """

    difference: float | None
    kl: float
    mean_kl: float


UNPACKED_LIMIT = "unpacked"  # for a reference on the export's own weights

# fp32: the accumulated rounding of float32 with room for other orders of summation. The others: about
# three times what was measured on SmolLM2-135M with right exports, see docs/parity.md. A fault that
# moves the logits by less than rounding does stays unseen there: verify in fp32 first.
LIMITS: dict[str, Limit] = {
    "fp32": Limit(1e-3, 1e-6, 1e-7),
    "fp16": Limit(0.3, 1e-3, 3e-4),
    "bf16": Limit(1.1, 6e-3, 7e-4),
    "q8_0": Limit(None, 0.1, 0.03),
    "int8": Limit(None, 0.1, 0.03),
    "4-bit": Limit(None, 5.0, 1.5),
    "2-bit": Limit(None, 9.0, 1.8),
    UNPACKED_LIMIT: Limit(None, 0.2, 0.02),  # activations in blocks of 8 bits
}
# beside those in LIMITS: ggml's types, llama.cpp's file types, ours of ONNX, a server that does not say
_REPORTED = re.compile(r"(i?q|tq)\d_\w+|mxfp4(_moe)?|nvfp4|int4|f64|unknown")
_SMALLEST = -80.0  # below it a probability in float32 loses its digits
_ROUNDING = 1e-3  # of a sum of float32 probabilities; llama-server's, of 49152 tokens, was 1.0002
_BLOCK = 64  # rows
LOGITS_PER_RADIAN = 10.0  # SmolLM2-135M at 32768: 5.6
# by how names of quantized types begin
_BITS = {
    **dict.fromkeys(("q6", "q8"), "q8_0"),
    **dict.fromkeys(("q4", "q5", "iq4", "int4", "mxfp4", "nvfp4"), "4-bit"),
    **dict.fromkeys(("q1", "q2", "q3", "iq1", "iq2", "iq3", "tq"), "2-bit"),  # 3 bits and fewer
}
_NOT_QUANTIZED = ("fp32", "fp16", "bf16", "f64", "unknown")


def limit_for(precision: str, given: dict[str, Limit] | None = None) -> Limit:
    """The limit of a precision as runtimes name it; `given` goes before LIMITS.

    Raises:
        ConfigError: nothing is known about it.
    """
    known = {**LIMITS, **(given or {})}
    return known[limit_name(precision, known)]


def limit_name(precision: str, known: Container[str]) -> str:
    """Under which name in `known` the limit of a precision stands: its own, or its family's.

    Raises:
        ConfigError: under none.
    """
    family = next((name for prefix, name in _BITS.items() if precision.startswith(prefix)), "")
    for name in (precision, family):
        if name in known:
            return name
    raise ConfigError(
        f"no limits are known for {precision}: give them, as --limit {precision}=KL:MEAN_KL"
    )


def is_precision(name: str) -> bool:
    """Whether a limit of this name can be used: a name in LIMITS, or one that a runtime may report."""
    return name in LIMITS or _REPORTED.fullmatch(name) is not None


def is_quantized(precision: str) -> bool:
    """Whether the weights are rounded to blocks of few bits; so is every type not known here."""
    return precision not in _NOT_QUANTIZED


@dataclass(frozen=True)
class Difference:
    """Rows of logits against the reference's, one value for each row.

    Attributes:
        difference: (n,) max |logit - reference|.
        mean_difference: (n,) its mean over the vocabulary.
        kl: (n,) KL divergence in nats, of the runtime's distribution from the reference's.
        same_top: (n,) whether both name the same token first.
        loss: (n,) change of -ln p of the token that follows, NaN where none does.
    """

    difference: Floats
    mean_difference: Floats
    kl: Floats
    same_top: npt.NDArray[np.bool_]
    loss: Floats

    def misses(self, limit: Limit, angle_error: Floats | float = 0.0) -> npt.NDArray[np.bool_]:
        """(n,) the rows that are beyond the limit; NaN is.

        Args:
            angle_error: (n,) radians by which the runtime's angles are rounded. Logits follow
                them in proportion, divergences by their square.
        """
        more_kl = np.square(angle_error)
        bad = ~(self.kl <= limit.kl + more_kl)
        if limit.difference is not None:
            bad |= ~(self.difference <= limit.difference + LOGITS_PER_RADIAN * angle_error)
        if not bad.any() and not np.mean(np.maximum(self.kl - more_kl, 0)) <= limit.mean_kl:
            bad |= self.kl > limit.mean_kl + more_kl
        return bad


def float32_angle_error(positions: Sequence[int]) -> Floats:
    """(n,) radians: half a unit in the last place of a float32 angle at each position.

    The fastest pair turns by one radian a token, so its angle is as large as the position.
    """
    result: Floats = np.asarray(positions, np.float64) * 2.0**-24
    return result


def compare(
    logits: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], following: list[int | None]
) -> Difference:
    """Compare row by row.

    Args:
        logits, expected: (n, vocabulary). A runtime may pad its vocabulary: what is beyond the
            reference's is left out.
        following: (n,) the token after each row, None at the end of the text.

    Raises:
        ConfigError: the numbers of rows differ, or the runtime's vocabulary is smaller.
    """
    if len(logits) != len(expected) or logits.shape[1] < expected.shape[1]:
        raise ConfigError(f"logits have shape {logits.shape}, the reference's {expected.shape}")
    if len(logits) > _BLOCK:  # float64 copies of all rows of a large vocabulary take gigabytes
        parts = [slice(first, first + _BLOCK) for first in range(0, len(logits), _BLOCK)]
        return _join([compare(logits[part], expected[part], following[part]) for part in parts])
    got = logits[:, : expected.shape[1]].astype(np.float64)
    right = expected.astype(np.float64)
    log_got, log_right = log_softmax(got), log_softmax(right)
    kl = (np.exp(log_right) * (log_right - log_got)).sum(1)
    loss = [
        np.nan if token is None else log_right[row, token] - log_got[row, token]
        for row, token in enumerate(following)
    ]
    return Difference(
        difference=np.abs(got - right).max(1),
        mean_difference=np.abs(got - right).mean(1),
        kl=np.maximum(kl, 0),  # rounding
        same_top=got.argmax(1) == right.argmax(1),
        loss=np.asarray(loss, np.float64),
    )


def compare_log_probabilities(
    given: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], following: list[int | None]
) -> Difference:
    """Compare rows of a server, which names some tokens alone, with logits.

    `difference` is the largest |ln p - ln p_reference| of the named tokens; `kl` takes all others
    as one outcome; `loss` is NaN where the token was not named. Rows that name all tokens are
    normalized anew, as `compare` does.

    Args:
        given: (n, vocabulary) natural logarithms of probabilities, NaN where none was named.
        expected: (n, vocabulary) logits.
        following: (n,) the token after each row, None at the end of the text.

    Raises:
        ConfigError: the shapes differ, or a row names no token.
    """
    named = ~np.isnan(given)
    if given.shape != expected.shape or not named.any(1).all():
        raise ConfigError(
            f"log probabilities have shape {given.shape}, the reference's logits {expected.shape}; "
            f"{np.count_nonzero(~named.any(1))} rows are empty"
        )
    if len(given) > _BLOCK:
        parts = [slice(first, first + _BLOCK) for first in range(0, len(given), _BLOCK)]
        return _join(
            [compare_log_probabilities(given[p], expected[p], following[p]) for p in parts]
        )
    log_right = log_softmax(expected.astype(np.float64))
    log_got = np.where(named, given.astype(np.float64), -np.inf)
    whole = named.all(1)
    log_got[whole] = log_softmax(log_got[whole])
    log_right = np.maximum(log_right, _SMALLEST)
    log_got = np.where(named, np.maximum(log_got, _SMALLEST), -np.inf)
    right, got = np.exp(log_right), np.exp(log_got)
    inside_right, inside_got = np.where(named, right, 0).sum(1), got.sum(1)
    inside = np.where(named, right * (log_right - log_got), 0).sum(1)
    inside -= inside_right * np.log(inside_right / inside_got)  # the named ones among themselves
    inside_got = np.clip(inside_right, inside_got - _ROUNDING, inside_got + _ROUNDING)
    outside = np.where(named, 0, right).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.where(outside > 0, np.log(outside / np.maximum(1 - inside_got, 0)), 0)
    kl = inside + inside_right * np.log(inside_right / inside_got) + outside * rest
    loss = [
        log_right[row, token] - log_got[row, token]
        if token is not None and named[row, token]
        else np.nan
        for row, token in enumerate(following)
    ]
    return Difference(
        difference=np.where(named, np.abs(log_got - log_right), 0).max(1),
        mean_difference=np.abs(log_got - log_right).mean(1, where=named),
        kl=np.maximum(kl, 0),  # rounding
        same_top=log_got.argmax(1) == log_right.argmax(1),
        loss=np.asarray(loss, np.float64),
    )


def _join(parts: list[Difference]) -> Difference:
    names = [field.name for field in fields(Difference)]
    return Difference(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})


def log_softmax(logits: Floats) -> Floats:
    """(n, vocabulary) natural logarithms of probabilities."""
    shifted = logits - logits.max(1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result
