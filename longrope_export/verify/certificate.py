"""The outcome of `verify` as a JSON file, and the check of an export against one made earlier."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export import __version__
from longrope_export.config import LongRopeConfig
from longrope_export.errors import ModelError
from longrope_export.factor_files import from_json, to_json
from longrope_export.gguf_format import PADDING_KEY, read_header
from longrope_export.runtimes.base import Runtime
from longrope_export.runtimes.open import Export, open_runtime
from longrope_export.verify.compare import Limit
from longrope_export.verify.run import CaseResult, ExportResult, Probe

FORMAT = "longrope-certificate"
VERSION = 1
FILE_NAME = "longrope-certificate.json"  # in a folder that was verified
GGUF_KEY = "longrope.certificate"

_TRANSIENT = {FILE_NAME, ".DS_Store"}
_BLOCK = 1 << 20
_PROBE_ROUNDING = 1e-5  # of log probabilities that are written with six digits


def make_certificate(
    source: Path,
    config: LongRopeConfig,
    tokens: Sequence[int],
    results: Sequence[ExportResult],
    probe: Probe,
) -> dict[str, Any]:
    """Everything that was found, as JSON values.

    Args:
        source: the model that the reference ran.
        tokens: ids that were run.
        results: one for each export.
        probe: for `check_probe`.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": f"longrope-export {__version__}",
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
        "passed": all(result.passed for result in results),
        "reference": {"path": str(source), "sha256": content_hash(source)},
        "config": to_json(config),
        "tokens": {
            "count": len(tokens),
            "sha256": hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest(),
        },
        "probe": asdict(probe),
        "exports": [_export_json(result) for result in results],
    }


def _export_json(result: ExportResult) -> dict[str, Any]:
    info = result.info
    return {
        "path": str(result.export.path),
        "runtime_name": result.export.runtime,
        "runtime": info.name if info else result.export.runtime,
        "runtime_version": info.version if info else None,
        "precision": info.precision if info else None,
        "switching": info.switching if info else None,
        "log_probabilities": info.log_probabilities if info else None,
        "sha256": content_hash(result.export.path),
        "passed": result.passed,
        "problems": result.problems,
        "limit": asdict(result.limit) if result.limit else None,
        "cases": [_case_json(case) for case in result.cases],
    }


def _case_json(result: CaseResult) -> dict[str, Any]:
    difference = result.difference
    losses = difference.loss[np.isfinite(difference.loss)]
    return {
        "name": result.case.name,
        "origin": result.case.origin,
        "length": result.case.length,
        "compared_rows": len(result.rows),
        "max_difference": float(difference.difference.max()),
        "max_kl": float(difference.kl.max()),
        "mean_kl": float(difference.kl.mean()),
        "same_top_token": float(difference.same_top.mean()),
        "mean_loss_change": float(losses.mean()) if len(losses) else None,
        "first_miss": result.first_miss,
        "seconds": round(result.seconds, 3),
        "rows": [
            [row.position, row.tier, float(f"{d:.4g}"), float(f"{kl:.4g}")]
            for row, d, kl in zip(result.rows, difference.difference, difference.kl, strict=True)
        ],
    }


def content_hash(path: Path | str) -> str | None:
    """SHA-256 of what a model file or folder says, hex; an embedded certificate is left out.

    None for a server, whose address is text.

    A GGUF: its keys in the order of their names, its tensors and their bytes. A folder: the names
    and bytes of its files, in the order of their names.

    Raises:
        ModelError: the path cannot be read.
    """
    if isinstance(path, str):
        return None
    digest = hashlib.sha256()
    try:
        if path.is_file() and path.suffix == ".gguf":
            for shard in _shards(path):
                _hash_gguf(shard, digest)
        elif path.is_file():
            _hash_bytes(path, 0, digest)
        else:
            for file in sorted(path.rglob("*")):
                if file.is_file() and file.name not in _TRANSIENT:
                    digest.update(f"{file.relative_to(path)}\n".encode())
                    _hash_bytes(file, 0, digest)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()


def _shards(path: Path) -> list[Path]:
    """All files of a split model, whose names end in -00001-of-00003.gguf, or the one file."""
    count = read_header(path).get("split.count", 1)
    stem, separator, _ = path.name.rpartition("-00001-of-")
    if not separator or not isinstance(count, int) or count < 2:
        return [path]
    return [path.with_name(f"{stem}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]


def _hash_gguf(path: Path, digest: hashlib._Hash) -> None:
    header = read_header(path)
    for name in sorted(set(header.key_values) - {GGUF_KEY, PADDING_KEY}):
        digest.update(header.key_values[name].pack())
    for tensor in header.tensors:
        digest.update(tensor.pack())
    ends = [t.offset_bytes + (t.num_bytes or header.data_bytes) for t in header.tensors]
    used = min(max(ends, default=0), header.data_bytes)
    _hash_bytes(path, header.data_start_bytes, digest, used)


def _hash_bytes(path: Path, start: int, digest: hashlib._Hash, count: int | None = None) -> None:
    left = path.stat().st_size - start if count is None else count
    with path.open("rb") as file:
        file.seek(start)
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)


def read_certificate(path: Path) -> dict[str, Any]:
    """The certificate in a JSON file, or embedded in a GGUF or in an export's folder.

    Raises:
        ModelError: there is none, or none that this version knows.
    """
    try:
        if path.is_dir():
            text = (path / FILE_NAME).read_text(encoding="utf-8")
        elif path.suffix == ".gguf":
            text = read_header(path).get(GGUF_KEY, "")
        else:
            text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no certificate in it: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ModelError(f"{path}: not a certificate: it has no format {FORMAT!r}")
    if values.get("version") != VERSION:
        raise ModelError(f"{path}: version {values.get('version')!r}, expected {VERSION}")
    return values


def without_rows(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """The same without the single rows: small enough to be carried by an export."""
    exports = [
        {
            **export,
            "cases": [
                {name: value for name, value in case.items() if name != "rows"}
                for case in export["cases"]
            ],
        }
        for export in certificate["exports"]
    ]
    return {**certificate, "exports": exports}


def check_export(
    certificate: Mapping[str, Any], path: Path, *, threads: int | None = None, build: bool = False
) -> list[str]:
    """Is this the export that was certified, and does it still compute the same here?

    Its hash is compared, then the certificate's short text is run on the runtime that was
    certified, and its likeliest tokens compared.

    Returns:
        What is wrong; empty where all is well.

    Raises:
        ModelError: the certificate is damaged.
    """
    try:
        return _check_export(certificate, path, threads, build)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"the certificate of {path} is damaged: {error!r}") from error


def _check_export(
    certificate: Mapping[str, Any], path: Path, threads: int | None, build: bool
) -> list[str]:
    found = content_hash(path)
    entries = [entry for entry in certificate["exports"] if entry["sha256"] == found]
    if not entries:
        known = ", ".join(str(entry["path"]) for entry in certificate["exports"])
        return [f"{path} is none of the certified exports ({known}): its SHA-256 is {found}"]
    problems = []
    probe = Probe(**certificate["probe"])
    config = from_json(certificate["config"], "certificate")
    for entry in entries:
        if not entry["passed"]:
            problems.append(f"{path}: certified to FAIL on {entry['runtime']}")
            continue
        runtime = open_runtime(
            Export(entry["runtime_name"], path),
            context=len(probe.tokens) + 1,
            config=config,
            threads=threads,
            build=build,
        )
        try:
            problems += _check_probe(runtime, probe, Limit(**entry["limit"]))
        finally:
            runtime.close()
    return problems


def _check_probe(runtime: Runtime, probe: Probe, limit: Limit) -> list[str]:
    sequence = runtime.start(declared_length=probe.declared_length)
    logits = sequence.append(probe.tokens, keep=len(probe.top_tokens)).astype(np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    got = np.take_along_axis(log_p, np.asarray(probe.top_tokens), 1)
    right = np.asarray(probe.log_probabilities)
    kl = float((np.exp(right) * (right - got)).sum(1).max())
    difference = float(np.abs(right - got).max())
    # of log probabilities, not of logits: both the logit and the sum may be off
    if kl <= limit.kl + _PROBE_ROUNDING and (
        limit.difference is None or difference <= 2 * limit.difference
    ):
        return []
    return [
        f"{runtime.info.path}: {runtime.info.name} here differs from the certificate: log "
        f"probabilities by up to {difference:.2g}, KL {kl:.2g} (limit {limit.kl:.2g})"
    ]
