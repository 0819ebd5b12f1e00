"""What a GGUF file will hold, worked out before a byte of it is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from longrope_export.config import LongRopeConfig
from longrope_export.gguf_keys import encode_config
from longrope_export.gguf_values import KeyValue


@dataclass(frozen=True)
class SourceTensor:
    """Where a tensor lies in a safetensors file.

    `dtype` is one of "BF16", "F16", "F32"; `shape` is row major (torch order, rows first).
    """

    path: Path
    offset_bytes: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output, in the order in which the file lists it.

    `source` is a place in a file, or a small float32 array made by us (rope factors).
    `num_heads`, when set, asks for llama.cpp's interleaved row order: within each of the
    `num_heads` groups of rows, row j of the first half and row j of the second half become
    neighbours (transformers keeps the halves apart).
    """

    name: str
    source: SourceTensor | npt.NDArray[np.float32]
    target_type: GGMLQuantizationType
    num_heads: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Row major, as in the source; GGUF lists the same numbers in reverse."""
        return self.source.shape


@dataclass(frozen=True)
class GgufPlan:
    """Metadata and tensors of one output file."""

    key_values: tuple[KeyValue, ...]
    tensors: tuple[PlannedTensor, ...]


def add_to_plan(plan: GgufPlan, config: LongRopeConfig) -> GgufPlan:
    """A plan without rope scaling, with the keys and factor tensors of `config` added.

    The factor tensors come first, where llama.cpp's own converter puts them.
    """
    architecture = next(
        str(entry.value) for entry in plan.key_values if entry.key == "general.architecture"
    )
    encoded = encode_config(config, architecture)
    replaced = {entry.key: entry for entry in encoded.set_keys}
    kept = [
        replaced.pop(entry.key, entry)
        for entry in plan.key_values
        if entry.key not in encoded.remove_keys
    ]
    factors = tuple(
        PlannedTensor(name, values, GGMLQuantizationType.F32)
        for name, values in encoded.tensors.items()
    )
    return replace(plan, key_values=(*kept, *replaced.values()), tensors=factors + plan.tensors)
