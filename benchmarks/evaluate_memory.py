"""Peak memory of `evaluate` against the window length: a straight line is expected.

    python benchmarks/evaluate_memory.py                       # a toy of 4 layers, up to 65536 tokens
    python benchmarks/evaluate_memory.py --model smollm2/ --factors f.json --lengths 1024,2048,4096
    python benchmarks/evaluate_memory.py --model model.gguf --lengths 4096,8192,16384

Every length is a process of its own, which reads one window of the text. Printed are its peak, the
line through the two longest lengths, and how far the others lie from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.demo.material import write_help_text
from longrope_export.evaluate.results import cells_of, read_results

VOCABULARY = 49152  # a row of logits of SmolLM2: all rows of 65536 tokens would take 12 GiB


def make_toy(folder: Path) -> None:
    """Random weights, a byte-level tokenizer, and a vocabulary of the size of SmolLM2's."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: place for place, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def bake(model: str, factors: Path, folder: Path) -> None:
    """The model with its factors: evaluate's own --factors would measure it without them, too."""
    command = [sys.executable, "-m", "longrope_export", "-q", "safetensors", model]
    command += ["--factors", str(factors), "--remote-code", "--link", "-o", str(folder)]
    subprocess.run(command, check=True)


def measure(arguments: argparse.Namespace, model: str, text: Path, length: int) -> dict[str, Any]:
    """The cell of one length."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "r.json"
        command = [sys.executable, "-m", "longrope_export", "-q", "evaluate", model]
        command += ["--text", str(text), "--lengths", str(length), "-o", str(output)]
        if arguments.threads:
            command += ["--threads", str(arguments.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads or 2)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        (cell,) = cells_of(read_results(output), "perplexity")
        return cell


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="as evaluate takes it [a toy that is made]")
    parser.add_argument("--factors", type=Path)
    parser.add_argument("--text", type=Path, help="UTF-8 [Python's help topics]")
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = arguments.text or Path(folder) / "help.txt"
        if arguments.text is None:
            write_help_text(text)
        model = arguments.model
        if model is None:
            model = str(Path(folder) / "toy")
            make_toy(Path(model))
            text = Path(folder) / "short.txt"  # to it a byte is a token, and all of a text is cut
            write_help_text(text)
            text.write_text(text.read_text(encoding="utf-8")[: max(lengths)], encoding="utf-8")
        if arguments.factors:
            bake(model, arguments.factors, Path(folder) / "baked")
            model = str(Path(folder) / "baked")
        for length in lengths:
            cell = measure(arguments, model, text, length)
            row = (length, cell["peak_memory_bytes"] / (1 << 20), cell["tokens_per_second"])
            rows.append(row)
            print(f"{length:8} tokens {row[1]:9.0f} MiB {row[2]:9.0f} tokens/s", flush=True)
    if len(rows) > 1:
        x, y = np.asarray(rows)[:, 0], np.asarray(rows)[:, 1]
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
        apart = np.abs(y - (y[-1] + slope * (x - x[-1]))).max()
        print(f"{1024 * slope:.2f} MiB for 1024 tokens; at most {apart:.0f} MiB off the line")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
