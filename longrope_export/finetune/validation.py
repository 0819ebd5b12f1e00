"""What a fine-tune gave, on documents that it never saw: both rules, text and several-key needles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.config import LongRopeConfig
from longrope_export.definition import to_json
from longrope_export.errors import ConfigError
from longrope_export.run_settings import SETTINGS
from longrope_export.search.documents import in_turn, windows_of
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.jobs import Document
from longrope_export.search.judge import RuleRow, measure_rules
from longrope_export.search.needles import make_needles
from longrope_export.search.run_base import Texts
from longrope_export.search.scorer import Scorer
from longrope_export.search.state import RunFolder
from longrope_export.search.workers import LocalWorkers


@dataclass(frozen=True)
class Validation:
    """Documents of one length, and the same with needles in them.

    Attributes:
        documents: windows of works.
        needles: as many, with several keys asked for at the end; may be none.
        length: tokens of each.
    """

    documents: tuple[Document, ...]
    needles: tuple[Document, ...]
    length: int

    def to_json(self) -> dict[str, Any]:
        """What a run depends on."""
        texts = [[document.ids, document.answers] for document in (*self.documents, *self.needles)]
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        return {"length": self.length, "documents_sha256": digest}


def make_validation(texts: Texts, length: int, count: int, keys: int, seed: int) -> Validation:
    """Up to `count` windows, from the works in turn.

    Args:
        keys: of each needle document; 0 for no such documents.

    Raises:
        ConfigError: no work has `length` tokens.
    """
    body = length - len(texts.start)
    turns = in_turn([windows_of(name, ids, body, texts.start) for name, ids in texts.works])
    if not turns:
        longest = max((len(ids) for _, ids in texts.works), default=0)
        raise ConfigError(
            f"--validation-text: the longest work has {longest} tokens, a window needs {body}: give "
            f"longer texts, or --validation-documents 0 to measure nothing"
        )
    documents = tuple(turns[:count])
    rng = np.random.default_rng(seed)
    found = [make_needles(d, texts.encode, keys, rng, texts.start) for d in documents if keys]
    return Validation(documents, tuple(found), length)


def measure(
    path: Path,
    config: LongRopeConfig,
    validation: Validation,
    folder: Path,
    machine: tuple[str, str],
    say: Callable[[str], None] = lambda phase: None,
) -> list[RuleRow]:
    """Both rules of a model under a config; logged, so that a killed run does not compute it again.

    Args:
        path: a Hugging Face folder.
        folder: for the log.
        machine: dtype and device.

    Raises:
        LongRopeError: what the model or the disk raise.
    """
    documents = [*validation.documents, *validation.needles]
    dtype, device = machine
    # the model is not hashed again: the folder belongs to a run, whose settings name it
    settings = {"definition": to_json(config), "dtype": dtype, **validation.to_json()}
    log = RunFolder(folder, settings, resume=(folder / SETTINGS).is_file())
    window = config.original_max_position_embeddings
    workers = LocalWorkers(lambda: Scorer(path, documents, window, dtype, device))
    count = len(validation.documents)
    passes = (2 if len(config.tiers) > 1 else 1) * len(documents)
    try:
        evaluator = Evaluator(
            workers, log, observe=lambda p: say(f"{p.evaluations} of {passes} passes")
        )
        needles = list(range(count, len(documents)))
        return measure_rules(evaluator, config, list(range(count)), needles, validation.length)
    finally:
        workers.close()
        log.close()


def summarize(rows: Sequence[RuleRow]) -> dict[str, Any]:
    """As JSON values, by rule: perplexity, its stretches, the needles' digits."""
    return {
        row.switch.value: {
            **dataclasses.asdict(row),
            "perplexity": float(np.exp(np.mean(row.losses))),
        }
        for row in rows
    }
