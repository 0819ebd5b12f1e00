"""The pinned llama.cpp source: fetch it by pip, check its hash, unpack it into the cache.

The source distribution of llama-cpp-python carries a whole llama.cpp tree, is immutable, and comes
through whatever package index or mirror pip is set up for.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
from pathlib import Path

from longrope_export.errors import ToolError
from longrope_export.llama_cpp.cache import Say, cache_folder, locked, say_nothing
from longrope_export.pip_packages import download

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TREE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp"  # inside the archive

_OTHERWISE = (
    f"Or fetch and unpack {PACKAGE} {VERSION} (its source distribution) yourself and give the "
    "folder vendor/llama.cpp with --source DIR"
)


def fetch_source(say: Say = say_nothing) -> Path:
    """The folder of the pinned, unpatched llama.cpp; downloaded at the first call (77 MB).

    Two processes may call it at once: one fetches, the other waits.

    Raises:
        ToolError: no pip, no network, a wrong hash or a full disk, with what to do.
    """
    folder = cache_folder() / "source" / f"llama_cpp_python-{VERSION}-{SHA256[:8]}"
    if folder.is_dir():
        return folder
    with locked(folder, say):
        if folder.is_dir():
            return folder
        for leftover in folder.parent.glob(".fetch-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        say(f"fetching llama.cpp: {PACKAGE} {VERSION}, 77 MB")
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
                unpack(_download(Path(temporary)), folder)
        except OSError as error:
            raise ToolError(f"cannot unpack llama.cpp to {folder}: {error}") from error
    return folder


def unpack(archive: Path, folder: Path, *, sha256: str = SHA256, tree: str = TREE) -> None:
    """Check the archive's SHA-256, then make `folder` from its subfolder `tree`, whole or not at all.

    Raises:
        ToolError: the hash differs, or the archive holds no such tree or wants to write outside.
        OSError: the disk is full or refuses.
    """
    with archive.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != sha256:
        raise ToolError(
            f"{archive.name} is not the pinned file: expected SHA-256 {sha256}, got {got}. "
            f"Nothing of it was used. {_OTHERWISE}"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        try:
            with tarfile.open(archive) as tar:
                # Pythons before 3.11.4 know no filter
                tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
                members = [m for m in tar if m.name.startswith(f"{tree}/")]
                for member in members:
                    if ".." in member.name.split("/") or not (member.isfile() or member.isdir()):
                        raise tarfile.TarError(f"{member.name} is a link, or lies outside")
                tar.extractall(temporary, members=members)
        except tarfile.TarError as error:
            raise ToolError(f"{archive.name} cannot be unpacked: {error}") from error
        unpacked = Path(temporary, tree)
        if not (unpacked / "CMakeLists.txt").is_file():
            raise ToolError(f"{archive.name} holds no {tree}/CMakeLists.txt")
        unpacked.rename(folder)


def _download(folder: Path) -> Path:
    try:
        return download(PACKAGE, VERSION, SHA256, folder, source=True)
    except ToolError as error:
        raise ToolError(f"{error}\n{_OTHERWISE}") from error
