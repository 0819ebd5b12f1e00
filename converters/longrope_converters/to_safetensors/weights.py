"""Weights of a checkpoint into another folder: hard-linked, or copied byte for byte.

A copied checkpoint carries the config in the metadata of its first shard, so that one file's
header grows; the tensor bytes behind it are the same. A hard link is the same file and cannot, so
that a shard with other factors in its metadata is copied even then.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longrope_converters.to_gguf.files import (
    COPY_PIECE_BYTES,
    copy_range,
    open_source,
    start_writeback,
    write_exactly,
)
from longrope_export.errors import ModelError, OutputError
from longrope_export.stock_rope import DEFINITION_KEY

_LENGTH_BYTES = 8  # a safetensors file starts with the length of its header, u64
_PAGE_BYTES = 4096

Progress = Callable[[int], None]


def link_file(source: Path, output: Path) -> None:
    """Make `output` another name of the file itself, also where `source` is a symbolic link.

    Raises:
        OutputError: another filesystem, or one without hard links.
    """
    try:
        os.link(source.resolve(), output)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        raise OutputError(
            f"{source} cannot be hard-linked into {output.parent.parent}: {error.strerror}; both "
            f"must be on one filesystem that knows hard links: leave out --link to copy"
        ) from error


def copy_file(source: Path, output: Path, progress: Progress) -> None:
    """Copy byte for byte, inside the kernel where it can (and as a clone on btrfs and XFS)."""
    with _open_both(source, output) as (reading, writing):
        _copy_from(reading, source, 0, writing, 0, progress)


def copy_with_definition(source: Path, output: Path, definition: str, progress: Progress) -> None:
    """Copy a safetensors file, with `definition` under the key "longrope" of its metadata.

    The tensor bytes keep their place within a page, so that whole blocks can be cloned where the
    filesystem does that. The source's header must have been checked before.
    """
    header, data_start = _read_header(source)
    metadata = {**header.pop("__metadata__", {}), DEFINITION_KEY: definition}
    raw = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    raw += b" " * (-(_LENGTH_BYTES + len(raw) - data_start) % _PAGE_BYTES)
    with _open_both(source, output) as (reading, writing):
        write_exactly(writing, 0, len(raw).to_bytes(_LENGTH_BYTES, "little") + raw)
        _copy_from(reading, source, data_start, writing, _LENGTH_BYTES + len(raw), progress)


def read_definition(path: Path) -> str | None:
    """The text under the key "longrope" of a safetensors file's metadata, or None."""
    definition: str | None = _read_header(path)[0].get("__metadata__", {}).get(DEFINITION_KEY)
    return definition


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(header, where the tensor bytes start)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > path.stat().st_size:
            raise ModelError(f"{path}: damaged safetensors header; download the file again")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, _LENGTH_BYTES + length


@contextlib.contextmanager
def _open_both(source: Path, output: Path) -> Iterator[tuple[int, int]]:
    with contextlib.ExitStack() as stack:
        reading = open_source(source)
        stack.callback(os.close, reading)
        writing = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        stack.callback(os.close, writing)
        yield reading, writing


def _copy_from(
    reading: int, path: Path, start: int, writing: int, output_start: int, progress: Progress
) -> None:
    """Everything from `start` to the end. The first piece ends at a page, for the clones."""
    end = os.fstat(reading).st_size
    at = start
    while at < end:
        count = min(COPY_PIECE_BYTES - at % _PAGE_BYTES, end - at)
        if at == start and at % _PAGE_BYTES:
            count = min(_PAGE_BYTES - at % _PAGE_BYTES, end - at)
        to = output_start + at - start
        copy_range(reading, path, at, writing, to, count)
        start_writeback(writing, to, count)
        at += count
        progress(count)
