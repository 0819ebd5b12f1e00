"""The type in which a model's weights lie on the disk, whatever they are computed in."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

from longrope_export.models.safetensors_header import read_tensor_types
from longrope_export.runtimes.base import RuntimeInfo
from longrope_export.runtimes.llama_cpp import weight_precision

_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def stored_precision(path: Path) -> str:
    """The type that most of a GGUF's or a folder's weights have: fp32, fp16, bf16 or another name.

    "unknown" for a folder without safetensors files.

    Raises:
        ModelError: a file is damaged.
    """
    if path.is_file():
        return weight_precision(path)
    counts: Counter[str] = Counter()
    for file in sorted(path.glob("*.safetensors")):
        for dtype, shape in read_tensor_types(file).values():
            counts[dtype] += math.prod(shape)
    if not counts:
        return "unknown"
    name = counts.most_common(1)[0][0]
    return _NAMES.get(name, name.lower())


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
