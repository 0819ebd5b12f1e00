"""Qwen2: biases on q, k and v; the upper layers may have a sliding window."""

from longrope_converters.to_onnx.description import Decoder, describe_common
from longrope_export.models.hf_config import HfConfig


def describe(config: HfConfig) -> Decoder:
    return with_upper_windows(config, describe_common(config)).but(qkv_bias=True)


def with_upper_windows(config: HfConfig, decoder: Decoder) -> Decoder:
    """use_sliding_window turns it on, for the layers from max_window_layers upwards."""
    window = config.get("sliding_window", 4096)
    if not config.get("use_sliding_window", False) or not window:
        return decoder
    types = config.get("layer_types")
    if isinstance(types, list):
        local = [kind == "sliding_attention" for kind in types]
    else:
        full = int(config.get("max_window_layers", 28))
        local = [layer >= full for layer in range(decoder.num_layers)]
    return decoder.but(windows=tuple(window if slides else None for slides in local))
