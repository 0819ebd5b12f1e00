"""The whole way from a source tree to a running program, on a llama.cpp of a dozen lines."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from longrope_export.cli import main
from longrope_export.errors import ToolError
from longrope_export.llama_cpp import build, options, source
from longrope_export.llama_cpp.binaries import find_binary, find_library, require_binary
from longrope_export.llama_cpp.build import ensure_built, find_build
from longrope_export.llama_cpp.options import BuildOptions, build_key, cpp_folder, cpu_options
from longrope_export.llama_cpp.perplexity import run_perplexity

ROOT = Path(__file__).parent.parent

FAKE_CMAKE = """
cmake_minimum_required(VERSION 3.14)
project(fake CXX)
# a precompiled header pays for a hundred files, not for two
set(LONGROPE_FAST_COMPILE OFF CACHE BOOL "" FORCE)
add_subdirectory(src)
"""
FAKE_SRC_CMAKE = """
add_library(llama SHARED llama.cpp)
add_executable(llama-quantize main.cpp)
target_link_libraries(llama-quantize PRIVATE llama)
add_executable(llama-bench EXCLUDE_FROM_ALL main.cpp)
target_link_libraries(llama-bench PRIVATE llama)
"""
FAKE_LIBRARY = 'const char * llama_name(void) {\n    return "stock";\n}\n'
FAKE_MAIN = """#include <stdio.h>
const char * llama_name(void);
int main(int argc, char ** argv) {
    printf("%s", llama_name());
    for (int i = 1; i < argc; i++) printf(" [%s]", argv[i]);
    printf("\\n");
}
"""
PATCH = """--- a/src/llama.cpp
+++ b/src/llama.cpp
@@ -1,3 +1,4 @@
+#include "longrope-name.h"
 const char * llama_name(void) {
-    return "stock";
+    return LONGROPE_NAME;
 }
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LONGROPE_EXPORT_CACHE", str(folder))
    monkeypatch.delenv("LONGROPE_EXPORT_LLAMA_CPP", raising=False)
    return folder


@pytest.fixture
def tree(tmp_path: Path, cache: Path) -> Path:
    """A source tree with the names of llama.cpp."""
    folder = tmp_path / "llama.cpp"
    (folder / "src").mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text(FAKE_CMAKE)
    (folder / "src" / "CMakeLists.txt").write_text(FAKE_SRC_CMAKE)
    (folder / "src" / "llama.cpp").write_text(FAKE_LIBRARY)
    (folder / "src" / "main.cpp").write_text(FAKE_MAIN)
    return folder


@pytest.fixture
def cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our own CMakeLists.txt and cpp_patch with a trivial series instead of the real one."""
    folder = tmp_path / "cpp"
    (folder / "cpp_patch" / "src").mkdir(parents=True)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    shutil.copy(ROOT / "cpp_patch" / "apply.cmake", folder / "cpp_patch")
    (folder / "cpp_patch" / "series").write_text("# comment\n\n0001-name.patch\n")
    (folder / "cpp_patch" / "0001-name.patch").write_text(PATCH)
    (folder / "cpp_patch" / "src" / "longrope-name.h").write_text(
        '#define LONGROPE_NAME "patched"\n'
    )
    monkeypatch.setattr(options, "cpp_folder", lambda: folder)
    monkeypatch.setattr(build, "cpp_folder", lambda: folder)
    return folder


def output_of(folder: Path, *arguments: str) -> str:
    command = [folder / "llama-quantize", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def content_of(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


# the source


def make_archive(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_pinned_tree_alone_is_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    files = {"p/vendor/x/CMakeLists.txt": b"hello", "p/other": b"", "p/vendor/xy/no": b""}
    sha256 = make_archive(archive, files)
    source.unpack(archive, tmp_path / "out", sha256=sha256, tree="p/vendor/x")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"CMakeLists.txt"}
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar.gz", "out"}


def test_an_archive_with_another_hash_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    got = make_archive(archive, {f"{source.TREE}/CMakeLists.txt": b"evil"})
    with pytest.raises(ToolError, match=f"expected SHA-256 {source.SHA256}, got {got}.*--source"):
        source.unpack(archive, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar.gz"}


@pytest.mark.parametrize("escape", ["p/../../../evil", "p/link/evil"])
def test_an_archive_that_writes_outside_is_refused(tmp_path: Path, escape: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    archive = inner / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("p/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo(escape))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(ToolError, match="cannot be unpacked"):
        source.unpack(archive, inner / "out", sha256=sha256, tree="p")
    assert [p.name for p in tmp_path.iterdir()] == ["inner"]
    assert [p.name for p in inner.iterdir()] == ["a.tar.gz"]


def test_a_failing_pip_is_told_with_the_way_around(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ToolError, match=r"(?s)pip could not fetch|has no pip") as caught:
        source.fetch_source()
    assert "--source DIR" in str(caught.value)
    assert not [p for p in (cache / "source").iterdir() if p.suffix != ".lock"]


# the key


def test_the_key_follows_everything_that_is_compiled(
    cpp: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [build_key(BuildOptions())]
    keys.append(build_key(BuildOptions(patched=False)))
    keys.append(build_key(BuildOptions(cmake_options=("-DGGML_CUDA=ON",))))
    (cpp / "cpp_patch" / "0001-name.patch").write_text(PATCH.replace("LONGROPE_NAME", '"x"'))
    keys.append(build_key(BuildOptions()))
    (cpp / "cpp_patch" / "src" / "new.cpp").touch()
    keys.append(build_key(BuildOptions()))
    monkeypatch.setenv("CXXFLAGS", "-g")
    keys.append(build_key(BuildOptions()))
    assert len(set(keys)) == len(keys)

    (cpp / "cpp_patch" / "README.md").write_text("not compiled")
    (cpp / "cpp_patch" / "0002-not-in-the-series.patch").write_text("x")
    assert build_key(BuildOptions()) == keys[-1]


def test_the_key_follows_a_given_source(tree: Path) -> None:
    before = build_key(BuildOptions(source=tree))
    (tree / "build-old").mkdir()
    (tree / "build-old" / "object.o").touch()
    assert build_key(BuildOptions(source=tree)) == before
    (tree / "src" / "llama.cpp").write_text(FAKE_LIBRARY + "// more\n")
    assert build_key(BuildOptions(source=tree)) != before


def test_the_cpu_options_are_those_that_this_cpu_has() -> None:
    text = "processor : 0\nflags\t\t: fpu sse4_2 avx avx2 fma bmi2 avx512f amx_int8 avx512_bf16\n"
    assert cpu_options(text, "x86_64") == [
        "-DGGML_SSE42=ON",
        "-DGGML_AVX=ON",
        "-DGGML_AVX2=ON",
        "-DGGML_BMI2=ON",
        "-DGGML_FMA=ON",
        "-DGGML_F16C=OFF",
        "-DGGML_AVX512=OFF",
    ]
    all_five = text.replace("avx512f", "avx512f avx512cd avx512vl avx512dq avx512bw")
    assert "-DGGML_AVX512=ON" in cpu_options(all_five, "x86_64")
    assert cpu_options("Features : fp asimd\n", "aarch64") == []


@pytest.mark.parametrize("option", ["GGML_CUDA=ON", "-GNinja", "-DX", "-DLONGROPE_PATCH=OFF"])
def test_what_is_no_cmake_option_is_refused(option: str) -> None:
    with pytest.raises(ToolError, match="CMake option"):
        BuildOptions(cmake_options=(option,))


# the build


@pytest.mark.parametrize("program", ["git", "patch"])
def test_the_series_is_applied_to_a_copy(tree: Path, cpp: Path, program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    # the trap for git: a repository around the cache
    subprocess.run(["git", "init", "-q", str(tree.parent)], check=False)
    without_git = ("-DLONGROPE_GIT=OFF",) if program == "patch" else ()
    before = content_of(tree)
    chosen = BuildOptions(source=tree, cmake_options=without_git)
    folder = ensure_built(["llama-quantize", "llama"], chosen)
    assert output_of(folder) == "patched\n"
    assert find_library("llama", folder).is_file()
    assert content_of(tree) == before


def test_unpatched_is_stock_and_shares_its_build_with_an_empty_series(
    tree: Path, cpp: Path
) -> None:
    stock = ensure_built(["llama-quantize"], BuildOptions(source=tree, patched=False))
    assert output_of(stock) == "stock\n"
    (cpp / "cpp_patch" / "series").write_text("# none\n")
    shutil.rmtree(cpp / "cpp_patch" / "src")
    assert find_build(BuildOptions(source=tree)).binaries == stock


def test_what_is_built_is_found_at_once_and_more_targets_join_it(tree: Path, cpp: Path) -> None:
    chosen = BuildOptions(source=tree)
    assert find_binary("llama-quantize", chosen) is None
    folder = ensure_built(["llama-quantize"], chosen)
    seen: list[str] = []
    start = time.perf_counter()
    assert ensure_built(["llama-quantize"], chosen, report=lambda *a: seen.append(a[0])) == folder
    assert time.perf_counter() - start < 0.1
    assert seen == []

    steps: list[tuple[int, int]] = []
    ensure_built(
        ["llama-bench"], chosen, report=lambda line, done, total: steps.append((done, total))
    )
    assert max(steps)[0] == max(steps)[1] > 0
    assert find_build(chosen).built_targets() == {"llama-quantize", "llama-bench"}
    (folder / "llama-bench").unlink()
    assert find_binary("llama-bench", chosen) is None


def test_a_patch_that_does_not_apply_says_which_and_what_to_do(tree: Path, cpp: Path) -> None:
    (tree / "src" / "llama.cpp").write_text(FAKE_LIBRARY.replace("stock", "newer"))
    with pytest.raises(ToolError, match=r"0001-name\.patch does not apply") as caught:
        ensure_built(["llama-quantize"], BuildOptions(source=tree))
    assert "--unpatched" in " ".join(str(caught.value).split())
    log = find_build(BuildOptions(source=tree)).log
    assert f"Whole log: {log}" in str(caught.value)
    assert "0001-name.patch" in log.read_text()


def test_a_new_file_may_not_replace_one_of_llama_cpp(tree: Path, cpp: Path) -> None:
    (cpp / "cpp_patch" / "src" / "llama.h").touch()
    (tree / "src" / "llama.h").touch()
    with pytest.raises(ToolError, match=r"would overwrite src/llama\.h"):
        ensure_built(["llama-quantize"], BuildOptions(source=tree))


def test_a_compiler_error_is_shown_and_the_repaired_source_builds(tree: Path, cpp: Path) -> None:
    (tree / "src" / "main.cpp").write_text("int main(void) { return nonsense; }\n")
    with pytest.raises(ToolError, match="nonsense"):
        ensure_built(["llama-quantize"], BuildOptions(source=tree))
    (tree / "src" / "main.cpp").write_text(FAKE_MAIN)
    assert output_of(ensure_built(["llama-quantize"], BuildOptions(source=tree))) == "patched\n"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_build_killed_in_the_middle_goes_on_at_the_next_call(tree: Path, cache: Path) -> None:
    slow = 'add_custom_command(OUTPUT slow.cpp COMMAND "${CMAKE_COMMAND}" -E touch started\n'
    slow += (
        '    COMMAND "${CMAKE_COMMAND}" -E sleep 4 COMMAND "${CMAKE_COMMAND}" -E touch slow.cpp)\n'
    )
    slow += "target_sources(llama-quantize PRIVATE slow.cpp)\n"
    (tree / "src" / "CMakeLists.txt").write_text(FAKE_SRC_CMAKE + slow)
    chosen = BuildOptions(source=tree, patched=False)
    code = "from pathlib import Path\nfrom longrope_export.llama_cpp.build import *\n"
    code += f"ensure_built(['llama-quantize'], BuildOptions(Path({str(tree)!r}), patched=False))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    folder = find_build(chosen).folder
    deadline = time.monotonic() + 60

    def is_compiling() -> bool:  # os.walk passes over folders that are renamed meanwhile
        return any("started" in files for _, _, files in os.walk(folder))

    while not is_compiling() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (folder / "unfinished").exists()

    said: list[str] = []
    binaries = ensure_built(["llama-quantize"], chosen, report=lambda *a: said.append(a[0]))
    assert said[0].startswith("another process works on")  # the orphaned compiler
    assert output_of(binaries) == "stock\n"


def test_a_missing_cmake_is_told_with_the_way_to_get_it(
    tree: Path, cpp: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ToolError, match="pip install cmake ninja"):
        ensure_built(["llama-quantize"], BuildOptions(source=tree))


def test_an_unknown_target_fails_with_its_name(tree: Path, cpp: Path) -> None:
    with pytest.raises(ToolError, match="llama-nonsense"):
        ensure_built(["llama-nonsense"], BuildOptions(source=tree))


def test_cmake_alone_says_where_to_get_the_source(tmp_path: Path) -> None:
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "b")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "longrope-export llama-cpp build" in result.stderr


# the programs


def test_a_chosen_folder_of_programs_comes_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    program = mine / "llama-bench"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("LONGROPE_EXPORT_LLAMA_CPP", str(mine))
    assert require_binary("llama-bench") == program
    with pytest.raises(ToolError, match=r"llama-cli not found in .*mine"):
        require_binary("llama-cli", build=True)
    monkeypatch.setenv("LONGROPE_EXPORT_LLAMA_CPP", str(tmp_path / "nothing"))
    with pytest.raises(ToolError, match="must name a folder"):
        require_binary("llama-bench")


def test_path_of_what_is_not_built_exits_2_with_advice(cache: Path) -> None:
    for arguments in (["path"], ["path", "llama-bench"]):
        result = CliRunner().invoke(main, ["llama-cpp", *arguments])
        assert result.exit_code == 2
        assert "run longrope-export llama-cpp build" in result.output


def test_run_builds_and_passes_the_arguments_untouched(tree: Path) -> None:
    command = [sys.executable, "-m", "longrope_export", "llama-cpp", "run", "--unpatched"]
    command += ["--source", str(tree), "llama-quantize", "-h", "--help", "a b", "--", "-p"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "stock [-h] [--help] [a b] [--] [-p]\n", result.stderr
    assert "compiling llama.cpp" in result.stderr

    chosen = ["--unpatched", "--source", str(tree)]
    result_path = CliRunner().invoke(main, ["llama-cpp", "path", *chosen, "llama-quantize"])
    program = find_build(BuildOptions(source=tree, patched=False)).binaries / "llama-quantize"
    assert result_path.output == f"{program}\n"


@pytest.mark.parametrize("name", ["../evil", "-x", "a/b"])
def test_a_name_that_is_no_program_is_refused(name: str) -> None:
    result = CliRunner().invoke(main, ["llama-cpp", "path", "--", name])
    assert result.exit_code == 2
    assert "expected a name" in result.output


def test_the_pin_in_the_readme_is_the_one_in_the_code() -> None:
    text = (cpp_folder() / "cpp_patch" / "README.md").read_text()
    assert f"{source.PACKAGE} {source.VERSION}" in text
    assert source.SHA256 in text


def test_a_perplexity_that_was_never_printed_is_computed_again(tmp_path: Path) -> None:
    # stock llama.cpp ends without waiting for the thread that prints
    program = tmp_path / "llama-perplexity"
    program.write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/calls\n"
        f'[ $(wc -l < {tmp_path}/calls) -lt 8 ] || echo "Final estimate: PPL = 7.5 +/- 0.1"\n'
    )
    program.chmod(0o755)
    found = run_perplexity(program, tmp_path / "m.gguf", tmp_path / "t.txt", context=64)
    assert (found.value, found.standard_error) == (7.5, 0.1)
    program.write_text("#!/bin/sh\necho no such file\nexit 1\n")
    with pytest.raises(ToolError, match=r"no perplexity \(exit code 1\)[^\n]*\nno such file"):
        run_perplexity(program, tmp_path / "m.gguf", tmp_path / "t.txt", context=64)
