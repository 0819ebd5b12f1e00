"""`longrope-export search`: find the factors that suit a model and its texts."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    SEED,
    is_quiet,
    json_option,
    model_options,
    number_list,
    print_json,
    say,
)
from longrope_export.cli.search_parts import (
    encode_texts,
    make_offload,
    make_options,
    refuse_ignored,
    refuse_unshared,
)

if TYPE_CHECKING:
    from longrope_export.models.model import Model
    from longrope_export.search.jobs import Document, Workers
    from longrope_export.search.options import Event, Outcome, SearchOptions

ALGORITHMS = ("longrope", "longrope2", "practical")
SECONDS_BETWEEN_LINES = 60  # where there is no terminal
SHOWN_FORMS = 4


@click.command(context_settings=CONTEXT_SETTINGS)
@model_options
@click.option("--target-length", type=int, required=True, help="New maximum length in tokens.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    metavar="FILE|DIR|dataset:NAME",
    help="Works longer than the target; .txt, .jsonl, .parquet, folders of them; repeat it.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="RUN folder.")
@click.option("--resume", is_flag=True, help="Go on with the run in that folder.")
@click.option(
    "--algorithm", type=click.Choice(ALGORITHMS), default="longrope", show_default=True,
    help="The paper's, LongRoPE2's, or the practical one.",
)  # fmt: skip
@click.option("--ladder", help="Search a ladder: 8192,16384,32768, or every:2048, or x1.25.")
@click.option("--no-refine", is_flag=True, help="A ladder: its smooth family alone.")
@click.option("--tier-tokens", type=int, help="A ladder: judge a tier on so many tokens [all].")
@click.option("--recover", type=number_list(int, "4096,8192"), metavar="LENGTHS",
              help="Short tiers of an extended model, as 4096,8192.")  # fmt: skip
@click.option("--recover-cap", type=float, default=1.0, show_default=True,
              help="Their largest factors, times the model's own.")  # fmt: skip
@click.option(
    "--switch", type=click.Choice(["causal", "sequence"]), help="Rule [the better one, measured]."
)
@click.option(
    "--documents", default="0,3,3", type=number_list(int, "0,3,3"), show_default=True,
    metavar="N,N,N", help="For search, validation and test; 0: the paper's number.",
)  # fmt: skip
@click.option(
    "--attention-factor", "attention",
    help="longrope, yarn, none, a number, or search [longrope; practical: search].",
)  # fmt: skip
@click.option("--no-start-tokens", is_flag=True, help="Leave the start-token window alone.")
@click.option(
    "--against",
    help="Closed forms to compare with [pi,ntk,dynamic-ntk,yarn; "
    "for a ladder yarn,yarn-ladder,yarn-ladder:0.6].",
)
@click.option("--warm-start", type=click.Path(path_type=Path), help="Factors to begin with.")
@click.option("--budget-tokens", type=float, help="Stop searching after so many forward tokens.")
@click.option("--budget-minutes", type=float, help="Or after so many minutes of evaluations.")
@click.option("--population", type=int, help="Individuals of the first generation [64].")
@click.option("--iterations", type=int, help="Generations after it [40].")
@click.option("--family-evaluations", type=int, default=40, show_default=True,
              help="practical and ladders: members of the smooth family to try.")  # fmt: skip
@click.option("--gradient-steps", type=int, default=24, show_default=True,
              help="practical: steps along the gradient.")  # fmt: skip
@click.option("--needle-keys", type=int, default=5, show_default=True,
              help="Keys by which the rules are compared; 0: none.")  # fmt: skip
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of everything random.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
              show_default=True, help="Of the model.")  # fmt: skip
@click.option("--device", "devices", multiple=True, metavar="DEVICE",
              help="A process for each, as cuda:0; repeat it [the GPU if there is one].")  # fmt: skip
@click.option("--sequence-parallel", type=click.IntRange(min=1), default=1, show_default=True,
              metavar="N", help="Devices that share every pass, for long targets.")  # fmt: skip
@click.option(
    "--offload", type=click.Choice(["cpu", "disk"]),
    help="Layers' weights in CPU memory (for a GPU) or on disk, brought when a layer runs [neither].",
)  # fmt: skip
@click.option("--ray", "ray_address", metavar="ADDRESS", help="Workers on a Ray cluster.")
@click.option("--ray-workers", type=int, help="How many of them.")
@json_option
def command(
    model: str, revision: str | None, local_files_only: bool, output: Path, as_json: bool,
    resume: bool, texts: tuple[str, ...], devices: tuple[str, ...], ray_address: str | None,
    ray_workers: int | None, sequence_parallel: int, warm_start: Path | None, offload: str | None,
    **given: Any,
) -> None:  # fmt: skip
    """Find the factors that suit a model and its texts.

    RUN gets factors.json, result.json, a log and plots. Candidates are scored on search
    documents, the result is chosen on validation documents, and test documents are only reported
    on. A run that was killed goes on with --resume and ends as an unbroken one.

    \b
    longrope-export search model/ --target-length 32768 --text books/ -o run/
    longrope-export search model/ --target-length 32768 --text books/ -o run/ \\
        --algorithm practical --budget-minutes 60
    longrope-export search model/ --target-length 32768 --text books/ -o run/ --ladder every:2048
    longrope-export search extended/ --target-length 131072 --text books/ -o run/ --recover 4096,8192
    """
    from longrope_export.factor_files import read_factors
    from longrope_export.models.hf_config import refuse_quantized
    from longrope_export.models.model import find_model, load_model
    from longrope_export.search.pool import Setup
    from longrope_export.search.recovery import RecoveryRun
    from longrope_export.search.run import SearchRun
    from longrope_export.search.workers import make_workers
    from longrope_export.texts import read_texts

    refuse_ignored(given)
    refuse_unshared(given, sequence_parallel, devices, ray_address, offload)
    source = load_model(find_model(model, revision=revision, local_files_only=local_files_only))
    refuse_quantized(source.path)
    warm = None if warm_start is None else read_factors(warm_start, source)
    options = make_options(given, warm)
    away = make_offload(offload, source, devices, output, is_ray=ray_address is not None)
    say(f"reading {', '.join(texts)}")
    encoded = encode_texts(source, read_texts(texts))

    def start(documents: Sequence[Document]) -> Workers:
        setup = Setup(source.path, tuple(documents), source.window, options.dtype, offload=away)
        return make_workers(
            setup,
            list(devices) or None,
            ray_address=ray_address,
            num_workers=ray_workers,
            sequence_parallel=sequence_parallel,
        )

    make: type[SearchRun] | type[RecoveryRun] = RecoveryRun if options.recover else SearchRun
    with show_progress() as observe:
        run = make(source, encoded, options, output, start, resume=resume, observe=observe)
        say(run.held_out)
        try:
            outcome = run.execute()
        finally:
            run.close()
            if away is not None and away.folder is not None:
                shutil.rmtree(away.folder, ignore_errors=True)  # also of workers that were killed
    write_plots(source, options, outcome, output)
    if as_json:
        print_json(outcome.result)
    if not is_quiet():
        say_outcome(outcome, output)


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[Event], None]]:
    """What is being done, the best so far against the closed forms, what is spent and what is left.

    On a terminal a bar; elsewhere a line for each phase, and one a minute.
    """
    if is_quiet():
        yield lambda event: None
        return
    if not sys.stderr.isatty():
        yield say_now_and_then()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[spent]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task, phase = progress.add_task("reading", total=None, spent=""), ""

        def observe(event: Event) -> None:
            nonlocal phase
            if event.phase != phase:
                phase = event.phase
                progress.reset(task, total=None)
            if event.progress is not None:
                progress.update(task, total=1.0, completed=event.progress.share)
            progress.update(task, description=describe(event), spent=describe_spent(event))

        yield observe


def say_now_and_then() -> Callable[[Event], None]:
    """An observer that writes lines."""
    phase, written = "", 0.0

    def observe(event: Event) -> None:
        nonlocal phase, written
        now = time.monotonic()
        if event.phase == phase and now - written < SECONDS_BETWEEN_LINES:
            return
        phase, written = event.phase, now
        share = "" if event.progress is None else f", {event.progress.share:.0%}"
        spent = describe_spent(event)
        say(describe(event) + (f"; {spent}{share}" if spent else ""))

    return observe


def describe(event: Event) -> str:
    """One line: the phase, the best loss, and the best closed forms' beside it."""
    if event.best is None:
        return event.phase
    line = f"{event.phase}: {event.best:.4f} nats ({event.origin})"
    nearest = sorted(event.closed_forms.items(), key=lambda entry: entry[1])[:SHOWN_FORMS]
    return line + "".join(f", {name.partition(',')[0]} {loss:.4f}" for name, loss in nearest)


def describe_spent(event: Event) -> str:
    """Passes and forward tokens so far."""
    if event.progress is None:
        return ""
    return f"{event.progress.evaluations} passes, {event.progress.tokens:,} tokens"


def write_plots(source: Model, options: SearchOptions, outcome: Outcome, folder: Path) -> None:
    """Plots beside the factors, or a word why there are none."""
    from longrope_export.errors import ToolError
    from longrope_export.ladder import make_config
    from longrope_export.report.search_plots import write_search_plots

    forms = {
        name: make_config(source, name, options.target_length).tiers[-1]
        for name in options.compared
        if not options.recover and "-ladder" not in name
    }
    try:
        write_search_plots(outcome.result, outcome.config, forms, folder)
    except ToolError as error:
        say(f"no plots: {error}")


def say_outcome(outcome: Outcome, folder: Path) -> None:
    """The table of the test documents, what was held out, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    from longrope_export.search.tables import HEADER, test_rows

    result = outcome.result
    title = f"{len(result['documents']['test'])} test documents, against {result['baseline']}"
    table = Table(*HEADER, title=title)
    for row in test_rows(result):
        table.add_row(*row)
    Console(stderr=True).print(table)
    say(f"chosen: {result['chosen']}, switch {outcome.config.switch}")
    say(f"standard errors are over windows; {result['held_out']}")
    for note in result.get("notes", ()):
        say(f"note: {note}")
    say(f"{folder}/factors.json; next: longrope-export gguf MODEL --factors {folder}/factors.json")
