"""What decides a build: the source, the patches, the CPU, CMake's options. Their hash is its name."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from longrope_export.errors import ToolError
from longrope_export.llama_cpp import source as pinned
from longrope_export.llama_cpp.cache import cache_folder

# CMake option of ggml -> flags of /proc/cpuinfo that all have to be there
_X86_OPTIONS = {
    "GGML_SSE42": ("sse4_2",),
    "GGML_AVX": ("avx",),
    "GGML_AVX2": ("avx2",),
    "GGML_BMI2": ("bmi2",),
    "GGML_FMA": ("fma",),
    "GGML_F16C": ("f16c",),
    "GGML_AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
}

# read by CMake when it configures
_ENVIRONMENT = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS")

# set by this package; a second value on the command line would silently win
_OURS = ("LLAMA_CPP_SOURCE_DIR", "LONGROPE_PATCH", "LONGROPE_PATCH_DIR", "LONGROPE_BUILD_TESTS")

_IGNORED_FOLDERS = {".git", "node_modules", "__pycache__"}


@dataclass(frozen=True)
class BuildOptions:
    """Which llama.cpp is meant.

    Attributes:
        source: an unpacked llama.cpp instead of the pinned one; it is read, never written.
        cmake_options: as for cmake, each starting with -D: `-DGGML_CUDA=ON`.
        patched: apply the series of cpp_patch; False gives stock llama.cpp.

    Raises:
        ToolError: on construction, if the source is none or an option is not CMake's.
    """

    source: Path | None = None
    cmake_options: tuple[str, ...] = ()
    patched: bool = True

    def __post_init__(self) -> None:
        if self.source is not None and not (self.source / "CMakeLists.txt").is_file():
            raise ToolError(
                f"source {self.source} must be an unpacked llama.cpp, but has no CMakeLists.txt"
            )
        for option in self.cmake_options:
            match = re.fullmatch(r"-D([A-Za-z0-9_]+)(:[A-Z]+)?=.*", option)
            if match is None:
                raise ToolError(f"CMake option must look like -DGGML_CUDA=ON, got {option!r}")
            if match[1] in _OURS:
                raise ToolError(f"CMake option {match[1]} is set by --source and --unpatched")


def cpp_folder() -> Path:
    """The folder of CMakeLists.txt and cpp_patch/: inside the wheel, or the top of a checkout.

    Raises:
        ToolError: the installation is incomplete.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_cpp", package.parent):
        if (folder / "CMakeLists.txt").is_file() and (folder / "cpp_patch" / "series").is_file():
            return folder
    raise ToolError(f"CMakeLists.txt and cpp_patch/ are missing beside {package}: install again")


def patch_files(cpp: Path) -> list[Path]:
    """The patches in the order of the series, then the new C++ files; what a build compiles in.

    Raises:
        ToolError: the series names a patch that does not exist.
    """
    folder = cpp / "cpp_patch"
    lines = (folder / "series").read_text(encoding="utf-8").splitlines()
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for name in names:
        if not (folder / name).is_file():
            raise ToolError(f"{folder / 'series'} names {name}, which does not exist there")
    new_files = (f for f in (folder / "src").glob("*") if f.suffix in (".cpp", ".h"))
    return [folder / name for name in names] + sorted(new_files)


def cpu_options(cpuinfo: str, machine: str) -> list[str]:
    """ggml's x86 options for the flags in the text of /proc/cpuinfo; none for another machine.

    AMX and the later AVX-512 sets stay off, so that the binaries run on the neighbours of this
    machine as well. Without /proc/cpuinfo (macOS) ggml's own portable default stands.
    """
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if machine.lower() not in ("x86_64", "amd64") or found is None:
        return []
    flags = set(found[1].split())
    return [
        f"-D{option}={'ON' if flags.issuperset(needed) else 'OFF'}"
        for option, needed in _X86_OPTIONS.items()
    ]


def cmake_options(options: BuildOptions) -> list[str]:
    """Every -D option that CMake gets, those of the user last so that they win."""
    path = Path("/proc/cpuinfo")
    cpuinfo = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    fixed = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=OFF", "-DLONGROPE_BUILD_TESTS=OFF"]
    return [*fixed, *cpu_options(cpuinfo, platform.machine()), *options.cmake_options]


def build_key(options: BuildOptions) -> str:
    """16 hex digits that change with anything that could change a binary."""
    cpp = cpp_folder()
    patches = patch_files(cpp) if options.patched else []
    recipe = [cpp / "CMakeLists.txt", cpp / "cpp_patch" / "apply.cmake"]
    inputs = {
        "source": pinned.SHA256 if options.source is None else _tree_state(options.source),
        "files": [(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in recipe + patches],
        "options": cmake_options(options),
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
        # CMake's own files in a build folder are bound to its path and to the machine's kind
        "place": [str(cache_folder()), platform.system(), platform.machine()],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _tree_state(folder: Path) -> str:
    """A hash of every file's name, size and time: reading the content would take a second."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            f
            for f in folders
            if f not in _IGNORED_FOLDERS and not (parent == str(folder) and f.startswith("build"))
        )
        for name in sorted(files):
            path = os.path.join(parent, name)  # noqa: PTH118 - thousands of files in 30 ms
            status = os.lstat(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
