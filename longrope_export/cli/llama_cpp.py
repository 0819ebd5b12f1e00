"""`longrope-export llama-cpp`: fetch, patch, build and run the pinned llama.cpp."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    F,
    is_quiet,
    is_verbose,
    json_option,
    print_json,
    say,
)

if TYPE_CHECKING:
    from longrope_export.llama_cpp.options import BuildOptions


@click.group(context_settings=CONTEXT_SETTINGS)
def command() -> None:
    """Build and run the pinned llama.cpp.

    \b
    longrope-export llama-cpp build
    longrope-export llama-cpp run llama-cli -m model.gguf -p "Once upon"
    """


def build_options(function: F) -> F:
    """Which build is meant; without any of them, the pinned source with our patches."""
    for decorate in (
        click.option("--unpatched", is_flag=True, help="Stock llama.cpp, without our patches."),
        click.option(
            "--cmake-option",
            "cmake_options",
            multiple=True,
            metavar="-DNAME=VALUE",
            help="Passed to cmake, as -DGGML_CUDA=ON; repeatable.",
        ),
        click.option(
            "--source",
            type=click.Path(path_type=Path, file_okay=False, exists=True),
            help="An unpacked llama.cpp instead of the pinned one; only read.",
        ),
    ):
        function = decorate(function)
    return function


def _chosen(
    source: Path | None, cmake_options: tuple[str, ...], unpatched: bool
) -> BuildOptions | None:
    """None when nothing is asked for, so that LONGROPE_EXPORT_LLAMA_CPP has its say."""
    from longrope_export.llama_cpp.options import BuildOptions

    options = BuildOptions(source, cmake_options, patched=not unpatched)
    return None if options == BuildOptions() else options


def _check_name(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) is None:
        raise click.BadParameter(f"expected a name like llama-cli, got {value!r}")
    return value


def _check_names(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    for value in values:
        _check_name(ctx, parameter, value)
    return values


@command.command(context_settings=CONTEXT_SETTINGS)
@build_options
@click.option(
    "--target",
    "targets",
    multiple=True,
    callback=_check_names,
    help="Build only this program, as llama-perplexity; repeatable.",
)
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Compilers at once.")
@click.option("-v", "--verbose", is_flag=True, help="Show every line of the build.")
@json_option
def build(
    source: Path | None,
    cmake_options: tuple[str, ...],
    unpatched: bool,
    targets: tuple[str, ...],
    jobs: int | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Fetch, patch and build llama.cpp in the cache; print the folder of the programs.

    \b
    longrope-export llama-cpp build
    longrope-export llama-cpp build --target llama-perplexity --target llama-quantize
    longrope-export llama-cpp build --cmake-option -DGGML_CUDA=ON
    """
    from longrope_export.llama_cpp.build import TARGETS, ensure_built, find_build
    from longrope_export.llama_cpp.progress import build_progress

    options = _chosen(source, cmake_options, unpatched)
    with build_progress(quiet=is_quiet(), verbose=verbose or is_verbose()) as report:
        folder = ensure_built(targets or TARGETS, options, jobs=jobs, report=report)
    built = find_build(options)
    if as_json:
        names = sorted(built.built_targets())
        print_json({"folder": str(folder), "targets": names, "log": str(built.log)})
    else:
        click.echo(folder)


@command.command(context_settings=CONTEXT_SETTINGS)
@build_options
@click.argument("name", required=False, callback=_check_name)
@json_option
def path(
    name: str | None,
    source: Path | None,
    cmake_options: tuple[str, ...],
    unpatched: bool,
    as_json: bool,
) -> None:
    """Print the folder of the programs, or the path of the program NAME.

    \b
    longrope-export llama-cpp path
    $(longrope-export llama-cpp path llama-bench) -m model.gguf
    """
    from longrope_export.errors import ToolError
    from longrope_export.llama_cpp.binaries import chosen_folder, require_binary
    from longrope_export.llama_cpp.build import find_build

    options = _chosen(source, cmake_options, unpatched)
    if name is not None:
        found = require_binary(name, options)
    else:
        chosen = chosen_folder() if options is None else None
        found = chosen or find_build(options).binaries
        if chosen is None and not find_build(options).built_targets():
            raise ToolError("llama.cpp is not built yet: run longrope-export llama-cpp build")
    if as_json:
        print_json({"path": str(found)})
    else:
        click.echo(found)


@command.command(context_settings={**CONTEXT_SETTINGS, "allow_interspersed_args": False})
@build_options
@click.argument("name", callback=_check_name)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    name: str,
    arguments: tuple[str, ...],
    source: Path | None,
    cmake_options: tuple[str, ...],
    unpatched: bool,
) -> None:
    """Run the program NAME, built first if it is missing; ARGUMENTS go to it as they are.

    \b
    longrope-export llama-cpp run llama-cli -m model.gguf -p "Once upon"
    longrope-export llama-cpp run --unpatched llama-perplexity --help
    """
    from longrope_export.llama_cpp.binaries import require_binary
    from longrope_export.llama_cpp.progress import build_progress

    options = _chosen(source, cmake_options, unpatched)
    with build_progress(quiet=is_quiet(), verbose=is_verbose()) as report:
        program = require_binary(name, options, build=True, report=report)
    if is_verbose():
        say(shlex.join([str(program), *arguments]))
    os.execv(program, [str(program), *arguments])


@command.command(context_settings=CONTEXT_SETTINGS)
def source() -> None:
    """Fetch the pinned llama.cpp source and print its folder; the patches are not applied.

    \b
    cmake -S . -B build -DLLAMA_CPP_SOURCE_DIR="$(longrope-export llama-cpp source)"
    """
    from longrope_export.llama_cpp.source import fetch_source

    click.echo(fetch_source(say))
