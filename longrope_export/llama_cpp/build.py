"""Build llama.cpp in the cache with CMake, or find that it has been done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longrope_export.errors import ToolError
from longrope_export.llama_cpp.cache import cache_folder, locked
from longrope_export.llama_cpp.options import (
    BuildOptions,
    build_key,
    cmake_options,
    cpp_folder,
    patch_files,
)
from longrope_export.llama_cpp.source import fetch_source

TARGETS = (
    "llama-completion",
    "llama-cli",
    "llama-server",
    "llama-perplexity",
    "llama-quantize",
    "llama-bench",
)

# (line of the log, finished steps, all steps); 0 of 0 while that is unknown
Report = Callable[[str, int, int], None]

_STEP = re.compile(r"\[\s*(\d+)(?:/(\d+)|%)\]")
_LOG_TAIL_LINES = 30


@dataclass(frozen=True)
class Build:
    """One build folder of the cache, finished or not."""

    folder: Path

    @property
    def binaries(self) -> Path:
        """Programs and shared libraries; they run from here as they are."""
        return self.folder / "bin"

    @property
    def log(self) -> Path:
        return self.folder / "build.log"

    @property
    def _stamp(self) -> Path:
        return self.folder / "built.json"

    @property
    def _unfinished(self) -> Path:
        """Present while CMake runs, and after it was killed."""
        return self.folder / "unfinished"

    def built_targets(self) -> set[str]:
        """The targets that a build has finished and nobody has deleted."""
        try:
            names = json.loads(self._stamp.read_text(encoding="utf-8"))["targets"]
        except (OSError, ValueError, KeyError):
            return set()
        return {name for name in names if has_output(self.binaries, name)}

    def write_stamp(self, targets: set[str], options: BuildOptions) -> None:
        values = {
            "targets": sorted(targets),
            "source": str(options.source or "pinned"),
            "patched": options.patched,
            "cmake_options": cmake_options(options),
        }
        temporary = self._stamp.with_suffix(".partial")
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self._stamp)


def has_output(binaries: Path, target: str) -> bool:
    """True if the program, or the shared library of the target `llama` or `ggml`, is there."""
    program = binaries / target
    names = (f"lib{target}.so", f"lib{target}.dylib")
    return program.is_file() or any((binaries / name).is_file() for name in names)


def find_build(options: BuildOptions | None = None) -> Build:
    """The place of this build in the cache; nothing is made, fetched or checked."""
    return Build(cache_folder() / "builds" / build_key(options or BuildOptions()))


def ensure_built(
    targets: Sequence[str] = TARGETS,
    options: BuildOptions | None = None,
    *,
    jobs: int | None = None,
    report: Report = lambda line, done, total: None,
) -> Path:
    """Build what is missing of `targets` and return the folder of the binaries.

    Takes some 20 ms when nothing is missing. A run that failed or was killed goes on where it
    stopped. Of two processes, one builds and the other waits.

    Args:
        targets: CMake targets; see TARGETS for those that are always known.
        options: which llama.cpp; the pinned one with our patches if None.
        jobs: compilers at once; one for each core that this process may use if None.
        report: called for every line of CMake's output.

    Raises:
        ToolError: a program is missing, a patch does not apply, or the compiler fails.
    """
    options = options or BuildOptions()
    build = find_build(options)
    if build.built_targets().issuperset(targets):
        return build.binaries
    with locked(build.folder, lambda line: report(line, 0, 0)) as lock:
        done = build.built_targets()
        if not done.issuperset(targets):
            _run_cmake(build, options, targets, jobs, report, lock)
            lacking = [name for name in targets if not has_output(build.binaries, name)]
            if lacking:
                raise ToolError(f"CMake built {lacking}, but not as programs in {build.binaries}")
            build.write_stamp(done | set(targets), options)
    return build.binaries


def _run_cmake(
    build: Build,
    options: BuildOptions,
    targets: Sequence[str],
    jobs: int | None,
    report: Report,
    lock: int,
) -> None:
    cmake = _find_program("cmake")
    if cmake is None:
        raise ToolError("cmake is not installed: pip install cmake ninja, or apt install cmake")
    find_compiler()  # or an error that CMake would not say so plainly
    source = options.source or fetch_source(lambda line: report(line, 0, 0))
    cpp = cpp_folder()
    patched = options.patched and patch_files(cpp)
    configure = [cmake, "-S", str(cpp), "-B", str(build.folder)]
    configure += [f"-DLLAMA_CPP_SOURCE_DIR={source.resolve()}"]
    configure += [f"-DLONGROPE_PATCH={'ON' if patched else 'OFF'}"]
    configure += cmake_options(options)
    cache = build.folder / "CMakeCache.txt"
    if cache.exists() and not _configured_from(cache, cpp):
        cache.unlink()  # another checkout with the same files: what it compiled stays good
    if not cache.exists() and (ninja := _find_program("ninja")):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]

    compile_ = [cmake, "--build", str(build.folder), "--parallel", str(jobs or _usable_cores())]
    compile_ += ["--target", *targets]
    uses_ninja = (build.folder / "build.ninja").exists()
    if build._unfinished.exists() and cache.exists() and not uses_ninja:
        compile_ += ["--clean-first"]  # make would trust a half-written object file

    try:
        build.folder.mkdir(parents=True, exist_ok=True)
        build._unfinished.touch()
        with build.log.open("w", encoding="utf-8") as log:
            for title, command in (("configuring", configure), ("compiling", compile_)):
                report(f"{title} llama.cpp, log in {build.log}", 0, 0)
                status = _run(command, log.write, report, lock)
                if status != 0:
                    break
    except OSError as error:
        raise ToolError(f"cannot build in {build.folder}: {error}") from error
    finally:
        build._unfinished.unlink(missing_ok=True)
    if status != 0:
        lines = build.log.read_text(encoding="utf-8").splitlines()
        tail = "\n".join(lines[-_LOG_TAIL_LINES:])
        raise ToolError(
            f"{title} llama.cpp failed (exit {status}):\n{tail}\nWhole log: {build.log}"
        )


def _configured_from(cache: Path, folder: Path) -> bool:
    text = cache.read_text(encoding="utf-8", errors="replace")
    return f"CMAKE_HOME_DIRECTORY:INTERNAL={folder}\n" in text


def _run(command: list[str], write: Callable[[str], object], report: Report, lock: int) -> int:
    """Run a command line by line and return its exit status; it holds the lock as well."""
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "CMAKE_COLOR_DIAGNOSTICS": "OFF"}
    write(f"+ {' '.join(command)}\n")
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        pass_fds=(lock,),
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                write(line)
                step = _STEP.match(line)
                done, total = (int(step[1]), int(step[2] or 100)) if step else (0, 0)
                report(line.rstrip("\n"), done, total)
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def find_compiler() -> str:
    """The C++ compiler: that of the variable CXX, else one on PATH.

    Raises:
        ToolError: there is none.
    """
    found = map(_find_program, ("c++", "g++", "clang++"))
    compiler = os.environ.get("CXX") or next(filter(None, found), None)
    if compiler is None:
        raise ToolError(
            "no C++ compiler is installed: apt install build-essential (Debian, Ubuntu), "
            "xcode-select --install (macOS), or name one in the variable CXX"
        )
    return compiler


def _find_program(name: str) -> str | None:
    """A program on PATH, or one that pip has put beside this Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
