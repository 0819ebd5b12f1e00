"""Closed forms against transformers' own functions and against published values."""

import math

import numpy as np
import pytest

from longrope_export import methods
from longrope_export.errors import ConfigError
from longrope_export.rope import compute_inv_freq


def transformers_factors(
    rope: dict[str, object], theta: float, dim: int, target: int
) -> np.ndarray:
    """inv_freq of plain RoPE over the one that transformers computes for this block."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=dim * 2,
        num_attention_heads=2,
        max_position_embeddings=target,
        rope_parameters={"rope_theta": theta, **rope},
    )
    inv_freq, _ = ROPE_INIT_FUNCTIONS[str(rope["rope_type"])](config, "cpu", seq_len=target)
    return compute_inv_freq(theta, dim) / inv_freq.double().numpy()


@pytest.mark.parametrize(
    ("theta", "dim", "window", "ratio"),
    [
        (10000.0, 128, 4096, 16),
        (100000.0, 64, 8192, 4),
        (1e6, 96, 32768, 2.5),
    ],
)
def test_yarn_equals_transformers(theta: float, dim: int, window: int, ratio: float) -> None:
    ours = methods.yarn_factors(compute_inv_freq(theta, dim), ratio, window)
    rope = {"rope_type": "yarn", "factor": ratio, "original_max_position_embeddings": window}
    theirs = transformers_factors(rope, theta, dim, round(window * ratio))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    exact = methods.yarn_factors(compute_inv_freq(theta, dim), ratio, window, ramp="code-exact")
    theirs = transformers_factors({**rope, "truncate": False}, theta, dim, round(window * ratio))
    np.testing.assert_allclose(exact, theirs, rtol=1e-6)


def test_llama3_equals_transformers_and_the_published_table() -> None:
    ours = methods.llama3_factors(compute_inv_freq(5e5, 128), 8, 8192)
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    np.testing.assert_allclose(ours, transformers_factors(rope, 5e5, 128, 65536), rtol=1e-6)
    published = [1, 1.207, 1.553, 2.026, 2.695, 3.684, 5.257, 8]
    np.testing.assert_allclose(ours[28:36], published, atol=5e-4)


def test_dynamic_ntk_equals_transformers_at_a_given_length() -> None:
    theta, dim, window = 10000.0, 64, 2048
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=window,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": theta},
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=5000)
    ours = methods.dynamic_ntk_factors(compute_inv_freq(theta, dim), 5000 / window, 4.0)
    np.testing.assert_allclose(compute_inv_freq(theta, dim) / ours, theirs.numpy(), rtol=1e-6)


def test_yarn_of_llama2_has_the_published_bounds() -> None:
    factors = methods.yarn_factors(compute_inv_freq(1e4, 128), 16, 4096)
    assert (factors == 1).sum() == 21  # pairs 0..20
    assert int(np.argmax(factors == 16)) == 46
    np.testing.assert_allclose(factors[[24, 32, 40]], [1.17, 1.76, 3.59], atol=5e-3)


def test_paper_ramp_differs_from_the_code_ramp_in_the_middle_only() -> None:
    inv_freq = compute_inv_freq(1e4, 128)
    paper = methods.yarn_factors(inv_freq, 16, 4096, ramp="paper")
    code = methods.yarn_factors(inv_freq, 16, 4096)
    turns = 4096 * inv_freq / (2 * np.pi)
    gamma = (turns - 1) / 31
    middle = (turns > 1) & (turns < 32)
    np.testing.assert_allclose(paper[middle], 1 / (gamma + (1 - gamma) / 16)[middle])
    assert np.all(paper[turns >= 32] == 1)
    np.testing.assert_allclose(paper[turns <= 1], 16)
    assert abs(paper[middle] - code[middle]).max() > 1


def test_ntk_and_pi() -> None:
    inv_freq = compute_inv_freq(1e4, 128)
    ntk = methods.ntk_factors(inv_freq, 8)
    assert ntk[0] == 1
    assert ntk[-1] == pytest.approx(8)
    np.testing.assert_allclose(inv_freq / ntk, compute_inv_freq(1e4 * 8 ** (128 / 126), 128))
    assert set(methods.pi_factors(inv_freq, 8)) == {8.0}


@pytest.mark.parametrize(
    ("theta", "dim", "window", "index"),
    [(1e4, 96, 2048, 31), (5e5, 128, 8192, 35), (1e4, 128, 4096, 46), (1e4, 128, 8192, 50)],
)
def test_critical_pairs_of_longrope2(theta: float, dim: int, window: int, index: int) -> None:
    assert methods.critical_pair(compute_inv_freq(theta, dim), window) == index


def test_phi4_mini_is_an_instance_of_the_longrope2_form() -> None:
    factors = methods.longrope2_factors(compute_inv_freq(1e4, 96), 32.03, 2048, critical=31)
    np.testing.assert_allclose(factors[:32], 32.03 ** (np.arange(32) / 31))
    assert set(factors[31:]) == {32.03}


def test_bases_of_longrope2s_ntk() -> None:
    assert methods.critical_base(1e4, 2048, 131072) == pytest.approx(7.49e6, rel=1e-3)
    assert methods.critical_base(5e5, 8192, 131072) == pytest.approx(7.98e7, rel=1e-3)


def test_entropy_abf_factors() -> None:
    factors = methods.abf_factors(compute_inv_freq(1e4, 128), 50)
    np.testing.assert_allclose(factors[[0, 16, 32, 48, 63]], [1, 2.66, 7.07, 18.8, 47.0], rtol=2e-3)


def test_seeds_are_monotone_and_within_the_search_space() -> None:
    inv_freq = compute_inv_freq(1e4, 128)
    for factors in (
        methods.pi_factors(inv_freq, 8),
        methods.ntk_factors(inv_freq, 8),
        methods.yarn_factors(inv_freq, 8, 4096),
    ):
        assert np.all(np.diff(factors) >= 0)
        assert factors.min() >= 1
        assert factors.max() <= 1.25 * 8


def test_a_model_that_was_scaled_before_is_seen_at_its_own_speed() -> None:
    """Extending Llama 3.1: the pairs it slowed down have fewer turns than the plain base says."""
    plain = compute_inv_freq(5e5, 128)
    scaled = plain / methods.llama3_factors(plain, 8, 8192)
    assert methods.critical_pair(scaled, 131072) < methods.critical_pair(plain, 131072)
    kept = methods.yarn_factors(scaled, 2, 131072)
    turns = 131072 * scaled / (2 * np.pi)
    assert np.all(kept[turns < 0.9] > 1.95)


def test_bad_options() -> None:
    inv_freq = compute_inv_freq(1e4, 64)
    with pytest.raises(ConfigError, match="must be above beta_slow"):
        methods.yarn_factors(inv_freq, 4, 2048, beta_fast=1, beta_slow=2)
    for absurd in ({"beta_fast": 1e308}, {"beta_slow": 1e-320}, {"beta_fast": math.inf}):
        with pytest.raises(ConfigError, match=r"must be above beta_slow .* both 1e-30 to 1e"):
            methods.yarn_factors(inv_freq, 4, 2048, **absurd)
    with pytest.raises(ConfigError, match="ramp must be"):
        methods.yarn_factors(inv_freq, 4, 2048, ramp="linear")
    with pytest.raises(ConfigError, match="critical pair must be"):
        methods.longrope2_factors(inv_freq, 4, 2048, critical=32)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ratio", [0.0, -1.0, 1e308, math.inf, math.nan])
def test_absurd_ratios_are_one_error_and_no_warning(ratio: float) -> None:
    inv_freq = 10000.0 ** -(np.arange(8) / 8)
    for form in (
        lambda: methods.pi_factors(inv_freq, ratio),
        lambda: methods.ntk_factors(inv_freq, ratio),
        lambda: methods.dynamic_ntk_factors(inv_freq, ratio, 2.0),
        lambda: methods.yarn_factors(inv_freq, ratio, 256),
        lambda: methods.llama3_factors(inv_freq, ratio, 256),
        lambda: methods.abf_factors(inv_freq, ratio),
        lambda: methods.longrope2_factors(inv_freq, ratio, 256),
    ):
        with pytest.raises(ConfigError, match="a ratio of"):
            form()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("inv_freq", [np.ones(8), np.ones(1)], ids=["theta 1", "one pair"])
def test_turns_of_frequencies_that_do_not_fall(inv_freq: np.ndarray) -> None:
    for form in (methods.yarn_factors, methods.longrope2_factors):
        with pytest.raises(ConfigError, match="do not fall"):
            form(inv_freq, 4.0, 256)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("window", "target"), [(6, 100), (7, 1 << 31)])
def test_windows_that_no_base_extends(window: int, target: int) -> None:
    with pytest.raises(ConfigError, match="give one"):
        methods.critical_base(1e6, window, target)
