"""A LongRopeConfig that exists is valid."""

import math

import pytest

from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig
from longrope_export.errors import ConfigError


def config(**changes: object) -> LongRopeConfig:
    values: dict[str, object] = {
        "rope_theta": 10000.0,
        "rotary_dim": 4,
        "original_max_position_embeddings": 8,
        "max_position_embeddings": 16,
        "tiers": (FactorTier(8, (1.0, 1.0)), FactorTier(16, (1.0, 2.0))),
    }
    return LongRopeConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 0}, "rope_theta must be a finite number above 0"),
        ({"rotary_dim": 5}, "rotary_dim must be even"),
        ({"rotary_dim": 8}, "2 values, expected rotary_dim / 2 = 4"),
        ({"tiers": ()}, "tiers is empty"),
        ({"max_position_embeddings": 17}, "expected the last tier's max_length, 16"),
        (
            {"tiers": (FactorTier(16, (1.0, 1.0)), FactorTier(8, (1.0, 1.0)))},
            "not in order: max_length 8 follows 16",
        ),
        ({"layers": (-1,)}, "layers must be an integer 0"),
    ],
)
def test_bad_configs_say_what_is_wrong(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0, "2", True, None])
def test_bad_factors(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"rescale_factors\[1\] must be a finite number above 0"):
        FactorTier(8, (1.0, bad))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [0, -1, 1 << 32, 2.5, True])
def test_bad_lengths(bad: object) -> None:
    with pytest.raises(ConfigError, match="max_length must be an integer 1"):
        FactorTier(bad, (1.0,))  # type: ignore[arg-type]


def test_published_oddities_are_accepted() -> None:
    FactorTier(8, (0.9982, 1.11, 1.10))  # MiniCPM starts below 1, some Mistral files fall slightly


def test_length_beyond_the_last_tier() -> None:
    with pytest.raises(ConfigError, match="length 17 is beyond max_position_embeddings 16"):
        config().select_tier(17)


def test_logit_scaling_needs_a_base_above_one() -> None:
    with pytest.raises(ConfigError, match="base_length must be an integer 2"):
        LogitScaling(1)
