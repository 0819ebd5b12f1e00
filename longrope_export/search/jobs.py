"""What a search asks its workers to compute, and what they answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from longrope_export.config import LongRopeConfig
from longrope_export.definition import to_json

Span = tuple[int, int]  # first position, and one past the last


@dataclass(frozen=True)
class Document:
    """A text of one window.

    Attributes:
        ids: token ids.
        answers: spans of positions whose tokens alone count for the loss (LongRoPE2's needles);
            none: every token but the first.
        name: of the work and the place that it comes from, for tables.
    """

    ids: tuple[int, ...]
    answers: tuple[Span, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Job:
    """One pass over one document.

    Three kinds, by cost:
    - whole (no blocks): every token of the document, in one pass;
    - blocks behind a prefix: only the tokens of `blocks` are computed under `config`; what stands
      before each is taken from a cache that was filled under `prefix`. Where config is causal
      and agrees with prefix below the block, that is exact; else it leaves out what the
      candidate would change in the hidden states before the block;
    - blocks without a prefix: the document's first tokens, moved to the positions of the blocks,
      with nothing between them. Cheap, and only good for throwing out the hopeless.

    Attributes:
        config: the definition to compute under.
        document: index of the document.
        blocks: rising, not overlapping spans of positions.
        prefix: the definition of the cache.
        gradient: also differentiate by the logarithms of the factors and the attention factor of
            the config's only tier; whole passes alone.
    """

    config: LongRopeConfig
    document: int
    blocks: tuple[Span, ...] = ()
    prefix: LongRopeConfig | None = None
    gradient: bool = False

    @property
    def key(self) -> str:
        """Names the result in the log: equal keys have equal results on one set of documents."""
        prefix = self.prefix and essence(self.prefix)
        values = [essence(self.config), self.document, self.blocks, prefix, self.gradient]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Score:
    """What a pass gave.

    Attributes:
        losses: sum of -ln p over the tokens of each span, in nats.
        counts: tokens of each span that were predicted.
        hits: how many of them were the most probable one.
        tokens: computed for it, as forward tokens (a gradient counts four times); a prefix is not
            counted here, since it may be there already.
        seconds: wall time.
        gradient: (pairs + 1,) d(mean loss) by ln(factor) of each pair and by ln(attention factor).
    """

    losses: tuple[float, ...]
    counts: tuple[int, ...]
    hits: tuple[int, ...]
    tokens: int
    seconds: float
    gradient: tuple[float, ...] = field(default=())

    @property
    def mean(self) -> float:
        """Loss per token in nats."""
        return sum(self.losses) / max(sum(self.counts), 1)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Score:
        return cls(
            tuple(values["losses"]),
            tuple(values["counts"]),
            tuple(values["hits"]),
            values["tokens"],
            values["seconds"],
            tuple(values["gradient"]),
        )


class Workers(Protocol):
    """Whoever computes jobs: this process, one process per device, or Ray."""

    def run(self, jobs: Sequence[Job], done: Callable[[int, Score], None]) -> None:
        """Compute all jobs.

        Args:
            done: called in this thread for each finished job with its index, in any order.
        """
        ...

    def close(self) -> None:
        """Give back models, processes and connections."""
        ...


def spans_of(document: Document, window: int) -> tuple[Span, ...]:
    """The spans of positions whose losses a whole pass reports.

    Its answers, or stretches of the model's own window, so that a loss can be told apart by how
    far it lies behind it.
    """
    if document.answers:
        return document.answers
    count = len(document.ids)
    return tuple((start, min(start + window, count)) for start in range(0, count, window))


def essence(config: LongRopeConfig) -> str:
    """The config as text, without its provenance: what a pass depends on."""
    values = to_json(config)
    del values["provenance"]
    return json.dumps(values)
