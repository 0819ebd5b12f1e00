"""A source model, factors for it, an ONNX export of both, and a text: what is evaluated."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from test_onnx import export
from tiny_models import add_bpe_tokenizer, make_model

from longrope_export.cli import main
from longrope_export.config import FactorTier, LongRopeConfig
from longrope_export.factor_files import to_json
from longrope_export.models.model import load_model

HELP = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))[:60_000]


def ladder(folder: Path) -> LongRopeConfig:
    """Borders at 300, 600 and 2000 tokens; factors and attention factors that matter."""
    native = load_model(folder).native
    ramp = np.linspace(0, 1, native.num_pairs)

    def tier(length: int, ratio: float, attention: float) -> FactorTier:
        return FactorTier(length, tuple((ratio**ramp).tolist()), 3, attention)

    return LongRopeConfig(
        rope_theta=native.rope_theta,
        rotary_dim=native.rotary_dim,
        original_max_position_embeddings=256,
        max_position_embeddings=2000,
        tiers=(tier(300, 1, 1.0), tier(600, 3, 1.1), tier(2000, 8, 1.2)),
        provenance={"method": "by hand"},
    )


def make_root(folder: Path) -> Path:
    """m: a source model whose attention matters; f.json: factors; m-onnx: both; help.txt."""
    settings = {"initializer_range": 0.15, "eos_token_id": 1}
    source = make_model(folder / "m", dtype="float32", **settings)
    add_bpe_tokenizer(source)
    config = ladder(source)
    (folder / "f.json").write_text(json.dumps(to_json(config)))
    export(source, config, folder / "m-onnx")
    (folder / "help.txt").write_text(HELP)
    return folder


def run_evaluate(root: Path, *words: object) -> Result:
    """`evaluate` with paths below root."""
    known = {path.name for path in root.iterdir()}
    inside = [str(root / str(w)) if str(w) in known else str(w) for w in words]
    return CliRunner().invoke(main, ["evaluate", *inside])


class Scripted:
    """A runtime that answers `4`, `2`, an end token, `9`, whatever it reads; `read` is what it was given.

    Args:
        path: a folder that names token 0 as its end.
    """

    words = ("<eos>", "q", "4", "2", "9")

    def __init__(self, path: Path) -> None:
        (path / "generation_config.json").write_text('{"eos_token_id": 0}')
        self.info = SimpleNamespace(log_probabilities=None, path=path, name="stub", precision="-")
        self.read: list[int] = []
        self._answers = [2, 3, 0, 4, 4, 4, 4, 4]

    def start(self, **_: Any) -> Scripted:
        return self

    @property
    def length(self) -> int:
        return len(self.read)

    def append(self, tokens: Any, keep: int | None = None) -> Any:
        self.read += list(tokens)
        return np.eye(len(self.words), dtype=np.float32)[[self._answers.pop(0)]]

    def tokenize(self, text: str) -> list[int]:
        return [self.words.index(character) for character in text if character in self.words]

    def detokenize(self, tokens: Any) -> str:
        return "".join(self.words[token] for token in tokens if token)  # no special tokens
