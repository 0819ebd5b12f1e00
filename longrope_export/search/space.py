"""What a search may choose: bounds, grid and start-token windows, and how individuals are varied.

An individual is a FactorTier of the length that is searched for. Its lambda are relative to the
model's own factors, which makes a second stage on an extended model a search like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from longrope_export import methods
from longrope_export.config import FactorTier, LongRopeConfig
from longrope_export.errors import ConfigError
from longrope_export.rope import FloatArray, compute_inv_freq, longrope_attention_factor

START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)  # LongRoPE, table 4
STEP = 0.01  # LongRoPE, table 4
REACH = 1.25  # lambda goes up to 1.25 times the ratio, LongRoPE, table 4
YARN_FORMS = {"mistral": (128.0, 2.0)}  # microsoft/LongRoPE's beta_fast and beta_slow


@dataclass(frozen=True)
class SearchSpace:
    """Everything that a candidate for one length may be (LongRoPE, arXiv 2402.13753, table 4).

    Attributes:
        length: tokens of the tier that is searched for.
        window: tokens that the model handles as it is.
        inv_freq: (pairs,) radians per token as the model was trained, its own factors included.
        own_factors: (pairs,) factors that the model has; lambda multiplies them.
        own_attention: the attention factor that the model has; attention multiplies it.
        highest: (pairs,) largest lambda.
        start_tokens: permitted start-token windows.
        attention: attention factor of every candidate, relative to own_attention.
        attention_range: lowest and highest where it is a gene, else None.
    """

    length: int
    window: int
    inv_freq: tuple[float, ...]
    own_factors: tuple[float, ...]
    own_attention: float
    highest: tuple[float, ...]
    start_tokens: tuple[int, ...]
    attention: float
    attention_range: tuple[float, float] | None = None

    @property
    def ratio(self) -> float:
        """Length over window."""
        return self.length / self.window

    @property
    def num_pairs(self) -> int:
        return len(self.own_factors)

    def tier(
        self, lambdas: FloatArray, num_start_tokens: int = 0, attention: float | None = None
    ) -> FactorTier:
        """The individual with these lambda, (pairs,), relative to the model's own factors."""
        factors = np.asarray(self.own_factors) * lambdas
        scale = self.own_attention * (self.attention if attention is None else attention)
        return FactorTier(self.length, tuple(factors.tolist()), num_start_tokens, scale)

    def lambdas(self, tier: FactorTier) -> FloatArray:
        """(pairs,) lambda of an individual, relative to the model's own factors."""
        factors = np.asarray(tier.rescale_factors, dtype=np.float64)
        return factors / np.asarray(self.own_factors, dtype=np.float64)

    def seeds(self, family: str = "") -> dict[str, FactorTier]:
        """PI, NTK and YaRN, with the attention factor of the space (LongRoPE, Alg. 1)."""
        speeds = np.asarray(self.inv_freq)
        fast, slow = YARN_FORMS.get(family, (32.0, 1.0))
        forms = {
            "pi": methods.pi_factors(speeds, self.ratio),
            "ntk": methods.ntk_factors(speeds, self.ratio),
            "yarn": methods.yarn_factors(speeds, self.ratio, self.window, fast, slow),
        }
        start = self.start_tokens[0]
        return {name: self.tier(lambdas, start) for name, lambdas in forms.items()}

    def clip(self, lambdas: FloatArray) -> FloatArray:
        """Lambda brought into the bounds and into order."""
        within = np.clip(lambdas, 1.0, np.asarray(self.highest))
        return np.asarray(np.maximum.accumulate(within))

    def clip_attention(self, attention: float) -> float:
        """An attention factor, relative to the model's own, brought into its range."""
        if self.attention_range is None:
            return self.attention
        low, high = self.attention_range
        return min(max(attention, low), high)

    def within(self, tier: FactorTier) -> FactorTier:
        """An individual of any origin with lambda in order and bounds; itself where it is."""
        lambdas = self.lambdas(tier)
        allowed = self.clip(lambdas)
        if np.allclose(allowed, lambdas, rtol=1e-12, atol=0):
            return tier
        attention = tier.attention_factor / self.own_attention
        return self.tier(allowed, tier.num_start_tokens, attention)

    def mutate(self, tier: FactorTier, rng: np.random.Generator, chance: float) -> FactorTier:
        """Each gene is drawn anew with probability `chance`, lambda between its two neighbours.

        The paper does not say how a gene is drawn. Free draws would all break the order of 32 or 64
        lambda; as in microsoft/LongRoPE, one is uniform on the grid between the neighbours, from
        the first pair on.
        """
        lambdas = self.lambdas(tier)
        for pair in range(self.num_pairs):
            if rng.random() < chance:
                low = lambdas[pair - 1] if pair else 1.0
                high = self.highest[pair]
                if pair + 1 < self.num_pairs:
                    high = min(high, lambdas[pair + 1])
                lambdas[pair] = _on_grid(rng, low, max(low, high))
        start, attention = tier.num_start_tokens, tier.attention_factor / self.own_attention
        if len(self.start_tokens) > 1 and rng.random() < chance:
            start = int(rng.choice(self.start_tokens))
        if self.attention_range and rng.random() < chance:
            attention = _on_grid(rng, *self.attention_range, step=STEP / 10)
        return self.tier(lambdas, start, attention)

    def cross(self, first: FactorTier, second: FactorTier, rng: np.random.Generator) -> FactorTier:
        """Each gene from either parent with equal chance, lambda as far as their order allows.

        A lambda of the chosen parent that lies below the child's one before it is left out for
        the other parent's, so that every child is in order.
        """
        parents = np.stack([self.lambdas(first), self.lambdas(second)])
        child = np.empty(self.num_pairs)
        lowest, side = 1.0, 0
        for pair in range(self.num_pairs):
            wanted = int(rng.random() < 0.5)
            side = wanted if parents[wanted, pair] >= lowest else side
            child[pair] = lowest = parents[side, pair]
        start = (first, second)[rng.random() < 0.5].num_start_tokens
        attention = (first, second)[rng.random() < 0.5].attention_factor
        return self.tier(child, start, attention / self.own_attention)


def make_space(
    native: LongRopeConfig,
    length: int,
    *,
    attention: float | None = None,
    attention_range: tuple[float, float] | None = None,
    start_tokens: tuple[int, ...] = START_TOKENS,
) -> SearchSpace:
    """The paper's space for a model and a target length.

    Args:
        native: the model's own RoPE; on a model that was extended before, the second stage.
        attention: attention factor relative to the model's own; None takes LongRoPE's
            sqrt(1 + ln s / ln L).
        attention_range: makes it a gene.

    Raises:
        ConfigError: the length is no extension of the model.
    """
    own = native.tiers[-1]
    if length <= own.max_length:
        raise ConfigError(
            f"a search for {length} tokens: the model handles {own.max_length} as it is; choose a "
            f"longer --target-length, or --recover for shorter ones"
        )
    ratio = length / own.max_length
    if attention is None:
        attention = longrope_attention_factor(ratio, own.max_length)
    if any(factor != 1 for factor in own.rescale_factors):
        # start tokens turn as in plain RoPE, which such a model was not trained with
        start_tokens = (own.num_start_tokens,)
    factors = np.asarray(own.rescale_factors)
    return SearchSpace(
        length=length,
        window=own.max_length,
        inv_freq=tuple(compute_inv_freq(native.rope_theta, native.rotary_dim) / factors),
        own_factors=own.rescale_factors,
        own_attention=own.attention_factor,
        highest=(REACH * ratio,) * native.num_pairs,
        start_tokens=tuple(n for n in start_tokens if n < own.max_length),
        attention=attention,
        attention_range=attention_range,
    )


def make_recovery_space(native: LongRopeConfig, length: int, cap: float) -> SearchSpace:
    """The space of a short tier of an extended model (LongRoPE, section 3.3).

    Lambda counts from plain RoPE and stays below `cap` times the model's long factors; the attention
    factor is a gene between 1 and the long one's.

    Args:
        length: tokens, below the model's own length.
        cap: 1 is the long factors themselves.

    Raises:
        ConfigError: the model is not extended that far, or the cap leaves nothing to choose.
    """
    own = native.tiers[-1]
    if not length < own.max_length:
        raise ConfigError(
            f"--recover {length}: the model's own length is {own.max_length}: only shorter ones "
            f"can be recovered"
        )
    factors = np.asarray(own.rescale_factors)
    if not (cap * factors > 1 + STEP).any():
        raise ConfigError(
            f"--recover {length}: with a cap of {cap:g} times the model's factors (at most "
            f"{factors.max():g}) there is nothing to choose; is this an extended model?"
        )
    attention = (min(1.0, own.attention_factor), max(1.0, own.attention_factor))
    return SearchSpace(
        length=length,
        window=length,
        inv_freq=tuple(compute_inv_freq(native.rope_theta, native.rotary_dim)),
        own_factors=(1.0,) * native.num_pairs,
        own_attention=1.0,
        highest=tuple(np.maximum(cap * factors, 1.0).tolist()),
        start_tokens=(own.num_start_tokens,),
        attention=1.0,
        attention_range=attention if attention[0] < attention[1] else None,
    )


def recovery_seeds(space: SearchSpace, native: LongRopeConfig) -> dict[str, FactorTier]:
    """Plain RoPE, the long factors, and powers of them in between, as far as the cap allows."""
    own = native.tiers[-1]
    seeds = {}
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        lambdas = np.minimum(np.maximum(own.rescale_factors, 1.0) ** part, space.highest)
        lambdas = np.maximum.accumulate(lambdas)
        for attention in sorted({1.0, own.attention_factor}):
            name = f"long factors to the {part:g}, attention {attention:.3f}"
            seeds[name] = space.tier(lambdas, own.num_start_tokens, attention)
    return seeds


def with_start(tier: FactorTier, num_start_tokens: int) -> FactorTier:
    """The same factors under another start-token window."""
    return replace(tier, num_start_tokens=num_start_tokens)


def _on_grid(rng: np.random.Generator, low: float, high: float, step: float = STEP) -> float:
    """A uniform draw from the multiples of `step` in [low, high]; `low` where there is none."""
    first, last = int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9))
    if last < first:
        return float(low)
    return round(int(rng.integers(first, last + 1)) * step, 9)
