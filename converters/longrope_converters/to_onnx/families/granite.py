"""Granite: Llama with four multipliers."""

from longrope_converters.to_onnx.description import Decoder
from longrope_converters.to_onnx.families import llama
from longrope_export.models.hf_config import HfConfig


def describe(config: HfConfig) -> Decoder:
    return llama.describe(config).but(
        embedding_multiplier=float(config.get("embedding_multiplier", 1.0)),
        residual_multiplier=float(config.get("residual_multiplier", 1.0)),
        logits_divisor=float(config.get("logits_scaling", 1.0)),
        attention_scale=float(config.get("attention_multiplier", 1.0)),
    )
