"""Linear layers and the embedding, in any precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from longrope_converters.to_onnx.graph import MICROSOFT, Graph
from longrope_converters.to_onnx.quantize import QuantizedMatrix
from longrope_converters.to_onnx.source import Weights
from longrope_converters.to_onnx.weights import RowRange, Rows, Stacked
from longrope_export.errors import UnsupportedError

_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Matrix:
    """The weight of a linear layer, rows first as checkpoints have it, and its bias."""

    name: str
    rows: Rows
    bias: Rows | None = None


@dataclass(frozen=True)
class Table:
    """The embedding in the graph, which a tied head shares."""

    rows: Rows
    values: ir.Value
    scales: ir.Value | None = None


class Linear:
    """Builds linear layers over the weights of one model.

    Args:
        precision: "fp32", "fp16", "int8" or "int4".
        accuracy_level: of MatMulNBits: 0 computes in fp32, 4 quantizes activations to int8.
        embedding_bits: of embedding and head in int8 and int4.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        precision: str,
        accuracy_level: int,
        embedding_bits: int,
    ) -> None:
        self.graph, self.weights, self.precision = graph, weights, precision
        self.bits = _BITS.get(precision)
        self.accuracy_level, self.embedding_bits = accuracy_level, embedding_bits

    def matrix(self, name: str, shape: tuple[int, int], has_bias: bool = False) -> Matrix:
        """A layer of the checkpoint.

        Raises:
            ModelError: it is missing, or has another shape.
        """
        bias = self.weights.take(f"{name}.bias", shape[:1]) if has_bias else None
        return Matrix(name, self.weights.take(f"{name}.weight", shape), bias)

    def parts(self, name: str, counts: Sequence[int], columns: int) -> list[Matrix]:
        """The layers that a fused matrix of the checkpoint holds, one below the other."""
        whole = self.weights.take(f"{name}.weight", (sum(counts), columns))
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        return [
            Matrix(f"{name}.{index}", RowRange(whole, start, count))
            for index, (start, count) in enumerate(zip(starts, counts, strict=True))
        ]

    def apply(self, x: ir.Value, matrix: Matrix) -> ir.Value:
        """x (..., columns) -> (..., rows)."""
        name = f"{matrix.name}.weight"
        if self.bits is None:
            out: ir.Value = self.graph.op("MatMul", x, self.graph.transposed(name, matrix.rows))
        else:
            packed, scales = self._quantized(matrix.rows, name, self.bits)
            out = self._matmul_nbits(x, packed, scales, matrix.rows, self.bits)
        if matrix.bias is not None:
            bias = self.graph.rows(f"{matrix.name}.bias", matrix.bias)
            out = self.graph.op("Add", out, bias)
        return out

    def embed(self, tokens: ir.Value, name: str, shape: tuple[int, int]) -> tuple[ir.Value, Table]:
        """Look tokens up: (batch, tokens, columns), and the table for a tied head.

        Raises:
            UnsupportedError: int8 or int4, and the width is no multiple of the block.
        """
        graph, name = self.graph, f"{name}.weight"
        rows = self.weights.take(name, shape)
        if self.bits is None:
            values = graph.rows(name, rows)
            return graph.op("Gather", values, tokens), Table(rows, values)
        matrix = QuantizedMatrix(rows, self.embedding_bits)
        if shape[1] % matrix.block_size:
            raise UnsupportedError(
                f"{self.weights.where}: hidden_size {shape[1]} is no multiple of "
                f"{matrix.block_size}, the block of --precision {self.precision}"
            )
        packed, scales = self._quantized(rows, name, self.embedding_bits)
        planned = next(tensor for tensor in graph.tensors if tensor.name == packed.name)
        x = graph.op(
            "GatherBlockQuantized",
            graph.view(planned, f"{name}.flat", (shape[0], shape[1] * self.embedding_bits // 8)),
            tokens,
            scales,
            domain=MICROSOFT,
            bits=self.embedding_bits,
            block_size=matrix.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return x, Table(rows, packed, scales)

    def head(self, x: ir.Value, tied: Table | None, name: str, shape: tuple[int, int]) -> ir.Value:
        """Logits (batch, tokens, vocabulary); `tied` is the embedding's table, or None."""
        graph, op = self.graph, self.graph.op
        rows = self.weights.take(f"{name}.weight", shape) if tied is None else tied.rows
        if self.bits is not None:
            pair = (tied.values, tied.scales) if tied and tied.scales else None
            packed, scales = pair or self._quantized(rows, f"{name}.weight", self.embedding_bits)
            return self._matmul_nbits(x, packed, scales, rows, self.embedding_bits)
        # Gemm takes the rows as the checkpoint has them, and so can share the embedding
        values = graph.rows(f"{name}.weight", rows) if tied is None else tied.values
        flat = op("Reshape", x, graph.constant([-1, shape[1]], np.int64))
        size = op("Shape", x, start=0, end=2)
        size = op("Concat", size, graph.constant([-1], np.int64), axis=0)
        logits: ir.Value = op("Reshape", op("Gemm", flat, values, transB=1), size)
        return logits

    def _quantized(self, rows: Rows, name: str, bits: int) -> tuple[ir.Value, ir.Value]:
        matrix = QuantizedMatrix(rows, bits)
        packed = self.graph.weight(
            f"{name}.q{bits}", np.uint8, matrix.packed_shape, matrix.packed_pieces
        )
        scales = self.graph.weight(
            f"{name}.scales", np.float32, matrix.scales_shape, matrix.scale_pieces
        )
        return packed, scales

    def _matmul_nbits(
        self, x: ir.Value, packed: ir.Value, scales: ir.Value, rows: Rows, bits: int
    ) -> ir.Value:
        out: ir.Value = self.graph.op(
            "MatMulNBits",
            x,
            packed,
            scales,
            domain=MICROSOFT,
            N=rows.shape[0],
            K=rows.shape[1],
            bits=bits,
            block_size=QuantizedMatrix(rows, bits).block_size,
            accuracy_level=self.accuracy_level or None,
        )
        return out


def stack(name: str, matrices: Sequence[Matrix]) -> Matrix:
    """One layer that computes several of the same input."""
    biases = tuple(matrix.bias for matrix in matrices if matrix.bias is not None)
    rows = Stacked(tuple(matrix.rows for matrix in matrices))
    return Matrix(name, rows, Stacked(biases) if biases else None)
