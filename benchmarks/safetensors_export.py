"""Measure `longrope_export safetensors` on a synthetic Llama: links, copies against cp, a GGUF.

Whole command lines run in turn; medians, ratios and peak memory are printed.

    python benchmarks/safetensors_export.py --workdir /scratch/bench \\
        --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf

It needs 13 GB of disk at full size; `--size 0.01` is a smoke test. A copy of ours is not done before
it is on the disk (fsync), cp's is: hence the row with cp and sync.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gguf_export import Command, Measurement, measure, ours
from rich.console import Console
from rich.table import Table


def prepare(folder: Path, size: float, smollm2: Path) -> None:
    """The checkpoint, factors for it, and a q8_0 GGUF of it; kept for the next run."""
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "tokenizer_config.json").is_file():
        # on its own: what this process has loaded would count as the peak of its children
        script = Path(__file__).with_name("synthetic_llama.py")
        words = (str(checkpoint), str(smollm2), "--size", str(size))
        subprocess.run((sys.executable, str(script), *words), check=True)
    factors = (
        "factors",
        "yarn",
        checkpoint,
        "--target-length",
        32768,
        "-f",
        "-o",
        folder / "f.json",
    )
    subprocess.run(ours(*factors), check=True)
    if not (folder / "q8_0.gguf").is_file():
        words = ("gguf", checkpoint, "--outtype", "q8_0", "-o", folder / "q8_0.gguf")
        subprocess.run(ours(*words), check=True)


def commands(folder: Path) -> list[Command]:
    source, output, copy = folder / "checkpoint", folder / "output", folder / "copy"

    def clean() -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)

    export = ("safetensors", source, "--factors", folder / "f.json", "-o", output)
    dequantize = ("safetensors", folder / "q8_0.gguf", "--dtype", "bf16", "-o", output)
    cp = ("cp", "-r", str(source), str(copy))
    sync = ("sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(source), str(copy))
    return [
        Command("cp -r", cp, clean),
        Command("cp -r and sync", sync, clean),
        Command("ours, copied", ours(*export), clean),
        Command("ours, linked", ours(*export, "--link"), clean),
        Command("ours, q8_0 GGUF to bf16", ours(*dequantize), clean),
    ]


def show(results: dict[str, Measurement], console: Console) -> None:
    table = Table(title="median of whole commands", title_justify="left")
    for column in ("", "s", "/ cp", "/ (cp and sync)", "peak MiB"):
        table.add_column(column, justify="right" if column else "left")
    cp, synced = results["cp -r"].median, results["cp -r and sync"].median
    for name, result in results.items():
        median = result.median
        ratios = (f"{median / cp:.2f}", f"{median / synced:.2f}")
        table.add_row(name, f"{median:.2f}", *ratios, f"{result.peak_mib:.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--smollm2", type=Path, required=True, help="a SmolLM2 GGUF: the tokenizer")
    parser.add_argument("--size", type=float, default=1.0, help="1 is 3.08 GB")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    prepare(options.workdir, options.size, options.smollm2)
    results = measure(commands(options.workdir), options.repeat)
    console = Console()
    show(results, console)
    console.print("load average at the end: " + ", ".join(f"{x:.1f}" for x in os.getloadavg()))


if __name__ == "__main__":
    main()
