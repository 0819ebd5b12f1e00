"""The tokens with which an export's answers end, as its own files name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longrope_export.errors import ModelError
from longrope_export.gguf_format import read_header

_GGUF = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
_FILES = ("generation_config.json", "genai_config.json", "config.json")  # the first that names one


def end_tokens(path: Path | str) -> frozenset[int]:
    """Ids of the tokens that end a text or a turn; none where nothing names them, as of a server.

    Raises:
        ModelError: a file cannot be read.
    """
    if isinstance(path, str):
        return frozenset()
    if path.is_file():
        header = read_header(path)
        return _ids([header.get(name) for name in _GGUF])
    for name in _FILES:
        if (path / name).is_file() and (found := _ids(_named_in(path / name))):
            return found
    return frozenset()


def _named_in(file: Path) -> Any:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        inner = values.get("model" if file.name == "genai_config.json" else "text_config") or {}
        return values.get("eos_token_id", inner.get("eos_token_id"))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: cannot be read as a JSON object: {error}") from error


def _ids(value: Any) -> frozenset[int]:
    several = value if isinstance(value, list) else [value]
    return frozenset(token for token in several if isinstance(token, int))
