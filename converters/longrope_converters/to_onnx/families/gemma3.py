"""Gemma 3 (text): four norms per layer, five local layers with a theta of their own to one global."""

from __future__ import annotations

import math

from longrope_converters.to_onnx.description import ACTIVATIONS, Decoder, describe_common
from longrope_export.errors import UnsupportedError
from longrope_export.models.hf_config import HfConfig

# what transformers' Gemma3TextConfig assumes where config.json is silent
_SLIDING_WINDOW = 4096
_PATTERN = 6
_LOCAL_THETA = 10000.0


def describe(config: HfConfig) -> Decoder:
    decoder = describe_common(config)
    activation = str(config.get("hidden_activation", "gelu_pytorch_tanh"))
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"{config.path}: hidden_activation {activation!r} is not supported")
    if config.get("attn_logit_softcapping"):
        raise UnsupportedError(f"{config.path}: attn_logit_softcapping is not supported")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedError(f"{config.path}: use_bidirectional_attention is not supported")
    bias = bool(config.get("attention_bias"))
    return decoder.but(
        activation=ACTIVATIONS[activation],
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        norm_plus_one=True,
        sandwich_norms=True,
        tied=bool(config.get("tie_word_embeddings", True)),
        embedding_multiplier=math.sqrt(decoder.hidden_size),
        softcap=config.get("final_logit_softcapping"),
        attention_scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        windows=_windows(config, decoder.num_layers),
        local_theta=_local_theta(config),
    )


def _windows(config: HfConfig, layers: int) -> tuple[int | None, ...]:
    window = int(config.get("sliding_window", _SLIDING_WINDOW))
    types = config.get("layer_types")
    if not isinstance(types, list):
        pattern = int(config.get("sliding_window_pattern", _PATTERN))
        types = [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
            for layer in range(layers)
        ]
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _local_theta(config: HfConfig) -> float:
    nested = (config.values.get("rope_parameters") or {}).get("sliding_attention") or {}
    return float(nested.get("rope_theta", config.get("rope_local_base_freq", _LOCAL_THETA)))
