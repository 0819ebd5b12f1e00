"""`longrope-export demo`: a real 8k model at 32k in llama.cpp, from nothing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    is_quiet,
    is_verbose,
    json_option,
    number_list,
    print_json,
)

if TYPE_CHECKING:
    from longrope_export.config import LongRopeConfig
    from longrope_export.demo.measured import Measured
    from longrope_export.models.model import Model

PROGRAMS = ("llama-perplexity", "llama-completion")
PROMPT = "A context window is"
FOLDER = "longrope-demo"  # of its own, so that nobody's file of the same name is replaced
_GENERATION_SECONDS = 5


@click.command(context_settings=CONTEXT_SETTINGS)
@click.option(
    "-o",
    "--output",
    "parent",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help=f"Where the folder {FOLDER}/ with the results is made [here].",
)
@click.option("--target-length", type=int, default=32768, help="New context in tokens [32768].")
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    help="Measure what fits into so many minutes, the build included, at least one context beyond "
    "the model's window [6].",
)
@click.option("--lengths", type=number_list(int, "8192,16384"),
              help="Measure these contexts, however long it takes: 8192,16384.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Threads of llama.cpp [all].")
@json_option
def command(
    parent: Path,
    target_length: int,
    budget: float | None,
    lengths: tuple[int, ...] | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Take a real 8k model to 32k in llama.cpp, from nothing.

    Fetches SmolLM2-135M, builds llama.cpp (both are cached), makes YaRN factors, bakes them into
    the GGUF, and measures the perplexity of both files on Python's own help texts. What is
    fetched, built and measured is kept, so that a second run goes further.

    \b
    longrope-export demo
    longrope-export demo -o /tmp --lengths 8192,16384
    """
    from longrope_export.demo.budget import (
        FULL_CONTEXTS,
        PROBE_CONTEXT,
        affordable_contexts,
        estimate_seconds,
    )
    from longrope_export.demo.material import fetch_smollm2, write_help_text
    from longrope_export.demo.measured import measure_once
    from longrope_export.llama_cpp.binaries import require_binaries
    from longrope_export.llama_cpp.progress import build_progress
    from longrope_export.models.model import load_model

    contexts = _contexts(lengths, budget)
    started = time.monotonic()
    folder = parent / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with _step("SmolLM2-135M, a model trained for 8192 tokens"):
        source = fetch_smollm2()
    with build_progress(quiet=is_quiet(), verbose=is_verbose()) as report:
        programs = require_binaries(PROGRAMS, build=True, report=report)
    model = load_model(source)
    with _step(f"YaRN factors for {target_length} tokens, baked into a copy"):
        extended = folder / f"smollm2-{target_length}.gguf"
        _bake(model, target_length, folder / "factors.json", extended)
    text = folder / "help.txt"
    write_help_text(text)

    def measure(name: str, context: int) -> Measured:
        path = source if name == "before" else extended
        with _step(f"perplexity at {context} tokens, {name}"):
            return measure_once(
                programs / "llama-perplexity", path, text, context=context, threads=threads
            )

    hint = ""
    if contexts is None:
        budget = 6.0 if budget is None else budget
        probe = measure("before", PROBE_CONTEXT).seconds
        left = 60 * budget - (time.monotonic() - started) - _GENERATION_SECONDS
        contexts = affordable_contexts(left, probe)
        full = sum(2 * estimate_seconds(context, probe) for context in FULL_CONTEXTS)
        hint = _what_is_missing(contexts, budget, full)
    rows: list[dict[str, Any]] = []
    for context in contexts:
        row: dict[str, Any] = {"context": context}
        for name in ("before", "after"):
            result = measure(name, context).perplexity
            row[name], row[f"{name}_error"] = result.value, result.standard_error
        rows.append(row)
    with _step("a few tokens from the new file"):
        generated = _generate(programs / "llama-completion", extended, threads)
    seconds = time.monotonic() - started
    if as_json:
        result_json = {"rows": rows, "generated": generated, "seconds": seconds}
        print_json({**result_json, "model": str(extended), "note": hint})
        return
    _print_result(rows, generated, extended, target_length, seconds, hint)


def _contexts(lengths: tuple[int, ...] | None, budget: float | None) -> list[int] | None:
    from longrope_export.errors import ConfigError

    if lengths is None:
        return None
    if budget is not None:
        raise ConfigError("--lengths are measured however long it takes: leave out --budget")
    if min(lengths) < 1:
        raise ConfigError(f"--lengths must be at least 1 token, got {min(lengths)}")
    return list(lengths)


def _what_is_missing(contexts: list[int], budget: float, full_seconds: float) -> str:
    """What a user has to know about a table that was cut short; empty if nothing is missing."""
    from longrope_export.demo.budget import FULL_CONTEXTS

    if contexts == list(FULL_CONTEXTS):
        return ""
    return (
        f"Cut short for a budget of {budget:g} minutes. The whole table takes about "
        f"{max(full_seconds / 60, 1):.0f} minutes more: longrope-export demo --lengths "
        + ",".join(map(str, FULL_CONTEXTS))
    )


def _bake(model: Model, target_length: int, factors: Path, output: Path) -> LongRopeConfig:
    from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
    from longrope_export.config import SwitchPolicy
    from longrope_export.factor_files import write_factors
    from longrope_export.ladder import make_config

    config = make_config(model, "yarn", target_length, switch=SwitchPolicy.SEQUENCE)
    write_factors(config, factors)
    GgufConverter(GgufOptions(force=True)).convert(model, config, output, lambda _: None)
    return config


def _generate(program: Path, model: Path, threads: int | None) -> str:
    from longrope_export.errors import ToolError

    command = [str(program), "-m", str(model), "-c", "32768", "-n", "32", "--temp", "0"]
    command += ["-no-cnv", "-p", PROMPT, "--no-warmup"] + (["-t", str(threads)] if threads else [])
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        tail = "\n".join(result.stderr.strip().splitlines()[-12:])
        raise ToolError(f"{' '.join(command)}\nfailed with exit code {result.returncode}:\n{tail}")
    return result.stdout.strip()


@contextmanager
def _step(title: str) -> Iterator[None]:
    """A line per step: a spinner with the time while it runs, a tick when it is done."""
    if is_quiet():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    started = time.monotonic()
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(title)
        yield
    console.print(f"[green]done[/green] {title} [dim]{time.monotonic() - started:.1f} s[/dim]")


def _print_result(
    rows: list[dict[str, Any]],
    generated: str,
    model: Path,
    target_length: int,
    seconds: float,
    hint: str,
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title="Perplexity, lower is better")
    for name in ("context", "original file", f"extended to {target_length}", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["context"]),
            f"{row['before']:.2f} \u00b1 {row['before_error']:.2f}",
            f"{row['after']:.2f} \u00b1 {row['after_error']:.2f}",
            f"{row['after'] / row['before']:.2f}",
        )
    console.print(table)
    if hint:
        console.print(f"[yellow]{hint}[/yellow]", highlight=False)
    console.print(f"[bold]It writes:[/bold] {escape(generated)}", highlight=False)
    console.print(
        f"\n{escape(str(model))} is ready ({seconds:.0f} s in all). Next:\n"
        f"  longrope-export inspect {model}\n"
        f"  longrope-export llama-cpp run llama-server -m {model} -c {target_length}\n"
        f"  longrope-export factors yarn YOUR-MODEL --target-length N -o f.json\n"
        f"  longrope-export gguf YOUR-MODEL --factors f.json -o your-model.gguf",
        highlight=False,
    )
