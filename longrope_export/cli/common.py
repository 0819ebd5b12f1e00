"""What several commands share: options, consoles, progress."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from longrope_converters.base import ExportReport
    from longrope_export.config import LongRopeConfig
    from longrope_export.models.model import Model

F = TypeVar("F", bound=Callable[..., Any])
N = TypeVar("N", int, float)

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}
OUTPUT_PATH = click.Path(path_type=Path)
SEED = click.IntRange(0, 2**32 - 1)  # what numpy and torch both take


def model_options(command: F) -> F:
    """MODEL and how a hub id is fetched."""
    for decorate in (
        click.option("--local-files-only", is_flag=True, help="Never ask the hub."),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
        click.argument("model"),
    ):
        command = decorate(command)
    return command


def factor_options(command: F) -> F:
    """Where existing factors are read from."""
    for decorate in (
        click.option(
            "--tier",
            "tiers",
            multiple=True,
            metavar="LENGTH=FILE.csv",
            help="A CSV of microsoft/LongRoPE for one tier; repeat it for a ladder.",
        ),
        click.option(
            "--factors",
            type=click.Path(path_type=Path),
            help="Factors: our JSON, a config.json or its rope block, a GGUF, an ONNX export.",
        ),
    ):
        command = decorate(command)
    return command


def given_factors(
    factors: Path | None,
    tiers: tuple[str, ...],
    model: Model,
    switch: str | None = None,
    attention: str = "longrope",
) -> LongRopeConfig | None:
    """What --factors or --tier name, checked against the model; None without either.

    Args:
        switch: overrides the rule at a tier border that the file states.
        attention: attention factor of CSV tiers, which state none.

    Raises:
        LongRopeError: both are given, a tier is not LENGTH=FILE, or the file does not fit.
    """
    from longrope_export.config import SwitchPolicy
    from longrope_export.errors import FactorFileError
    from longrope_export.factor_files import read_csv_ladder, read_factors

    if factors is not None and tiers:
        raise FactorFileError("--factors and --tier are two ways to say the same: give one")
    if tiers:
        files: dict[int, Path] = {}
        for tier in tiers:
            length, _, name = tier.partition("=")
            if not length.isdecimal() or not name:
                raise FactorFileError(f"--tier {tier}: expected LENGTH=FILE.csv, as 4096=4k.csv")
            if int(length) in files:
                raise FactorFileError(f"--tier {tier}: length {length} is given twice")
            files[int(length)] = Path(name)
        return read_csv_ladder(
            files, model, switch=SwitchPolicy(switch or "causal"), attention=attention
        )
    if factors is None:
        if switch is not None:
            raise FactorFileError("--switch overrides a factors file: give --factors or --tier")
        return None
    config = read_factors(factors, model)
    return config if switch is None else replace(config, switch=SwitchPolicy(switch))


def input_files(model: Path, factors: Path | None, tiers: tuple[str, ...]) -> list[Path]:
    """Every file that a command reads, so that none of them becomes its output."""
    named = [model, *([factors] if factors else [])]
    named += [Path(tier.partition("=")[2]) for tier in tiers]
    return with_contents(named)


def with_contents(paths: Iterable[Path]) -> list[Path]:
    """The paths, and every file inside of those that are folders."""
    named = list(paths)
    inside = [file for path in named if path.is_dir() for file in path.rglob("*") if file.is_file()]
    return [*named, *inside]


def read_utf8(path: Path, option: str) -> str:
    """The content of a text that an option names.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    from longrope_export.errors import ConfigError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: cannot be read as UTF-8: {error}") from error


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path]) -> None:
    """Refuse outputs of one command that are inputs, or that are two names of one file.

    Args:
        outputs: by the name of the option; None where it is not given.

    Raises:
        OutputError: nothing has been written yet.
    """
    from longrope_export.errors import OutputError
    from longrope_export.outputs import check_output

    read = list(inputs)
    taken: dict[Path, str] = {}
    for option, output in outputs.items():
        if output is None:
            continue
        check_output(output, read, force=True)
        other = taken.setdefault(output.resolve(), option)
        if other != option:
            raise OutputError(f"{other} and {option} both name {output}: give two names")


def number_list(kind: Callable[[str], N], example: str) -> Callable[[str], tuple[N, ...]]:
    """Type of an option that takes numbers with commas between, as the example has them.

    Args:
        kind: int or float.
    """
    wanted = "whole numbers" if kind is int else "numbers"

    def numbers(text: str) -> tuple[N, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            raise click.BadParameter(
                f"{text}: expected {wanted} with commas between, as {example}"
            ) from error

    return numbers


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)


def force_option(command: F) -> F:
    return click.option("-f", "--force", is_flag=True, help="Replace an existing output.")(command)


def switch_option(command: F) -> F:
    """The rule at a tier border, instead of the factor file's."""
    return click.option(
        "--switch", type=click.Choice(["causal", "sequence"]), help="Override the file's."
    )(command)


def verify_option(command: F) -> F:
    return click.option(
        "--verify",
        "verify",
        is_flag=True,
        help="Run the export afterwards and compare it with the definition, in short.",
    )(command)


def check_dry_run(dry_run: bool, *, verify: bool, as_json: bool) -> None:
    """Refuse what a dry run would leave out without a word.

    Raises:
        UnsupportedError: naming the option.
    """
    from longrope_export.errors import UnsupportedError

    for flag, given in (("--verify", verify), ("--json", as_json)):
        if dry_run and given:
            raise UnsupportedError(
                f"{flag} needs a file, --dry-run writes none: leave one of them out"
            )


def was_given(name: str) -> bool:
    """True if the option of this parameter stands on the command line."""
    from click.core import ParameterSource

    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def refuse_unused(needs: Iterable[tuple[tuple[str, ...], str, bool]]) -> None:
    """Refuse options that nothing would look at.

    Args:
        needs: names of parameters, what they belong to, and whether that is there.

    Raises:
        ConfigError: naming the option and what it belongs to.
    """
    from longrope_export.errors import ConfigError

    for names, needed, is_there in needs:
        for name in names:
            if was_given(name) and not is_there:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} belongs to {needed}: here it would be ignored")


def say_report(report: ExportReport, max_length: int | None, *, as_json: bool) -> None:
    """What was written: for people, and as JSON if asked for."""
    if as_json:
        print_json(report.to_json())
    length = "" if max_length is None else f", up to {max_length} tokens"
    say(f"{report.output}: {report.num_bytes:,} bytes ({report.route}){length}")
    for note in report.notes:
        say(f"  note: {note}")


def is_quiet() -> bool:
    """True if -q stands before the command."""
    root = click.get_current_context().find_root()
    return bool(root.params.get("quiet"))


def is_verbose() -> bool:
    root = click.get_current_context().find_root()
    return bool(root.params.get("verbose"))


def say(message: str) -> None:
    """A line for people, on stderr, silent under -q."""
    if not is_quiet():
        click.echo(message, err=True)


def print_json(values: Any) -> None:
    click.echo(json.dumps(values, indent=2))


@contextlib.contextmanager
def byte_progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that is told of finished bytes; shown only on a terminal."""
    if is_quiet() or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total_bytes)
        yield lambda count: progress.advance(task, count)


@contextlib.contextmanager
def share_progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr that is told what is being done and which share of it; only on a terminal."""
    if is_quiet() or not sys.stderr.isatty():
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda what, share: progress.update(task, description=escape(what), completed=share)
