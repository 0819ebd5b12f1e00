"""Name the pre-tokenizer of a BPE model: the splitting rule that llama.cpp applies before merging.

GGUF stores a name, tokenizer.json a pipeline. The name is looked up by a hash of the ids that the
pipeline gives for a fixed text; the table comes from llama.cpp (see pre_tokenizers.json).
"""

from __future__ import annotations

import json
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from longrope_export.errors import UnsupportedError

_EXAMPLES = ("llama-bpe", "qwen2", "gpt-2", "smollm", "llama4", "deepseek-r1-qwen", "tekken")


def pre_tokenizer_name(tokenizer: Tokenizer, path: Path, override: str | None = None) -> str:
    """The value of tokenizer.ggml.pre.

    Args:
        tokenizer: the loaded tokenizer.json.
        path: that file, for messages.
        override: a name that the user gives; it wins, and must be one that llama.cpp knows.

    Raises:
        UnsupportedError: an unknown hash and no name given, or a name not in the table.
    """
    table = _table()
    names = set(table["names"].values())
    if override is not None:
        if override not in names:
            raise UnsupportedError(
                f"--pre {override}: not a pre-tokenizer of llama.cpp ({table['version']}); "
                f"known are {', '.join(sorted(names))}"
            )
        return override
    digest = text_hash(tokenizer, table["text"])
    name = table["names"].get(digest)
    if name is None:
        raise UnsupportedError(
            f"{path}: the BPE pre-tokenizer is not in llama.cpp's table ({table['version']}); its "
            f"hash is {digest}. If the tokenizer is a known one with changed tokens, name it with "
            f"--pre NAME, for example {', '.join(name for name in _EXAMPLES if name in names)}"
        )
    return str(name)


def text_hash(tokenizer: Tokenizer, text: str) -> str:
    """SHA-256 of the list of ids, written as Python prints it; special tokens included."""
    return sha256(str(tokenizer.encode(text).ids).encode()).hexdigest()


def _table() -> dict[str, Any]:
    raw = files("longrope_converters.to_gguf").joinpath("pre_tokenizers.json")
    table: dict[str, Any] = json.loads(raw.read_text(encoding="utf-8"))
    return table
