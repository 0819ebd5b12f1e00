"""What a GGUF file will hold, worked out before a byte of it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from longrope_export.gguf_format import KeyValue


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
