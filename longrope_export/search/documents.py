"""Texts for a search: tokenized once, cut into windows, split into three disjoint sets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longrope_export.errors import ConfigError
from longrope_export.search.jobs import Document


@dataclass(frozen=True)
class Split:
    """Documents of one window each.

    Attributes:
        search: candidates are scored on them.
        validation: the result is chosen on them.
        test: only reported on.
        held_out: how far the sets are apart, and what was asked for and is not there, in words.
    """

    search: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    held_out: str

    @property
    def all(self) -> tuple[Document, ...]:
        """Search, validation and test documents, in this order."""
        return self.search + self.validation + self.test


def tokenize(
    works: Sequence[tuple[str, str]], encode: Callable[[str], list[int]]
) -> list[tuple[str, list[int]]]:
    """(name, token ids) of every work."""
    return [(name, encode(text)) for name, text in works]


def split_documents(
    works: Sequence[tuple[str, Sequence[int]]],
    length: int,
    counts: tuple[int, int, int],
    rng: np.random.Generator,
    start: Sequence[int] = (),
) -> Split:
    """Windows of `length` tokens for search, validation and test.

    A work that is given twice counts once. With three works or more that are long enough, each set
    has its own works. With less, the sets are different places of the same works, or, where there
    are fewer than three windows, the same ones; Split.held_out says so.

    Args:
        works: (name, ids) without special tokens.
        length: tokens of a window.
        counts: documents wanted for each set; fewer if there are no more.
        rng: shuffles the works.
        start: ids in front of every window (the tokenizer's begin-of-text), within its length.

    Raises:
        ConfigError: no work has `length` tokens.
    """
    body = length - len(start)
    given, works = len(works), _distinct(works)
    others = f"; {given - len(works)} work(s) given twice, used once" if len(works) < given else ""
    shuffled = [works[int(index)] for index in rng.permutation(len(works))]
    windows = [w for w in (windows_of(*work, body, start) for work in shuffled) if w]
    if short := len(works) - len(windows):
        others += f"; {short} work(s) shorter than a window, left out"
    if not windows:
        longest = max((len(ids) for _, ids in works), default=0)
        raise ConfigError(
            f"--text: the longest of {len(works)} works has {longest} tokens, a window needs "
            f"{body}: give longer texts, or a shorter --target-length"
        )
    if len(windows) >= 3:
        search, validation, test, words = _by_work(windows, counts)
        return Split(search, validation, test, words + others)
    flat = [window for work in windows for window in work]
    if len(flat) >= 3:
        last = max(1, min(counts[2], len(flat) // 4))
        middle = max(1, min(counts[1], len(flat) // 4))
        note = (
            f"{len(windows)} work(s) are long enough, not three: search, validation and test are "
            f"different places of the same work"
        )
        rest = tuple(flat[: len(flat) - middle - last])[: counts[0]]
        return Split(rest, tuple(flat[-middle - last : -last]), tuple(flat[-last:]), note + others)
    note = f"only {len(flat)} window(s) of {length} tokens: nothing is held out"
    return Split(tuple(flat), tuple(flat), tuple(flat), note + others)


def _distinct(works: Sequence[tuple[str, Sequence[int]]]) -> list[tuple[str, Sequence[int]]]:
    """The works without those whose tokens came before: a copy would stand in two of the sets."""
    found: dict[bytes, tuple[str, Sequence[int]]] = {}
    for name, ids in works:
        digest = hashlib.sha256(np.asarray(ids, np.int64).tobytes()).digest()
        found.setdefault(digest, (name, ids))
    return list(found.values())


def _by_work(
    windows: list[list[Document]], counts: tuple[int, int, int]
) -> tuple[tuple[Document, ...], tuple[Document, ...], tuple[Document, ...], str]:
    """Give each work to the set that lacks most; then take windows from its works in turn."""
    shares: list[list[list[Document]]] = [[], [], []]
    for work in windows:
        have = [sum(map(len, share)) / count for share, count in zip(shares, counts, strict=True)]
        shares[int(np.argmin(have))].append(work)
    chosen, words = [], []
    for name, share, count in zip(("search", "validation", "test"), shares, counts, strict=True):
        turns = in_turn(share)
        chosen.append(tuple(turns[:count]))
        lack = "" if len(turns) >= count else f" (of {count} asked for)"
        words.append(f"{name} {len(chosen[-1])}{lack} from {min(len(share), count)}")
    held_out = f"windows from different works: {', '.join(words)}"
    return chosen[0], chosen[1], chosen[2], held_out


def in_turn(works: Sequence[Sequence[Document]]) -> list[Document]:
    """The first window of every work, then the second of every one that has it, and so on."""
    rounds = max(map(len, works), default=0)
    return [work[k] for k in range(rounds) for work in works if k < len(work)]


def windows_of(name: str, ids: Sequence[int], body: int, start: Sequence[int]) -> list[Document]:
    """A work cut into documents of `start` and `body` tokens each, side by side."""
    places = range(0, len(ids) - body + 1, body)
    return [
        Document((*start, *ids[place : place + body]), name=f"{name}, from token {place}")
        for place in places
    ]
