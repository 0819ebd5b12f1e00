"""A GGUF as source: its keys as the settings of config.json, its tensors dequantized row by row.

Families, tensor names and row orders are those of the GGUF exporter (to_gguf.families), read
backwards.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from longrope_converters.gguf_tokenizer import generation_settings
from longrope_converters.to_gguf.families import NATIVE, expected_tensors
from longrope_converters.to_onnx.source import Source, Weights
from longrope_converters.to_onnx.weights import Float32, Rows
from longrope_export.errors import ModelError, UnsupportedError
from longrope_export.gguf_format import GgufHeader, TensorInfo
from longrope_export.gguf_keys import LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR
from longrope_export.models.hf_config import HfConfig
from longrope_export.models.model import Model, header_of

# config.json -> key of the architecture; what a file lacks is left to the family's defaults
_SETTINGS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "attention_multiplier": "attention.scale",
}
_TOKENS = {
    f"{name}_token_id": f"tokenizer.ggml.{key}_token_id"
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
}
_BIASES = {
    "attention_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_down.bias",
}
_ROPE_TENSORS = (LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR)  # in the model's config already


@dataclass(frozen=True)
class GgufRows:
    """Rows of one tensor, dequantized.

    `num_heads` is set where the file has llama.cpp's interleaved row order: rows 2j and 2j + 1 of a
    head are rows j of its two halves.
    """

    path: Path
    info: TensorInfo
    data_start_bytes: int
    num_heads: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(reversed(self.info.shape))

    def read(self, start: int, stop: int) -> Float32:
        """See Rows.

        Raises:
            ModelError: the file ends early.
        """
        if self.num_heads is None:
            return self._read_stored(start, stop)
        per_head = self.shape[0] // self.num_heads
        first = start // per_head * per_head
        last = -(-stop // per_head) * per_head
        stored = self._read_stored(first, last)
        heads = stored.reshape(-1, per_head // 2, 2, *self.shape[1:])
        halves = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(stored.shape)
        return halves[start - first : stop - first]

    def _read_stored(self, start: int, stop: int) -> Float32:
        kind = GGMLQuantizationType(self.info.ggml_type)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        columns = self.shape[1] if len(self.shape) > 1 else 1
        row_bytes = columns * block_bytes // block
        offset = self.data_start_bytes + self.info.offset_bytes + start * row_bytes
        with self.path.open("rb", buffering=0) as file:
            raw = os.pread(file.fileno(), (stop - start) * row_bytes, offset)
        if len(raw) != (stop - start) * row_bytes:
            raise ModelError(f"{self.path}: ends in the middle of tensor {self.info.name}")
        stored = np.frombuffer(raw, np.uint8).reshape(stop - start, row_bytes)
        values = (
            dequantize(stored, kind) if kind != GGMLQuantizationType.F32 else stored.view("<f4")
        )
        return values.reshape(stop - start, *self.shape[1:])


def open_gguf(model: Model) -> Source:
    """The settings and weights of a GGUF.

    Raises:
        UnsupportedError: a family that cannot be read from a GGUF, a quantization that the gguf
            package cannot undo, a split file.
        GgufError: the file is damaged.
    """
    header = header_of(model)
    name = model.family.name
    if name not in NATIVE or name == "minicpm":
        known = ", ".join(sorted(set(NATIVE) - {"minicpm"}))
        raise UnsupportedError(
            f"{model.path}: architecture {header.architecture!r} is not supported by the ONNX "
            f"exporter as a GGUF; known are {known}: use the Hugging Face folder"
        )
    if header.get("split.count", 1) > 1:
        raise UnsupportedError(
            f"{model.path}: one part of a split file: join the parts with llama-gguf-split --merge"
        )
    settings = _settings(model, header)
    tensors: dict[str, Rows] = {}
    infos = {info.name: info for info in header.tensors if info.name not in _ROPE_TENSORS}
    for hf_name, expected in expected_tensors(settings, NATIVE[name]).items():
        info = infos.pop(expected.gguf_name, None)
        if info is not None:
            _check_type(model.path, info)
            tensors[hf_name] = GgufRows(
                model.path, info, header.data_start_bytes, expected.num_heads
            )
    # names that no table knows stay as they are, so that they are refused with the other leftovers
    tensors |= {n: GgufRows(model.path, i, header.data_start_bytes, None) for n, i in infos.items()}
    return Source(
        settings=settings,
        weights=Weights(model.path, tensors),
        generation=generation_settings(header),
        tokenizer=header,
    )


def _settings(model: Model, header: GgufHeader) -> HfConfig:
    """The keys of a GGUF in the words of config.json; `path` is the file."""
    names = {info.name: info for info in header.tensors}
    embedding = names.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{model.path}: tensor token_embd.weight is missing")
    values: dict[str, Any] = {
        "head_dim": model.head_dim,
        "vocab_size": embedding.shape[-1],
        "tie_word_embeddings": "output.weight" not in names,
        **{key: tensor in names for key, tensor in _BIASES.items()},
    }
    for key, name in _SETTINGS.items():
        value = header.arch_get(name)
        if isinstance(value, np.ndarray):
            raise UnsupportedError(
                f"{model.path}: {header.architecture}.{name} differs by layer, which is not supported"
            )
        if value is not None:
            values[key] = value
    values.setdefault("sliding_window", None)  # llama.cpp knows no default of the family
    for key, name in _TOKENS.items():
        if header.get(name) is not None:
            values[key] = header.get(name)
    return HfConfig(model.path.parent, model.family, values, file_name=model.path.name)


def _check_type(path: Path, info: TensorInfo) -> None:
    try:
        kind = GGMLQuantizationType(info.ggml_type)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedError(
            f"{path}: tensor {info.name} has ggml type {info.ggml_type}, which the gguf package "
            f"cannot dequantize"
        ) from error
