"""Find the programs and shared libraries of llama.cpp that this package was tested with.

Looked for in the folder LONGROPE_EXPORT_LLAMA_CPP if that is set, else in our build cache. Never
on PATH: a llama.cpp of another version there would answer with other numbers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from longrope_export.errors import ToolError
from longrope_export.llama_cpp.build import Report, ensure_built, find_build
from longrope_export.llama_cpp.options import BuildOptions

BINARIES_VARIABLE = "LONGROPE_EXPORT_LLAMA_CPP"


def chosen_folder() -> Path | None:
    """The folder that LONGROPE_EXPORT_LLAMA_CPP names, or None.

    Raises:
        ToolError: it names no folder.
    """
    value = os.environ.get(BINARIES_VARIABLE)
    if not value:
        return None
    folder = Path(value).absolute()
    if not folder.is_dir():
        raise ToolError(f"{BINARIES_VARIABLE} must name a folder of binaries, got {value}")
    return folder


def find_binary(name: str, options: BuildOptions | None = None) -> Path | None:
    """The program `name` (`llama-perplexity`), or None if it is not there; never builds.

    Args:
        options: a build of ours other than the default; the variable is then not asked.
    """
    if options is None and (folder := chosen_folder()) is not None:
        path = folder / name
        return path if os.access(path, os.X_OK) and path.is_file() else None
    build = find_build(options)
    return build.binaries / name if name in build.built_targets() else None


def require_binary(
    name: str,
    options: BuildOptions | None = None,
    *,
    build: bool = False,
    report: Report = lambda line, done, total: None,
) -> Path:
    """The program `name`, built first if it is missing and `build` is True.

    Raises:
        ToolError: it is missing, or the build fails.
    """
    return require_binaries([name], options, build=build, report=report) / name


def require_binaries(
    names: Sequence[str],
    options: BuildOptions | None = None,
    *,
    build: bool = False,
    report: Report = lambda line, done, total: None,
) -> Path:
    """The one folder that holds all programs `names`; see `require_binary`."""
    missing = [name for name in names if find_binary(name, options) is None]
    folder = chosen_folder() if options is None else None
    if folder is not None:
        if missing:
            raise ToolError(
                f"{', '.join(missing)} not found in {folder}, the folder that "
                f"{BINARIES_VARIABLE} names: add it there, or unset the variable"
            )
        return folder
    if missing and not build:
        wanted = " ".join(f"--target {name}" for name in missing)
        raise ToolError(
            f"{', '.join(missing)} not built yet: run longrope-export llama-cpp build {wanted}, "
            f"or set {BINARIES_VARIABLE} to a folder of binaries"
        )
    if missing:
        return ensure_built(names, options, report=report)
    return find_build(options).binaries


def find_library(name: str, folder: Path) -> Path:
    """The shared library `name` (`llama`, `ggml`, `ggml-base`) in a folder of binaries.

    Raises:
        ToolError: there is none, as in a static build.
    """
    for suffix in (".so", ".dylib"):
        path = folder / f"lib{name}{suffix}"
        if path.is_file():
            return path
    raise ToolError(f"no shared library {name} in {folder}: was llama.cpp built static?")
