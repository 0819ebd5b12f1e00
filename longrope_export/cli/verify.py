"""`longrope-export verify`: do the exports compute what the definition says?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    OUTPUT_PATH,
    factor_options,
    given_factors,
    is_quiet,
    json_option,
    print_json,
    say,
    share_progress,
)

if TYPE_CHECKING:
    from longrope_export.verify.compare import Limit

_MISSED = 1


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("model")
@click.argument("exports", nargs=-1, required=True, metavar="EXPORT...")
@factor_options
@click.option("--switch", type=click.Choice(["causal", "sequence"]), help="Override the file's.")
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
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random tokens.")
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="PRECISION=KL:MEAN_KL[:DIFFERENCE]",
    help="What a precision may differ by, as q4_k=0.5:0.1; repeat it.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of llama.cpp and ONNX Runtime.")
@click.option("--build", is_flag=True, help="Build llama.cpp first where it is missing.")
@click.option("-o", "--output", type=OUTPUT_PATH, help="Certificate to write, JSON.")
@click.option("--markdown", type=OUTPUT_PATH, help="Section for a model card to write.")
@click.option("--plot", type=OUTPUT_PATH, help="Differences over position to write, PNG or SVG.")
@click.option(
    "--check",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Compare EXPORT with this certificate's hashes before anything is run.",
)
@json_option
def command(
    model: str,
    exports: tuple[str, ...],
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
    as_json: bool,
) -> None:
    """Run MODEL under the definition and every EXPORT, and compare their logits.

    MODEL is the folder or GGUF that the exports were made from, in float32. The definition is that
    of --factors, else what MODEL carries. An EXPORT is a GGUF (run by the patched llama.cpp), a
    folder with model.onnx (ONNX Runtime) or a Hugging Face folder (our live runtime), or
    RUNTIME=PATH: llama.cpp, llama.cpp-stock, onnxruntime, genai, transformers,
    transformers-stock, transformers-remote. Exit code 1 if any of them differs.

    \b
    longrope-export verify model/ model.gguf model-onnx/ --factors f.json -o certificate.json
    longrope-export verify model/ llama.cpp-stock=model.gguf --factors f.json --length 4096
    """
    from longrope_export.errors import ConfigError
    from longrope_export.models.model import find_model, load_model
    from longrope_export.outputs import write_text
    from longrope_export.runtimes.open import parse_export
    from longrope_export.verify.certificate import check_certificate, make_certificate
    from longrope_export.verify.memory import available_bytes, count_parameters, longest_length
    from longrope_export.verify.plan import make_cases
    from longrope_export.verify.report import markdown as as_markdown
    from longrope_export.verify.report import rich_tables, save_plot
    from longrope_export.verify.run import ReferenceRows, verify_export
    from longrope_export.verify.tokens import make_tokens

    source = load_model(find_model(model))
    config = given_factors(factors, tiers, source, switch) or source.native
    chosen = [parse_export(export) for export in exports]
    given_limits = dict(map(_parse_limit, limits))
    if check is not None:
        certificate = json.loads(check.read_text(encoding="utf-8"))
        problems = [
            problem
            for export in chosen
            for problem in check_certificate(certificate, export.path, str(check))
        ]
        for problem in problems:
            click.echo(problem, err=True)
        if problems:
            raise SystemExit(_MISSED)
        say(f"{check}: hashes and results agree; running again")
    target = config.max_position_embeddings
    if length is not None and length > target:
        raise ConfigError(f"--length {length} is beyond the definition's target of {target} tokens")
    if length is None:
        fits = longest_length(source, count_parameters(source.path), available_bytes())
        length = min(target, fits)
        if length < target:
            say(f"the memory that is free allows {length} of {target} tokens")
        if length < 2:
            raise ConfigError("not enough free memory for this model in float32: give --length")
    cases = make_cases(config, length)
    count = max(case.num_tokens for case in cases)
    content = None if text is None else text.read_text(encoding="utf-8")
    tokens = make_tokens(source, content, count, seed)
    with share_progress() as step:
        reference = ReferenceRows(source.path, config, tokens, cases, step)
        results = [
            verify_export(
                export,
                config,
                tokens,
                cases,
                reference,
                limits=given_limits,
                text=content,
                threads=threads,
                build=build,
                say=step,
            )
            for export in chosen
        ]
    certificate = make_certificate(source.path, config, tokens, results)
    if output is not None:
        write_text(output, json.dumps(certificate, indent=1) + "\n")
    if markdown is not None:
        write_text(markdown, as_markdown(certificate))
    if plot is not None:
        save_plot(certificate, plot)
    if as_json:
        print_json(certificate)
    elif not is_quiet():
        from rich.console import Console

        Console(stderr=True).print(*rich_tables(certificate))
    if not certificate["passed"]:
        raise SystemExit(_MISSED)


def _parse_limit(text: str) -> tuple[str, Limit]:
    from longrope_export.errors import ConfigError
    from longrope_export.verify.compare import Limit

    precision, _, values = text.partition("=")
    try:
        numbers = [float(value) for value in values.split(":")]
        kl, mean_kl = numbers[:2]
        (difference,) = numbers[2:] or [None]
    except ValueError as error:
        raise ConfigError(
            f"--limit {text}: expected PRECISION=KL:MEAN_KL[:DIFFERENCE], as q4_k=0.5:0.1"
        ) from error
    return precision, Limit(difference, kl, mean_kl)
