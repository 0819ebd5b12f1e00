"""The real llama.cpp and the real model, built and fetched once into the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from longrope_export.llama_cpp.binaries import require_binaries

PROGRAMS = ("llama-perplexity", "llama-completion", "llama-quantize")


@pytest.fixture(scope="session")
def programs() -> Path:
    """Folder of the pinned llama.cpp's programs."""
    return require_binaries(PROGRAMS, build=True)
