"""Tiers of a ladder, and options that a method must not ignore."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longrope_converters.to_gguf.convert import GgufConverter
from longrope_export import methods
from longrope_export.errors import ConfigError
from longrope_export.ladder import MethodOptions, make_config, parse_ladder
from longrope_export.models.model import load_model
from longrope_export.rope import compute_inv_freq


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("8192,16384,32768", [8192, 16384, 32768]),
        ("every:8192", [8192, 16384, 24576, 32768]),
        ("every:10000", [8192, 18192, 28192, 32768]),
        ("x2", [8192, 16384, 32768]),
        ("x1.5", [8192, 12288, 18432, 27648, 32768]),
    ],
)
def test_parse_ladder(text: str, lengths: list[int]) -> None:
    assert parse_ladder(text, 8192, 32768) == lengths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4096,32768", "starts at 4096, expected the model's own window 8192"),
        ("8192,16384", "ends at 16384, expected the target 32768"),
        ("8192,32768,16384", "must rise"),
        ("every:0", "no usable number"),
        ("every:x", "expected lengths"),
        ("x1", "must be above 1"),
        ("xyz", "expected lengths"),
        ("x1.0000001", "must be above 1"),
    ],
)
def test_bad_ladders(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_ladder(text, 8192, 32768)


def test_each_tier_has_the_closed_form_of_its_own_length(hf_config: Callable[..., Path]) -> None:
    model = load_model(hf_config())
    config = make_config(
        model,
        "yarn",
        1024,
        ladder="every:256",
        options=MethodOptions(attention_strength=0.6),
    )
    assert config.tiers[0].is_plain
    inv_freq = compute_inv_freq(10000.0, 16)
    for tier, ratio in zip(config.tiers[1:], (2, 3, 4), strict=True):
        np.testing.assert_allclose(tier.rescale_factors, methods.yarn_factors(inv_freq, ratio, 256))
        assert tier.attention_factor == pytest.approx(1 + 0.06 * np.log(ratio))


def test_without_a_ladder_one_tier_serves_all(hf_config: Callable[..., Path]) -> None:
    config = make_config(load_model(hf_config()), "yarn", 1024)
    assert [tier.max_length for tier in config.tiers] == [1024]


def test_extending_a_scaled_model_builds_upon_its_factors(hf_config: Callable[..., Path]) -> None:
    block = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = load_model(hf_config(max_position_embeddings=512, rope_scaling=block))
    config = make_config(model, "pi", 1024, ladder="512,1024")
    native = methods.llama3_factors(compute_inv_freq(10000.0, 16), 8, 64)
    np.testing.assert_allclose(config.tiers[0].rescale_factors, native)
    np.testing.assert_allclose(config.tiers[1].rescale_factors, 2 * native)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("pi", MethodOptions(beta_fast=16), "takes no --beta-fast; it would be ignored"),
        ("ntk", MethodOptions(attention_strength=0.6), "add --attention-factor yarn or longrope"),
        ("yarn", MethodOptions(attention="big"), "expected none, yarn, longrope or a number"),
        ("yarn", MethodOptions(attention_strength=-1), "must be 0 or more"),
        ("best", MethodOptions(), "known are pi, ntk"),
    ],
)
def test_options_are_never_ignored(
    method: str, options: MethodOptions, message: str, hf_config: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(load_model(hf_config()), method, 1024, options=options)


def test_target_must_extend(hf_config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="window is 256 already"):
        make_config(load_model(hf_config()), "yarn", 256)


def test_extending_a_file_of_ours_keeps_log_scaling_and_start_tokens(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    baked = tmp_path / "baked.gguf"
    first = make_config(load_model(tiny_gguf), "entropy-abf", 512, num_start_tokens=4)
    GgufConverter().convert(load_model(tiny_gguf), first, baked, lambda _: None)
    model = load_model(baked)
    second = make_config(model, "pi", 1024)
    assert second.logit_scaling == first.logit_scaling
    assert second.tiers[0].num_start_tokens == 4
    np.testing.assert_allclose(
        second.tiers[0].rescale_factors, 2 * np.float32(first.tiers[0].rescale_factors)
    )
    with pytest.raises(ConfigError, match="scales its logits already"):
        make_config(model, "entropy-abf", 1024)
    with pytest.raises(ConfigError, match="its own factors are not 1"):
        make_config(model, "pi", 1024, num_start_tokens=8)


@pytest.mark.parametrize(
    ("method", "options"),
    [("abf", MethodOptions(base=0)), ("dynamic-ntk", MethodOptions(dynamic_factor=-1))],
)
def test_zero_is_not_the_same_as_not_given(
    method: str, options: MethodOptions, hf_config: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        make_config(load_model(hf_config()), method, 1024, options=options)
