"""What every kind of search run has: documents, a log, workers, an observer, and its outputs."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export import __version__
from longrope_export.config import LongRopeConfig
from longrope_export.factor_files import write_factors
from longrope_export.models.model import Model
from longrope_export.outputs import check_outside, write_text
from longrope_export.search.documents import Split
from longrope_export.search.evaluator import Evaluator, Progress
from longrope_export.search.jobs import Document, Workers
from longrope_export.search.options import Event, Outcome, SearchOptions
from longrope_export.search.state import RunFolder
from longrope_export.search.tables import FORMAT
from longrope_export.verify.certificate import content_hash

RESULT = "result.json"
FACTORS = "factors.json"
SETS = ("search", "validation", "test")
IN_PROVENANCE = ("chosen", "baseline", "test", "rules", "held_out", "documents", "spent")


@dataclass(frozen=True)
class Texts:
    """Tokenized works.

    Attributes:
        works: (name, ids) without special tokens.
        encode: ids of a text, without special tokens.
        start: ids that stand in front of every window.
    """

    works: Sequence[tuple[str, Sequence[int]]]
    encode: Callable[[str], list[int]]
    start: tuple[int, ...] = ()


class Run(ABC):
    """One run in one folder.

    Args:
        model: the source.
        texts: at least one window of the target length.
        options: see there.
        folder: RUN/.
        make_workers: starts whoever computes, given all documents.
        resume: go on with a run that is there.
        observe: told of progress.

    Attributes:
        held_out: how far search, validation and test documents are apart.

    Raises:
        ConfigError: texts too short, a target that does not fit, a run with other settings.
        OutputError: the folder holds a run already, or cannot be written.
    """

    def __init__(
        self,
        model: Model,
        texts: Texts,
        options: SearchOptions,
        folder: Path,
        make_workers: Callable[[Sequence[Document]], Workers],
        *,
        resume: bool = False,
        observe: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.model, self.options, self.folder = model, options, folder
        self._observe, self._event = observe, Event("reading")
        self.history: list[dict[str, Any]] = []
        self.seed_losses: dict[str, float] = {}
        self.held_out = ""
        check_outside(folder, model.path)
        documents = self._prepare(texts, np.random.default_rng(options.seed))
        self.run = RunFolder(folder, self._settings(documents), resume=resume)
        self.workers = make_workers(documents)
        self.searching = Evaluator(self.workers, self.run, options.budget, self._progress)
        self.judging = Evaluator(self.workers, self.run, None, self._progress)

    @property
    def has_gradient(self) -> bool:
        """Whether losses can be differentiated by the factors of this model; see gradient.py."""
        return self.model.native.layers is None and self.model.native.logit_scaling is None

    @abstractmethod
    def _prepare(self, texts: Texts, rng: np.random.Generator) -> list[Document]:
        """Check the options against the model, and make all documents."""

    @abstractmethod
    def execute(self) -> Outcome:
        """Search, choose, report; writes factors.json and result.json.

        Raises:
            LongRopeError: what the workers or the disk raise; the run can be resumed.
        """

    def close(self) -> None:
        """End the workers and close the log."""
        self.workers.close()
        self.run.close()

    def _finish(self, config: LongRopeConfig, result: Mapping[str, Any]) -> Outcome:
        """Add what every result has, and write both files."""
        whole = {
            "format": FORMAT,
            **result,
            "seeds": self.seed_losses,
            "history": self.history,
            "spent": _spent(self.searching),
            "judging": _spent(self.judging),
        }
        provenance = {
            "method": f"search ({self.options.algorithm})",
            "target_length": self.options.target_length,
            "options": self.options.to_json(),
            "model_fingerprint": self.model.fingerprint,
            "tool": f"longrope-export {__version__}",
            "search": {name: whole[name] for name in IN_PROVENANCE if name in whole},
        }
        config = replace(config, provenance=json.loads(json.dumps(provenance)))
        write_factors(config, self.folder / FACTORS)
        write_text(self.folder / RESULT, json.dumps(whole, indent=2) + "\n")
        return Outcome(config, json.loads(json.dumps(whole)))

    def _settings(self, documents: Sequence[Document]) -> dict[str, Any]:
        ids = json.dumps([[d.ids, d.answers] for d in documents]).encode()
        return {
            "tool": f"longrope-export {__version__}",
            "model_sha256": content_hash(self.model.path),
            "documents_sha256": hashlib.sha256(ids).hexdigest(),
            "options": self.options.to_json(),
        }

    def _say(self, phase: str) -> None:
        self._event = replace(self._event, phase=phase, progress=None)
        self._observe(self._event)

    def _progress(self, progress: Progress) -> None:
        self._event = replace(self._event, progress=progress)
        self._observe(self._event)

    def _seeded(self, losses: dict[str, float]) -> None:
        self._event = replace(self._event, closed_forms=losses)
        self.seed_losses = losses

    def _found(self, loss: float, origin: str) -> None:
        self._event = replace(self._event, best=loss, origin=origin)
        spent = _spent(self.searching)
        self.history.append({**spent, "phase": self._event.phase, "loss": loss, "origin": origin})
        self._observe(self._event)


def indices_of(split: Split, name: str, first: int = 0) -> list[int]:
    """Indices of one set, "search", "validation" or "test", where Split.all begins at `first`."""
    for other in SETS[: SETS.index(name)]:
        first += len(getattr(split, other))
    return list(range(first, first + len(getattr(split, name))))


def names_of(split: Split) -> dict[str, list[str]]:
    """Where the documents of each set come from."""
    return {name: [document.name for document in getattr(split, name)] for name in SETS}


def _spent(evaluator: Evaluator) -> dict[str, Any]:
    return {
        "evaluations": evaluator.evaluations,
        "tokens": evaluator.tokens,
        "seconds": evaluator.seconds,
    }
