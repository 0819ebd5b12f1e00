"""What an evaluation is asked to do, and the cells that it comes down to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longrope_export.errors import ConfigError
from longrope_export.evaluate.needle import MULTIKEY, MULTIVALUE, PASSKEY

PERPLEXITY, LM_EVAL = "perplexity", "lm-eval"


@dataclass(frozen=True)
class Text:
    """One document.

    Attributes:
        name: for tables; each text has another.
        content: of it.
    """

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Hex, of its UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Settings:
    """How everything is measured.

    Attributes:
        lengths: window or prompt lengths in tokens, rising, each at least 2.
        perplexity, passkey, needle: which kinds of task are run.
        stride: tokens between windows; None for the window's length, windows side by side.
        tokens: of each text that are read for perplexity; None for the longest length.
        num_stretches: into how many parts a window is cut for perplexity by position.
        depths: of the passkey, each 0 to 1.
        trials: of every needle task at every length (and depth), with other numbers each.
        num_keys: hidden numbers of `multikey`; 0 leaves it out.
        num_values: hidden numbers of `multivalue`; 0 leaves it out.
        seed: of the hidden numbers.
        tasks: names for lm-eval.

    Raises:
        ConfigError: on construction, if a value is out of range.
    """

    lengths: tuple[int, ...]
    perplexity: bool = True
    passkey: bool = False
    needle: bool = False
    stride: int | None = None
    tokens: int | None = None
    num_stretches: int = 16
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 1
    num_keys: int = 5
    num_values: int = 4
    seed: int = 0
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        hidden = self.passkey or (self.needle and (self.num_keys or self.num_values))
        if not (self.perplexity or hidden or self.tasks):
            raise ConfigError(
                "nothing to measure: perplexity is off, and no other task is named, or --needle alone "
                "with --keys 0 and --values 0"
            )
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ConfigError(f"lengths must be different and rising, got {self.lengths}")
        if self.lengths[0] < 2:
            raise ConfigError(f"lengths must be at least 2 tokens, got {self.lengths[0]}")
        if self.tokens is not None and self.tokens < self.lengths[-1]:
            raise ConfigError(
                f"--tokens must be at least the longest length, {self.lengths[-1]}, got {self.tokens}"
            )
        if self.stride is not None and not 1 <= self.stride <= self.lengths[0]:
            raise ConfigError(
                f"--stride must be 1 to {self.lengths[0]}, the shortest length, got {self.stride}"
            )
        for name, least in (
            ("num_stretches", 1),
            ("trials", 1),
            ("num_keys", 0),
            ("num_values", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"--seed must be 0 or more, got {self.seed}")
        if not all(0 <= depth <= 1 for depth in self.depths) or not self.depths:
            raise ConfigError(f"--depths must be from 0 to 1, got {self.depths}")

    @property
    def num_tokens(self) -> int:
        """Tokens of each text that are read for perplexity."""
        return self.tokens or self.lengths[-1]

    def fixed(self) -> dict[str, Any]:
        """What a run that goes on must share with the one before; the rest only adds cells."""
        names = ("stride", "num_stretches", "num_keys", "num_values", "seed")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        task: perplexity, passkey, multikey, multivalue, or lm-eval.
        model: label of the subject.
        length: tokens; for lm-eval the longest length, of which its requests keep the last tokens.
        text: name of the document, or of the lm-eval task.
        num_tokens: of it that are read, for perplexity.
        depth: of the passkey.
        trial: from 0.
    """

    task: str
    model: str
    length: int
    text: str
    num_tokens: int | None = None
    depth: float | None = None
    trial: int | None = None

    def __str__(self) -> str:
        parts = [self.task, self.model, self.text, str(self.length)]
        parts += ["" if self.depth is None else f"depth {self.depth:g}"]
        return ", ".join(part for part in parts if part)


def make_cells(settings: Settings, models: Sequence[str], texts: Sequence[Text]) -> list[Cell]:
    """Every cell, model by model and length by length, cheap lengths first."""
    return [cell for model in models for cell in _cells_of_model(settings, model, texts)]


def _cells_of_model(settings: Settings, model: str, texts: Sequence[Text]) -> Iterator[Cell]:
    for length in settings.lengths:
        yield from _cells_of(settings, model, length, texts)
    for task in settings.tasks:
        yield Cell(LM_EVAL, model, settings.lengths[-1], task)


def _cells_of(settings: Settings, model: str, length: int, texts: Sequence[Text]) -> Iterator[Cell]:
    if settings.perplexity:
        for text in texts:
            yield Cell(PERPLEXITY, model, length, text.name, settings.num_tokens)
    for trial in range(settings.trials):
        haystack = texts[trial % len(texts)].name if texts else ""
        if settings.passkey:
            for depth in settings.depths:
                yield Cell(PASSKEY, model, length, haystack, depth=depth, trial=trial)
        if settings.needle:
            counts = {MULTIKEY: settings.num_keys, MULTIVALUE: settings.num_values}
            for kind, count in counts.items():
                if count:
                    yield Cell(kind, model, length, haystack, trial=trial)
