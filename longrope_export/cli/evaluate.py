"""`longrope-export evaluate`: what the extension is worth, on the runtime that will serve it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longrope_export.cli.common import (
    CONTEXT_SETTINGS,
    OUTPUT_PATH,
    force_option,
    json_option,
    number_list,
    print_json,
    read_utf8,
    refuse_unused,
    say,
    share_progress,
    with_contents,
)

if TYPE_CHECKING:
    from longrope_export.evaluate.settings import Text

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("paths", nargs=-1, required=True, metavar="MODEL-OR-EXPORT...")
@click.option("--text", "texts", multiple=True, type=_FILE, help="UTF-8 document; repeat it.")
@click.option(
    "--factors",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="Run every source model under these too; repeat it to compare.",
)
@click.option("--lengths", default="4096", type=number_list(int, "4096,8192"), show_default=True,
              help="Windows in tokens: 4096,8192,16384.")  # fmt: skip
@click.option("--stride", type=click.IntRange(min=1), help="Tokens between windows [the length].")
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    help="Of each text that are read for perplexity [the longest length].",
)
@click.option("--perplexity/--no-perplexity", default=True, help="Perplexity [on].")
@click.option("--passkey", is_flag=True, help="One number hidden at every depth.")
@click.option("--needle", is_flag=True, help="Several keys, and several numbers of one key.")
@click.option("--depths", default="0,0.25,0.5,0.75,1", type=number_list(float, "0,0.5,1"),
              show_default=True, help="Of the passkey.")  # fmt: skip
@click.option("--trials", type=click.IntRange(min=1), default=1, help="Of each needle task [1].")
@click.option(
    "--keys", type=click.IntRange(0, 256), default=5, help="Of the multikey task, or 0 [5]."
)
@click.option(
    "--values", type=click.IntRange(0, 256), default=4, help="Of the multivalue task, or 0 [4]."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the hidden numbers [0].")
@click.option("--tasks", help="Tasks of lm-eval, as hellaswag_local,my_task.")
@click.option(
    "--include-path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the tasks' YAML files.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Samples of each task [all].")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of transformers' models.",
)
@click.option("--device", default="cpu", show_default=True, help="Of transformers' models.")
@click.option("--threads", type=click.IntRange(min=1), help="Of the runtimes.")
@click.option("--build", is_flag=True, help="Build llama.cpp first where it is missing.")
@click.option("-o", "--output", type=OUTPUT_PATH, required=True, help="Results to write, JSON.")
@force_option
@json_option
def command(
    paths: tuple[str, ...],
    texts: tuple[Path, ...],
    factors: tuple[Path, ...],
    lengths: tuple[int, ...],
    stride: int | None,
    tokens: int | None,
    perplexity: bool,
    passkey: bool,
    needle: bool,
    depths: tuple[float, ...],
    trials: int,
    keys: int,
    values: int,
    seed: int,
    tasks: str | None,
    include_path: Path | None,
    limit: int | None,
    dtype: str,
    device: str,
    threads: int | None,
    build: bool,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Measure perplexity, passkeys, needles and tasks, side by side.

    Each MODEL-OR-EXPORT is run as `verify` runs it: a GGUF by the patched llama.cpp, a folder with
    model.onnx by ONNX Runtime, a Hugging Face folder by our live runtime, RUNTIME=PATH or a server's
    address by another. What is finished is kept in a file beside the output, so that the same command
    goes on after an interruption; more models, lengths and tasks may be added. --force begins anew.

    \b
    longrope-export evaluate model/ --factors f.json --text book.txt --lengths 8192,16384 -o r.json
    longrope-export evaluate model.gguf model-onnx/ --text book.txt --passkey --needle -o r.json
    """
    from longrope_export.evaluate.journal import journal_path
    from longrope_export.evaluate.results import is_results, make_results, rich_tables
    from longrope_export.evaluate.run import evaluate, open_journal
    from longrope_export.evaluate.session import Options
    from longrope_export.evaluate.settings import Settings
    from longrope_export.evaluate.subjects import check_lengths, make_subjects
    from longrope_export.outputs import check_output, check_outside, write_text
    from longrope_export.runtimes.open import parse_export

    # those that a journal holds on to (--stride, --keys, --values, --seed) may be given before
    refuse_unused(
        (
            (("limit", "include_path"), "--tasks", bool(tasks)),
            (("depths",), "--passkey", passkey),
            (("trials",), "--passkey or --needle", passkey or needle),
        )
    )
    settings = Settings(
        lengths=tuple(sorted(set(lengths))),
        perplexity=perplexity and bool(texts or not tasks),
        passkey=passkey,
        needle=needle,
        stride=stride,
        tokens=tokens,
        depths=tuple(sorted(set(depths))),
        trials=trials,
        num_keys=keys,
        num_values=values,
        seed=seed,
        tasks=tuple(filter(None, (tasks or "").split(","))),
    )
    exports = [parse_export(path) for path in paths]
    local = [export.path for export in exports if isinstance(export.path, Path)]
    for model in local:
        check_outside(output, model)  # a new file in it would make it another model
    inputs = with_contents([*texts, *factors, *local])
    check_output(output, inputs, force=force or is_results(output))
    check_output(journal_path(output), inputs, force=True)
    documents = _read_texts(texts)
    subjects = make_subjects(exports, factors, dtype=dtype, device=device)
    check_lengths(subjects, settings.lengths[-1])
    for subject in subjects:
        if subject.note:
            say(f"{subject.label} {subject.note}")
    options = Options(threads, build, include_path, limit)
    with (
        open_journal(journal_path(output), settings, documents, fresh=force) as journal,
        share_progress() as step,
    ):
        measured = evaluate(subjects, documents, settings, journal, options=options, say=step)
    results = make_results(subjects, documents, settings, measured)
    write_text(output, json.dumps(results, indent=1) + "\n")
    if as_json:
        print_json(results)
        return
    from rich.console import Console

    Console().print(*rich_tables(results))


def _read_texts(paths: tuple[Path, ...]) -> list[Text]:
    """Documents, each by the name of its file, or its path where two are alike."""
    from longrope_export.evaluate.settings import Text

    names = [path.name for path in paths]
    found = []
    for path in dict.fromkeys(paths):
        content = read_utf8(path, "--text")
        found.append(Text(path.name if names.count(path.name) == 1 else str(path), content))
    return found
