"""Read the config.json of a Hugging Face folder, without transformers and without running code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.errors import ModelError, UnsupportedError
from longrope_export.models.families import Family, family_of_hf

MAX_CONFIG_BYTES = 64 << 20
_LEGACY_TYPES = {"su": "longrope"}
# the second one of old compressed-tensors
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_QUANTIZATION_FILE = "hf_quant_config.json"


@dataclass(frozen=True)
class HfRope:
    """The RoPE settings of a config.json in one shape, whatever spelling the file uses.

    Attributes:
        rope_type: "default", "linear", "dynamic", "yarn", "longrope", "llama3", ... ("su" is
            read as "longrope").
        rope_theta: base of the geometric series.
        partial_rotary_factor: rotated share of head_dim, 0 to 1.
        original_max_position_embeddings: the trained window if the file names one.
        parameters: the whole block as it stands (rope_parameters or rope_scaling).
    """

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float
    original_max_position_embeddings: int | None
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class HfConfig:
    """A config.json. `values` is the text model's part of it, as written, without defaults."""

    folder: Path
    family: Family
    values: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / "config.json"

    @property
    def architecture(self) -> str:
        """First entry of `architectures`, or an empty string."""
        names = self.values.get("architectures") or [""]
        return str(names[0])

    def get(self, key: str, default: Any = None) -> Any:
        """The value in the file, else transformers' default for the family, else `default`."""
        value = self.values.get(key)
        return self.family.defaults.get(key, default) if value is None else value

    def require_int(self, key: str) -> int:
        """A positive integer.

        Raises:
            ModelError: if the key is missing or something else.
        """
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(f"{self.path}: {key} must be a positive integer, got {value!r}")
        return value

    @property
    def head_dim(self) -> int:
        explicit = self.get("head_dim")
        if explicit is not None:
            return self.require_int("head_dim")
        heads, hidden = self.require_int("num_attention_heads"), self.require_int("hidden_size")
        if hidden % heads:
            raise ModelError(
                f"{self.path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            )
        return hidden // heads

    @property
    def num_key_value_heads(self) -> int:
        # an explicit null means one per query head, whatever the family's default
        if self.values.get("num_key_value_heads", self.get("num_key_value_heads")) is None:
            return self.require_int("num_attention_heads")
        return self.require_int("num_key_value_heads")

    @property
    def rope(self) -> HfRope:
        return _read_rope(self)

    @property
    def quantization(self) -> str:
        """What says that the weights are quantized, and how; "" for plain weights."""
        for key in _QUANTIZATION_KEYS:
            if block := self.values.get(key):
                method = block.get("quant_method") if isinstance(block, dict) else block
                return f"{key} in config.json" + (f": {method}" if method else "")
        # of NVIDIA's ModelOpt
        return _QUANTIZATION_FILE if (self.folder / _QUANTIZATION_FILE).is_file() else ""


def is_hf_folder(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file()


def refuse_quantized(path: Path) -> None:
    """For whoever computes with the weights of a model; a GGUF, whose types are known, passes.

    Raises:
        UnsupportedError: a Hugging Face folder whose weights are quantized.
        ModelError: its config.json cannot be read.
    """
    found = read_hf_config(path).quantization if is_hf_folder(path) else ""
    if found:
        raise UnsupportedError(
            f"{path}: its weights are quantized ({found}); expected plain ones (BF16, F16 or F32). "
            f"Give the checkpoint that it was made from, or dequantize it first with transformers "
            f"and what it wants for this method: model = AutoModelForCausalLM.from_pretrained("
            f"{str(path)!r}); model.dequantize(); model.save_pretrained(NEW), and the tokenizer "
            f"likewise"
        )


def read_hf_config(folder: Path) -> HfConfig:
    """Read config.json.

    Raises:
        ModelError: no such file, not JSON, not an object, absurdly large.
    """
    values = read_json_object(folder / "config.json")
    text = values.get("text_config")
    if isinstance(text, dict):  # gemma3 and other multimodal wrappers keep the text model inside
        values = {**values, **text}
    architectures = architecture_names(values, folder / "config.json")
    return HfConfig(folder, family_of_hf(values.get("model_type"), architectures), values)


def architecture_names(values: Mapping[str, Any], path: Path) -> list[str]:
    """`architectures` as a list of names; empty if the file has none.

    Raises:
        ModelError: it is something else.
    """
    names = values.get("architectures") or []
    if not isinstance(names, list):
        raise ModelError(f"{path}: architectures must be a list of names, got {names!r}")
    return [str(name) for name in names]


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB.

    Raises:
        ModelError: with the position of the fault.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path}: {size} bytes is too large for a JSON settings file")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: no such file; a Hugging Face model folder must hold one"
        ) from error
    except OSError as error:
        raise ModelError(f"{path}: cannot read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object, got a {type(values).__name__}")
    return values


def rope_block(values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_scaling or rope_parameters as one flat dict; {} for plain RoPE.

    rope_scaling wins where both stand, as in transformers 5. Of a block nested per layer type the
    full-attention part counts: the sliding-window layers are never rescaled.
    """
    return _flat_block(values.get("rope_scaling") or values.get("rope_parameters") or {})


def _flat_block(block: Any) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise ModelError(
            f"rope_scaling / rope_parameters must be an object, got {type(block).__name__}"
        )
    nested = block.get("full_attention")
    return dict(nested) if isinstance(nested, dict) else dict(block)


def _refuse_conflicts(values: Mapping[str, Any]) -> None:
    """RoPE settings may stand in three places; each runtime reads another one of them."""
    top_level = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    places: dict[str, dict[str, Any]] = {
        "the top level": {name: values[name] for name in top_level if name in values}
    }
    for name in ("rope_scaling", "rope_parameters"):
        block = _flat_block(values.get(name) or {})
        if block:
            kind = str(block.get("rope_type") or block.pop("type", None) or "default").lower()
            places[name] = {**block, "rope_type": _LEGACY_TYPES.get(kind, kind)}
    seen: dict[str, tuple[str, Any]] = {}
    for place, settings in places.items():
        for key, value in settings.items():
            other, expected = seen.setdefault(key, (place, value))
            if value is not None and expected is not None and value != expected:
                raise ModelError(
                    f"conflicting rope settings: {key} is {expected!r:.60} in {other} and "
                    f"{value!r:.60} in {place}; runtimes differ in which one they read: make them "
                    f"equal or remove one"
                )


def _read_rope(config: HfConfig) -> HfRope:
    try:
        block = rope_block(config.values)
        _refuse_conflicts(config.values)
    except ModelError as error:
        raise ModelError(f"{config.path}: {error}") from error
    rope_type = str(block.get("rope_type") or block.get("type") or "default").lower()
    if rope_type == "default" and "factor" in block:
        raise ModelError(f"{config.path}: the rope block has a factor but no rope_type")
    # transformers 5 lets the top-level copies win when the model is built
    original = config.values.get("original_max_position_embeddings")
    if original is None:
        original = block.get("original_max_position_embeddings")
    if original is None and rope_type in ("longrope", "su"):
        original = config.get("original_max_position_embeddings")  # Phi-3's default
    theta = block.get("rope_theta", config.get("rope_theta", 10000.0))
    partial = block.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    for name, number in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        good = isinstance(number, int | float) and not isinstance(number, bool)
        if not good or not 0 < number < 1e30:
            raise ModelError(f"{config.path}: {name} must be a positive number, got {number!r:.60}")
    if original is not None and (not isinstance(original, int) or original <= 0):
        raise ModelError(
            f"{config.path}: original_max_position_embeddings must be a positive integer, "
            f"got {original!r}"
        )
    return HfRope(
        _LEGACY_TYPES.get(rope_type, rope_type), float(theta), float(partial), original, block
    )
