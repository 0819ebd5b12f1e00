"""Write docs/evaluation.md and its plots: SmolLM2 beyond its window, variant by variant.

    python scripts/measure_smollm2.py --lengths 8192 --variants none,yarn
    python scripts/measure_smollm2.py --lengths 8192,16384,32768 --trials 3
    python scripts/measure_smollm2.py --lengths 32768 --variants searched=run/factors.json

Fetches SmolLM2 where it is missing. One length and variant after the other, in any order, in as many
runs and on as many machines as one likes: what is finished is kept in --records, and the table holds all of it. Before
each part stands what it will roughly take; a pass over 32768 tokens costs some 15 minutes of two old cores. What
two variants compute alike (a ladder below its first border, and the model as trained) is run once.
The block `evaluation` of README.md gets the same table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

from longrope_converters.to_safetensors.convert import SafetensorsConverter, SafetensorsOptions
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.definition import dump_factors
from longrope_export.demo.material import fetch_smollm2, write_help_text
from longrope_export.evaluate.journal import Journal
from longrope_export.evaluate.results import lengths_of, make_results, markdown_table, tables
from longrope_export.evaluate.run import evaluate, open_journal
from longrope_export.evaluate.session import Options
from longrope_export.evaluate.settings import PERPLEXITY, Cell, Settings, Text, make_cells
from longrope_export.evaluate.subjects import Subject, make_subjects
from longrope_export.factor_files import read_factors
from longrope_export.ladder import make_config
from longrope_export.llama_cpp.cache import cache_folder
from longrope_export.models.model import Model, load_model
from longrope_export.outputs import write_text
from longrope_export.report.drawing import Plot, save_plots
from longrope_export.report.figures import by_length, by_position
from longrope_export.runtimes.open import parse_export
from scripts.readme import write_block
from scripts.twins import take_twins

ROOT = Path(__file__).parent.parent
BLOCK = "evaluation"  # of README.md
RECORDS = ROOT / "docs" / "measured"
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
Every cell stands in [measured/](measured/).

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
            found.append(replace(plain, label=label, definition=config, bounded=True, note=None))
    return found


def earlier_variants(journal: Journal, records: Path) -> list[str]:
    """`name=f.json` of the variants of one's own that earlier runs have measured."""
    measured = dict.fromkeys(cell.model for cell in journal.cells())
    files = {
        label: records / f"{label}.json" for label in measured if label not in VARIANTS.values()
    }
    return [f"{label}={file}" for label, file in files.items() if file.is_file()]


def finished(
    journal: Journal, subjects: Sequence[Subject], texts: Sequence[Text], tokens: int
) -> list[tuple[Cell, Any]]:
    """Every cell of any run so far, of these texts at this number of tokens, by variant and length."""
    known = {subject.label: place for place, subject in enumerate(subjects)}
    names = [text.name for text in texts]
    cells = [
        cell
        for cell in journal.cells()
        if cell.model in known and cell.text in names and cell.num_tokens in (None, tokens)
    ]
    cells.sort(key=lambda cell: (known[cell.model], cell.length, cell.task, cell.trial or 0))
    return [(cell, journal.find(cell, subjects[known[cell.model]].identity)) for cell in cells]


def estimate(cell: Cell, measured: Sequence[tuple[Cell, Any]]) -> float:
    """Seconds that a cell will roughly take.

    By the passes of this length that were measured, else by those of two old cores: 100 seconds for
    8192 tokens, 930 for 32768.
    """
    seconds = [
        r["seconds"] / _passes(other) for other, r in measured if other.length == cell.length
    ]
    x = cell.length / 8192
    one = sum(seconds) / len(seconds) if seconds else 56 * x + 44 * x * x
    return one * _passes(cell)


def _passes(cell: Cell) -> int:
    return -(-(cell.num_tokens or cell.length) // cell.length) if cell.task == PERPLEXITY else 1


def measure(
    subjects: Sequence[Subject],
    everything: Sequence[Subject],
    texts: Sequence[Text],
    settings: Settings,
    journal: Journal,
    *,
    twins: bool = True,
    options: Options | None = None,
) -> None:
    """Run what is missing, variant by variant and length by length.

    Args:
        everything: variants that may have been measured before, `subjects` among them.
        twins: take what another variant has computed alike.

    Raises:
        LongRopeError: as evaluate.
    """
    tokens = settings.num_tokens
    for subject in subjects:
        for length in settings.lengths:
            part = replace(settings, lengths=(length,), tokens=tokens)
            cells = make_cells(part, [subject.label], texts)
            if twins:
                for cell, label in take_twins(journal, subject, everything, cells):
                    CONSOLE.print(f"{cell}: as {label}", highlight=False)
            known = finished(journal, everything, texts, tokens)
            say = _announcer({str(cell): estimate(cell, known) for cell in cells})
            evaluate([subject], texts, part, journal, options=options, say=say)


def _announcer(seconds: dict[str, float]) -> Callable[[str, float], None]:
    def say(what: str, share: float) -> None:
        if what in seconds:
            CONSOLE.print(f"{what}: about {seconds.pop(what) / 60:.1f} minutes", highlight=False)

    return say


def describe_own(model: dict[str, Any]) -> str:
    """A paragraph on a variant of one's own; nothing on the others."""
    label, config = model["label"], model["config"]
    if label in VARIANTS.values():
        return ""
    came = config["provenance"]
    named = {"method": "by", "ladder": "ladder", "search_documents": "found on"}
    words = [f"{word} {_listed(came[key])}" for key, word in named.items() if key in came]
    tiers = f"{len(config['tiers'])} tiers, rule {config['switch']}"
    return f"`{label}` ([factors](measured/{label}.json)): {', '.join([tiers, *words])}.\n\n"


def _listed(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def write_documents(
    results: dict[str, Any], tokens: int, *, dtype: str = "float32", root: Path = ROOT
) -> None:
    """docs/evaluation.md with its plots, and the block of the README."""
    shown = [table for table in tables(results) if table.title != "Speed and memory"]
    parts = []
    for table in shown:
        parts += [f"**{table.title}**, at lengths in tokens", "", markdown_table(table)]
    text = "\n".join(parts)
    names = ", ".join(t["name"] for t in results["texts"])
    computed = "" if dtype == "float32" else f" Computed in {dtype}."
    words = (
        f"Text: {names}, its first {tokens:,} tokens in windows side by side; the hidden numbers "
        f"stand in the same text, too few for differences of one or two to mean much.{computed} {results['platform']}, {results['created'][:10]}.\n"
    )
    longest = max(lengths_of(results, PERPLEXITY))
    draw = {"evaluation": by_length, "evaluation-positions": partial(by_position, length=longest)}
    plots = [
        Plot(name, "perplexity", "", partial(figure, results)) for name, figure in draw.items()
    ]
    save_plots(plots, root / "docs")
    for name in draw:
        (root / "docs" / f"{name}.svg").unlink()
    own = "".join(describe_own(model) for model in results["models"])
    plot = "![Perplexity by window length]"
    positions = (
        f"![Perplexity by position in a window of {longest:,} tokens](evaluation-positions.png)"
    )
    page = f"{HEAD}{own}{text}\n{words}\n{plot}(evaluation.png)\n\n{positions}\n"
    write_text(root / "docs" / "evaluation.md", page)
    write_block(BLOCK, f"{text}\n{plot}(docs/evaluation.png)", root / "README.md")


def prepare(work: Path, text: Path | None) -> tuple[Path, Text]:
    """The model as a folder in float32, fetched where it is missing, and the text."""
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "smollm2"
    if not folder.exists():
        source = load_model(fetch_smollm2(CONSOLE.print))
        options = SafetensorsOptions(dtype="f32")
        SafetensorsConverter(options).convert(source, None, folder, lambda _: None)
    if text is not None:
        return folder, Text(text.name, text.read_text(encoding="utf-8"))
    write_help_text(work / "help.txt")
    return folder, Text("Python's help topics", (work / "help.txt").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", default="8192,16384,32768", help="run now")
    parser.add_argument("--variants", help=f"run now: {', '.join(VARIANTS)}, NAME=f.json, NAME of earlier [all of them]")  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=TARGET, help="of the text, read at every length"
    )
    parser.add_argument("--text", type=Path, help="UTF-8 [Python's help topics]")
    parser.add_argument("--trials", type=int, default=1, help="of the multi-key passkey")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--work", type=Path, default=cache_folder() / "measure-smollm2", help="for the model"
    )
    parser.add_argument(
        "--records", type=Path, default=RECORDS, help="cells, and variants of one's own"
    )
    parser.add_argument(
        "--no-twins", action="store_true", help="run everything, even what is computed alike"
    )
    parser.add_argument("--no-write", action="store_true", help="leave docs/ and README.md alone")
    arguments = parser.parse_args()
    work: Path = arguments.work
    records: Path = arguments.records
    records.mkdir(parents=True, exist_ok=True)
    stored = {path.stem: path for path in sorted(records.glob("*.json"))}
    if arguments.variants is None:
        arguments.variants = ",".join([*VARIANTS, *stored])
    chosen = [
        f"{name}={stored[name]}" if name in stored else name
        for name in arguments.variants.split(",")
        if name
    ]
    for name in chosen:
        label, given, _ = name.partition("=")
        taken = label in (*VARIANTS, *VARIANTS.values())
        if taken if given else label not in VARIANTS:
            known = ", ".join([*VARIANTS, *stored])
            parser.error(f"variant {name}: expected one of {known}, or NEW-NAME=f.json")
    own = [name for name in chosen if "=" in name]

    folder, text = prepare(work, arguments.text)
    texts = [text]

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

    with open_journal(records / "smollm2.cells.jsonl", settings, texts) as journal:
        given = [name.partition("=")[0] for name in own]
        earlier = [
            n for n in earlier_variants(journal, records) if n.partition("=")[0] not in given
        ]
        everything = subjects_of([*VARIANTS, *earlier, *own])
        finished(journal, everything, texts, settings.num_tokens)  # says what is not what it was
        for subject in everything:
            if subject.label in given and subject.definition is not None:
                write_text(records / f"{subject.label}.json", dump_factors(subject.definition))
        labels = [VARIANTS.get(name, name.partition("=")[0]) for name in chosen]
        now = [subject for label in labels for subject in everything if subject.label == label]
        measure(
            now,
            everything,
            texts,
            settings,
            journal,
            twins=not arguments.no_twins,
            options=Options(arguments.threads),
        )
        measured = finished(journal, everything, texts, arguments.tokens)
    used = [s for s in everything if any(cell.model == s.label for cell, _ in measured)]
    results = make_results(used, texts, settings, measured)
    for table in tables(results):
        print(f"\n{table.title}\n\n{markdown_table(table)}", end="")
    if not arguments.no_write:
        write_documents(results, arguments.tokens, dtype=arguments.dtype)


if __name__ == "__main__":
    main()
