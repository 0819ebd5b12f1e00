"""Measure the tables of README.md and write them there.

    python scripts/update_readme.py                      # all of them: hours on two old cores
    python scripts/update_readme.py --parts demo,speed   # some
    python scripts/update_readme.py --parts parity -- --length 600    # with options of its script

| part | by | in the README |
|---|---|---|
| demo | longrope-export demo --lengths 8192,16384 | perplexity before and after |
| speed | benchmarks/gguf_export.py | ratios against llama.cpp's converter and cp |
| parity | scripts/update_parity.py | largest differences of each float32 export |
| evaluation | scripts/measure_smollm2.py | SmolLM2 beyond its window |

The last two keep what they have measured, write docs/ too, and can be run by themselves, in as many runs as one
likes. The speeds want a machine that does nothing else, and 15 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from longrope_export.evaluate.results import Table, markdown_table
from longrope_export.llama_cpp.cache import cache_folder
from scripts.readme import write_block

SCRIPTS = Path(__file__).parent
LENGTHS = "8192,16384"
SPEEDS = {
    "ours bf16": "folder to bf16 GGUF",
    "ours f16": "folder to f16",
    "ours q8_0": "folder to q8_0",
    "bake": "factors into a GGUF",
    "in place": "factors in place",
}


def run(*command: str) -> str:
    """Standard output of a Python command; its progress is shown.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def demo(options: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["demo", "-o", folder, "--lengths", LENGTHS, "--json", *options]
        found = json.loads(run("-m", "longrope_export", *arguments))
    rows = [
        (f"{row['context']} tokens", f"{row['before']:.2f}", f"{row['after']:.2f}")
        for row in found["rows"]
    ]
    header = ("perplexity at", "original file", "with factors for 32768")
    write_block("demo", markdown_table(Table("demo", header, tuple(rows))))


def speed(options: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        output = Path(folder) / "speed.json"
        benchmark = str(SCRIPTS.parent / "benchmarks" / "gguf_export.py")
        print(run(benchmark, "--workdir", folder, "--json", str(output), *options))
        found = json.loads(output.read_text(encoding="utf-8"))
    write_block("speed", speed_table(found))


def speed_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown of what gguf_export.py --json wrote."""
    rows = []
    for title, measurements in found.items():
        of = {m["name"]: m for m in measurements}
        where = ", not cached" if "not in the page cache" in title else ""
        for name, label in SPEEDS.items():
            if name not in of:
                continue
            ours, stock = of[name], of.get(name.replace("ours", "stock"))
            has_stock = stock is not None and stock is not ours
            faster = f"{_median(stock) / _median(ours):.1f}x" if stock and has_stock else ""
            theirs = f" ({stock['peak_mib']:.0f})" if stock and has_stock else ""
            against = (f"{_median(ours) / _median(of[c]):.2g}" for c in ("cp", "cp+sync"))
            rows.append((label + where, faster, *against, f"{ours['peak_mib']:.0f} MiB{theirs}"))
    header = ("", "faster than convert_hf_to_gguf.py", "time against cp", "against cp and sync", "peak memory (theirs)")  # fmt: skip
    return markdown_table(Table("speed", header, tuple(rows)))


def _median(measurement: dict[str, Any]) -> float:
    return float(statistics.median(measurement["seconds"]))


def by_script(name: str) -> Callable[[Sequence[str]], None]:
    """A script that writes its block by itself."""
    return lambda options: print(run(str(SCRIPTS / name), *options))


PARTS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo,
    "speed": speed,
    "parity": by_script("update_parity.py"),
    "evaluation": by_script("measure_smollm2.py"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them [all]")
    parser.add_argument("options", nargs="*", help="behind --: for the one part that is named")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]}: there are {', '.join(PARTS)}")
    if arguments.options and len(parts) > 1:
        parser.error("options are for one part: name it by --parts")
    for part in parts:
        PARTS[part](arguments.options)


if __name__ == "__main__":
    main()
