"""Fixtures shared by the tests: small files made by hand."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import gguf_keys, write_gguf_file

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


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A llama GGUF with the keys that geometry needs and two small tensors."""
    tensors = {
        "token_embd.weight": np.arange(64 * 5, dtype=np.float32).reshape(5, 64),
        "output_norm.weight": np.ones(64, dtype=np.float32),
    }
    return write_gguf_file(tmp_path / "tiny.gguf", gguf_keys(), tensors)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, which is full soon."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
