"""The small program that feeds token ids to a llama.cpp library and hands out logits.

Compiled against the headers of the pinned source at its first use, in seconds, and linked at run
time, so that one program serves the patched and the stock library.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from longrope_export.errors import ToolError
from longrope_export.llama_cpp.build import find_compiler
from longrope_export.llama_cpp.cache import cache_folder, locked
from longrope_export.llama_cpp.options import cpp_folder
from longrope_export.llama_cpp.source import SHA256, fetch_source

_LIBRARIES = ("llama", "ggml", "ggml-base")


def require_driver(libraries: Path) -> Path:
    """The program, compiled if it is not in the cache.

    Args:
        libraries: a folder of binaries, for the linker; any build will do at run time.

    Raises:
        ToolError: no C++ compiler, or it fails.
    """
    code = cpp_folder() / "cpp_patch" / "driver" / "longrope-driver.cpp"
    key = hashlib.sha256(code.read_bytes() + SHA256.encode()).hexdigest()[:16]
    program = cache_folder() / "drivers" / key / "longrope-driver"
    if program.is_file():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with locked(program.parent):
        if not program.is_file():
            partial = program.with_suffix(".partial")
            _compile(code, libraries, partial)
            partial.rename(program)
    return program


def _compile(code: Path, libraries: Path, output: Path) -> None:
    source = fetch_source()
    includes = [f"-I{source / name}" for name in ("include", "ggml/include")]
    links = [f"-L{libraries}", *(f"-l{name}" for name in _LIBRARIES), "-ldl", "-lpthread"]
    command = [
        find_compiler(),
        "-std=c++17",
        "-O1",
        "-o",
        str(output),
        str(code),
        *includes,
        *links,
    ]
    command += [f"-Wl,-rpath-link,{libraries}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ToolError(f"{' '.join(command)}\nfailed:\n{result.stderr[-3000:]}")
