"""The real llama.cpp and the real model, built and fetched once into the user's cache."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from longrope_driver import Driver

from longrope_export.llama_cpp.binaries import require_binaries
from longrope_export.llama_cpp.options import BuildOptions, cpp_folder
from longrope_export.llama_cpp.source import fetch_source

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
    source = fetch_source()  # the longrope functions are looked up at run time
    includes = [f"-I{source / name}" for name in ("include", "ggml/include")]
    names = ("llama", "ggml", "ggml-base")
    links = [f"-L{libraries[True]}", *(f"-l{name}" for name in names), "-ldl", "-lpthread"]
    program = folder / "longrope-driver"
    code = cpp_folder() / "cpp_patch" / "tests" / "longrope-driver.cpp"
    command = ["c++", "-std=c++17", "-O1", "-o", program, code, *includes, *links]
    subprocess.run([*map(str, command), f"-Wl,-rpath-link,{libraries[True]}"], check=True)
    return Driver(program, libraries, folder)
