"""The patched llama.cpp beside the stock one: speed without keys, with keys, and what a tier border costs.

    python benchmarks/llama_cpp.py [--repeats 5] [--long 32768]

Runs SmolLM2 (fetched through pip) in both builds of the pinned source, in turns, and prints medians
as ratios. Both builds are made in the cache if they are not there (minutes).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_export.demo.material import fetch_smollm2
from longrope_export.ladder import MethodOptions, make_config
from longrope_export.llama_cpp.binaries import require_binaries
from longrope_export.llama_cpp.options import BuildOptions, cpp_folder
from longrope_export.llama_cpp.source import fetch_source
from longrope_export.models.model import load_model

LIBRARIES = ("llama", "ggml", "ggml-base")


class Driver:
    """cpp_patch/tests/longrope-driver.cpp over the libraries of either build."""

    def __init__(self, scratch: Path) -> None:
        programs = ("llama-completion",)
        self.patched = require_binaries(programs, build=True)
        self.stock = require_binaries(programs, BuildOptions(patched=False), build=True)
        self.program = scratch / "driver"
        source = fetch_source()
        code = cpp_folder() / "cpp_patch" / "tests" / "longrope-driver.cpp"
        command = ["c++", "-std=c++17", "-O1", "-o", self.program, code]
        command += [f"-I{source / 'include'}", f"-I{source / 'ggml' / 'include'}"]
        command += [f"-L{self.patched}", *(f"-l{name}" for name in LIBRARIES), "-ldl"]
        subprocess.run([*map(str, command), f"-Wl,-rpath-link,{self.patched}"], check=True)

    def times(self, folder: Path, model: Path, script: Iterable[str]) -> list[float]:
        """Seconds of each decode."""
        result = subprocess.run(
            [self.program, model, "/dev/null"],
            input="\n".join(script) + "\n",
            env={"LD_LIBRARY_PATH": str(folder)},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = (line.split() for line in result.stdout.splitlines())
        return [int(words[1]) / 1e6 for words in lines if words[0] == "time"]


def script(prompt: int, steps: int, context: int, batch: int = 512) -> list[str]:
    """A prompt in one batch and single tokens behind it."""
    lines = [f"ctx n_ctx={context} n_batch={context} n_ubatch={batch} type_k=f16 type_v=f16 fa=1"]
    lines += [f"add 0 0 {' '.join(str(7 + i % 1000) for i in range(prompt))}", "run"]
    for i in range(steps):
        lines += [f"add 0 {prompt + i} 11", "run"]
    return lines


def bake(
    model: Path, output: Path, ladder: str | None, start_tokens: int = 0, strength: float = 1.0
) -> Path:
    """YaRN to 32768 tokens by a ladder of tiers."""
    source = load_model(model)
    options = MethodOptions(attention_strength=strength)
    config = make_config(
        source, "yarn", 32768, ladder=ladder, options=options, num_start_tokens=start_tokens
    )
    converter = GgufConverter(GgufOptions())
    converter.check(source, config)
    converter.convert(source, config, output, lambda count: None)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", type=int, default=32768, help="0: without the long prefill")
    arguments = parser.parse_args()
    console = Console()
    model = fetch_smollm2()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        driver = Driver(scratch)
        three = bake(model, scratch / "three.gguf", "8192,16384,32768", 64)
        many = bake(model, scratch / "many.gguf", "every:123")
        count = len(load_model(many).native.tiers)

        table = Table(
            "what", "prefill 512", "decode", title=f"speed, median of {arguments.repeats}"
        )
        runs = {
            "stock": (driver.stock, model),
            "patched, no keys": (driver.patched, model),
            "patched, 3 tiers, 64 start tokens": (driver.patched, three),
            f"patched, {count} tiers": (driver.patched, many),
        }
        prefill: dict[str, list[float]] = {name: [] for name in runs}
        decode: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.repeats):
            for name, (libraries, file) in runs.items():
                seconds = driver.times(libraries, file, script(512, 48, 4096))
                prefill[name].append(seconds[0])
                decode[name].append(statistics.median(seconds[1:]))
        for name in runs:
            ratios = [
                statistics.median(s / own for s, own in zip(all_["stock"], all_[name], strict=True))
                for all_ in (prefill, decode)
            ]
            table.add_row(name, *(f"{ratio:.1%} of stock's speed" for ratio in ratios))
        console.print(table)

        border = Table("what", "seconds", "ratio", title="one tier border, 8192 cached tokens")
        again, steps = [], []
        for _ in range(max(1, arguments.repeats // 2)):
            seconds = driver.times(driver.patched, three, script(8192, 3, 8448))
            again.append(seconds[0])
            steps.append(seconds[1] - statistics.median(seconds[2:]))
        first, rotation = statistics.median(again), statistics.median(steps)
        border.add_row("prefill of 8192 tokens", f"{first:.2f}", "")
        border.add_row("rotation of their keys", f"{rotation:.3f}", f"1/{first / rotation:.0f}")
        console.print(border)

        if arguments.long:
            whole = Table("what", "seconds", "ratio", title=f"prefill of {arguments.long} tokens")
            length = arguments.long
            one = bake(model, scratch / "one.gguf", None)
            names = {"one tier": one, "3 tiers": three, f"{count} tiers": many}
            long = {
                name: driver.times(driver.patched, file, script(length, 0, length))[0]
                for name, file in names.items()
            }
            for name, value in long.items():
                whole.add_row(name, f"{value:.1f}", f"{value / long['one tier'] - 1:+.1%}")
            console.print(whole)


if __name__ == "__main__":
    sys.exit(main())
