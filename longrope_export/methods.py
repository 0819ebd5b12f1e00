"""Closed forms: factors for one target length, without a search.

Each returns divisors of inv_freq, shape (pairs,), float64, for `ratio` = target length / window.
They are written against `inv_freq`, the model's own speeds as it was trained, so that they also
extend a model that has factors already (Llama 3.1, a fine-tuned LongRoPE model): the result then
multiplies what the model has. i is the pair index, d = 2 * pairs, s = ratio.

Raises, all of them: ConfigError, for a ratio that is not within the range of factors (1e-30 to
1e30), and where turns are counted, for frequencies that do not fall.
"""

from __future__ import annotations

import math

import numpy as np

from longrope_export.config import LARGEST, SMALLEST
from longrope_export.errors import ConfigError
from longrope_export.rope import FloatArray


def pi_factors(inv_freq: FloatArray, ratio: float) -> FloatArray:
    """lambda_i = s (position interpolation, arXiv 2306.15595)."""
    _check_ratio(ratio)
    return np.full(len(inv_freq), float(ratio))


def ntk_factors(inv_freq: FloatArray, ratio: float) -> FloatArray:
    """lambda_i = s^(2i / (d-2)): 1 for the first pair, s for the last ("NTK-aware")."""
    _check_ratio(ratio)
    pairs = len(inv_freq)
    return np.asarray(ratio ** (np.arange(pairs) / max(pairs - 1, 1)), dtype=np.float64)


def dynamic_ntk_factors(inv_freq: FloatArray, ratio: float, factor: float) -> FloatArray:
    """NTK with the base that transformers' "dynamic" type has at this length.

    b' = b * (factor * s - (factor - 1))^(d / (d-2)), as lambda_i = (b'/b)^(2i/d).

    Args:
        ratio: current length over window.
        factor: the config's `factor`, constant over all lengths.
    """
    return ntk_factors(inv_freq, factor * ratio - (factor - 1))


def yarn_factors(
    inv_freq: FloatArray,
    ratio: float,
    window: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ramp: str = "code",
) -> FloatArray:
    """lambda_i = 1 / (gamma_i + (1 - gamma_i) / s), gamma from 1 (keep) to 0 (interpolate).

    Source: YaRN, arXiv 2309.00071 section 3.2. With r_i the turns of pair i within the window:

    - ramp "code" (the authors', transformers', every released model): gamma falls linearly in i
      between low = floor(index with r = beta_fast) and high = ceil(index with r = beta_slow);
    - ramp "code-exact": the same without rounding (transformers' `truncate: false`);
    - ramp "paper" (eq. 18): gamma = clip((r_i - beta_slow) / (beta_fast - beta_slow), 0, 1).

    Raises:
        ConfigError: beta_fast is not above beta_slow, one of them is out of the range of factors,
            or the ramp is unknown.
    """
    _check_ratio(ratio)
    if not LARGEST >= beta_fast > beta_slow >= SMALLEST:
        raise ConfigError(
            f"yarn: beta_fast {beta_fast:g} must be above beta_slow {beta_slow:g}, "
            f"both {SMALLEST:g} to {LARGEST:g}"
        )
    pairs = len(inv_freq)
    if ramp == "paper":
        turns = window * inv_freq / (2 * math.pi)
        gamma = np.clip((turns - beta_slow) / (beta_fast - beta_slow), 0, 1)
    elif ramp in ("code", "code-exact"):
        low = index_with_turns(inv_freq, window, beta_fast)
        high = index_with_turns(inv_freq, window, beta_slow)
        if ramp == "code":
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        high = high + 0.001 if low == high else high
        gamma = 1 - np.clip((np.arange(pairs) - low) / (high - low), 0, 1)
    else:
        raise ConfigError(f"yarn: ramp must be code, code-exact or paper, got {ramp!r}")
    return 1 / (gamma + (1 - gamma) / ratio)


def llama3_factors(
    inv_freq: FloatArray,
    ratio: float,
    window: int,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> FloatArray:
    """Llama 3.1's scaling: the paper ramp of YaRN between two wavelengths (transformers "llama3").

    Keep pairs with wavelength < window / high_freq_factor, divide those with wavelength >
    window / low_freq_factor by s, blend the frequencies in between.
    """
    return yarn_factors(inv_freq, ratio, window, high_freq_factor, low_freq_factor, ramp="paper")


def abf_factors(inv_freq: FloatArray, base_ratio: float) -> FloatArray:
    """A new base b': lambda_i = (b'/b)^(2i/d) (adjusted base frequency, Code Llama)."""
    _check_ratio(base_ratio)
    pairs = len(inv_freq)
    return np.asarray(base_ratio ** (np.arange(pairs) / pairs), dtype=np.float64)


def critical_base(rope_theta: float, window: int, target: int) -> float:
    """b' = b^(ln(L'/2pi) / ln(L/2pi)): lambda is s just where one turn takes the whole window.

    Source: LongRoPE2, arXiv 2502.20082 section 3 (its "NTK").

    Raises:
        ConfigError: a window of less than one turn, 2pi tokens, or a base beyond float64.
    """
    turn = 2 * math.pi
    try:
        if window > turn:
            return float(rope_theta ** (math.log(target / turn) / math.log(window / turn)))
    except OverflowError:
        pass
    raise ConfigError(f"no base takes a window of {window} tokens to {target}: give one (--base)")


def critical_pair(inv_freq: FloatArray, window: int) -> int:
    """Index of the first pair that makes less than one turn in the window.

    ceil((d/2) * log_b(L / 2pi)), half of LongRoPE2's theoretical critical dimension d_tcd
    (arXiv 2502.20082 eq. 5); pairs from here on saw only a part of their period in training.
    """
    return min(math.ceil(index_with_turns(inv_freq, window, 1.0)), len(inv_freq) - 1)


def longrope2_factors(
    inv_freq: FloatArray, ratio: float, window: int, critical: int | None = None, scale: float = 1.0
) -> FloatArray:
    """LongRoPE2's starting form: NTK below the critical pair c, constant from it on.

    lambda_i = (scale * s)^(i/c) for i < c, scale * s for i >= c (arXiv 2502.20082, Alg. 2).

    Args:
        critical: c; None takes critical_pair. The paper finds real ones a little lower.
        scale: 1 to 2; the paper draws lambda from [s, 2s].
    """
    _check_ratio(scale * ratio)
    chosen = critical_pair(inv_freq, window) if critical is None else critical
    if not 0 < chosen < len(inv_freq):
        raise ConfigError(f"longrope2: critical pair must be 1..{len(inv_freq) - 1}, got {chosen}")
    exponent = np.minimum(np.arange(len(inv_freq)) / chosen, 1.0)
    return np.asarray((scale * ratio) ** exponent, dtype=np.float64)


def index_with_turns(inv_freq: FloatArray, window: int, turns: float) -> float:
    """The real-valued pair index at which a pair makes `turns` turns within the window.

    For plain RoPE this is d * ln(L / (2 pi turns)) / (2 ln b). ln(inv_freq) is interpolated
    linearly, which is exact there, and its ends are extended with the slope they have.
    """
    falling = np.minimum.accumulate(np.log(inv_freq))
    wanted = math.log(2 * math.pi * turns / window)
    last = len(falling) - 1
    if falling[last] <= wanted <= falling[0]:
        return float(np.interp(-wanted, -falling, np.arange(last + 1)))
    start = 0 if wanted > falling[0] else last - 1
    slope = falling[start] - falling[start + 1] if last > 0 else 0.0
    if not slope > 0:
        raise ConfigError("turns cannot be counted: the frequencies of the pairs do not fall")
    return start + float((falling[start] - wanted) / slope)


def _check_ratio(ratio: float) -> None:
    if not SMALLEST <= ratio <= LARGEST:
        raise ConfigError(f"a ratio of {ratio:g} makes no factors: it must be 1e-30 to 1e30")
