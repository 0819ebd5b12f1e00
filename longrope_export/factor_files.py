"""Read factors from every known shape, write them in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.config import MAX_LENGTH, FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.definition import FORMAT, VERSION, dump_factors, from_json, to_json
from longrope_export.errors import ConfigError, FactorFileError, LongRopeError
from longrope_export.gguf_format import MAGIC, read_header
from longrope_export.ladder import attention_factor
from longrope_export.models.families import family_of_hf
from longrope_export.models.hf_config import (
    HfConfig,
    architecture_names,
    read_json_object,
    with_text_config,
)
from longrope_export.models.hf_rope import rope_block
from longrope_export.models.model import Model, check_fits
from longrope_export.models.native import declared_by_hf, native_of_hf
from longrope_export.models.native_gguf import native_of_gguf
from longrope_export.onnx_metadata import is_onnx, read_config
from longrope_export.outputs import write_text

MAX_FILE_BYTES = 256 << 20
# each of them tells a rope block that stands alone from a config.json
_BARE_BLOCK_KEYS = frozenset({"short_factor", "rope_type", "type", "full_attention"})

__all__ = [
    "FORMAT",
    "VERSION",
    "dump_factors",
    "from_json",
    "read_csv",
    "read_csv_ladder",
    "read_factors",
    "to_json",
    "write_factors",
]


def write_factors(config: LongRopeConfig, output: Path) -> None:
    """Write the published JSON shape; factors keep every digit."""
    write_text(output, dump_factors(config))


def read_factors(path: Path, model: Model | None = None) -> LongRopeConfig:
    """Read a factors file of any known shape but CSV (see read_csv_ladder) and check the fit.

    Known are: our JSON; a config.json or its bare rope_scaling / rope_parameters block; a GGUF; an
    ONNX file of ours, or its folder.

    Args:
        model: the model that the factors are for; a bare block needs it for what it leaves out.

    Raises:
        FactorFileError: naming file, field, expected, got, and what to do.
    """
    if path.is_dir() and not is_onnx(path):
        path = path / "config.json"
    if not (path.is_file() or is_onnx(path)):
        raise FactorFileError(f"{path}: no such factors file")
    if path.suffix.lower() == ".csv":
        raise FactorFileError(
            f"{path}: a CSV does not say for which length it is: use --tier LENGTH={path.name} (as "
            f"--tier 131072={path.name}), or make a factors file of it first: longrope-export factors "
            f"file MODEL --tier LENGTH={path.name} -o factors.json"
        )
    try:
        config = _read_any(path, model)
    except FactorFileError:
        raise
    except LongRopeError as error:
        raise FactorFileError(str(error)) from error
    if model is not None:
        check_fits(config, model, str(path))
    return config


def read_csv_ladder(
    files: Mapping[int, Path],
    model: Model,
    *,
    switch: SwitchPolicy = SwitchPolicy.CAUSAL,
    attention: str = "longrope",
) -> LongRopeConfig:
    """microsoft/LongRoPE CSV files, one per tier length, as one config.

    The files hold no attention factor; the authors' code uses the longrope formula for the ratio
    of the tier's length to the trained window. A GGUF does not tell that of Llama 3's scaling: there
    it is the window that the model has now, for folders too.

    Args:
        files: tier length in tokens (inclusive) -> CSV file.
        attention: "longrope", "yarn", "none" or a number as text.

    Raises:
        FactorFileError: naming file and row.
    """
    native = model.native
    scaled = native.provenance.get("method") == "model (llama3)"
    window = model.window if scaled else native.original_max_position_embeddings
    pairs = model.native.num_pairs
    tiers = []
    for length, path in sorted(files.items()):
        start, factors = read_csv(path, pairs)
        scale = attention_factor(attention, length / window, window, 1.0)
        tiers.append(_tier(path, length, factors, start, scale))
    try:
        return LongRopeConfig(
            rope_theta=model.native.rope_theta,
            rotary_dim=model.native.rotary_dim,
            original_max_position_embeddings=window,
            max_position_embeddings=tiers[-1].max_length,
            tiers=tuple(tiers),
            switch=switch,
            logit_scaling=model.native.logit_scaling,
            layers=model.native.layers,
            provenance={
                "method": "csv",
                "files": {str(length): path.name for length, path in sorted(files.items())},
                "attention": attention,
                "model_fingerprint": model.fingerprint,
            },
        )
    except ConfigError as error:
        raise FactorFileError(
            f"{', '.join(str(path) for path in files.values())}: {error}"
        ) from error


def read_csv(path: Path, pairs: int) -> tuple[int, tuple[float, ...]]:
    """One CSV of the LongRoPE authors: (number of start tokens, factors).

    Known are one value per line, `pairs` of them, or `pairs` + 1 with the start-token count first
    (the dim_mono_n kind), and a table of layers x pairs whose rows must be equal.

    Raises:
        FactorFileError: another shape, text that is no number, rows that differ.
    """
    table = _read_table(path)
    if table.shape[1] == 1:
        values = table[:, 0]
    else:
        differing = np.flatnonzero((table != table[0]).any(axis=1))
        if len(differing):
            raise FactorFileError(
                f"{path}: row {differing[0] + 1} differs from row 1: factors per layer cannot be "
                f"expressed by any target; expected equal rows"
            )
        values = table[0]
    start = 0
    if len(values) == pairs + 1:
        if values[0] < 0 or values[0] != int(values[0]):
            raise FactorFileError(
                f"{path}: {pairs + 1} values, so the first is a start-token count, "
                f"but it is {values[0]:g}"
            )
        start, values = int(values[0]), values[1:]
    if len(values) != pairs:
        raise FactorFileError(
            f"{path}: {len(values)} factors, expected rotary_dim / 2 = {pairs} for this model "
            f"(or {pairs + 1} with the start-token count first)"
        )
    return start, tuple(float(value) for value in values)


def _read_any(path: Path, model: Model | None) -> LongRopeConfig:
    if is_onnx(path):
        return read_config(path)
    if _starts_with(path, MAGIC):
        return native_of_gguf(read_header(path))
    return _read_json(path, model)


def _read_table(path: Path) -> npt.NDArray[np.float64]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FactorFileError(f"{path}: too large for a factors file")
        rows = [
            [float(cell) for cell in line.split(",")]
            for line in path.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except OSError as error:
        raise FactorFileError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise FactorFileError(f"{path}: not a CSV of numbers: {error}") from error
    if not rows or len({len(row) for row in rows}) != 1:
        raise FactorFileError(f"{path}: expected rows of equal length, at least one")
    table = np.asarray(rows, dtype=np.float64)
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise FactorFileError(
            f"{path}: row {row + 1}, column {column + 1} is {table[row, column]}, expected a number"
        )
    return table


def _tier(
    path: Path, length: int, factors: Sequence[float], start: int, scale: float
) -> FactorTier:
    try:
        return FactorTier(length, tuple(factors), start, scale)
    except ConfigError as error:
        raise FactorFileError(f"{path}: {error}") from error


def _read_json(path: Path, model: Model | None) -> LongRopeConfig:
    values = read_json_object(path)
    if values.get("format") == FORMAT:
        return from_json(values, str(path))
    values = with_text_config(values)
    if not _BARE_BLOCK_KEYS.isdisjoint(values):
        values = {"rope_scaling": values}
    if not rope_block(values):
        raise FactorFileError(
            f"{path}: no factors in it: expected format {FORMAT!r}, or a config.json with "
            f"rope_scaling or rope_parameters, or such a block alone"
        )
    return _read_hf_block(path, values, model)


def _read_hf_block(path: Path, values: dict[str, Any], model: Model | None) -> LongRopeConfig:
    """transformers' spelling; what a bare block leaves out is taken from the model."""
    if {"hidden_size", "head_dim", "text_config"}.isdisjoint(values):
        if model is None:
            raise FactorFileError(
                f"{path}: a bare rope block leaves out theta and head size: name the model too"
            )
        config = _read_bare_block(path, rope_block(values), model)
    else:
        family = family_of_hf(values.get("model_type"), architecture_names(values, path))
        config = native_of_hf(HfConfig(path.parent, family, values, file_name=path.name))
    return replace(config, provenance={"method": "file", "file": path.name})


def _read_bare_block(path: Path, block: Mapping[str, Any], model: Model) -> LongRopeConfig:
    native = model.native
    values = {
        "rope_theta": native.rope_theta,
        "head_dim": model.head_dim,
        "rotary_dim": native.rotary_dim,
        "max_position_embeddings": _declared_length(path, block, model),
        "original_max_position_embeddings": block.get("original_max_position_embeddings")
        or model.window,
        "rope_scaling": block,
    }
    config = declared_by_hf(
        HfConfig(path.parent, family_of_hf(None, []), values, file_name=path.name)
    )
    return replace(config, layers=native.layers, logit_scaling=native.logit_scaling)


def _declared_length(path: Path, block: Mapping[str, Any], model: Model) -> int:
    """max_position_embeddings of a config.json with this block: "dynamic" starts from the window."""
    factor = block.get("factor")
    window = block.get("original_max_position_embeddings") or model.window
    if factor is None:
        raise FactorFileError(
            f"{path}: a bare rope block without `factor` does not say the target length: add "
            f'"factor": target / window, or use the whole config.json'
        )
    if not isinstance(factor, int | float) or not 1 < factor <= MAX_LENGTH:
        raise FactorFileError(
            f"{path}: the `factor` of a bare rope block must be a finite number above 1 (target / "
            f"window), got {factor!r:.60}"
        )
    if not isinstance(window, int):
        raise FactorFileError(
            f"{path}: original_max_position_embeddings must be an integer, got {window!r:.60}"
        )
    kind = block.get("rope_type") or block.get("type")
    return model.window if kind == "dynamic" else round(window * factor)


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
