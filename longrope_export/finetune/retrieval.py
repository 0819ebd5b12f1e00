"""Rows that hide numbers in their text and ask for them at its end; the answers alone are learned.

The sentences are those of the search's needles (LongRoPE2, arXiv 2502.20082, section 3.2). In a row
whose positions jump (PoSE), a number and its question stand as far apart as their positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import floor

import numpy as np

from longrope_export.errors import ConfigError
from longrope_export.models.token_losses import IGNORED
from longrope_export.search.jobs import Document
from longrope_export.search.needles import MAX_KEYS, make_needles


@dataclass(frozen=True)
class Retrieval:
    """Which rows ask for numbers, and how many.

    Attributes:
        share: of all rows, 0..1, evenly among them.
        keys: numbers in such a row, 1 to 64.
        encode: token ids of a text, without special tokens.

    Raises:
        ConfigError: numbers out of bounds.
    """

    share: float
    keys: int
    encode: Callable[[str], list[int]]

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"rows: retrieval_share {self.share}: expected 0..1")
        if not 1 <= self.keys <= MAX_KEYS:
            raise ConfigError(f"rows: retrieval_keys {self.keys}: expected 1..{MAX_KEYS}")

    def asks(self, index: int) -> bool:
        """Whether row `index` is one of them: with a share of 0.5 every second one."""
        return floor((index + 1) * self.share) > floor(index * self.share)

    def hide(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A row's text with numbers in it, of the same length.

        Args:
            ids: (n,) token ids; its last ones make room.

        Returns:
            (n,) int32 token ids, and (n,) int32 targets, IGNORED outside of the answers.

        Raises:
            ConfigError: the row is too short for the numbers.
        """
        text = Document(tuple(ids.tolist()))
        way_out = "give fewer by retrieval_keys, or longer rows"
        found = make_needles(text, self.encode, self.keys, rng, way_out=way_out)
        hidden = np.array(found.ids, np.int32)
        targets = np.full(len(hidden), IGNORED, np.int32)
        for begin, end in found.answers:
            targets[begin:end] = hidden[begin:end]
        return hidden, targets
