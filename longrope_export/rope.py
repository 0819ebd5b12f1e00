"""The formulas of rotary position embedding, in numpy. Every one has its only home here.

Angles are float64; a caller that stores them as float32 rounds once, at the end. Pair i is channels
i and i + rotary_dim // 2 in transformers' half-split layout, 2i and 2i + 1 in the interleaved one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig, SwitchPolicy

FloatArray = npt.NDArray[np.float64]


def compute_inv_freq(rope_theta: float, rotary_dim: int) -> FloatArray:
    """Radians per token of each pair, theta_i = base^(-2i/d) (RoFormer, arXiv 2104.09864 eq. 15).

    Returns:
        (rotary_dim // 2,) float64, falling from 1.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    return np.asarray(rope_theta**-exponents, dtype=np.float64)


def compute_wavelengths(inv_freq: npt.ArrayLike) -> FloatArray:
    """Tokens per full turn of each pair, 2 pi / inv_freq."""
    return 2 * math.pi / np.asarray(inv_freq, dtype=np.float64)


def compute_angles(
    positions: npt.ArrayLike, rope_theta: float, rotary_dim: int, tier: FactorTier
) -> FloatArray:
    """Rotation angle of every pair at absolute positions (LongRoPE, arXiv 2402.13753 eq. 3).

    Position p turns pair i by p * theta_i if p < tier.num_start_tokens, else by
    p * theta_i / rescale_factors[i].

    Args:
        positions: (n,) absolute positions, integers from 0.

    Returns:
        (n, rotary_dim // 2) float64, radians.
    """
    absolute = np.asarray(positions, dtype=np.float64)
    original = absolute[:, None] * compute_inv_freq(rope_theta, rotary_dim)
    rescaled = original / np.asarray(tier.rescale_factors, dtype=np.float64)
    return np.where(absolute[:, None] < tier.num_start_tokens, original, rescaled)


def compute_cos_sin(
    positions: npt.ArrayLike, rope_theta: float, rotary_dim: int, tier: FactorTier
) -> tuple[FloatArray, FloatArray]:
    """cos and sin of compute_angles, times the tier's attention factor, start tokens included.

    Returns:
        Two arrays (n, rotary_dim // 2), float64.
    """
    angles = compute_angles(positions, rope_theta, rotary_dim, tier)
    return np.cos(angles) * tier.attention_factor, np.sin(angles) * tier.attention_factor


def select_tier_indices(config: LongRopeConfig, positions: Sequence[int]) -> npt.NDArray[np.intp]:
    """Index of the tier that computes each position of one sequence.

    Under `causal` each position has its own tier; under `sequence` the last position decides.

    Raises:
        ConfigError: a position lies beyond the last tier.
    """
    absolute = np.asarray(positions, dtype=np.int64)
    if absolute.size:
        config.select_tier(int(absolute.max()) + 1)
    if config.switch is SwitchPolicy.SEQUENCE and absolute.size:
        absolute = np.full_like(absolute, absolute.max())
    borders = [tier.max_length for tier in config.tiers]
    return np.searchsorted(borders, absolute + 1, side="left")


def compute_logit_scale(positions: npt.ArrayLike, scaling: LogitScaling) -> FloatArray:
    """Factor of the query at absolute positions (from 0): max(ln(p+1) / ln(base_length), 1).

    Source: Entropy-ABF, arXiv 2401.07004 section 3.2, where positions count from 1.
    """
    one_based = np.asarray(positions, dtype=np.float64) + 1
    return np.maximum(np.log(one_based) / math.log(scaling.base_length), 1.0)


def longrope_attention_factor(ratio: float, original_length: int, strength: float = 1.0) -> float:
    """sqrt(1 + strength * ln(ratio) / ln(original_length)), 1 for ratio <= 1 ("su", Phi-3).

    1 for an original length of 1 too, of which there is no logarithm to divide by.

    Source: microsoft/LongRoPE rope/longrope.py and transformers' longrope; strength 1 is theirs.
    """
    if ratio <= 1 or original_length < 2:
        return 1.0
    return math.sqrt(1 + strength * math.log(ratio) / math.log(original_length))


def yarn_attention_factor(ratio: float, strength: float = 1.0) -> float:
    """1 + strength * 0.1 ln(ratio), 1 for ratio <= 1 (YaRN, arXiv 2309.00071 eq. 22)."""
    return 1.0 if ratio <= 1 else 1 + strength * 0.1 * math.log(ratio)
