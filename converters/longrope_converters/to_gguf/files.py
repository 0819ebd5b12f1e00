"""Positional reads and writes that are complete or fail, and copies inside the kernel."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longrope_export.errors import ModelError

# One call to copy_file_range: large enough to cost nothing, small enough to report progress.
COPY_PIECE_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20

# The kernel or filesystem cannot copy between these two files: a read and a write still can.
_NO_KERNEL_COPY = frozenset((errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL))


def open_source(path: Path) -> int:
    """Descriptor for reading.

    Raises:
        ModelError: if the file cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ModelError(f"{path}: cannot read: {error.strerror}") from error


def read_exactly(source: int, path: Path, offset_bytes: int, into: npt.NDArray[np.uint8]) -> None:
    """Fill `into` from `offset_bytes` of the file.

    Raises:
        ModelError: if the file cannot be read, or ends before that many bytes.
    """
    done = 0
    while done < into.size:
        try:
            count = os.preadv(source, [into.data[done:]], offset_bytes + done)
        except OSError as error:
            raise ModelError(f"{path}: cannot read: {error.strerror}") from error
        if count == 0:
            raise ModelError(
                f"{path}: ends at byte {offset_bytes + done}, {into.size - done} more bytes were "
                f"expected: it was truncated while it was being read"
            )
        done += count


def write_exactly(output: int, offset_bytes: int, data: npt.NDArray[np.uint8] | bytes) -> None:
    """Write all of `data` (uint8 array or bytes) at `offset_bytes`."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(output, view[done:], offset_bytes + done)


def preallocate(output: int, num_bytes: int) -> None:
    """Give the file its final size, zeroed, so that a full disk is noticed before any work.

    Raises:
        OSError: ENOSPC, EDQUOT or EFBIG. A filesystem that cannot reserve space is accepted.
    """
    os.ftruncate(output, num_bytes)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(output, 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def start_writeback(output: int, offset_bytes: int, num_bytes: int) -> None:
    """Let the disk start on a finished range, so that a later fsync has little left to wait for.

    Pages that are still dirty stay in the page cache, in spite of the name of the advice.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(output, offset_bytes, num_bytes, os.POSIX_FADV_DONTNEED)


def copy_range(
    source: int,
    path: Path,
    source_offset_bytes: int,
    output: int,
    output_offset_bytes: int,
    num_bytes: int,
) -> None:
    """Copy bytes between files, inside the kernel where it can.

    Raises:
        ModelError: if the source ends early.
        OSError: if the output cannot be written.
    """
    done = 0
    if hasattr(os, "copy_file_range"):
        while done < num_bytes:
            try:
                count = os.copy_file_range(
                    source,
                    output,
                    num_bytes - done,
                    source_offset_bytes + done,
                    output_offset_bytes + done,
                )
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                break
            if count == 0:  # the end of the file, or a kernel that gives up: reading will tell
                break
            done += count
    if done == num_bytes:
        return
    buffer = np.empty(min(_BUFFER_BYTES, num_bytes - done), np.uint8)
    while done < num_bytes:
        piece = buffer[: num_bytes - done]
        read_exactly(source, path, source_offset_bytes + done, piece)
        write_exactly(output, output_offset_bytes + done, piece)
        done += piece.size
