"""Is an export the one that a certificate is about, and does it still compute the same here?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longrope_export.errors import LongRopeError, ModelError
from longrope_export.factor_files import from_json
from longrope_export.runtimes.open import RUNS_CODE, Export, open_runtime
from longrope_export.verify.certificate import content_hash
from longrope_export.verify.compare import Limit
from longrope_export.verify.probes import Probe, probe_problems


def check_export(
    certificate: Mapping[str, Any],
    path: Path,
    *,
    threads: int | None = None,
    build: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Compare the export's hash, then run the certificate's short texts on the runtimes that passed.

    The log probabilities are compared with those that the same runtime gave when it was certified.
    A runtime that takes code from the folder is left out.

    Args:
        certificate: see read_certificate.
        path: the export.
        threads: of the runtimes.
        build: compile llama.cpp where it is missing.
        say: told what is left out.

    Returns:
        What is wrong; empty where all is well.

    Raises:
        ModelError: the certificate is damaged, or all that passed would run code from the folder.
    """
    try:
        return _check_export(certificate, path, threads, build, say)
    except LongRopeError:
        raise
    except Exception as error:  # whatever hostile values, or a runtime's own classes, raise
        raise ModelError(f"the certificate of {path} cannot be checked: {error!r}") from error


def _check_export(
    certificate: Mapping[str, Any],
    path: Path,
    threads: int | None,
    build: bool,
    say: Callable[[str], None],
) -> list[str]:
    found = content_hash(path)
    entries = [entry for entry in certificate["exports"] if entry["sha256"] == found]
    passed = [entry for entry in entries if entry["passed"]]
    if not entries:
        known = ", ".join(str(entry["path"]) for entry in certificate["exports"])
        return [f"{path} is none of the certified exports ({known}): its SHA-256 is {found}"]
    problems = []
    probes = [Probe(**values) for values in certificate["probes"]]
    config = from_json(certificate["config"], "certificate")
    if not passed:
        names = ", ".join(str(entry["runtime"]) for entry in entries)
        return [f"{path}: the certificate says that it failed on {names}"]
    safe = [entry for entry in passed if entry["runtime_name"] != RUNS_CODE]
    if not safe:
        raise ModelError(
            f"{path} was certified on {RUNS_CODE} alone, which runs code from its folder: --check does "
            f"not; verify it against its source model"
        )
    if len(safe) < len(passed):
        say(f"{path}: {RUNS_CODE} is left out, it runs code from the folder")
    for entry in safe:
        runtime = open_runtime(
            Export(entry["runtime_name"], path),
            context=max(len(probe.tokens) for probe in probes) + 1,
            config=config,
            threads=threads,
            build=build,
        )
        try:
            limit, precision = Limit(**entry["limit"]), entry["precision"]
            for probe, rows in zip(probes, entry["probe_log_probabilities"], strict=True):
                problems += probe_problems(runtime, probe, rows, precision, limit)
        finally:
            runtime.close()
    return problems
