"""A random model of a short window, with a tokenizer, and factors for three times the window."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tiny_models import add_bpe_tokenizer, make_model

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.models.model import load_model

WINDOW, TARGET, VOCAB = 32, 96, 320


def make_source(path: Path) -> Path:
    """The model's Hugging Face folder."""
    make_model(path, dtype="float32", max_position_embeddings=WINDOW, vocab_size=VOCAB)
    add_bpe_tokenizer(path)
    return path


def make_two_tiers(model_path: Path) -> LongRopeConfig:
    """The model's own tier, and one with start tokens and an attention factor; rule `sequence`."""
    native = load_model(model_path).native
    pairs = np.arange(native.num_pairs)
    far = FactorTier(TARGET, tuple(1.0 + 0.4 * pairs), num_start_tokens=3, attention_factor=1.2)
    return replace(
        native,
        max_position_embeddings=TARGET,
        tiers=(*native.tiers, far),
        switch=SwitchPolicy.SEQUENCE,
    )
