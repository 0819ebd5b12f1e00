"""Write a folder so that a failure leaves nothing behind: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from longrope_export.errors import OutputError

MARKER = "model.onnx"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
#: every name that an export writes
EXPORTED = frozenset(
    {MARKER, "model.onnx.data", "rerotate.onnx", "genai_config.json", *TOKENIZER_FILES}
)


def check_folder(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse a folder that must not be replaced.

    Args:
        inputs: files and folders that are read.
        force: allow an export to be replaced: a folder with model.onnx and nothing foreign.

    Raises:
        OutputError: with what to do about it. Nothing has been written yet.
    """
    parent = output.absolute().parent
    if not parent.is_dir():
        raise OutputError(
            f"output folder {parent} does not exist: create it first (mkdir -p {parent})"
        )
    if not os.access(parent, os.W_OK):
        raise OutputError(f"output folder {parent} is not writable: choose another with -o")
    resolved = output.resolve()
    for source in inputs:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputError(
                f"output {output} is or holds the input {source}: choose another name with -o"
            )
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"output {output} is a file: an ONNX export is a folder")
    if not any(output.iterdir()):
        return
    if not (output / MARKER).is_file():
        raise OutputError(
            f"output folder {output} is not empty and holds no {MARKER}: it is not replaced, "
            f"with --force neither; choose another name with -o"
        )
    strangers = sorted({path.name for path in output.iterdir()} - EXPORTED)
    if strangers:
        raise OutputError(
            f"output folder {output} holds what no export writes ({', '.join(strangers[:5])}), "
            f"which would be lost: move it away, or choose another name with -o"
        )
    if not force:
        raise OutputError(
            f"output {output} exists: use --force to replace it, or another name with -o"
        )


@contextlib.contextmanager
def replace_folder_when_done(output: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `output`; on success fsync it and give it that name.

    Whatever goes wrong inside the block, a Ctrl-C included, the temporary folder is removed and
    `output` stays as it was. After kill -9 only a folder can be left over whose name starts with a
    dot and ends in `.partial`.

    Raises:
        OutputError: when the disk is full or the parent refuses the folder.
    """
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = output.with_name(f".{output.name}.{token}.partial")
    replaced = output.with_name(f".{output.name}.{token}.old")
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        if output.exists():
            output.rename(replaced)
        try:
            temporary.rename(output)
        except OSError:
            if replaced.exists():
                replaced.rename(output)
            raise
        _fsync(output.absolute().parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        advice = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "; nothing was written under that name: free some space or choose another -o"
        raise OutputError(f"cannot write {output}: {error.strerror or error}{advice}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a folder on some network disks
            raise
    finally:
        os.close(descriptor)
