"""The formulas against numbers written down elsewhere, and against transformers' own."""

import math

import numpy as np
import pytest

from longrope_export import rope
from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig, SwitchPolicy


def plain(length: int, pairs: int) -> FactorTier:
    return FactorTier(length, (1.0,) * pairs)


def test_factors_of_one_are_plain_rope_bit_for_bit() -> None:
    positions = np.arange(4096)
    angles = rope.compute_angles(positions, 10000.0, 128, plain(4096, 64))
    by_hand = positions[:, None] * (10000.0 ** -(np.arange(0, 128, 2) / 128))
    assert np.array_equal(angles, by_hand)


def test_inv_freq_equals_transformers_llama() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=4, rope_theta=500000.0
    )
    theirs = LlamaRotaryEmbedding(config).inv_freq.numpy()
    np.testing.assert_allclose(rope.compute_inv_freq(500000.0, 64), theirs, rtol=2e-7)


def test_start_tokens_keep_the_original_rotation_by_absolute_position() -> None:
    tier = FactorTier(100, (2.0, 4.0), num_start_tokens=3)
    angles = rope.compute_angles([2, 3, 1, 50], 100.0, 4, tier)
    np.testing.assert_allclose(angles, [[2, 0.2], [1.5, 0.075], [1, 0.1], [25, 1.25]])


def test_attention_factor_multiplies_cos_and_sin_of_start_tokens_too() -> None:
    tier = FactorTier(100, (2.0,), num_start_tokens=1, attention_factor=1.5)
    cos, sin = rope.compute_cos_sin([0, 2], 10.0, 2, tier)
    np.testing.assert_allclose(cos[:, 0], [1.5, 1.5 * math.cos(1.0)])
    np.testing.assert_allclose(sin[:, 0], [0.0, 1.5 * math.sin(1.0)])


@pytest.mark.parametrize(
    ("position", "scale"), [(0, 1.0), (4095, 1.0), (8191, 13 / 12), (16383, 14 / 12), (32767, 1.25)]
)
def test_logit_scale_of_entropy_abf(position: int, scale: float) -> None:
    got = rope.compute_logit_scale([position], LogitScaling(4096))
    assert got[0] == pytest.approx(scale, abs=1e-12)


def test_attention_factors_of_shipped_models() -> None:
    assert rope.longrope_attention_factor(32, 4096) == pytest.approx(1.19024, abs=5e-6)
    assert rope.longrope_attention_factor(64, 2048) == pytest.approx(1.243163121016122, abs=1e-12)
    assert rope.yarn_attention_factor(32) == pytest.approx(1.34657, abs=5e-6)
    assert rope.yarn_attention_factor(4, strength=0.6) == pytest.approx(1 + 0.06 * math.log(4))
    assert rope.yarn_attention_factor(0.5) == rope.longrope_attention_factor(1, 4096) == 1.0
    assert rope.longrope_attention_factor(8, 1) == 1.0


def test_tiers_by_position_and_by_sequence() -> None:
    tiers = (plain(4, 1), plain(6, 1), plain(8, 1))
    causal = LongRopeConfig(10.0, 2, 4, 8, tiers)
    sequence = LongRopeConfig(10.0, 2, 4, 8, tiers, SwitchPolicy.SEQUENCE)
    assert rope.select_tier_indices(causal, range(8)).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert rope.select_tier_indices(sequence, range(4)).tolist() == [0] * 4
    assert rope.select_tier_indices(sequence, range(5)).tolist() == [1] * 5
    assert causal.select_tier(4) is tiers[0]
    assert causal.select_tier(5) is tiers[1]
