"""Texts and conversations from files, folders and the datasets package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.errors import ConfigError, UnsupportedError

TEXT_SUFFIXES = (".txt", ".md", ".text", ".rst")
ROW_SUFFIXES = (".jsonl", ".parquet")
DATASET = "dataset:"
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

_COLUMNS = ("text", "messages", "conversations")
_EXPECTED = (
    'a string "text", or a list "messages" of {"role", "content"}, '
    'or a list "conversations" of {"from": human|gpt|system, "value"}'
)
_PARQUET_ROWS = 256  # held in memory at once

Message = dict[str, str]  # "role" and "content", as chat templates want it


@dataclass(frozen=True)
class Work:
    """A text or a conversation.

    Attributes:
        name: of the file or dataset and the place in it.
        text: empty for a conversation.
        messages: the turns of a conversation, none for a text.
    """

    name: str
    text: str
    messages: tuple[Message, ...] = ()


def read_works(sources: Sequence[str]) -> Iterator[Work]:
    """Every text and every conversation, read while it is asked for.

    Args:
        sources: text files; .jsonl and .parquet files with one work per row, either a string
            "text", or "messages", or ShareGPT's "conversations"; folders of all these; or
            dataset:NAME[:SPLIT[:COLUMN]] for the datasets package.

    Raises:
        ConfigError: nothing there or an empty folder, at once; while reading: not UTF-8, a damaged
            file, a row that is neither a text nor a conversation.
        UnsupportedError: while reading: the datasets or the pyarrow package is not installed.
    """
    found: list[str | Path] = []
    for source in sources:
        found += [source] if source.startswith(DATASET) else _files(Path(source))
    return _read(found)


def read_texts(sources: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) of every work; see read_works.

    Raises:
        ConfigError: as read_works, and for a conversation.
        UnsupportedError: as read_works.
    """
    works = []
    for work in read_works(sources):
        if work.messages:
            raise ConfigError(
                f'{work.name}: a conversation, expected a text: give rows with a string "text"; '
                f"conversations are for fine-tuning"
            )
        works.append((work.name, work.text))
    return works


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"text {path}: no such file or folder")
    suffixes = (*TEXT_SUFFIXES, *ROW_SUFFIXES)
    found = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in suffixes)
    files = [file for file in found if file.is_file()]
    if not files:
        raise ConfigError(
            f"text {path}: no text in this folder; expected files that end in {', '.join(suffixes)}"
        )
    return files


def _read(found: Sequence[str | Path]) -> Iterator[Work]:
    for source in found:
        if isinstance(source, str):
            yield from _from_dataset(source.removeprefix(DATASET))
        elif source.suffix.lower() == ".parquet":
            yield from _from_parquet(source)
        elif source.suffix.lower() == ".jsonl":
            yield from _from_jsonl(source)
        else:
            try:
                yield Work(source.stem, source.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, OSError) as error:
                raise _unreadable(source, error) from error


def _from_jsonl(path: Path) -> Iterator[Work]:
    number = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _work(f"{path.stem} line {number}", json.loads(line))
    except (UnicodeDecodeError, OSError) as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise ConfigError(
            f"text {path}, line {number}: expected an object with {_EXPECTED}; {error}"
        ) from error


def _from_parquet(path: Path) -> Iterator[Work]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UnsupportedError(
            f"text {path} needs the pyarrow package: {error}; pip install pyarrow"
        ) from error
    number = 0
    try:
        with ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            if not columns:
                raise ValueError(f"it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _work(f"{path.stem} row {number}", row)
    except (ArrowException, OSError) as error:  # ArrowInvalid is a ValueError too
        raise ConfigError(f"text {path}: cannot be read as parquet: {error}") from error
    except ValueError as error:
        raise ConfigError(f"text {path}, row {number}: expected {_EXPECTED}; {error}") from error


def _from_dataset(spec: str) -> Iterator[Work]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UnsupportedError(
            f"text {DATASET}{spec} needs the datasets package: {error}; pip install datasets"
        ) from error
    name, split, column = [*spec.split(":"), "", ""][:3]
    number = 0
    try:
        for number, row in enumerate(load_dataset(name, split=split or "train")):
            yield _work(f"{name} {number}", row, column)
    except Exception as error:  # many kinds, from many loaders
        raise ConfigError(
            f"text {DATASET}{spec}, row {number}: datasets cannot read it as {_EXPECTED}: {error}"
        ) from error


def _work(name: str, row: Any, column: str = "") -> Work:
    """The work of a row; ValueError if it is none, saying what the row has."""
    if not isinstance(row, Mapping):
        raise ValueError("it is no object")
    present = [key for key in ((column,) if column else _COLUMNS) if row.get(key) is not None]
    if not present:
        raise ValueError(f"it has {', '.join(map(str, row)) or 'nothing'}")
    value = row[present[0]]
    if isinstance(value, str) and present[0] in (column, "text"):
        return Work(name, value)
    if not isinstance(value, list) or not value or present[0] == "text":
        raise ValueError(f'"{present[0]}" is {type(value).__name__} {str(value)[:40]!r}')
    return Work(name, "", tuple(_message(turn) for turn in value))


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"a turn is no object: {str(turn)[:40]!r}")
    if turn.get("tool_calls"):
        raise ValueError("tool calls are not supported")
    if "from" in turn:
        role, content = SHAREGPT_ROLES.get(str(turn["from"])), turn.get("value")
    else:
        role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"a turn is {str(dict(turn))[:80]}")
    return {"role": role, "content": content}


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"text {path}: cannot be read as UTF-8 text: {error}")
