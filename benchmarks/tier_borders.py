"""A long prompt on a real model: perplexity by stretch and seconds, by rule and by number of tiers.

    python benchmarks/tier_borders.py TEXT.txt [--length 32768] [--json out.json]

SmolLM2 (window 8192, F16 weights) with YaRN factors; every token of one window of the text is scored.
The two builds of the pinned llama.cpp are made in the cache if they are not there. The rows take
turns batch by batch, so that a slow minute of the machine is one for all of them: an hour of two
cores at 32768 tokens. A tier border also cuts the prompt into smaller calls, which costs by itself:
rule `sequence` has one tier, and runs in calls as small as those of the finest ladder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from llama_cpp import BATCH, FINE, UBATCH, WINDOW, Driver, bake
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longrope_export.demo.material import fetch_smollm2
from longrope_export.llama_cpp.binaries import require_binary

STOCK = "stock, the same long factors"


def tokenize(model: Path, text: str, count: int) -> list[int]:
    """The first tokens of a text, by the tokenizer in the GGUF."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    ids: list[int] = tokenizer(text[: 12 * count]).input_ids[:count]
    if len(ids) < count:
        raise SystemExit(f"the text has {len(ids)} tokens, expected {count}")
    return ids


def measure(
    ids: list[int], threads: int, scratch: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By row: -ln p of ids[1:], each given all before it; and the seconds of each batch."""
    length = len(ids)
    driver = Driver()
    weights = scratch / "f16.gguf"
    quantize = require_binary("llama-quantize", build=True)
    command = [quantize, "--allow-requantize", fetch_smollm2(), weights, "F16"]
    subprocess.run(command, check=True, capture_output=True)
    three = bake(weights, scratch / "three.gguf", "8192,16384,32768")
    fine = bake(weights, scratch / "fine.gguf", f"every:{FINE}", strength=0.6)
    one = bake(weights, scratch / "one.gguf", None)
    rows = {
        STOCK: (driver.stock, one, None, UBATCH),
        "causal, tiers 8k, 16k, 32k": (driver.patched, three, "causal", UBATCH),
        f"sequence, {FINE} tokens a call": (driver.patched, three, "sequence", FINE),
        f"causal, a tier every {FINE}, strength 0.6": (driver.patched, fine, "causal", UBATCH),
    }
    sessions, outputs = {}, {}
    for i, (name, (libraries, model, rule, ubatch)) in enumerate(rows.items()):
        outputs[name] = scratch / f"scores-{i}.bin"
        sessions[name] = driver.start(libraries, model, length, threads, ubatch, outputs[name])
        if rule:
            sessions[name].use(rule, length)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for first in track(range(0, length, BATCH), "batches", console=Console(stderr=True)):
        part = ids[first : first + BATCH]
        following = ids[first + BATCH] if first + BATCH < length else 0
        for name, session in sessions.items():
            seconds[name].append(session.score(first, part, following))
    for session in sessions.values():
        session.close()
    losses = {name: np.fromfile(path, np.float32)[: length - 1] for name, path in outputs.items()}
    return {name: values.tolist() for name, values in losses.items()}, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    length = arguments.length
    ids = tokenize(fetch_smollm2(), arguments.text.read_text(), length)
    with tempfile.TemporaryDirectory() as folder:
        losses, seconds = measure(ids, arguments.threads, Path(folder))

    borders = [0, *(b for b in (WINDOW, 2 * WINDOW) if b < length), length]
    stretches = list(itertools.pairwise(borders))
    columns = [f"{a}-{b}" for a, b in stretches]
    title = f"{length} tokens of {arguments.text.stem}: perplexity by stretch, seconds"
    table = Table("what", *columns, "all", "seconds", "to stock", title=title)
    for name, values in losses.items():
        figures = [float(np.exp(np.mean(values[a:b]))) for a, b in [*stretches, (0, length)]]
        more = sum(seconds[name]) / sum(seconds[STOCK]) - 1
        shown = [*(f"{v:.3f}" for v in figures), f"{sum(seconds[name]):.1f}", f"{more:+.1%}"]
        table.add_row(name, *shown)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"losses": losses, "seconds": seconds}))


if __name__ == "__main__":
    main()
