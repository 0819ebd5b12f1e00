"""What an export is made from: settings in the words of config.json, and weights by their names in
a Hugging Face folder, read when they are written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope_converters.to_gguf.checkpoint import name_some, read_checkpoint
from longrope_converters.to_gguf.plan import SourceTensor
from longrope_converters.to_onnx.weights import Float32, Rows
from longrope_export.errors import ModelError, UnsupportedError
from longrope_export.gguf_format import GgufHeader
from longrope_export.models.hf_config import (
    HfConfig,
    read_hf_config,
    read_json_object,
    refuse_quantized,
)
from longrope_export.models.model import Model, ModelKind

_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
# buffers that old checkpoints carry along
_IGNORED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class SafetensorsRows:
    """Rows of one tensor of a safetensors file."""

    tensor: SourceTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self, start: int, stop: int) -> Float32:
        """See Rows.

        Raises:
            ModelError: the file ends early.
        """
        tensor = self.tensor
        row_bytes = int(np.prod(tensor.shape[1:])) * _ITEM_BYTES[tensor.dtype]
        with tensor.path.open("rb", buffering=0) as file:
            raw = os.pread(
                file.fileno(), (stop - start) * row_bytes, tensor.offset_bytes + start * row_bytes
            )
        if len(raw) != (stop - start) * row_bytes:
            raise ModelError(f"{tensor.path}: ends in the middle of a tensor; download it again")
        return widen(raw, tensor.dtype).reshape(stop - start, *tensor.shape[1:])


def widen(raw: bytes, dtype: str) -> Float32:
    """Little-endian BF16, F16 or F32 as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32, copy=False)


class Weights:
    """The weights of a model by name; remembers which were asked for.

    Args:
        where: folder or file, for messages.
        tensors: every weight there is.
    """

    def __init__(self, where: Path, tensors: Mapping[str, Rows]) -> None:
        self.where, self._tensors = where, tensors
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, shape: tuple[int, ...]) -> Rows:
        """The weight, checked.

        Raises:
            ModelError: it is missing, or has another shape than the settings ask for.
        """
        rows = self._tensors.get(name)
        if rows is None:
            raise ModelError(f"{self.where}: tensor {name} of shape {list(shape)} is missing")
        if rows.shape != shape:
            raise ModelError(
                f"{self.where}: tensor {name} must have shape {list(shape)} by the model's "
                f"settings, got {list(rows.shape)}"
            )
        self._taken.add(name)
        return rows

    def refuse_rest(self, *, also_ignore: tuple[str, ...] = ()) -> None:
        """Refuse weights that nobody asked for: the graph would not compute the model.

        Raises:
            UnsupportedError: naming some of them.
        """
        rest = [
            name
            for name in self._tensors
            if name not in self._taken and name not in also_ignore and not name.endswith(_IGNORED)
        ]
        if rest:
            raise UnsupportedError(
                f"{self.where}: tensors that this family's graph has no place for: "
                f"{name_some(rest)}"
            )


@dataclass(frozen=True)
class Source:
    """A model, opened.

    Attributes:
        generation: generation_config.json, or what the keys of a GGUF say of it, or empty.
        tokenizer: the folder with the tokenizer's files, or the GGUF whose keys hold it.
    """

    settings: HfConfig
    weights: Weights
    generation: Mapping[str, Any]
    tokenizer: Path | GgufHeader


def open_source(model: Model) -> Source:
    """Open a Hugging Face folder or a GGUF; only headers and settings are read.

    Raises:
        LongRopeError: the model is damaged, or of a kind that cannot be read here.
    """
    if model.kind is ModelKind.GGUF:
        from longrope_converters.to_onnx.gguf_source import open_gguf

        return open_gguf(model)
    refuse_quantized(model.path)
    generation = model.path / "generation_config.json"
    return Source(
        settings=read_hf_config(model.path),
        weights=folder_weights(model.path),
        generation=read_json_object(generation) if generation.is_file() else {},
        tokenizer=model.path,
    )


def folder_weights(folder: Path) -> Weights:
    """Every tensor of the safetensors files of a folder.

    Raises:
        ModelError: see read_checkpoint; or a dtype other than BF16, F16 and F32.
    """
    tensors: dict[str, Rows] = {}
    for name, tensor in read_checkpoint(folder).items():
        if tensor.dtype not in _ITEM_BYTES:
            raise ModelError(
                f"{tensor.path}: tensor {name} has dtype {tensor.dtype}, expected one of "
                f"{', '.join(_ITEM_BYTES)}; save the model in one of these first"
            )
        tensors[name] = SafetensorsRows(tensor)
    return Weights(folder, tensors)
