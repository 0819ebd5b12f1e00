"""The type in which a model's weights lie on the disk, whatever they are computed in."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

from longrope_export.errors import ModelError
from longrope_export.runtimes.base import RuntimeInfo
from longrope_export.runtimes.llama_cpp import weight_precision

_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit


def stored_precision(path: Path) -> str:
    """The type that most bytes of a GGUF's or a folder's weights have: fp32, fp16, bf16 or another name.

    "unknown" for a folder without safetensors files.

    Raises:
        ModelError: a file is damaged.
    """
    if path.is_file():
        return weight_precision(path)
    sizes: Counter[str] = Counter()
    for file in sorted(path.glob("*.safetensors")):
        sizes.update(_sizes_by_type(file))
    if not sizes:
        return "unknown"
    name = sizes.most_common(1)[0][0]
    return _NAMES.get(name, name.lower())


def _sizes_by_type(path: Path) -> Counter[str]:
    """Bytes of each type in a safetensors file, by its header."""
    sizes: Counter[str] = Counter()
    try:
        with path.open("rb") as file:
            (count,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(count, _MOST_HEADER_BYTES)))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[entry["dtype"]] += end - begin
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise ModelError(f"{path}: damaged safetensors header: {error!r}") from error
    return sizes


def as_stored(info: RuntimeInfo, source: Path) -> RuntimeInfo:
    """The info of one of transformers' runtimes, with the precision that its weights were rounded to.

    float32 arithmetic on weights of 16 bits is as far from the source as these are, unless the source
    lies in the same type.

    Raises:
        ModelError: a file is damaged.
    """
    if info.precision != "fp32":
        return info
    stored = stored_precision(Path(info.path))
    if stored not in ("fp16", "bf16") or stored == stored_precision(source):
        return info
    return replace(info, precision=stored)
