"""The token ids that are run."""

from __future__ import annotations

import numpy as np

from longrope_export.errors import ConfigError
from longrope_export.models.hf_config import read_hf_config
from longrope_export.models.model import Model, ModelKind, header_of
from longrope_export.models.torch_model import load_torch_tokenizer

_LOWEST = 3  # most vocabularies begin with special tokens


def make_tokens(model: Model, text: str | None, count: int, seed: int) -> list[int]:
    """(count,) ids: the beginning of a text by the model's tokenizer, or random ones.

    Raises:
        ConfigError: the text has fewer tokens.
        UnsupportedError: a text needs transformers for its tokenizer, which is not installed.
        ModelError: there is no tokenizer.
    """
    if text is None:
        generator = np.random.default_rng(seed)
        ids = generator.integers(_LOWEST, vocabulary_size(model), count)
        return [int(token) for token in ids]
    tokens: list[int] = load_torch_tokenizer(model.path)(text).input_ids
    if len(tokens) < count:
        raise ConfigError(f"--text has {len(tokens)} tokens, expected at least {count}")
    return tokens[:count]


def vocabulary_size(model: Model) -> int:
    """Rows of the embedding."""
    if model.kind is ModelKind.HF:
        return read_hf_config(model.path).require_int("vocab_size")
    shapes = (t.shape for t in header_of(model).tensors if t.name == "token_embd.weight")
    return next(shapes)[1]
