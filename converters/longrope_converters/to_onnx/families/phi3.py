"""Phi-3: fused matrices, and a rotation of a part of each head in the small models."""

from longrope_converters.to_onnx.description import Decoder, describe_common, same_window
from longrope_export.models.hf_config import HfConfig


def describe(config: HfConfig) -> Decoder:
    return same_window(config.get("sliding_window"), describe_common(config)).but(fused=True)
