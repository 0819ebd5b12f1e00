"""Edit a GGUF in its own file: new tensors at the end, room for the header in front.

Where the header outgrows its place, the file system inserts whole blocks at the start of the file
(ext4 and XFS on Linux) instead of moving the data; what is left over is filled by a padding key,
and later edits use it up.

Not safe against a crash or a power cut: between inserting the blocks and writing the header,
which takes some milliseconds, the file is no GGUF. An exception, Ctrl-C included, is undone. A
program that has the file open meanwhile, a running llama.cpp for one, sees it change.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import numpy as np

from longrope_converters.to_gguf.bake import (
    EditedHeader,
    HeaderEdit,
    Patch,
    apply_edit,
)
from longrope_converters.to_gguf.files import read_exactly, write_exactly
from longrope_export.errors import OutputError
from longrope_export.gguf_format import PADDING_KEY, GgufHeader, build_header
from longrope_export.gguf_values import ValueType, make_key_value

# linux/falloc.h
_FALLOC_FL_COLLAPSE_RANGE = 0x08
_FALLOC_FL_INSERT_RANGE = 0x20


def bake_in_place(header: GgufHeader, edit: HeaderEdit) -> None:
    """Edit the file that `header` was read from; of a split model, give the first shard.

    Raises:
        GgufError: the edit does not fit the file. It is unchanged.
        OutputError: the file has several names, the file system cannot do it, or a write failed
            (a full disk); it is as before.
    """
    source = header.path
    edited = apply_edit(header, edit)
    try:
        descriptor = os.open(source, os.O_RDWR)
    except OSError as error:
        raise OutputError(f"{source}: cannot be edited in place: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if status.st_nlink > 1:
            raise _refusal(source, f"it has {status.st_nlink} names (hard links)")
        block_bytes = os.fstatvfs(descriptor).f_bsize
        if block_bytes % header.alignment_bytes:
            raise _refusal(
                source,
                f"general.alignment {header.alignment_bytes} does not divide blocks of "
                f"{block_bytes} bytes",
            )
        new_header = _build_with_padding(edited, block_bytes)
        _write(descriptor, source, edited, new_header)
    except OSError as error:
        raise OutputError(
            f"{source}: editing in place failed, the file is as before: {error.strerror}"
        ) from error
    finally:
        os.close(descriptor)


def _build_with_padding(edited: EditedHeader, block_bytes: int) -> bytes:
    """The new header, as long as the old one or whole blocks longer."""
    alignment = edited.source.alignment_bytes
    version = edited.source.version
    plain_bytes = len(build_header(edited.key_values, edited.tensors, 1, version))
    empty = make_key_value(PADDING_KEY, ValueType.STRING, "")
    target = edited.source.data_start_bytes
    while True:
        room = target - plain_bytes
        if 0 <= room < alignment:
            return edited.build()
        fill = room - len(empty.pack())
        if fill >= 0:
            pad = make_key_value(PADDING_KEY, ValueType.STRING, " " * fill)
            return build_header((*edited.key_values, pad), edited.tensors, alignment, version)
        target += block_bytes


def _write(descriptor: int, source: Path, edited: EditedHeader, new_header: bytes) -> None:
    """New tensors first, while the old header still holds; then the header.

    Tensors that are replaced come last: their old bytes belong to the old header.
    """
    header = edited.source
    inserted = len(new_header) - header.data_start_bytes
    old_header = np.empty(header.data_start_bytes, np.uint8)
    read_exactly(descriptor, source, 0, old_header)
    old_data = [
        (patch.offset_bytes, _read(descriptor, header.data_start_bytes, patch))
        for patch in (*edited.replaced, *edited.added)
    ]
    has_inserted = False
    try:
        for patch in edited.added:
            write_exactly(descriptor, header.data_start_bytes + patch.offset_bytes, patch.data)
        os.fsync(descriptor)
        if inserted:
            _change_front(descriptor, source, _FALLOC_FL_INSERT_RANGE, inserted)
            has_inserted = True
        write_exactly(descriptor, 0, new_header)
        for patch in edited.replaced:
            write_exactly(descriptor, len(new_header) + patch.offset_bytes, patch.data)
        os.fsync(descriptor)
    except BaseException:
        try:
            if has_inserted:
                _change_front(descriptor, source, _FALLOC_FL_COLLAPSE_RANGE, inserted)
            write_exactly(descriptor, 0, old_header)
            for offset_bytes, data in old_data:
                write_exactly(descriptor, header.data_start_bytes + offset_bytes, data)
            os.ftruncate(descriptor, header.file_bytes)
        except (OSError, OutputError) as error:
            raise OutputError(
                f"{source}: editing in place failed and so did undoing it: the file is damaged, "
                f"fetch it again ({error})"
            ) from error
        raise


def _read(descriptor: int, data_start_bytes: int, patch: Patch) -> bytes:
    """What stands where a patch will go; less, or nothing, beyond the end of the file."""
    return os.pread(descriptor, len(patch.data), data_start_bytes + patch.offset_bytes)


def _change_front(descriptor: int, source: Path, mode: int, num_bytes: int) -> None:
    """Insert or drop whole blocks at the start of the file."""
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError, TypeError) as error:
        raise _refusal(source, "this system has no fallocate") from error
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(descriptor, mode, 0, num_bytes) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
        raise _refusal(source, f"its file system cannot insert blocks ({os.strerror(code)})")
    raise OSError(code, os.strerror(code), str(source))


def _refusal(source: Path, reason: str) -> OutputError:
    return OutputError(
        f"{source}: cannot be edited in place: {reason}. Write a new file with -o instead"
    )
