"""LongRoPE2's search (arXiv 2502.20082, section 3.2 and Alg. 2): the critical pair is searched too.

From the critical pair on, lambda lies in [s, 2s] and does not fall; below it, lambda follows the base
that lambda at the critical pair implies ("NTK"). Mutations touch the upper part alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from longrope_export import methods
from longrope_export.config import FactorTier
from longrope_export.errors import ConfigError
from longrope_export.rope import FloatArray
from longrope_export.search.space import STEP, SearchSpace

UPPER = 2.0  # lambda up to twice the ratio


@dataclass(frozen=True)
class CriticalSpace:
    """Individuals of LongRoPE2.

    Attributes:
        space: bounds of what lies around it; its lambda bound is not used.
        lowest, highest: permitted critical pairs, both inclusive.
    """

    space: SearchSpace
    lowest: int
    highest: int

    @classmethod
    def of(cls, space: SearchSpace) -> CriticalSpace:
        """Critical pairs from ten turns within the window to one (the theoretical one).

        Raises:
            ConfigError: no pair of the model makes less than one turn.
        """
        speeds = np.asarray(space.inv_freq)
        tenth = methods.index_with_turns(speeds, space.window, 10.0)
        highest = methods.critical_pair(speeds, space.window)
        lowest = min(max(math.ceil(tenth), 1), highest)
        if highest < 1:
            raise ConfigError("longrope2: every pair makes less than one turn within the window")
        return cls(space, lowest, highest)

    def compose(self, critical: int, upper: FloatArray, start: int, attention: float) -> FactorTier:
        """An individual from its critical pair and the lambda from there on, (pairs - critical,)."""
        below = upper[0] ** (np.arange(critical) / critical)
        return self.space.tier(np.concatenate([below, upper]), start, attention)

    def draw(self, rng: np.random.Generator) -> FactorTier:
        """A critical pair, and one lambda from [s, 2s] for all pairs from it on."""
        critical = int(rng.integers(self.lowest, self.highest + 1))
        value = rng.uniform(self.space.ratio, UPPER * self.space.ratio)
        upper = np.full(self.space.num_pairs - critical, value)
        return self.compose(critical, upper, self.space.start_tokens[0], self.space.attention)

    def critical_of(self, tier: FactorTier) -> int:
        """The critical pair: the last one up to which ln(lambda) rises linearly from 0."""
        logs = np.log(self.space.lambdas(tier))
        for critical in range(self.highest, self.lowest, -1):
            line = logs[critical] * np.arange(critical) / critical
            if np.allclose(logs[:critical], line, atol=1e-9):
                return critical
        return self.lowest

    def mutate(self, tier: FactorTier, rng: np.random.Generator, chance: float) -> FactorTier:
        """Lambda from the critical pair on, each with probability `chance`, by steps of 0.01."""
        critical = self.critical_of(tier)
        upper = self.space.lambdas(tier)[critical:].copy()
        top = UPPER * self.space.ratio
        for index in range(len(upper)):
            if rng.random() < chance:
                low = upper[index - 1] if index else self.space.ratio
                high = upper[index + 1] if index + 1 < len(upper) else top
                upper[index] = min(low + round(rng.uniform(0, high - low) / STEP) * STEP, high)
        attention = tier.attention_factor / self.space.own_attention
        return self.compose(critical, upper, tier.num_start_tokens, attention)

    def cross(self, first: FactorTier, second: FactorTier, rng: np.random.Generator) -> FactorTier:
        """The critical pair of one parent; from it on, each lambda from either as order allows."""
        critical = self.critical_of(first if rng.random() < 0.5 else second)
        child = self.space.cross(first, second, rng)
        upper = np.maximum(self.space.lambdas(child)[critical:], self.space.ratio)
        attention = child.attention_factor / self.space.own_attention
        return self.compose(critical, upper, child.num_start_tokens, attention)
