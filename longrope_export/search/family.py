"""One smooth family of factors: five numbers that give a tier for any length.

It is YaRN (arXiv 2309.00071) with its constants set free, so YaRN itself is a member, and a search
over it can end no worse than there. A ladder made from it has tiers at any spacing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from longrope_export.config import FactorTier
from longrope_export.errors import ConfigError, UnsupportedError
from longrope_export.methods import index_with_turns
from longrope_export.rope import FloatArray, yarn_attention_factor


@dataclass(frozen=True)
class SmoothFamily:
    """Factors as a function of a pair's turns within the window and of the length.

    With x the pair index, from 0 where a pair makes `beta_fast` turns within the window to 1 where
    it makes `beta_slow`, clipped, and s = length / window:

        gamma = (1 - x)^bend,  lambda = 1 / (gamma + (1 - gamma) / s'),  s' = 1 + scale * (s - 1)
        attention factor = 1 + attention_strength * 0.1 ln s

    Attributes:
        beta_fast: turns above which a pair keeps its speed.
        beta_slow: turns below which a pair is slower by s'.
        bend: 1 is YaRN's straight ramp; larger slows the pairs in between more.
        scale: 1 is YaRN; larger slows the last pairs by more than s.
        attention_strength: 1 is YaRN.
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    bend: float = 1.0
    scale: float = 1.0
    attention_strength: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = 0.0 if field.name == "attention_strength" else 1e-6
            if not lowest <= value < 1e6:
                raise ConfigError(f"smooth family: {field.name} must be positive, got {value}")
        if not self.beta_fast > self.beta_slow:
            raise ConfigError(
                f"smooth family: beta_fast {self.beta_fast:g} must be above beta_slow "
                f"{self.beta_slow:g}"
            )

    def lambdas(self, inv_freq: FloatArray, window: int, length: int) -> FloatArray:
        """(pairs,) factors for a length in tokens, relative to the speeds in inv_freq."""
        low = index_with_turns(inv_freq, window, self.beta_fast)
        high = index_with_turns(inv_freq, window, self.beta_slow)
        x = np.clip((np.arange(len(inv_freq)) - low) / (high - low), 0, 1)
        gamma = (1 - x) ** self.bend
        ratio = 1 + self.scale * (length / window - 1)
        return np.asarray(1 / (gamma + (1 - gamma) / ratio), dtype=np.float64)

    def tier(
        self,
        length: int,
        inv_freq: FloatArray,
        own: FactorTier,
        num_start_tokens: int | None = None,
    ) -> FactorTier:
        """The tier for a length.

        Args:
            length: tokens, above the model's window.
            inv_freq: (pairs,) the model's speeds, its own factors included.
            own: the model's last tier, which the family extends.
            num_start_tokens: None keeps the model's.
        """
        factors = np.asarray(own.rescale_factors) * self.lambdas(inv_freq, own.max_length, length)
        attention = yarn_attention_factor(length / own.max_length, self.attention_strength)
        start = own.num_start_tokens if num_start_tokens is None else num_start_tokens
        return FactorTier(length, tuple(factors.tolist()), start, own.attention_factor * attention)


# how a search sees the family: each coordinate is 0 for YaRN, and a step of 1 is a marked change
LOWER = (-4.0, -3.0, -2.0, -1.5, -1.25)
UPPER = (2.0, 3.0, 2.0, 2.0, 2.5)
# where searches begin: at YaRN, and at a late, steep ramp, which a small model trained on 256 tokens
# liked better at 4 and 8 times its window (between the two lies a ridge)
STARTS = ((0.0, 0.0, 0.0, 0.0, 0.0), (-2.5, -0.75, 0.3, -0.4, -0.2))


def from_coordinates(point: FloatArray) -> SmoothFamily:
    """The member at five coordinates, each within LOWER..UPPER; rounded, so that logs agree."""
    fast, slow, bend, scale, strength = (round(float(value), 4) for value in point)
    beta_slow = 2.0**slow
    return SmoothFamily(
        beta_fast=max(32.0 * 2.0**fast, 1.5 * beta_slow),
        beta_slow=beta_slow,
        bend=2.0**bend,
        scale=math.exp(0.5 * scale),
        attention_strength=max(0.0, 1.0 + 0.8 * strength),
    )


def minimise(loss: Callable[[FloatArray], float], start: FloatArray, evaluations: int) -> None:
    """Try members, led by a quadratic model of the loss (COBYQA of scipy, deterministic).

    Args:
        loss: of the member at five coordinates; keeps what it finds, and may raise to end this.
        start: the first coordinates.
        evaluations: most calls of loss.

    Raises:
        UnsupportedError: scipy is not installed.
    """
    try:
        from scipy.optimize import Bounds, minimize
    except ImportError as error:
        raise UnsupportedError(
            f"a search over the smooth family needs scipy: {error}; "
            f"pip install 'longrope-export[search]'"
        ) from error
    options = {"maxfev": evaluations, "initial_tr_radius": 0.75, "final_tr_radius": 0.05}
    minimize(loss, start, method="COBYQA", bounds=Bounds(LOWER, UPPER), options=options)
