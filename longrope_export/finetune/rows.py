"""Rows for training: which tokens, at which positions, with which targets.

A row is made when it is asked for and depends on the seed and its index alone, so a training that
was killed goes on with the rows that it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longrope_export.errors import ConfigError
from longrope_export.finetune.recipes import Layout
from longrope_export.finetune.retrieval import Retrieval
from longrope_export.finetune.row_sources import (
    Epoch,
    Part,
    Pieces,
    Source,
    Span,
    Stream,
    Windows,
    mix,
)
from longrope_export.finetune.samples import Sample
from longrope_export.models.token_losses import IGNORED


@dataclass(frozen=True)
class RowSettings:
    """What rows look like.

    Attributes:
        window: tokens of a row, but for POSE and SINGLE; positions are below it in all.
        short_length: MIXED: works of at most so many tokens are short, usually the window before
            extension.
        short_share: MIXED: share of the rows that holds short works, 0..1. The rarer kind decides
            how many rows an epoch has: no token comes twice in it.
        tokens: POSE: tokens of a row.
        chunks: POSE: pieces of a row, of random lengths. The first stands at position 0, each
            other one is moved on by a random skip.
        true_places: POSE: take each piece from its place in the work, which then needs a window
            of tokens; else the text of a row goes on while its positions jump.

    Raises:
        ConfigError: numbers out of bounds.
    """

    window: int
    layout: Layout = Layout.PACKED
    short_length: int | None = None
    short_share: float = 0.3
    tokens: int = 2048
    chunks: int = 2
    true_places: bool = False

    def __post_init__(self) -> None:
        if self.layout not in list(Layout):
            raise ConfigError(f"rows: layout {self.layout!r}: expected {', '.join(Layout)}")
        object.__setattr__(self, "layout", Layout(self.layout))
        if self.window < 2:
            raise ConfigError(f"rows: window {self.window}: expected 2 tokens or more")
        if self.layout is Layout.MIXED:
            if not 0 <= self.short_share <= 1:
                raise ConfigError(f"rows: short_share {self.short_share}: expected 0..1")
            if self.short_length is None or self.short_length < 2:
                raise ConfigError(
                    f"rows: mixed needs short_length, 2 tokens or more, got {self.short_length}: "
                    f"give the window before extension"
                )
        if self.layout is Layout.POSE:
            if not 2 <= self.tokens <= self.window:
                raise ConfigError(
                    f"rows: {self.tokens} tokens of a pose row cannot be spread over a window of "
                    f"{self.window}: expected 2..{self.window}"
                )
            if not 1 <= self.chunks <= self.tokens:
                raise ConfigError(
                    f"rows: {self.chunks} chunks of {self.tokens} tokens: expected 1..{self.tokens}"
                )


@dataclass(frozen=True, eq=False)
class Row:
    """What a model is given.

    Attributes:
        ids: (n,) int32 token ids.
        positions: (n,) int32.
        targets: (n,) int32: the id where the token is to be predicted from those before it, else
            IGNORED; not shifted (transformers' labels). A token whose true predecessor does not
            stand before it is no target. There may be none at all in a row.
        is_packed: documents must not see each other; one begins where positions begin anew.
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    is_packed: bool = False


class TrainingRows:
    """All rows of all epochs, by index.

    len() is the number of rows of an epoch. Epochs differ in the order of works and of rows, in
    what is left over, and in what is drawn for POSE.

    Args:
        samples: not copied; those without targets take no part.
        settings: see there.
        seed: of everything random, 0 or more.
        retrieval: which rows ask for hidden numbers; None for none. Not with packed rows, whose
            works must not see each other.

    Raises:
        ConfigError: samples that are too short or too few for the layout, or without targets.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        settings: RowSettings,
        seed: int,
        retrieval: Retrieval | None = None,
    ) -> None:
        if seed < 0:
            raise ConfigError(f"rows: seed {seed}: expected 0 or more")
        if retrieval is not None and settings.layout not in (Layout.LONG, Layout.POSE):
            raise ConfigError(
                f"rows: numbers are hidden in rows of one work, layout long or pose, not "
                f"{settings.layout}"
            )
        self._samples, self.settings, self.seed = samples, settings, seed
        self._retrieval = retrieval
        self._parts = self._make_parts()
        self._count = sum(part.taken for part in self._parts)
        self._shuffled: tuple[int, Epoch] | None = None

    def __len__(self) -> int:
        return self._count

    def row(self, index: int) -> Row:
        """Row `index`, 0 or more, of epoch index // len(self)."""
        epoch, number = divmod(index, self._count)
        if self._shuffled is None or self._shuffled[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._shuffled = epoch, Epoch(self._parts, rng)
        spans, is_packed = self._shuffled[1].spans(number)
        rng = np.random.default_rng((self.seed, index))
        if self.settings.layout is Layout.POSE:
            row = self._pose_row(spans[0], rng)
        else:
            row = _make_row(self._samples, spans, is_packed)
        if self._retrieval is None or not self._retrieval.asks(index):
            return row
        ids, targets = self._retrieval.hide(row.ids, rng)
        return Row(ids, row.positions, targets)

    def _make_parts(self) -> list[Part]:
        settings, layout = self.settings, self.settings.layout
        window = settings.window
        lengths = np.array([len(sample) for sample in self._samples], np.int64)
        able = np.flatnonzero([sample.is_target[1:].any() for sample in self._samples])
        if not len(able):
            raise ConfigError(f"rows: none of {len(lengths)} works has a token to learn")
        if layout is Layout.MIXED:
            assert settings.short_length is not None
            is_short = lengths[able] <= settings.short_length
            return mix(
                Stream(lengths, able[is_short], window),
                Stream(lengths, able[~is_short], window),
                settings.short_share,
            )
        source: Source
        if layout is Layout.SINGLE:
            source, needs = Pieces(self._samples, window), "a token to learn behind another"
        elif layout in (Layout.PACKED, Layout.DOCUMENTS):
            source, needs = Stream(lengths, able, window), f"{window} tokens in all"
        else:
            width = settings.tokens if layout is Layout.POSE else window
            least = width if layout is Layout.POSE and not settings.true_places else window
            source = Windows(lengths, able[lengths[able] >= least], width)
            needs = f"a work of {least} tokens"
        if source.count == 0:
            raise ConfigError(
                f"rows: layout {layout} needs {needs}, and {len(able)} works have "
                f"{lengths[able].sum()} tokens, the longest {lengths[able].max()}: give more or longer works, "
                f"or a shorter window"
            )
        return [Part(source, source.count, layout is Layout.DOCUMENTS)]

    def _pose_row(self, span: Span, rng: np.random.Generator) -> Row:
        settings = self.settings
        sample, first, _ = span
        cuts = rng.choice(settings.tokens - 1, settings.chunks - 1, replace=False) + 1
        borders = np.array([0, *np.sort(cuts), settings.tokens])
        skips = [0]
        for _ in range(settings.chunks - 1):  # the paper's: uniform from the skip before
            room = settings.window - settings.tokens
            skips.append(int(rng.integers(skips[-1], room, endpoint=True)))
        positions = np.arange(settings.tokens) + np.repeat(skips, np.diff(borders))
        if settings.true_places:
            spare = len(self._samples[sample]) - settings.window
            first = int(rng.integers(0, spare, endpoint=True))
            spans = [
                (sample, first + skip + int(start), first + skip + int(stop))
                for skip, start, stop in zip(skips, borders[:-1], borders[1:], strict=True)
            ]
        else:
            spans = [span]
        row = _make_row(self._samples, spans, is_packed=False)
        return Row(row.ids, positions.astype(np.int32), row.targets)


def batch(rows: Sequence[Row], pad_id: int) -> dict[str, np.ndarray]:
    """The arguments of a forward, padded on the right, (rows, longest row) int64 each.

    Under `input_ids`, `position_ids`, `labels`, and, if no row is packed, `attention_mask`: with a
    mask a row is one text, whatever its positions; without, a document begins where positions do
    not go on by one, and padding is such a document. The forward must be called without a cache
    (use_cache=False): with one, transformers looks for no documents.

    Raises:
        ConfigError: no rows, or rows with jumps in their positions beside packed ones.
    """
    if not rows:
        raise ConfigError("batch: no rows")
    is_packed = any(row.is_packed for row in rows)
    if is_packed and any((np.diff(row.positions) != 1).any() for row in rows if not row.is_packed):
        raise ConfigError(
            "batch: packed rows need a forward without a mask, rows with jumps in their positions "
            "(pose) one with a mask: put them into different batches"
        )
    shape = (len(rows), max(len(row.ids) for row in rows))
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    position_ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for k, row in enumerate(rows):
        n = len(row.ids)
        input_ids[k, :n], labels[k, :n], mask[k, :n] = row.ids, row.targets, 1
        position_ids[k, :n] = row.positions
        position_ids[k, n:] = np.arange(shape[1] - n)
    made = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    return made if is_packed else {**made, "attention_mask": mask}


def _make_row(samples: Sequence[Sample], spans: Sequence[Span], is_packed: bool) -> Row:
    """The spans behind each other; positions rise by one, or begin anew at each span if packed."""
    ids = np.concatenate([samples[k].ids[first:stop] for k, first, stop in spans])
    is_target = np.concatenate([samples[k].is_target[first:stop] for k, first, stop in spans])
    positions, place, before = np.arange(len(ids), dtype=np.int32), 0, (-1, 0)
    for sample, first, stop in spans:
        if before != (sample, first):  # the token before is not the one that precedes it
            is_target[place] = False
        if is_packed:
            positions[place : place + stop - first] = np.arange(stop - first)
        place += stop - first
        before = (sample, stop)
    targets = np.where(is_target, ids, IGNORED).astype(np.int32)
    return Row(ids, positions, targets, is_packed)
