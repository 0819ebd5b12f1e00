"""Write docs/evaluation.md and docs/evaluation.png: SmolLM2 beyond its window, variant by variant.

    python scripts/measure_smollm2.py --lengths 8192 --variants none,yarn
    python scripts/measure_smollm2.py --lengths 8192,16384,32768 --trials 3
    python scripts/measure_smollm2.py --lengths 32768 --variants searched=run/factors.json

Fetches SmolLM2 where it is missing. One length and variant after the other, in any order and in as many
runs as one likes: what is finished is kept in --work, and the table holds all of it. Before each part
stands what it will roughly take; a pass over 32768 tokens costs some 15 minutes of two old cores.
The block `evaluation` of README.md, where there is one, gets the same table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

from longrope_converters.to_safetensors.convert import SafetensorsConverter, SafetensorsOptions
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.definition import dump_factors
from longrope_export.demo.material import fetch_smollm2, write_help_text
from longrope_export.evaluate.journal import Journal
from longrope_export.evaluate.results import make_results, markdown_table, tables
from longrope_export.evaluate.run import evaluate, open_journal
from longrope_export.evaluate.session import Options
from longrope_export.evaluate.settings import Cell, Settings, Text
from longrope_export.evaluate.subjects import Subject, make_subjects
from longrope_export.factor_files import read_factors
from longrope_export.ladder import make_config
from longrope_export.llama_cpp.cache import cache_folder
from longrope_export.models.model import Model, load_model
from longrope_export.outputs import write_text
from longrope_export.report.drawing import Plot, save_plots
from longrope_export.report.figures import by_length
from longrope_export.runtimes.open import parse_export
from scripts.readme import has_block, write_block

ROOT = Path(__file__).parent.parent
CONSOLE = Console(stderr=True)
TARGET = 32768
LADDER = "every:4096"
VARIANTS = {
    "none": "as trained",
    "pi": "PI",
    "ntk": "NTK",
    "yarn": "YaRN",
    "causal": "YaRN ladder, causal",
    "sequence": "YaRN ladder, sequence",
}
HEAD = f"""# Measured: SmolLM2 beyond its window

SmolLM2-135M-Instruct (window 8192, Q4_1 weights unpacked to float32), in our live transformers runtime,
without any training. PI, NTK and YaRN are one set of factors for {TARGET:,} tokens each; the ladder has a
tier every 4096 tokens beyond the window, with YaRN for its own length, and stands under both rules at a
border. Written by `scripts/measure_smollm2.py`; `longrope-export evaluate` measures the same on yours.

"""


def make_variant(model: Model, name: str) -> LongRopeConfig | None:
    """Factors of a variant; None for the model as it was trained."""
    if name == "none":
        return None
    if name in ("causal", "sequence"):
        return make_config(model, "yarn", TARGET, ladder=LADDER, switch=SwitchPolicy(name))
    return make_config(model, name, TARGET)


def make_variants(folder: Path, names: Sequence[str]) -> list[Subject]:
    """A subject for each name; `name=f.json` is a variant of one's own."""
    (plain,) = make_subjects([parse_export(str(folder))])
    model = load_model(folder)
    found = []
    for name in names:
        label, given, file = name.partition("=")
        config = read_factors(Path(file), model) if given else make_variant(model, label)
        label = VARIANTS.get(label, label)
        if config is None:
            found.append(replace(plain, label=label))
        else:
            path = folder.parent / f"{name.partition('=')[0]}.json"
            write_text(path, dump_factors(config))
            found.append(replace(plain, label=label, definition=config, bounded=True, note=None))
    return found


def finished(journal: Journal, subjects: Sequence[Subject], tokens: int) -> list[tuple[Cell, Any]]:
    """Every cell of any run so far, at this number of tokens, by variant and length."""
    known = {subject.label: place for place, subject in enumerate(subjects)}
    cells = [
        cell
        for cell in journal.cells()
        if cell.model in known and cell.num_tokens in (None, tokens)
    ]
    cells.sort(key=lambda cell: (known[cell.model], cell.length, cell.task, cell.trial or 0))
    return [(cell, journal.find(cell, subjects[known[cell.model]].identity)) for cell in cells]


def write_documents(results: dict[str, Any], tokens: int) -> None:
    """docs/evaluation.md and .png, and the part of the README, where it has one."""
    shown = [table for table in tables(results) if table.title != "Speed and memory"]
    parts = []
    for table in shown:
        parts += [f"**{table.title}**, at lengths in tokens", "", markdown_table(table)]
    text = "\n".join(parts)
    names = ", ".join(t["name"] for t in results["texts"])
    words = (
        f"Text: {names}, its first {tokens:,} tokens in windows side by side; the hidden numbers "
        f"stand in the same text. {results['platform']}, {results['created'][:10]}.\n"
    )
    plot = "\n![Perplexity by window length](evaluation.png)\n"
    write_text(ROOT / "docs" / "evaluation.md", f"{HEAD}{text}\n{words}{plot}")
    save_plots([Plot("evaluation", "perplexity", "", lambda: by_length(results))], ROOT / "docs")
    (ROOT / "docs" / "evaluation.svg").unlink()
    if has_block("evaluation"):
        write_block("evaluation", text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", default="8192,16384,32768", help="run now")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"run now: {', '.join(VARIANTS)}, NAME=f.json")  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=TARGET, help="of the text, read at every length"
    )
    parser.add_argument("--text", type=Path, help="UTF-8 [Python's help topics]")
    parser.add_argument("--trials", type=int, default=1, help="of the multi-key passkey")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=cache_folder() / "measure-smollm2")
    parser.add_argument("--no-write", action="store_true", help="leave docs/ and README.md alone")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "smollm2"
    if not folder.exists():
        source = load_model(fetch_smollm2(CONSOLE.print))
        options = SafetensorsOptions(dtype="f32")
        SafetensorsConverter(options).convert(source, None, folder, lambda _: None)
    text = arguments.text or work / "help.txt"
    if arguments.text is None:
        write_help_text(text)
    texts = [
        Text("Python's help topics" if arguments.text is None else text.name, text.read_text())
    ]
    chosen = [name for name in arguments.variants.split(",") if name]
    unknown = [name for name in chosen if "=" not in name and name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variant {unknown[0]}")
    own = [name for name in chosen if "=" in name]

    def subjects_of(names: Sequence[str]) -> list[Subject]:
        found = make_variants(folder, names)
        return [replace(s, dtype=arguments.dtype, device=arguments.device) for s in found]

    lengths = tuple(sorted({int(length) for length in arguments.lengths.split(",")}))
    settings = Settings(
        lengths,
        needle=True,
        num_values=0,
        tokens=arguments.tokens,
        trials=arguments.trials,
    )

    def say(what: str, share: float) -> None:
        if what != say.last:  # type: ignore[attr-defined]
            CONSOLE.print(f"{share:4.0%} {what}", highlight=False)
        say.last = what  # type: ignore[attr-defined]

    say.last = ""  # type: ignore[attr-defined]
    everything = subjects_of([*VARIANTS, *own])
    with open_journal(work / "cells.jsonl", settings, texts) as journal:
        evaluate(
            subjects_of(chosen),
            texts,
            settings,
            journal,
            options=Options(arguments.threads),
            say=say,
        )
        measured = finished(journal, everything, arguments.tokens)
    used = [s for s in everything if any(cell.model == s.label for cell, _ in measured)]
    results = make_results(used, texts, settings, measured)
    for table in tables(results):
        print(f"\n{table.title}\n\n{markdown_table(table)}", end="")
    if not arguments.no_write:
        write_documents(results, arguments.tokens)


if __name__ == "__main__":
    main()
