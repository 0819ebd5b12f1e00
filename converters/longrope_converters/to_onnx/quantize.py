"""Weights in blocks of 4 or 8 bits, by ONNX Runtime's own MatMulNBits kernels, piece by piece.

Each row of a weight is cut into blocks; a block has one float32 scale and no zero point (symmetric,
round to nearest). The layout is MatMulNBits' and, flattened, GatherBlockQuantized's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from longrope_converters.to_onnx.weights import Array, Float32, Rows, row_steps

BLOCK_SIZE = 32


@dataclass
class QuantizedMatrix:
    """A (rows, columns) weight; the scales are kept from the first pass for the second."""

    rows: Rows
    bits: int
    block_size: int = BLOCK_SIZE
    _scales: list[Float32] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.rows.shape[1] // self.block_size)

    @property
    def packed_shape(self) -> tuple[int, ...]:
        return (self.rows.shape[0], self.num_blocks, self.block_size * self.bits // 8)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        return (self.rows.shape[0], self.num_blocks)

    def packed_pieces(self) -> Iterator[Array]:
        for start, stop in row_steps(self.rows.shape):
            packed, scales = quantize(self.rows.read(start, stop), self.bits, self.block_size)
            self._scales.append(scales)
            yield packed

    def scale_pieces(self) -> Iterator[Array]:
        """Only after packed_pieces has run to its end."""
        yield from self._scales
        self._scales.clear()


def quantize(weight: Float32, bits: int, block_size: int) -> tuple[Array, Float32]:
    """(rows, columns) float32 -> packed (rows, blocks, bytes) uint8, scales (rows, blocks)."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

    num_rows, num_columns = weight.shape
    blocks = -(-num_columns // block_size)
    padded = np.zeros((blocks * block_size, num_rows), np.float32)
    padded[:num_columns] = weight.T
    packed = np.zeros((num_rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.zeros((num_rows, blocks), np.float32)
    zero_points = np.zeros((num_rows, -(-blocks * bits // 8)), np.uint8)
    kernel = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}[bits]
    kernel(packed, padded, scales, zero_points, block_size, num_rows, num_columns, True)
    return packed, scales
