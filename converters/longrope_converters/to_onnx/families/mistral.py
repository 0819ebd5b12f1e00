"""Mistral: Llama without biases, with a sliding window in the first releases."""

from longrope_converters.to_onnx.description import Decoder, describe_common, same_window
from longrope_export.models.hf_config import HfConfig


def describe(config: HfConfig) -> Decoder:
    # as in transformers' class; null in the file means none
    window = config.values.get("sliding_window", 4096)
    return same_window(window, describe_common(config))
