"""Where the fetched source and the builds are kept, and the lock around each of them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

from longrope_export.errors import ToolError

CACHE_VARIABLE = "LONGROPE_EXPORT_CACHE"

Say = Callable[[str], None]


def say_nothing(_: str) -> None:
    """The default of every `say` argument: progress is for whoever asks for it."""


def cache_folder() -> Path:
    """The folder of everything that can be made again; LONGROPE_EXPORT_CACHE moves it."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen or platformdirs.user_cache_dir("longrope-export")).absolute()


@contextlib.contextmanager
def locked(folder: Path, say: Say = say_nothing) -> Iterator[int]:
    """Hold the lock `<folder>.lock`, waiting for another process if need be.

    The lock dies with its last holder, so kill -9 leaves none behind. Yields its file
    descriptor: a child that inherits it keeps the lock for as long as it lives, which is what
    stops a second build from starting beside the compilers of a killed one.

    Raises:
        ToolError: the cache cannot be written, or the system is Windows.
    """
    if sys.platform == "win32":
        raise ToolError("llama.cpp is built on Linux and macOS only: use WSL on Windows")
    import fcntl

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ToolError(
            f"cannot write the cache {folder.parent}: {error.strerror}. "
            f"Set {CACHE_VARIABLE} to a folder that is yours"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process works on {folder.name}, waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
