"""Weights on their way from a checkpoint into model.onnx.data, a piece at a time.

A weight is described first (shape, type, how to make its bytes) and written later, so that a graph
over a checkpoint of any size costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from longrope_export.errors import ModelError

Array = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]

ALIGNMENT_BYTES = 4096  # a page, so that a runtime can map each tensor
PIECE_ELEMENTS = 1 << 22
_TILE = 256


class Rows(Protocol):
    """A vector or matrix that can be read in part, widened to float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows,) or (rows, columns)."""

    def read(self, start: int, stop: int) -> Float32:
        """Rows start (inclusive) to stop (exclusive), float32, contiguous."""


@dataclass(frozen=True)
class RowRange:
    """Some consecutive rows of another weight: one part of a fused matrix."""

    whole: Rows
    start: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.whole.shape[1:])

    def read(self, start: int, stop: int) -> Float32:
        return self.whole.read(self.start + start, self.start + stop)


@dataclass(frozen=True)
class Stacked:
    """Several weights of the same width, one below the other."""

    parts: tuple[Rows, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def read(self, start: int, stop: int) -> Float32:
        pieces, top = [], 0
        for part in self.parts:
            bottom = top + part.shape[0]
            if start < bottom and stop > top:
                pieces.append(part.read(max(start, top) - top, min(stop, bottom) - top))
            top = bottom
        return np.concatenate(pieces)


@dataclass(frozen=True)
class AddOne:
    """A norm weight that is stored as its distance from one (gemma)."""

    stored: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self, start: int, stop: int) -> Float32:
        return self.stored.read(start, stop) + np.float32(1)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the data file. `pieces` yields its bytes in order, each piece an array."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset_bytes: int
    pieces: Callable[[], Iterator[Array]]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def row_pieces(rows: Rows, dtype: npt.DTypeLike) -> Iterator[Array]:
    """The rows as they stand."""
    for start, stop in row_steps(rows.shape):
        yield rows.read(start, stop).astype(dtype, copy=False)


def transposed_pieces(rows: Rows, dtype: npt.DTypeLike) -> Iterator[Array]:
    """The transpose of a (rows, columns) matrix; holds one copy of the matrix in `dtype`."""
    num_rows, num_columns = rows.shape
    matrix = np.empty((num_rows, num_columns), dtype)
    for start, stop in row_steps(rows.shape):
        matrix[start:stop] = rows.read(start, stop)
    turned = np.empty((_TILE, num_rows), dtype)
    for left in range(0, num_columns, _TILE):
        columns = matrix[:, left : left + _TILE]
        width = columns.shape[1]
        for top in range(0, num_rows, _TILE):  # a tile stays in the cache while it is turned
            turned[:width, top : top + _TILE] = columns[top : top + _TILE].T
        yield turned[:width]


def row_steps(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of rows of about PIECE_ELEMENTS elements."""
    per_row = int(np.prod(shape[1:]))
    step = max(1, PIECE_ELEMENTS // max(per_row, 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def write_data(
    tensors: Sequence[PlannedTensor], path: Path, progress: Callable[[int], None]
) -> int:
    """Write the data file; returns its size in bytes.

    Args:
        progress: told the number of bytes after each piece.

    Raises:
        ModelError: a weight beyond the range of float16.
        OSError: the disk is full, or the folder refuses the file.
    """
    with path.open("wb") as file:
        for tensor in tensors:
            file.seek(tensor.offset_bytes)
            try:
                with np.errstate(over="raise"):
                    _write_tensor(tensor, file, progress)
            except FloatingPointError as error:
                raise ModelError(
                    f"weight {tensor.name} has values beyond the range of {tensor.dtype}: "
                    f"export with --precision fp32, int8 or int4"
                ) from error
        return file.tell()


def _write_tensor(tensor: PlannedTensor, file: BinaryIO, progress: Callable[[int], None]) -> None:
    written = 0
    for piece in tensor.pieces():
        file.write(np.ascontiguousarray(piece).data)
        written += piece.nbytes
        progress(piece.nbytes)
    if written != tensor.num_bytes:
        raise AssertionError(f"{tensor.name}: {written} bytes, planned {tensor.num_bytes}")
