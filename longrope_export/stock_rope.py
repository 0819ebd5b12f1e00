"""What a LongRopeConfig is called inside config.json, and the nearest that stock code can run.

transformers, vLLM, SGLang, TGI, mlx-lm and ExLlama read different spellings of "longrope": one block
or the other, `type` or `rope_type`, an attention factor or two mscales, the trained window inside
or beside the block. What is written here satisfies all of them:

    max_position_embeddings             target
    original_max_position_embeddings    border between short and long, also inside both blocks
    rope_theta                          also inside rope_parameters
    rope_scaling      {rope_type, short_factor, long_factor, original_max_position_embeddings, factor,
                       attention_factor, short_mscale, long_mscale}
    rope_parameters   the same and rope_theta; one block per layer type for gemma3

One word for the kind, since ExLlamaV2 refuses both: `rope_type`, which transformers 4 wants for
granite and gemma3, but `type` for the phi families, where it and mlx-lm know no other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.models.families import Family
from longrope_export.rope import longrope_attention_factor

DEFINITION_FILE = "longrope.json"  # in an exported folder, the whole config
DEFINITION_KEY = "longrope"  # the same in config.json and in the metadata of a safetensors file

_TOLERANCE = 1e-5  # factors that went through float32
_LOCAL_THETA = 10000.0  # of gemma3's sliding-window layers
# other names of the longest sequence; engines take the smallest, or the first that they find
_LENGTH_KEYS = ("model_max_length", "max_sequence_length", "max_seq_len", "seq_length")


def stock_config(config: LongRopeConfig) -> LongRopeConfig:
    """What stock transformers runs for `config`: one tier, or short and long, under `sequence`.

    The first and the last tier, with the last one's attention factor; equal to `config` in all
    numbers if stock code can express it.
    """
    last = config.tiers[-1]

    def plain(tier: FactorTier, length: int) -> FactorTier:
        return FactorTier(length, tier.rescale_factors, 0, last.attention_factor)

    target = config.max_position_embeddings
    border = min(config.original_max_position_embeddings, target)
    tiers: tuple[FactorTier, ...] = (plain(last, target),)
    if len(config.tiers) > 1:
        first = config.tiers[0]
        border = first.max_length
        if first.rescale_factors != last.rescale_factors:
            tiers = (plain(first, border), *tiers)
    return LongRopeConfig(
        rope_theta=config.rope_theta,
        rotary_dim=config.rotary_dim,
        original_max_position_embeddings=border,
        max_position_embeddings=target,
        tiers=tiers,
        switch=SwitchPolicy.SEQUENCE,
        layers=config.layers,
    )


def has_formula_attention_factor(config: LongRopeConfig) -> bool:
    """Whether stock_config's attention factor is sqrt(1 + ln ratio / ln window).

    mlx-lm, ExLlama and llama.cpp's converter compute it so, whatever the file says.
    """
    stock = stock_config(config)
    formula = longrope_attention_factor(
        stock.extension_ratio, stock.original_max_position_embeddings
    )
    return math.isclose(stock.tiers[-1].attention_factor, formula, rel_tol=_TOLERANCE)


def write_stock_rope(
    values: Mapping[str, Any],
    config: LongRopeConfig,
    family: Family,
    head_dim: int,
    partial_rotary_factor: float,
) -> dict[str, Any]:
    """A copy of config.json's values with the nearest stock longrope in place of any scaling.

    Args:
        values: the whole file; where the text model's part is nested (text_config), that is changed.
        head_dim, partial_rotary_factor: the model's own. head_dim is always written: where a class
            has none by default (Mixtral), transformers 5 fails to check the factors.
    """
    text = values.get("text_config")
    if isinstance(text, Mapping):
        return {
            **values,
            "text_config": write_stock_rope(text, config, family, head_dim, partial_rotary_factor),
        }
    stock = stock_config(config)
    long_tier, attention = stock.tiers[-1], stock.tiers[-1].attention_factor
    border = stock.original_max_position_embeddings
    factors = {
        "short_factor": list(stock.tiers[0].rescale_factors),
        "long_factor": list(long_tier.rescale_factors),
    }
    numbers = {
        "original_max_position_embeddings": border,
        "factor": float(stock.extension_ratio),
        "attention_factor": float(attention),
        "short_mscale": float(attention),
        "long_mscale": float(attention),
    }
    partial = {} if partial_rotary_factor == 1 else {"partial_rotary_factor": partial_rotary_factor}
    # transformers 4 refuses any fourth key for phi3; what it computes then must be what is meant
    kind = "type" if family.name.startswith("phi") else "rope_type"
    three_keys = family.name == "phi3" and has_formula_attention_factor(config)
    parameters: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": config.rope_theta,
        **partial,
        **factors,
        **numbers,
    }
    changes: dict[str, Any] = {
        "head_dim": head_dim,
        "max_position_embeddings": stock.max_position_embeddings,
        "original_max_position_embeddings": border,
        "rope_theta": config.rope_theta,
        **partial,
        "rope_scaling": {kind: "longrope", **factors, **({} if three_keys else numbers)},
        "rope_parameters": parameters,
    }
    for key in _LENGTH_KEYS:
        if isinstance(values.get(key), int) and values[key] < stock.max_position_embeddings:
            changes[key] = stock.max_position_embeddings
    if family.global_layers_only:  # no flat rope_parameters: transformers 5 would ignore it
        local = _local_parameters(values)
        changes["rope_parameters"] = {"full_attention": parameters, "sliding_attention": local}
        changes["rope_local_base_freq"] = local["rope_theta"]
    return {**values, **changes}


def _local_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE of the layers that are never rescaled."""
    blocks = values.get("rope_parameters")
    local = blocks.get("sliding_attention") if isinstance(blocks, Mapping) else None
    theta = values.get("rope_local_base_freq", _LOCAL_THETA)
    return {"rope_type": "default", "rope_theta": theta, **(local or {})}


def first_difference(expected: LongRopeConfig, got: LongRopeConfig) -> str | None:
    """The first number in which two stock configs differ, in words, or None."""
    for name in ("rope_theta", "original_max_position_embeddings", "max_position_embeddings"):
        a, b = getattr(expected, name), getattr(got, name)
        if not math.isclose(a, b, rel_tol=_TOLERANCE):
            return f"{name} is {b:g}, expected {a:g}"
    if len(expected.tiers) != len(got.tiers):
        return f"{len(got.tiers)} sets of factors, expected {len(expected.tiers)}"
    for a_tier, b_tier in zip(expected.tiers, got.tiers, strict=True):
        where = f"for lengths up to {a_tier.max_length}"
        a_scale, b_scale = a_tier.attention_factor, b_tier.attention_factor
        if not math.isclose(a_scale, b_scale, rel_tol=_TOLERANCE):
            return f"attention factor {where} is {b_scale:g}, expected {a_scale:g}"
        if not np.allclose(a_tier.rescale_factors, b_tier.rescale_factors, rtol=_TOLERANCE, atol=0):
            return f"factors {where} differ"
    return None
