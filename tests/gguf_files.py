"""Small GGUF files made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from longrope_export.gguf_format import TensorInfo, build_header, padding
from longrope_export.gguf_values import KeyValue, make_array, make_key_value


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
