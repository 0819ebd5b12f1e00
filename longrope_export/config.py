"""The one definition that every format is held to.

A LongRopeConfig that exists is valid: everything is checked on construction, nobody checks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from longrope_export.errors import ConfigError

MAX_LENGTH = 1 << 31  # positions are int32 in every runtime we export to
SMALLEST, LARGEST = 1e-30, 1e30  # well within the normal range of float32
# as in the patched llama.cpp: no method goes beyond, and angles or keys in float16 would overflow
RESCALE_BOUNDS = (1e-6, 1e9)
ATTENTION_BOUNDS = (0.01, 100.0)


class SwitchPolicy(StrEnum):
    """What happens when a sequence outgrows a tier.

    CAUSAL: each token is computed under the tier of its own position; when a border is crossed
        the cached keys are rotated again, and nothing is recomputed.
    SEQUENCE: the final length picks one tier for the whole sequence (the rule of the paper and
        of transformers); crossing a border during generation means recomputing the cache.
    """

    CAUSAL = "causal"
    SEQUENCE = "sequence"


@dataclass(frozen=True)
class FactorTier:
    """One set of factors and the sequence lengths it serves.

    Attributes:
        max_length: largest sequence length in tokens that uses this tier, inclusive.
        rescale_factors: (rotary_dim // 2,) divisors of inv_freq, pair 0 the fastest; above 1 the
            rotation is slower; within RESCALE_BOUNDS. Values below 1 and slightly falling lists occur
            in published files.
        num_start_tokens: how many leading positions keep the original rotation (the paper's
            n-hat): position p is not rescaled if p < num_start_tokens.
        attention_factor: multiplier of cos and sin, so logits scale by its square; within
            ATTENTION_BOUNDS.
    """

    max_length: int
    rescale_factors: tuple[float, ...]
    num_start_tokens: int = 0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        where = f"tier max_length={self.max_length}"
        _check_int(where, "max_length", self.max_length, 1, MAX_LENGTH)
        _check_int(where, "num_start_tokens", self.num_start_tokens, 0, MAX_LENGTH)
        _check_positive(where, "attention_factor", self.attention_factor, *ATTENTION_BOUNDS)
        object.__setattr__(self, "rescale_factors", tuple(self.rescale_factors))
        if not self.rescale_factors:
            raise ConfigError(f"{where}: rescale_factors is empty")
        for pair, factor in enumerate(self.rescale_factors):
            _check_positive(where, f"rescale_factors[{pair}]", factor, *RESCALE_BOUNDS)

    @property
    def is_plain(self) -> bool:
        """True for the original RoPE: factors of 1 and attention factor 1."""
        return self.attention_factor == 1.0 and all(f == 1.0 for f in self.rescale_factors)


@dataclass(frozen=True)
class LogitScaling:
    """Entropy-ABF's logarithmic scale (arXiv 2401.07004, section 3.2).

    The query of the token at 1-based position i is multiplied by
    max(ln(i) / ln(base_length), 1), except in exempt_layers.
    """

    base_length: int
    exempt_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_int("logit_scaling", "base_length", self.base_length, 2, MAX_LENGTH)
        object.__setattr__(self, "exempt_layers", tuple(self.exempt_layers))
        for layer in self.exempt_layers:
            _check_int("logit_scaling", "exempt_layers", layer, 0, 1 << 16)


@dataclass(frozen=True)
class LongRopeConfig:
    """How a model ropes at every length.

    Attributes:
        rope_theta: the model's own base; never changed, a new base is expressed as factors.
        rotary_dim: rotated width of a head (head_dim times the partial rotary factor), even.
        original_max_position_embeddings: the window in tokens that the model was trained for.
        max_position_embeddings: the target length; equals the last tier's max_length.
        tiers: by rising max_length.
        switch: the rule at a tier border.
        logit_scaling: None, or a logarithmic scale on the queries.
        layers: the layers that are rescaled, or None for all.
        provenance: where the factors come from (method, arguments, model, tool); JSON values.
    """

    rope_theta: float
    rotary_dim: int
    original_max_position_embeddings: int
    max_position_embeddings: int
    tiers: tuple[FactorTier, ...]
    switch: SwitchPolicy = SwitchPolicy.CAUSAL
    logit_scaling: LogitScaling | None = None
    layers: tuple[int, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_positive("config", "rope_theta", self.rope_theta)
        _check_int("config", "rotary_dim", self.rotary_dim, 2, 1 << 16)
        if self.rotary_dim % 2:
            raise ConfigError(f"config: rotary_dim must be even, got {self.rotary_dim}")
        for name in ("original_max_position_embeddings", "max_position_embeddings"):
            _check_int("config", name, getattr(self, name), 1, MAX_LENGTH)
        object.__setattr__(self, "tiers", tuple(self.tiers))
        object.__setattr__(self, "switch", SwitchPolicy(self.switch))
        if not isinstance(self.provenance, Mapping):
            raise ConfigError(
                f"config: provenance must be an object, got {type(self.provenance).__name__}"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            for layer in self.layers:
                _check_int("config", "layers", layer, 0, 1 << 16)
        self._check_tiers()

    def _check_tiers(self) -> None:
        if not self.tiers:
            raise ConfigError("config: tiers is empty, expected at least one tier")
        for index, tier in enumerate(self.tiers):
            if len(tier.rescale_factors) != self.num_pairs:
                raise ConfigError(
                    f"tiers[{index}] (max_length {tier.max_length}): rescale_factors has "
                    f"{len(tier.rescale_factors)} values, expected rotary_dim / 2 = {self.num_pairs}"
                )
        for before, after in zip(self.tiers, self.tiers[1:], strict=False):
            if after.max_length <= before.max_length:
                raise ConfigError(
                    f"tiers are not in order: max_length {after.max_length} follows "
                    f"{before.max_length}; sort them by max_length, each length once"
                )
        if self.tiers[-1].max_length != self.max_position_embeddings:
            raise ConfigError(
                f"max_position_embeddings is {self.max_position_embeddings}, expected the last "
                f"tier's max_length, {self.tiers[-1].max_length}"
            )

    @property
    def num_pairs(self) -> int:
        """Number of rotated channel pairs, rotary_dim // 2."""
        return self.rotary_dim // 2

    @property
    def extension_ratio(self) -> float:
        """Target length over trained window."""
        return self.max_position_embeddings / self.original_max_position_embeddings

    @property
    def num_start_tokens(self) -> int:
        """The largest start-token window of all tiers."""
        return max(tier.num_start_tokens for tier in self.tiers)

    def select_tier(self, length: int) -> FactorTier:
        """The tier of a sequence of `length` tokens: the first with length <= max_length.

        Under the causal rule the tier of position p is select_tier(p + 1).

        Raises:
            ConfigError: length is below 1 or beyond the last tier.
        """
        return self.tiers[self.tier_index(length)]

    def tier_index(self, length: int) -> int:
        """The place of select_tier(length) in `tiers`; raises as it does."""
        if length < 1:
            raise ConfigError(f"length must be at least 1 token, got {length}")
        for index, tier in enumerate(self.tiers):
            if length <= tier.max_length:
                return index
        raise ConfigError(
            f"length {length} is beyond max_position_embeddings {self.max_position_embeddings}: "
            f"make factors for a longer target"
        )


def _check_int(where: str, name: str, value: object, lowest: int, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ConfigError(f"{where}: {name} must be an integer {lowest}..{highest}, got {value!r}")


def _check_positive(
    where: str, name: str, value: object, lowest: float = SMALLEST, highest: float = LARGEST
) -> None:
    """A number above 0 that float32 can hold: every target stores these as float32."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not lowest <= value <= highest:  # type: ignore[operator]
        raise ConfigError(
            f"{where}: {name} must be a finite number above 0 ({lowest:g} to {highest:g}), "
            f"got {value!r:.60}"
        )
