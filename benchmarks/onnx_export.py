"""`longrope-export onnx` against onnxruntime-genai's own builder and torch.onnx.export.

    python benchmarks/onnx_export.py --model smollm2-folder/ --workdir /scratch/bench

Exports are whole commands, in turn, compared by the median. Speed is measured in plain ONNX Runtime on
one thread: the models of a group are loaded together and take turns, call by call, in an order that
rotates. What is printed is the median over the turns of the ratio within a turn, so that a machine that
slows down for a while slows both. The builder's model is loaded twice: what its second instance
differs from the first is the noise.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.factor_files import write_factors
from longrope_export.models.model import Model, load_model

LONG = 131072
Measurements = dict[str, float]
# what is compared: row -> folder, the first of a group being what the others are held against
GROUPS = {
    "fp32": {
        "builder": "builder-fp32",
        "builder again": "builder-fp32",
        "ours, one tier": "ours-fp32",
        "ours, two tiers": "two-tiers-fp32",
    },
    "int4": {
        "builder": "builder-int4",
        "builder again": "builder-int4",
        "ours, 4-bit embedding": "ours-int4-all",
        "ours": "ours-int4",
    },
    f"choice of the tier, {LONG} rows": {
        "one tier": "ours-fp32",
        "one tier again": "ours-fp32",
        "two tiers": "two-tiers-fp32",
    },
}


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


class CommandError(Exception):
    """The last line that a command said."""


def run(command: list[str]) -> Measurements:
    """Wall seconds, CPU seconds and peak MiB of a command.

    Raises:
        CommandError: it ended with an error.
    """
    os.sync()
    with tempfile.TemporaryFile() as said:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise CommandError(lines[-1] if lines else f"exit status {process.returncode}")
    return {
        "wall": time.monotonic() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
        "mib": usage.ru_maxrss / 1024,
    }


def exports(model: Path, work: Path, rounds: int) -> dict[str, list[Measurements] | str]:
    """Every export `rounds` times in turn; a reason in place of measurements where one fails."""
    source = load_model(model)
    write_factors(factors(source, [LONG]), work / "one.json")
    write_factors(factors(source, [source.window, LONG]), work / "two.json")
    ours = [sys.executable, "-m", "longrope_export", "-q", "onnx", str(model), "--force"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model)]
    builder += ["-e", "cpu", "-c", str(work / "cache")]
    torch = [sys.executable, str(Path(__file__).with_name("torch_onnx_export.py")), str(model)]
    one = ["--factors", str(work / "one.json")]
    two = ["--factors", str(work / "two.json")]
    int4 = [*ours, *one, "--precision", "int4"]
    commands = {
        "ours-fp32": [*ours, *one, "-o"],
        "builder-fp32": [*builder, "-p", "fp32", "-o"],
        "torch-fp32": torch,
        "ours-int4": [*int4, "-o"],
        "ours-int4-all": [*int4, "--embedding-bits", "4", "-o"],
        "builder-int4": [*builder, "-p", "int4", "-o"],
    }
    results: dict[str, list[Measurements] | str] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            runs = results[name]
            if isinstance(runs, str):
                continue
            shutil.rmtree(work / name, ignore_errors=True)
            try:
                runs.append(run([*command, str(work / name)]))
            except CommandError as reason:
                results[name] = str(reason)
    run([*ours, *two, "-o", str(work / "two-tiers-fp32")])
    return results


class Runner:
    """A session with caches of a fixed capacity, which every kind of model here writes in place."""

    def __init__(self, folder: Path, capacity: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        shape = (1, decoder["num_key_value_heads"], capacity, decoder["head_size"])
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.caches = {
            value.name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for value in self.session.get_inputs()
            if value.name.startswith("past")
        }

    def call(self, tokens: np.ndarray[Any, Any], start: int) -> Measurements:
        """CPU and wall seconds of one call."""
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
        cpu, wall = time.thread_time(), time.perf_counter()
        self.session.run_with_iobinding(binding)
        return {"cpu": time.thread_time() - cpu, "wall": time.perf_counter() - wall}


def take_turns(
    runners: dict[str, Runner], tokens: np.ndarray[Any, Any], starts: list[int]
) -> dict[str, list[Measurements]]:
    """One call of every model at each of `starts`, behind what they have cached, the first in front
    being another one each time."""
    names = list(runners)
    measured: dict[str, list[Measurements]] = {name: [] for name in names}
    for turn, start in enumerate(starts):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(runners[name].call(tokens, start))
    return measured


def speeds(
    folders: dict[str, Path], prompt: int, prefills: int, steps: int
) -> dict[str, dict[str, list[Measurements]]]:
    """Prefills of `prompt` tokens, and decode steps behind the last one."""
    runners = {name: Runner(folder, prompt + steps + 1) for name, folder in folders.items()}
    tokens = np.arange(prompt, dtype=np.int64) % 200 + 5
    take_turns(runners, tokens, [0])  # warm up
    prefill = take_turns(runners, tokens, [0] * prefills)
    take_turns(runners, tokens[:1], [prompt])
    decode = take_turns(runners, tokens[:1], [prompt + 1 + step for step in range(steps - 1)])
    return {"prefill": prefill, "decode": decode}


def print_exports(results: dict[str, list[Measurements] | str]) -> None:
    keys = {"wall": "wall s", "cpu": "CPU s", "mib": "peak MiB"}
    print(f"{'export':24}" + "".join(f"{title:>12}" for title in keys.values()))
    for name, runs in results.items():
        if isinstance(runs, str):
            print(f"{name:24}  failed: {runs}")
            continue
        medians = (statistics.median(run[key] for run in runs) for key in keys)
        print(f"{name:24}" + "".join(f"{value:12.2f}" for value in medians))


def print_speeds(title: str, measured: dict[str, dict[str, list[Measurements]]]) -> None:
    """Speed of each model as a part of the first one's, and milliseconds of a decode step."""
    columns = [(phase, clock) for phase in ("prefill", "decode") for clock in ("cpu", "wall")]
    print(f"\n{title + ': speed of the first':52}", end="")
    print("".join(f"{f'{phase} {clock}':>14}" for phase, clock in columns) + f"{'ms/step':>12}")
    reference = next(iter(measured["decode"]))
    for name in measured["decode"]:
        cells = []
        for phase, clock in columns:
            pairs = zip(measured[phase][reference], measured[phase][name], strict=True)
            cells.append(statistics.median(first[clock] / own[clock] for first, own in pairs))
        step = 1000 * statistics.median(own["cpu"] for own in measured["decode"][name])
        print(f"{name:52}" + "".join(f"{cell:14.1%}" for cell in cells) + f"{step:12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--workdir", type=Path, help="some GB of space [a temporary folder]")
    parser.add_argument("--rounds", type=int, default=3, help="of the exports; 0: those in workdir")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill")
    parser.add_argument("--prefills", type=int, default=8, help="turns")
    parser.add_argument("--steps", type=int, default=100, help="turns of decoding")
    parser.add_argument("--json", type=Path, help="write every measurement")
    options = parser.parse_args()
    work = options.workdir or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    every: dict[str, Any] = {}
    if options.rounds:
        every["exports"] = exports(options.model, work, options.rounds)
        print_exports(every["exports"])
    for title, group in GROUPS.items():
        folders = {name: work / folder for name, folder in group.items()}
        every[title] = speeds(folders, options.prompt, options.prefills, options.steps)
        print_speeds(title, every[title])
    if options.json:
        options.json.write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
