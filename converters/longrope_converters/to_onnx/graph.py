"""A thin layer over onnx_ir: nodes by one call each, weights that stay on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from longrope_converters.to_onnx.weights import (
    ALIGNMENT_BYTES,
    PlannedTensor,
    Rows,
    row_pieces,
    transposed_pieces,
)
from longrope_export import __version__

IR_VERSION = 10
OPSET = 23
DATA_NAME = "model.onnx.data"
MICROSOFT = "com.microsoft"
NUMPY_TYPES: Mapping[str, np.dtype[np.generic]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
}


class Graph:
    """Collects inputs, nodes, weights and outputs, then makes the model.

    Args:
        dtype: of activations and of unquantized weights, float32 or float16.
    """

    def __init__(self, dtype: npt.DTypeLike, name: str) -> None:
        self.dtype = np.dtype(dtype)
        self.type = ir.DataType.from_numpy(self.dtype)
        self.tensors: list[PlannedTensor] = []
        self.microsoft = False
        self._name = name
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._end = 0

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def optional_input(
        self, name: str, default: npt.NDArray[Any], shape: Sequence[int | str]
    ) -> ir.Value:
        """An input that a caller may leave out: an initializer that is listed as input too."""
        tensor = ir.tensor(default, name=name)
        value = self.input(name, tensor.dtype, shape)
        value.const_value = tensor
        self._initializers.append(value)
        return value

    def output(
        self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]
    ) -> None:
        value.name = name
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        unused: Sequence[int] = (),
        **attributes: Any,
    ) -> Any:
        """Add a node; returns its output, or the tuple of its outputs if there are several.

        Args:
            unused: outputs that nobody wants; a named one would be allocated at every call.
        """
        self.microsoft |= domain == MICROSOFT
        number = len(self._nodes)
        names = [f"{op_type}_{number}.{index}" for index in range(outputs)]
        values = [ir.Value(name="" if i in unused else name) for i, name in enumerate(names)]
        self._nodes.append(
            ir.node(
                op_type,
                list(inputs),
                {key: value for key, value in attributes.items() if value is not None},
                domain=domain,
                outputs=values,
                name=f"{op_type}_{number}",
            )
        )
        return values[0] if outputs == 1 else tuple(values)

    def constant(self, array: npt.ArrayLike, dtype: npt.DTypeLike) -> ir.Value:
        """A small tensor inside model.onnx, as a Constant node: shape inference can see it."""
        value = np.asarray(array, dtype)
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=ir.tensor(value))
        return self._constants[key]

    def rows(self, name: str, rows: Rows) -> ir.Value:
        """A weight as it stands in the checkpoint."""
        dtype = self.dtype
        return self.weight(name, dtype, rows.shape, lambda: row_pieces(rows, dtype))

    def transposed(self, name: str, rows: Rows) -> ir.Value:
        """The transpose of a weight matrix, as MatMul wants it."""
        dtype = self.dtype
        return self.weight(name, dtype, rows.shape[::-1], lambda: transposed_pieces(rows, dtype))

    def weight(
        self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...], pieces: Any
    ) -> ir.Value:
        """A tensor of the data file, made by `pieces` when the file is written."""
        planned = PlannedTensor(name, np.dtype(dtype), shape, self._end, pieces)
        self.tensors.append(planned)
        self._end = -(-(self._end + planned.num_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return self.view(planned, name, shape)

    def view(self, planned: PlannedTensor, name: str, shape: Sequence[int]) -> ir.Value:
        """An initializer over the bytes of a planned tensor, in its own or in another shape."""
        tensor = ir.ExternalTensor(
            DATA_NAME,
            planned.offset_bytes,
            planned.num_bytes,
            ir.DataType.from_numpy(planned.dtype),
            shape=ir.Shape(shape),
            name=name,
        )
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(shape),
            const_value=tensor,
        )
        self._initializers.append(value)
        return value

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the graph; the data file beside it is the caller's."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports={"": OPSET, **({MICROSOFT: 1} if self.microsoft else {})},
            name=self._name,
        )
        model = ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="longrope-export",
            producer_version=__version__,
            metadata_props=dict(metadata),
        )
        ir.save(model, path)
