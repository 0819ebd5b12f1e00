"""The families that the exporter knows, by our family name. A new one is a file here and a row."""

from __future__ import annotations

from collections.abc import Callable

from longrope_converters.to_onnx.description import Decoder
from longrope_converters.to_onnx.families import gemma3, granite, llama, mistral, phi3, qwen2, qwen3
from longrope_export.errors import UnsupportedError
from longrope_export.models.hf_config import HfConfig

DESCRIBE: dict[str, Callable[[HfConfig], Decoder]] = {
    "gemma3": gemma3.describe,
    "granite": granite.describe,
    "llama": llama.describe,
    "mistral": mistral.describe,
    "phi3": phi3.describe,
    "qwen2": qwen2.describe,
    "qwen3": qwen3.describe,
}
# what marks models of these families that are something else inside
_REFUSED_KEYS = {
    "vision_config": "multimodal",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
}


def describe(config: HfConfig) -> Decoder:
    """The decoder of a config.json.

    Raises:
        UnsupportedError: naming the family or the field that is not built here.
        ModelError: fields that are missing or malformed.
    """
    name = config.family.name
    if name not in DESCRIBE:
        got = config.architecture or config.get("model_type")
        raise UnsupportedError(
            f"{config.path}: architecture {got!r} is not supported by the ONNX exporter; "
            f"it knows the families {', '.join(sorted(DESCRIBE))}"
        )
    for key, meaning in _REFUSED_KEYS.items():
        if config.values.get(key):
            raise UnsupportedError(
                f"{config.path}: {key}: a model that is {meaning} is not supported"
            )
    if config.architecture and not config.architecture.endswith("ForCausalLM"):
        raise UnsupportedError(
            f"{config.path}: {config.architecture} is no text-only language model"
        )
    return DESCRIBE[name](config)
