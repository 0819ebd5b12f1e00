"""Where the tokens of rows come from: works one behind the other, windows within works, pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from longrope_export.errors import ConfigError
from longrope_export.finetune.samples import Sample

Span = tuple[int, int, int]  # sample, its first token, one past the last
RowSpans = Callable[[int], list[Span]]  # of row 0, 1, ... of one epoch


class Source(Protocol):
    """Rows out of samples; `count` of them in an epoch, whatever is drawn."""

    count: int

    def shuffle(self, rng: np.random.Generator) -> RowSpans:
        """The rows of one epoch."""


class Stream:
    """Works in a random order behind each other, cut into rows; the rest is left out.

    Args:
        lengths: (samples,) int64 tokens of each.
        chosen: indices of the samples that take part.
        width: tokens of a row.
    """

    def __init__(self, lengths: np.ndarray, chosen: np.ndarray, width: int) -> None:
        self._lengths, self._chosen, self._width = lengths, chosen, width
        self.count = int(lengths[chosen].sum()) // width

    def shuffle(self, rng: np.random.Generator) -> RowSpans:
        order = rng.permutation(self._chosen)
        ends = np.cumsum(self._lengths[order])

        def spans(row: int) -> list[Span]:
            place, stop = row * self._width, (row + 1) * self._width
            found = []
            while place < stop:
                k = int(np.searchsorted(ends, place, side="right"))
                end, sample = int(ends[k]), int(order[k])
                begin = end - int(self._lengths[sample])
                found.append((sample, place - begin, min(stop, end) - begin))
                place = end
            return found

        return spans


class Windows:
    """As many windows as fit into each work, from a random place on; arguments as for Stream."""

    def __init__(self, lengths: np.ndarray, chosen: np.ndarray, width: int) -> None:
        self._chosen, self._width = chosen, width
        self._numbers, self._spare = lengths[chosen] // width, lengths[chosen] % width
        self.count = int(self._numbers.sum())

    def shuffle(self, rng: np.random.Generator) -> RowSpans:
        starts = rng.integers(0, self._spare, endpoint=True)
        ends = np.cumsum(self._numbers)

        def spans(row: int) -> list[Span]:
            k = int(np.searchsorted(ends, row, side="right"))
            number = row - int(ends[k] - self._numbers[k])
            first = int(starts[k]) + number * self._width
            return [(int(self._chosen[k]), first, first + self._width)]

        return spans


class Pieces:
    """Whole works, longer ones cut at the window; pieces with nothing to learn are left out."""

    def __init__(self, samples: Sequence[Sample], window: int) -> None:
        self._spans = [
            (k, first, min(first + window, len(sample)))
            for k, sample in enumerate(samples)
            for first in range(0, len(sample), window)
            if sample.is_target[first + 1 : first + window].any()
        ]
        self.count = len(self._spans)

    def shuffle(self, rng: np.random.Generator) -> RowSpans:
        return lambda row: [self._spans[row]]


@dataclass(frozen=True)
class Part:
    """Some of the rows of each epoch: `taken` of a source, packed or not."""

    source: Source
    taken: int
    is_packed: bool


def mix(short: Source, long: Source, share: float) -> list[Part]:
    """As many rows as can be had with a share of short ones, and none twice.

    Raises:
        ConfigError: a kind that is to be there has no row.
    """
    total = min(
        short.count / share if share > 0 else math.inf,
        long.count / (1 - share) if share < 1 else math.inf,
    )
    counts = (min(short.count, round(total * share)), min(long.count, round(total * (1 - share))))
    if (share > 0 and not counts[0]) or (share < 1 and not counts[1]):
        raise ConfigError(
            f"rows: {short.count} rows of short works and {long.count} of longer ones cannot be "
            f"mixed with a share of {share:g} short ones: give more of what lacks"
        )
    return [Part(short, counts[0], True), Part(long, counts[1], False)]


class Epoch:
    """The rows of all parts in one random order."""

    def __init__(self, parts: Sequence[Part], rng: np.random.Generator) -> None:
        self._parts = parts
        self._spans = [part.source.shuffle(rng) for part in parts]
        rows = [rng.permutation(part.source.count)[: part.taken] for part in parts]
        part_of = np.repeat(np.arange(len(parts)), [len(picked) for picked in rows])
        order = rng.permutation(len(part_of))
        self._part_of, self._rows = part_of[order], np.concatenate(rows)[order]

    def spans(self, number: int) -> tuple[list[Span], bool]:
        """What row `number` is made of, and whether it is packed."""
        part = int(self._part_of[number])
        return self._spans[part](int(self._rows[number])), self._parts[part].is_packed
