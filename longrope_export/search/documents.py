"""Texts for a search: read, tokenized once, cut into windows, split into three disjoint sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.errors import ConfigError, UnsupportedError
from longrope_export.search.jobs import Document

TEXT_SUFFIXES = (".txt", ".md", ".text", ".rst")
DATASET = "dataset:"


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


def read_texts(sources: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) of every work.

    Args:
        sources: text files, .jsonl files (one work per line, in field "text"), folders of both, or
            dataset:NAME[:SPLIT[:COLUMN]] for the datasets package.

    Raises:
        ConfigError: nothing there, an empty folder, not UTF-8, a line without text.
        UnsupportedError: a dataset is named and the datasets package is not installed.
    """
    works: list[tuple[str, str]] = []
    for source in sources:
        if source.startswith(DATASET):
            works += _from_dataset(source.removeprefix(DATASET))
            continue
        path = Path(source)
        if path.is_dir():
            files = [f for f in sorted(path.rglob("*")) if f.suffix in (*TEXT_SUFFIXES, ".jsonl")]
            if not files:
                raise ConfigError(
                    f"--text {path}: no text in this folder; expected files that end in "
                    f"{', '.join((*TEXT_SUFFIXES, '.jsonl'))}"
                )
        elif path.is_file():
            files = [path]
        else:
            raise ConfigError(f"--text {path}: no such file or folder")
        for file in files:
            works += _from_file(file)
    return works


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

    With three works or more that are long enough, each set has its own works. With less, the sets
    are different places of the same works, or, where there are fewer than three windows, the same
    ones; Split.held_out says so.

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
    shuffled = [works[int(index)] for index in rng.permutation(len(works))]
    windows = [w for w in (windows_of(*work, body, start) for work in shuffled) if w]
    if not windows:
        longest = max((len(ids) for _, ids in works), default=0)
        raise ConfigError(
            f"--text: the longest of {len(works)} works has {longest} tokens, a window needs "
            f"{body}: give longer texts, or a shorter --target-length"
        )
    if len(windows) >= 3:
        return Split(*_by_work(windows, counts))
    flat = [window for work in windows for window in work]
    if len(flat) >= 3:
        last = max(1, min(counts[2], len(flat) // 4))
        middle = max(1, min(counts[1], len(flat) // 4))
        note = (
            f"{len(windows)} work(s) are long enough, not three: search, validation and test are "
            f"different places of the same work"
        )
        rest = tuple(flat[: len(flat) - middle - last])[: counts[0]]
        return Split(rest, tuple(flat[-middle - last : -last]), tuple(flat[-last:]), note)
    note = f"only {len(flat)} window(s) of {length} tokens: nothing is held out"
    return Split(tuple(flat), tuple(flat), tuple(flat), note)


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
        rounds = max(map(len, share))
        turns = [work[k] for k in range(rounds) for work in share if k < len(work)]
        chosen.append(tuple(turns[:count]))
        lack = "" if len(turns) >= count else f" (of {count} asked for)"
        words.append(f"{name} {len(chosen[-1])}{lack} from {min(len(share), count)}")
    held_out = f"windows from different works: {', '.join(words)}"
    return chosen[0], chosen[1], chosen[2], held_out


def windows_of(name: str, ids: Sequence[int], body: int, start: Sequence[int]) -> list[Document]:
    """A work cut into documents of `start` and `body` tokens each, side by side."""
    places = range(0, len(ids) - body + 1, body)
    return [
        Document((*start, *ids[place : place + body]), name=f"{name}, from token {place}")
        for place in places
    ]


def _from_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--text {path}: cannot be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        yield path.stem, text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path.stem} line {number}", _text_of(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'--text {path}, line {number}: expected an object with a string "text"'
            ) from error


def _text_of(values: Any) -> str:
    text = values["text"]
    if not isinstance(text, str):
        raise TypeError
    return text


def _from_dataset(spec: str) -> Iterator[tuple[str, str]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UnsupportedError(
            f"--text {DATASET}{spec} needs the datasets package: {error}; pip install datasets"
        ) from error
    name, split, column = [*spec.split(":"), "", ""][:3]
    try:
        rows = load_dataset(name, split=split or "train")
        for number, row in enumerate(rows):
            yield f"{name} {number}", str(row[column or "text"])
    except Exception as error:  # many kinds, from many loaders
        raise ConfigError(f"--text {DATASET}{spec}: datasets cannot read it: {error}") from error
