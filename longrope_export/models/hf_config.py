"""Read the config.json of a Hugging Face folder, without transformers and without running code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longrope_export.errors import ModelError, UnsupportedError
from longrope_export.models.families import Family, family_of_hf
from longrope_export.models.hf_rope import HfRope as HfRope
from longrope_export.models.hf_rope import latent_head_dim, read_rope

MAX_CONFIG_BYTES = 64 << 20
# the second one of old compressed-tensors
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_QUANTIZATION_FILE = "hf_quant_config.json"


@dataclass(frozen=True)
class HfConfig:
    """A config.json. `values` is the text model's part of it, as written, without defaults."""

    folder: Path
    family: Family
    values: Mapping[str, Any]
    file_name: str = field(default="config.json", kw_only=True)

    @property
    def path(self) -> Path:
        return self.folder / self.file_name

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
        latent = latent_head_dim(self)
        if latent is not None:
            return latent
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
        return read_rope(self)

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
    values = with_text_config(read_json_object(folder / "config.json"))
    architectures = architecture_names(values, folder / "config.json")
    return HfConfig(folder, family_of_hf(values.get("model_type"), architectures), values)


def with_text_config(values: dict[str, Any]) -> dict[str, Any]:
    """gemma3 and other multimodal wrappers keep the text model's settings inside: those win.

    A null there stands for the default, which is no reason to forget what the outside says.
    """
    text = values.get("text_config")
    if not isinstance(text, dict):
        return values
    said = {key: value for key, value in text.items() if value is not None or key not in values}
    return {**values, **said}


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
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, an endless integer
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object, got a {type(values).__name__}")
    return values
