"""`longrope-export verify`: do the exports compute what the definition says?"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    OUTPUT_PATH,
    SEED,
    check_outputs,
    factor_options,
    given_factors,
    input_files,
    is_quiet,
    json_option,
    print_json,
    read_utf8,
    say,
    share_progress,
    switch_option,
    was_given,
    with_contents,
)

if TYPE_CHECKING:
    from longrope_export.config import LongRopeConfig
    from longrope_export.models.model import Model
    from longrope_export.verify.compare import Limit

_MISSED = 1


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("paths", nargs=-1, required=True, metavar="MODEL EXPORT...")
@factor_options
@switch_option
@click.option(
    "--length",
    type=click.IntRange(min=2),
    help="Longest sequence in tokens [the target, or what fits into the memory].",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What is read, UTF-8; also shows whether tokenizers agree [random tokens].",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random tokens.")
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="PRECISION=KL:MEAN_KL[:DIFFERENCE]",
    help="What a precision may differ by, as 4-bit=0.5:0.1; repeat it.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of the runtimes.")
@click.option("--build", is_flag=True, help="Build llama.cpp first where it is missing.")
@click.option("-o", "--output", type=OUTPUT_PATH, help="Certificate to write, JSON.")
@click.option("--markdown", type=OUTPUT_PATH, help="Section for a model card to write.")
@click.option("--plot", type=OUTPUT_PATH, help="Differences over position to write, PNG or SVG.")
@click.option(
    "--check",
    type=click.Path(path_type=Path, exists=True),
    help="Only see whether each EXPORT (no MODEL) is what this certificate is about.",
)
@click.option("--embed", is_flag=True, help="Put the certificate into every EXPORT that passed.")
@json_option
def command(
    paths: tuple[str, ...],
    factors: Path | None,
    tiers: tuple[str, ...],
    switch: str | None,
    length: int | None,
    text: Path | None,
    seed: int,
    limits: tuple[str, ...],
    threads: int | None,
    build: bool,
    output: Path | None,
    markdown: Path | None,
    plot: Path | None,
    check: Path | None,
    embed: bool,
    as_json: bool,
) -> None:
    """Prove that exports compute what the definition says.

    MODEL and every EXPORT are run, and their logits compared. MODEL is the folder or GGUF that the
    exports were made from, in float32; the definition is that of --factors, else what MODEL
    carries. An EXPORT is a GGUF (run by the patched llama.cpp), a folder with model.onnx (ONNX
    Runtime), a Hugging Face folder (our live runtime), or RUNTIME=PATH: llama.cpp,
    llama.cpp-stock, onnxruntime, genai, transformers, transformers-stock, transformers-remote,
    server; or the http:// address of a llama-server or vLLM. Exit code 1 if any of them differs.

    \b
    longrope-export verify model/ model.gguf model-onnx/ --factors f.json -o certificate.json
    longrope-export verify model/ llama.cpp-stock=model.gguf --factors f.json --length 4096
    longrope-export verify --check certificate.json model.gguf
    """
    if check is not None:
        _check(check, paths, threads, build)
        return
    if len(paths) < 2:
        raise click.UsageError("give MODEL and at least one EXPORT")
    model, *exports = paths
    from longrope_export.models.model import find_model, load_model
    from longrope_export.outputs import check_outside, write_text
    from longrope_export.runtimes.open import parse_export
    from longrope_export.verify.exports import check_length, prepare, unused_limits, verify_exports
    from longrope_export.verify.report import check_plot, save_plot
    from longrope_export.verify.report import markdown as as_markdown

    parsed_limits = dict(map(_parse_limit, limits))
    if plot is not None:
        check_plot(plot)
    source = load_model(find_model(model))
    config = given_factors(factors, tiers, source, switch) or source.native
    chosen = [parse_export(export) for export in exports]
    used = check_length(source, config, length)
    if length is None and used < config.max_position_embeddings:
        say(f"the free memory allows {used} of {config.max_position_embeddings} tokens")
    inputs = input_files(source.path, factors, tiers)
    inputs += with_contents(export.path for export in chosen if isinstance(export.path, Path))
    inputs += [text] if text else []
    outputs = {"-o": output, "--markdown": markdown, "--plot": plot}
    check_outputs(outputs, inputs)
    for option, written_to in outputs.items():
        for export in chosen:
            if written_to is not None and isinstance(export.path, Path):
                check_outside(
                    written_to,
                    export.path,
                    option,
                    "choose another folder, or use --embed for the certificate",
                )
    with share_progress() as step:
        written = None if text is None else read_utf8(text, "--text")
        prepared = prepare(source, config, used, text=written, seed=seed, say=step)
        certificate, results = verify_exports(
            prepared, chosen, limits=parsed_limits, threads=threads, build=build, say=step
        )
    if output is not None:
        write_text(output, json.dumps(certificate, indent=1) + "\n")
    if markdown is not None:
        write_text(markdown, as_markdown(certificate))
    if as_json:
        print_json(certificate)
    else:
        _show(certificate)
    if plot is not None:
        save_plot(certificate, plot)
    for name in unused_limits(parsed_limits, results):
        found = sorted({result.info.precision for result in results if result.info})
        say(
            f"warning: --limit {name} was not used: the exports reported "
            f"{', '.join(found) or 'no precision'}"
        )
    if embed:
        from longrope_converters.certificate import embed_certificate

        for result in results:
            if result.passed and isinstance(result.export.path, Path):  # a server holds none
                embed_certificate(result.export.path, certificate)
                say(f"{result.export.path}: certificate embedded")
    if not certificate["passed"]:
        raise SystemExit(_MISSED)


def verify_after(
    model: Model,
    config: LongRopeConfig | None,
    exports: Sequence[str],
    *,
    only_shown: Collection[str] = (),
) -> None:
    """The short run of the exporting commands' --verify; ends with exit code 1 on a miss.

    Args:
        config: the definition; None for the model's own.
        exports: as the command's EXPORT.
        only_shown: runtimes whose misses do not count.
    """
    from longrope_export.runtimes.open import parse_export
    from longrope_export.verify.exports import SHORT_LENGTH, prepare, verify_exports

    definition = config or model.native
    length = min(SHORT_LENGTH, definition.max_position_embeddings)
    with share_progress() as step:
        prepared = prepare(model, definition, length, say=step)
        chosen = [parse_export(export) for export in exports]
        certificate, results = verify_exports(prepared, chosen, build=True, say=step)
    _show(certificate)
    if not all(result.passed or result.export.runtime in only_shown for result in results):
        raise SystemExit(_MISSED)


def _show(certificate: dict[str, Any]) -> None:
    if is_quiet():
        return
    from rich.console import Console

    from longrope_export.verify.report import rich_tables

    Console(stderr=True).print(*rich_tables(certificate))


def _check(file: Path, paths: tuple[str, ...], threads: int | None, build: bool) -> None:
    from longrope_export.errors import ModelError
    from longrope_export.verify.certificate import read_certificate
    from longrope_export.verify.check import check_export

    for parameter in click.get_current_context().command.params:
        name = parameter.name or ""
        if name not in ("paths", "check", "threads", "build") and was_given(name):
            raise click.UsageError(
                f"{parameter.opts[-1]} is not for --check, which only runs what the certificate "
                "says: leave one of them out"
            )
    for path in map(Path, paths):
        if not path.exists():
            raise ModelError(
                f"{path}: no such file or folder: --check takes exports on this machine"
            )
    certificate = read_certificate(file)
    failed = False
    for path in map(Path, paths):
        problems = check_export(certificate, path, threads=threads, build=build, say=say)
        failed = failed or bool(problems)
        for problem in problems:
            click.echo(problem, err=True)
        if not problems:
            say(f"{path}: certified on {certificate['created'][:10]}, and computes the same here")
    if failed:
        raise SystemExit(_MISSED)


def _parse_limit(text: str) -> tuple[str, Limit]:
    from longrope_export.errors import ConfigError
    from longrope_export.verify.compare import LIMITS, Limit, is_precision

    precision, _, values = text.partition("=")
    try:
        kl, mean_kl, *rest = [float(value) for value in values.split(":")]
        difference = rest.pop() if rest else None
        if rest or not all(math.isfinite(v) for v in (kl, mean_kl, difference or 0)):
            raise ValueError("more than three numbers, or one without end")
    except ValueError as error:
        raise ConfigError(
            f"--limit {text}: expected PRECISION=KL:MEAN_KL[:DIFFERENCE], as 4-bit=0.5:0.1"
        ) from error
    if not is_precision(precision):
        raise ConfigError(
            f"--limit {text}: no runtime reports the precision {precision}: expected "
            f"{', '.join(LIMITS)}, unknown, or a type of ggml, as q4_k"
        )
    return precision, Limit(difference, kl, mean_kl)
