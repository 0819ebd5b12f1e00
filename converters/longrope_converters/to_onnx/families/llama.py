"""Llama, and what shares its class."""

from longrope_converters.to_onnx.description import Decoder, describe_common
from longrope_export.models.hf_config import HfConfig


def describe(config: HfConfig) -> Decoder:
    bias = bool(config.get("attention_bias"))
    return describe_common(config).but(
        qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias"))
    )
