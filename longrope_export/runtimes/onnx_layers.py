"""A copy of an exported graph, in memory, that also hands out what each layer gives to the next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

_NORM = "model.layers.{}.input_layernorm.weight"
_LAST_NORM = "model.norm.weight"


def with_layer_outputs(path: Path, num_layers: int) -> tuple[bytes, list[str]]:
    """model.onnx with more outputs; its weights stay in the data file beside it.

    The output of a layer is what the first norm of the next one reads, a residual stream in all
    families: a norm is known by the name of its weight.

    Returns:
        The serialized model, and the name of each layer's output; no names if the graph is not
        one of ours.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    streams = {
        weight: stream for node in model.graph.node for weight, stream in _normed_streams(node)
    }
    norms = [*(_NORM.format(layer) for layer in range(1, num_layers)), _LAST_NORM]
    if not streams.keys() >= set(norms):
        return b"", []
    names = [streams[norm] for norm in norms]
    dtype = next(v.type.tensor_type.elem_type for v in model.graph.output if v.name == "logits")
    for name in names:
        shape = ["batch", "tokens", None]
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, shape))
    return model.SerializeToString(), names


def _normed_streams(node: onnx.NodeProto) -> list[tuple[str, Any]]:
    """(name of the norm's weight, what it reads), or nothing where the node is no norm."""
    if node.op_type == "RMSNormalization":
        return [(node.input[1], node.input[0])]
    if node.op_type == "SkipSimplifiedLayerNormalization":
        return [(node.input[2], node.output[3])]  # it adds two inputs first
    return []
