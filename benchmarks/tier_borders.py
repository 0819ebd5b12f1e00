"""Perplexity by stretch of a long text on a real model: rule causal, rule sequence, stock llama.cpp.

    python benchmarks/tier_borders.py TEXT.txt [--length 32768] [--json out.json]

SmolLM2 (window 8192, F16 weights) with YaRN factors; every token of one window of the text is scored.
The two builds of the pinned llama.cpp are made in the cache if they are not there. Hours of
processor time at 32768 tokens on a small machine: each line is printed as soon as it is known.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from llama_cpp import BATCH, F16_CACHE, UBATCH, Driver, bake

from longrope_export.demo.material import fetch_smollm2
from longrope_export.llama_cpp.binaries import require_binary


def tokenize(model: Path, text: str, count: int) -> list[int]:
    """The first tokens of a text, by the tokenizer in the GGUF."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    ids: list[int] = tokenizer(text[: 12 * count]).input_ids[:count]
    if len(ids) < count:
        raise SystemExit(f"the text has {len(ids)} tokens, expected {count}")
    return ids


def score(
    driver: Driver,
    folder: Path,
    model: Path,
    ids: list[int],
    rule: str | None,
    scratch: Path,
    threads: int,
) -> list[float]:
    """-ln p of ids[1:], each given all before it."""
    length = len(ids)
    sizes = f"n_ctx={length} n_batch={BATCH} n_ubatch={UBATCH} n_threads={threads}"
    lines = [f"ctx {sizes} {F16_CACHE}"]
    if rule:
        lines += [f"switch {rule}", f"length 0 {length}"]
    for first in range(0, length, BATCH):
        part = ids[first : first + BATCH]
        following = ids[first + BATCH] if first + BATCH < length else 0
        lines += [f"add 0 {first} {' '.join(map(str, part))}", f"score {following}"]
    output = scratch / "scores.bin"
    subprocess.run(
        [driver.program, model, output],
        input="\n".join(lines) + "\n",
        env={"LD_LIBRARY_PATH": str(folder)},
        stdout=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return np.fromfile(output, np.float32)[: length - 1].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    length, window = arguments.length, 8192
    borders = [0, *(b for b in (window, 2 * window, 4 * window) if b < length), length]
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        driver = Driver()
        weights = scratch / "f16.gguf"
        quantize = require_binary("llama-quantize", build=True)
        command = [quantize, "--allow-requantize", fetch_smollm2(), weights, "F16"]
        subprocess.run(command, check=True, capture_output=True)
        ids = tokenize(fetch_smollm2(), arguments.text.read_text(), length)
        three = bake(weights, scratch / "three.gguf", "8192,16384,32768")
        fine = bake(weights, scratch / "fine.gguf", "every:2048", strength=0.6)
        one = bake(weights, scratch / "one.gguf", None)
        variants = {
            "causal, tiers 8k, 16k, 32k": (driver.patched, three, "causal"),
            "sequence (the last tier for all)": (driver.patched, three, "sequence"),
            "stock, the same long factors": (driver.stock, one, None),
            "causal, a tier every 2k, strength 0.6": (driver.patched, fine, "causal"),
        }
        for name, (libraries, model, rule) in variants.items():
            losses = score(driver, libraries, model, ids, rule, scratch, arguments.threads)
            results[name] = losses
            stretches = [
                math.exp(float(np.mean(losses[a : min(b, length - 1)])))
                for a, b in itertools.pairwise(borders)
            ]
            shown = "  ".join(
                f"{a}-{b}: {value:.3f}"
                for a, b, value in zip(borders, borders[1:], stretches, strict=False)
            )
            print(f"{name:40} all: {math.exp(float(np.mean(losses))):.3f}  {shown}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
