"""Perplexities that are measured once: the same model, text, context and llama.cpp say the same."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from longrope_export.llama_cpp.cache import cache_folder
from longrope_export.llama_cpp.perplexity import Perplexity, run_perplexity
from longrope_export.outputs import write_text


@dataclass(frozen=True)
class Measured:
    """A perplexity, and how long its run took when it was made, in seconds."""

    perplexity: Perplexity
    seconds: float


def measure_once(
    program: Path, model: Path, text: Path, *, context: int, threads: int | None = None
) -> Measured:
    """As `run_perplexity`, or what it found before, from the user's cache.

    Raises:
        ToolError: the program failed.
    """
    key = _key(program, model, text, context)
    record = cache_folder() / "perplexity" / f"{key}.json"
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        return Measured(Perplexity(**values["perplexity"]), float(values["seconds"]))
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not measured yet, or a record of another version
    started = time.monotonic()
    perplexity = run_perplexity(program, model, text, context=context, threads=threads)
    measured = Measured(perplexity, time.monotonic() - started)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(asdict(measured)))
    return measured


def _key(program: Path, model: Path, text: Path, context: int) -> str:
    """Changes with every byte of model and text, and with every program or library beside."""
    digest = hashlib.sha256(f"{context}\n".encode())
    for path in (model, text):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for path in sorted(program.resolve().parent.iterdir()):
        if path == program.resolve() or ".so" in path.suffixes or path.suffix == ".dylib":
            status = path.stat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
