"""Run llama-perplexity and read its result."""

from __future__ import annotations

import itertools
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longrope_export.errors import ToolError

# stock llama.cpp logs from a thread of its own and does not wait for it at exit, so that now and then
# (often, for runs of milliseconds or on a busy machine) the result is computed and never printed; our patch waits
_ATTEMPTS, _SECONDS = 5, 30  # it is run again while either lasts

_FINAL = re.compile(r"Final estimate: PPL = ([\d.]+|nan|inf) \+/- ([\d.]+|nan|inf|-nan)")


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss over the second half of each chunk, and its standard error.

    llama-perplexity scores only positions from context / 2 on, so that every scored token has at
    least half the context before it.
    """

    value: float
    standard_error: float
    context: int
    chunks: int


def run_perplexity(
    program: Path,
    model: Path,
    text: Path,
    *,
    context: int,
    chunks: int = 1,
    threads: int | None = None,
    options: Sequence[str] = ("-fa", "on"),
) -> Perplexity:
    """Perplexity of a GGUF on a text file.

    Args:
        context: tokens per chunk; the text must have at least twice as many in all.
        chunks: how many chunks, from the start of the text.
        options: further arguments of the program.

    Raises:
        ToolError: with the last lines of the program's output.
    """
    command = [str(program), "-m", str(model), "-f", str(text), "-c", str(context)]
    command += ["--chunks", str(chunks), *options]
    command += ["-t", str(threads)] if threads else []
    begin = time.monotonic()
    for attempt in itertools.count(1):
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        output = result.stdout + result.stderr
        match = _FINAL.search(output)
        if match is not None and result.returncode == 0:
            return Perplexity(float(match[1]), float(match[2].lstrip("-")), context, chunks)
        if result.returncode or (attempt >= _ATTEMPTS and time.monotonic() - begin > _SECONDS):
            break
    tail = "\n".join(output.strip().splitlines()[-12:])
    raise ToolError(
        f"{' '.join(command)}\nprinted no perplexity (exit code {result.returncode}):\n{tail}"
    )
