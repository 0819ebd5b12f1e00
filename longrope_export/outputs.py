"""Write files so that a failure leaves nothing behind: temporary name, fsync, replace."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from longrope_export.errors import OutputError


def check_output(output: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse an output that is one of the inputs, that exists without --force, or that has no folder.

    Args:
        output: the final name of the file to be written.
        inputs: files and folders that are read; an output equal to one, or inside the list of
            files that it stands for, would destroy what it is made from.
        force: allow an existing regular file to be replaced.

    Raises:
        OutputError: with what to do about it. Nothing has been written yet.
    """
    if output.is_dir():
        raise OutputError(f"output {output} is a folder: give the name of a file")
    parent = output.parent
    if not parent.is_dir():
        raise OutputError(
            f"output folder {parent} does not exist: create it first (mkdir -p {parent})"
        )
    if not os.access(parent, os.W_OK):
        raise OutputError(f"output folder {parent} is not writable: choose another with -o")
    for source in inputs:
        if output.exists() and source.exists() and output.samefile(source):
            raise OutputError(
                f"output {output} is the same file as the input {source}: choose another name with -o"
            )
    if output.exists() and not force:
        raise OutputError(
            f"output {output} exists: use --force to replace it, or another name with -o"
        )


@contextlib.contextmanager
def replace_when_done(output: Path) -> Iterator[Path]:
    """Yield a temporary path beside `output`; on success fsync it and rename it to `output`.

    Whatever goes wrong inside the block, a Ctrl-C included, the temporary file is removed and
    `output` stays as it was. After kill -9 only the temporary file can be left over; its name
    starts with a dot and ends in `.partial`. Two writers at once use two temporary names: the
    last one to finish wins, and the file is always one of the two, whole.

    Raises:
        OutputError: when the disk is full or the folder refuses the file.
    """
    temporary = output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(output)
        _fsync_folder(output.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"cannot write {output}: {error.strerror}. Nothing was written under that name; "
                f"free some space or choose another folder with -o"
            ) from error
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(output: Path, text: str) -> None:
    """Write `text` (UTF-8) under the final name only when it is complete on disk."""
    with replace_when_done(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network filesystems refuse to fsync a folder; the rename itself has happened
    finally:
        os.close(descriptor)
