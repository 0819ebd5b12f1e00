"""Mistral: Llama without biases, with a sliding window in the first releases."""

from longrope_converters.to_onnx.description import Decoder, describe_common, same_window
from longrope_export.models.hf_config import HfConfig


def describe(config: HfConfig) -> Decoder:
    return same_window(config, describe_common(config))
