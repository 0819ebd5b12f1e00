"""The outcome of `verify` as a JSON file, and the check of an export against one made earlier."""

from __future__ import annotations

import hashlib
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
from longrope_export.factor_files import to_json
from longrope_export.gguf_format import read_header
from longrope_export.verify.run import CaseResult, ExportResult

FORMAT = "longrope-certificate"
VERSION = 1
FILE_NAME = "longrope-certificate.json"  # in a folder that was verified
GGUF_KEY = "longrope.certificate"

_TRANSIENT = {FILE_NAME, ".DS_Store"}
_BLOCK = 1 << 20


def make_certificate(
    source: Path,
    config: LongRopeConfig,
    tokens: Sequence[int],
    results: Sequence[ExportResult],
) -> dict[str, Any]:
    """Everything that was found, as JSON values.

    Args:
        source: the model that the reference ran.
        tokens: ids that were run.
        results: one for each export.
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
        "exports": [_export_json(result) for result in results],
    }


def _export_json(result: ExportResult) -> dict[str, Any]:
    info = result.info
    return {
        "path": str(result.export.path),
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
            _hash_gguf(path, digest)
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


def _hash_gguf(path: Path, digest: hashlib._Hash) -> None:
    header = read_header(path)
    for name in sorted(header.key_values):
        if name != GGUF_KEY:
            digest.update(header.key_values[name].pack())
    for tensor in header.tensors:
        digest.update(tensor.pack())
    _hash_bytes(path, header.data_start_bytes, digest)


def _hash_bytes(path: Path, start: int, digest: hashlib._Hash) -> None:
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK):
            digest.update(block)


def check_certificate(certificate: Mapping[str, Any], export: Path | str, where: str) -> list[str]:
    """Problems of an export that a certificate is said to be about; empty where all is well.

    Raises:
        ModelError: the certificate is none, or of a later version.
    """
    if certificate.get("format") != FORMAT:
        raise ModelError(f"{where}: not a certificate: format is {certificate.get('format')!r}")
    if certificate.get("version") != VERSION:
        raise ModelError(f"{where}: version {certificate.get('version')!r}, expected {VERSION}")
    found = content_hash(export)
    if found is None:
        return [f"{export} is a server: it has no hash that a certificate could know"]
    entries = [entry for entry in certificate["exports"] if entry["sha256"] == found]
    if not entries:
        known = ", ".join(str(entry["path"]) for entry in certificate["exports"])
        return [f"{export} is none of the certified exports ({known}): SHA-256 {found}"]
    return [
        f"{export}: the certificate says that it failed on {entry['runtime']}"
        for entry in entries
        if not entry["passed"]
    ]
