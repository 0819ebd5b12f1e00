"""Fixtures shared by the tests: small files made by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGUFValueType

from longrope_export.gguf_format import (
    KeyValue,
    TensorInfo,
    build_header,
    make_array,
    make_key_value,
    padding,
)

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "vocab_size": 320,
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def hf_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder that holds only a llama config.json, with changes."""

    def write(name: str = "model", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        values = {**LLAMA_CONFIG, **changes}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return write


def gguf_keys(architecture: str = "llama", **changes: Any) -> list[KeyValue]:
    u32 = GGUFValueType.UINT32
    numbers = {
        "context_length": 256,
        "embedding_length": 64,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 16,
        **changes,
    }
    return [
        make_key_value("general.architecture", GGUFValueType.STRING, architecture),
        *(make_key_value(f"{architecture}.{name}", u32, value) for name, value in numbers.items()),
        make_key_value(f"{architecture}.rope.freq_base", GGUFValueType.FLOAT32, 10000.0),
        make_array("tokenizer.ggml.tokens", GGUFValueType.STRING, ["a", "b", "c\u00e9"]),
    ]


def write_gguf_file(
    path: Path, keys: list[KeyValue], tensors: dict[str, np.ndarray[Any, Any]]
) -> Path:
    """A GGUF of F32 tensors, put together without the code under test but for the header."""
    infos, data = [], b""
    for name, values in tensors.items():
        raw = np.ascontiguousarray(values, dtype="<f4").tobytes()
        infos.append(TensorInfo(name, tuple(reversed(values.shape)), 0, len(data)))
        data += raw + bytes(padding(len(raw), 32))
    path.write_bytes(build_header(keys, infos) + data)
    return path


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A llama GGUF with the keys that geometry needs and two small tensors."""
    tensors = {
        "token_embd.weight": np.arange(64 * 5, dtype=np.float32).reshape(5, 64),
        "output_norm.weight": np.ones(64, dtype=np.float32),
    }
    return write_gguf_file(tmp_path / "tiny.gguf", gguf_keys(), tensors)
