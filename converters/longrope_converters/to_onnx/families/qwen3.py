"""Qwen3: q and k are normalised per head."""

from longrope_converters.to_onnx.description import Decoder, describe_common
from longrope_converters.to_onnx.families.qwen2 import with_upper_windows
from longrope_export.models.hf_config import HfConfig


def describe(config: HfConfig) -> Decoder:
    bias = bool(config.get("attention_bias"))
    decoder = with_upper_windows(config, describe_common(config))
    return decoder.but(qk_norm=True, qkv_bias=bias, output_bias=bias)
