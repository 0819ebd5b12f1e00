"""The real llama.cpp and the real model, built and fetched once into the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from longrope_driver import Driver

from longrope_export.llama_cpp.binaries import require_binaries
from longrope_export.llama_cpp.driver import require_driver
from longrope_export.llama_cpp.options import BuildOptions

PROGRAMS = ("llama-perplexity", "llama-completion", "llama-quantize")
STOCK = BuildOptions(patched=False)


@pytest.fixture(scope="session")
def programs() -> Path:
    """Folder of the stock programs of the pinned llama.cpp."""
    return require_binaries(PROGRAMS, STOCK, build=True)


@pytest.fixture(scope="session")
def patched() -> Path:
    """Folder of our own build, which the package itself runs."""
    return require_binaries(("llama-completion", "llama-quantize"), build=True)


@pytest.fixture(scope="session")
def driver(programs: Path, patched: Path, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    libraries = {True: patched, False: programs}
    folder = tmp_path_factory.mktemp("driver")
    return Driver(require_driver(patched), libraries, folder)
