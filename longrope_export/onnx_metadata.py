"""The config inside an ONNX file of ours: the metadata entry longrope.config, a whole factors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from longrope_export.config import LongRopeConfig
from longrope_export.definition import from_json
from longrope_export.errors import ModelError, ToolError

MODEL_FILE = "model.onnx"
MAX_GRAPH_BYTES = 256 << 20  # the weights of our exports are in a file of their own


def is_onnx(path: Path) -> bool:
    """Whether a path is an ONNX file by its name, or a folder that holds model.onnx but no
    config.json (a Hugging Face folder may have both)."""
    if path.is_dir():
        return (path / MODEL_FILE).is_file() and not (path / "config.json").is_file()
    return path.suffix.lower() == ".onnx"


def read_config(path: Path) -> LongRopeConfig:
    """The config that a folder, or an ONNX file, was exported with; weights are not read.

    Raises:
        ToolError: the package onnx is not installed.
        ModelError: no such file, no ONNX file, or not one of ours.
        FactorFileError: the entry is there and wrong; the message names the field.
    """
    path = path / MODEL_FILE if path.is_dir() else path
    return parse_config(_read_metadata(path), path)


def read_precision(folder: Path) -> str:
    """fp32, fp16, int8 or int4 of a folder of ours; raises as read_config."""
    return _read_metadata(folder / MODEL_FILE).get("longrope.precision", "unknown")


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        import onnx
    except ImportError as error:
        raise ToolError("reading ONNX files needs: pip install 'longrope-export[onnx]'") from error
    if not path.is_file():
        raise ModelError(f"{path}: no such file; make it with `longrope-export onnx`")
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise ModelError(f"{path}: too large for a graph without weights: not one of ours")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf has no exception class of its own to catch
        raise ModelError(f"{path}: cannot read as ONNX: {error}") from error
    return {entry.key: entry.value for entry in model.metadata_props}


def parse_config(metadata: Mapping[str, str], path: Path) -> LongRopeConfig:
    """The config in the metadata of a file.

    Raises:
        ModelError: no such entry, or no JSON.
        FactorFileError: naming the field that is wrong.
    """
    text = metadata.get("longrope.config")
    if text is None:
        raise ModelError(
            f"{path}: no metadata longrope.config: not written by `longrope-export onnx`"
        )
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: metadata longrope.config is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: metadata longrope.config must be a JSON object, got {text[:40]}")
    return from_json(values, f"{path}: longrope.config")
