"""The outcome of `verify` as a JSON file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.config import LongRopeConfig
from longrope_export.errors import LongRopeError, ModelError
from longrope_export.factor_files import to_json
from longrope_export.gguf_format import MAGIC, PADDING_KEY, read_header
from longrope_export.gguf_shards import shard_paths
from longrope_export.stamp import stamp
from longrope_export.verify.probes import Probe
from longrope_export.verify.run import CaseResult, ExportResult

FORMAT = "longrope-certificate"
VERSION = 2
FILE_NAME = "longrope-certificate.json"  # in a folder that was verified
GGUF_KEY = "longrope.certificate"

_CARD = "README.md"
_BLOCK = 1 << 20


def make_certificate(
    source: Path,
    config: LongRopeConfig,
    tokens: Sequence[int],
    results: Sequence[ExportResult],
    probes: Sequence[Probe],
    seed: int | None,
) -> dict[str, Any]:
    """Everything that was found, as JSON values; null for numbers that are not finite.

    Args:
        source: the model that the reference ran.
        tokens: ids that were run.
        results: one for each export.
        probes: the short texts that `check_export` runs again.
        seed: of random tokens; None for those of a text.
    """
    values = {
        **stamp(FORMAT, VERSION),
        "passed": all(result.passed for result in results),
        "reference": {"path": str(source), "sha256": content_hash(source)},
        "config": to_json(config),
        "tokens": {
            "count": len(tokens),
            "sha256": hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest(),
            "seed": seed,
        },
        "probes": [asdict(probe) for probe in probes],
        "exports": [_export_json(result) for result in results],
    }
    made: dict[str, Any] = _finite(values)
    return made


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


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
        "sha256": _hash_or_none(result.export.path),
        "passed": result.passed,
        "problems": result.problems,
        "limit": asdict(result.limit) if result.limit else None,
        "own_limit": asdict(result.own_limit) if result.own_limit else None,
        "reference_weights": result.weights,
        "probe_log_probabilities": result.probe_rows,
        "cases": [_case_json(case) for case in result.cases],
    }


def _hash_or_none(path: Path | str) -> str | None:
    """None for a server, and for a file too damaged to be read: its result says so."""
    try:
        return content_hash(path)
    except LongRopeError:
        return None


def _case_json(result: CaseResult) -> dict[str, Any]:
    difference = result.difference
    losses = difference.loss[np.isfinite(difference.loss)]
    return {
        "name": result.case.name,
        "origin": result.case.origin,
        "length": result.case.length,
        "compared_rows": len(result.rows),
        "max_difference": float(difference.difference.max()),
        "mean_difference": float(difference.mean_difference.mean()),
        "max_kl": float(difference.kl.max()),
        "mean_kl": float(difference.kl.mean()),
        "same_top_token": float(difference.same_top.mean()),
        "mean_loss_change": float(losses.mean()) if len(losses) else None,
        "first_miss": result.first_miss,
        "first_layer": result.first_layer,
        "seconds": round(result.seconds, 3),
        "from_source": _from_source_json(result),
        "rows": [
            [row.position, row.tier, float(f"{d:.4g}"), float(f"{kl:.4g}")]
            for row, d, kl in zip(result.rows, difference.difference, difference.kl, strict=True)
        ],
    }


def _from_source_json(result: CaseResult) -> dict[str, float] | None:
    found = result.from_source
    if found is None:
        return None
    return {
        "max_difference": float(found.difference.max()),
        "max_kl": float(found.kl.max()),
        "mean_kl": float(found.kl.mean()),
        "same_top_token": float(found.same_top.mean()),
    }


def content_hash(path: Path | str) -> str | None:
    """SHA-256 of what a model file or folder says, hex.

    An embedded certificate and a folder's own README.md, the model card, are left out.

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
        if is_gguf(path):
            for shard in shard_paths(path):
                _hash_gguf(shard, digest)
        elif path.is_file():
            _hash_bytes(path, 0, digest)
        else:
            for file in sorted(path.rglob("*")):
                if file.is_file() and file not in (path / FILE_NAME, path / _CARD):
                    size = file.stat().st_size
                    digest.update(f"{file.relative_to(path)}\n{size}\n".encode())
                    _hash_bytes(file, 0, digest)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()


def is_gguf(path: Path) -> bool:
    """By its first bytes, whatever its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


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
        elif is_gguf(path):
            text = read_header(path).get(GGUF_KEY, "")
        else:
            text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError, TypeError, RecursionError) as error:
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
