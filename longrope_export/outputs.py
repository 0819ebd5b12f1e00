"""Write files so that a failure leaves nothing behind: temporary name, fsync, replace."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
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
    if output.exists() and not output.is_file():
        raise OutputError(f"output {output} is a device or a pipe: give the name of a file")
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
    temporary = output.with_name(f".{output.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    try:
        yield temporary
        _fsync_file(temporary)
        temporary.replace(output)
        _fsync_folder(output.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # a name that is too long cannot be removed either
            temporary.unlink(missing_ok=True)
        raise _output_error(output, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_outside(
    output: Path, model: Path, option: str = "-o", advice: str = "choose another folder"
) -> None:
    """Refuse an output that lies in a model that is read: a new file in its folder would change what it is.

    Args:
        output: file or folder to be written.
        model: file or folder.
        option, advice: for the message: what gave the output, and what to do.

    Raises:
        OutputError: nothing has been written yet.
    """
    if output.resolve().is_relative_to(model.resolve()):
        raise OutputError(f"{option} {output} lies in the model {model}: {advice}")


def check_output_folder(output: Path, inputs: Iterable[Path], *, force: bool, marker: str) -> None:
    """Refuse an output folder that holds an input, or that exists with something in it.

    Args:
        output: final name of the folder; an empty one may exist.
        inputs: files and folders that are read.
        force: allow a folder to be replaced, with all that is in it, if it holds `marker`.
        marker: name of a file by which an earlier export is known; nothing else is ever removed.

    Raises:
        OutputError: with what to do about it. Nothing has been written yet.
    """
    if not output.parent.is_dir():
        raise OutputError(
            f"output folder {output.parent} does not exist: create it first "
            f"(mkdir -p {output.parent})"
        )
    if not os.access(output.parent, os.W_OK):
        raise OutputError(f"output folder {output.parent} is not writable: choose another with -o")
    for source in inputs:
        if source.resolve().is_relative_to(output.resolve()):
            raise OutputError(
                f"output {output} is or holds the input {source}: choose another name with -o"
            )
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"output {output} is a file: give the name of a folder")
    if not any(output.iterdir()):
        return
    if not (output / marker).is_file():
        raise OutputError(
            f"output {output} is a folder with other files (no {marker} of an earlier export): "
            f"give a new name with -o, or remove it yourself"
        )
    if not force:
        raise OutputError(
            f"output {output} exists: use --force to replace it, or another name with -o"
        )


@contextlib.contextmanager
def replace_folder_when_done(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `output`; on success sync its files and rename it.

    An existing folder is replaced whole. Whatever goes wrong inside the block, the temporary folder
    is removed and `output` stays as it was; after kill -9 it can be left over, named as in
    replace_when_done. Files that are hard links of others are not synced: they were on disk before.

    Raises:
        OutputError: when the disk is full or the parent folder refuses.
    """
    output = output.resolve()
    temporary = output.with_name(f".{output.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    try:
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        _swap_folders(temporary, output)
        _fsync_folder(output.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _output_error(output, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync_tree(folder: Path) -> None:
    """fsync every file in a folder that is no hard link of another, and the folders themselves."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _fsync_folder(path)
        elif path.stat().st_nlink == 1:
            _fsync_file(path)


def _swap_folders(new: Path, output: Path) -> None:
    if not output.is_dir() or not any(output.iterdir()):
        new.rename(output)  # takes the place of an empty folder too
        return
    old = new.with_suffix(".old.partial")
    output.rename(old)
    try:
        new.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old)


def write_text(output: Path, text: str) -> None:
    """Write `text` (UTF-8) under the final name only when it is complete on disk."""
    with replace_when_done(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _output_error(output: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"cannot write {output}: {error.strerror}. Nothing was written under that name; "
            f"free some space or choose another folder with -o"
        )
    return OutputError(f"cannot write {output}: {error.strerror or error}")


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network filesystems refuse to fsync a folder; the rename itself has happened
    finally:
        os.close(descriptor)
