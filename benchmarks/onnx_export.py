"""`longrope-export onnx` against onnxruntime-genai's own builder: export and speed.

    python benchmarks/onnx_export.py --model smollm2-folder/ --workdir /scratch/bench

Exports are whole commands, in turn, compared by the median. Speed is CPU time of one thread in plain
ONNX Runtime, all models in turn in one process, best of the rounds: CPU time is what a shared machine
leaves comparable.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.factor_files import write_factors
from longrope_export.models.model import Model, load_model

PREFILL, CAPACITY = 512, 4096
LONG = 131072


def factors(model: Model, lengths: list[int]) -> LongRopeConfig:
    """Tiers of any factors: only their number and size matter here."""
    native = model.native
    tiers = tuple(
        FactorTier(length, (1.0 + index,) * native.num_pairs)
        for index, length in enumerate(lengths)
    )
    return replace(
        native, max_position_embeddings=lengths[-1], tiers=tiers, switch=SwitchPolicy.SEQUENCE
    )


def run(command: list[str]) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak MiB of a command."""
    os.sync()
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return {
        "wall": time.monotonic() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
        "mib": usage.ru_maxrss / 1024,
    }


def exports(model: Path, work: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    source = load_model(model)
    write_factors(factors(source, [LONG]), work / "one.json")
    write_factors(factors(source, [source.window, LONG]), work / "two.json")
    ours = [sys.executable, "-m", "longrope_export", "-q", "onnx", str(model), "--force"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model)]
    builder += ["-e", "cpu", "-c", str(work / "cache")]
    one = ["--factors", str(work / "one.json")]
    commands = {
        "ours fp32": [*ours, *one, "-o", str(work / "ours-fp32")],
        "builder fp32": [*builder, "-p", "fp32", "-o", str(work / "builder-fp32")],
        "ours int4": [*ours, *one, "-o", str(work / "ours-int4"), "--precision", "int4"],
        "builder int4": [*builder, "-p", "int4", "-o", str(work / "builder-int4")],
    }
    four = [*commands["ours int4"], "--embedding-bits", "4"]
    commands["ours int4 all"] = [*four, "-o", str(work / "ours-int4-all")]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(work / name.replace(" ", "-"), ignore_errors=True)
            results[name].append(run(command))
    run([*ours, "--factors", str(work / "two.json"), "-o", str(work / "two-tiers-fp32")])
    return results


class Runner:
    """A session with caches of a fixed capacity, which both kinds of model write in place."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        shape = (1, decoder["num_key_value_heads"], CAPACITY, decoder["head_size"])
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.caches = {
            value.name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for value in self.session.get_inputs()
            if value.name.startswith("past")
        }

    def call(self, tokens: np.ndarray[Any, Any], start: int) -> float:
        """CPU seconds of one call."""
        total = start + len(tokens)
        binding = self.session.io_binding()
        feeds = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(start, total)[None],
        }
        for name in self.inputs & feeds.keys():
            binding.bind_cpu_input(name, feeds[name])
        binding.bind_output("logits")
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        before = time.thread_time()
        self.session.run_with_iobinding(binding)
        return time.thread_time() - before


def speeds(work: Path, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per CPU second, prefill and decode behind it."""
    runners = {name: Runner(work / name.replace(" ", "-")) for name in names}
    tokens = np.arange(PREFILL, dtype=np.int64) % 4000 + 5
    prefill: dict[str, list[float]] = {name: [] for name in names}
    decode: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, runner in runners.items():
            prefill[name].append(runner.call(tokens, 0))
        for step in range(12):
            for name, runner in runners.items():
                decode[name].append(runner.call(tokens[:1], PREFILL + step))
    return {
        name: {"prefill": PREFILL / min(prefill[name]), "decode": 1 / min(decode[name])}
        for name in names
    }


def table(results: dict[str, Any], columns: dict[str, Callable[[Any], float]]) -> None:
    print(f"{'':16}" + "".join(f"{column:>12}" for column in columns))
    for name, values in results.items():
        print(f"{name:16}" + "".join(f"{get(values):12.2f}" for get in columns.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--workdir", type=Path, help="some GB of space [a temporary folder]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every measurement")
    options = parser.parse_args()
    work = options.workdir or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    exported = exports(options.model, work, options.rounds)

    def median(key: str) -> Callable[[list[dict[str, float]]], float]:
        return lambda runs: statistics.median(run[key] for run in runs)

    table(exported, {"wall s": median("wall"), "CPU s": median("cpu"), "MiB": median("mib")})
    names = [
        "builder fp32",
        "ours fp32",
        "two-tiers fp32",
        "builder int4",
        "ours int4 all",
        "ours int4",
    ]
    speed = speeds(work, names, options.rounds)
    print("\ntokens per CPU second")
    table(speed, {key: lambda row, key=key: row[key] for key in ("prefill", "decode")})  # type: ignore[misc]
    if options.json:
        options.json.write_text(json.dumps({"exports": exported, "speeds": speed}, indent=1))


if __name__ == "__main__":
    main()
