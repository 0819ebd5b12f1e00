"""The weights that a quantized export holds, unpacked into the reference's model.

What the export then differs by is what its runtime computes otherwise, not what quantization lost. The
formats are written down once more here, apart from the exporters: MatMulNBits by its
documentation, ggml's types by the gguf package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import UnsupportedError
from longrope_export.gguf_format import GgufHeader, read_header
from longrope_export.onnx_metadata import MODEL_FILE

if TYPE_CHECKING:
    import onnx

Floats = npt.NDArray[np.float32]

_FAR = 0.5  # of a row; rounding to 4 bits in blocks of 32 moves it by 0.36 at most
_FAR_IN_FEW_BITS = 0.9  # fewer than 4; to 2 bits in blocks of 16: 0.52, measured; a lost row: 1
_TINY = 0.01  # of the mean row: shorter rows may vanish in a float16 scale
_UNITED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class _Part:
    """Some rows of a parameter.

    Attributes:
        label: name in the export, for messages.
        parameter: name in transformers' model.
        first_row: of the parameter.
        values: (rows, columns).
        far: share of its norm that a row may be moved by.
        heads: ggml may keep the two halves of each of so many heads interleaved; 0: it does not.
    """

    label: str
    parameter: str
    first_row: int
    values: Floats
    far: float = _FAR
    heads: int = 0


def use_weights_of(model: Any, export: Path) -> list[str]:
    """Put an export's quantized weights in place of the source's, one tensor at a time.

    Args:
        model: transformers' model of the source, float32; tied parameters stay tied.
        export: a GGUF, or a folder with model.onnx.

    Returns:
        What is wrong: tensors that are no rounding of the source's.

    Raises:
        UnsupportedError: a tensor has no place in the model, or a format is not known here. Part
            of the weights may have been replaced.
    """
    import torch

    parameters = model.state_dict()
    parts = _of_gguf(model, export) if export.is_file() else _of_onnx(parameters, export)
    problems = []
    for part in parts:
        target = parameters[part.parameter][part.first_row :][: len(part.values)]
        if tuple(target.shape) != part.values.shape:
            raise UnsupportedError(
                f"{export}: {part.label} is {part.values.shape}, its place {tuple(target.shape)}"
            )
        source = target.numpy()
        choices = [part.values, *([_halves(part.values, part.heads)] if part.heads else [])]
        values = min(choices, key=lambda choice: float(np.abs(choice - source).sum()))
        wrong = _far_rows(values, source, part.far)
        if len(wrong):
            problems.append(
                f"{part.label}: {len(wrong)} of {len(values)} rows are no rounding of the "
                f"source's, the first is {wrong[0]}"
            )
        with torch.no_grad():
            target.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return problems


def _far_rows(values: Floats, source: Floats, most: float) -> npt.NDArray[np.int64]:
    sizes = np.linalg.norm(source, axis=1)
    distances = np.linalg.norm(values - source, axis=1)
    far = ~(distances <= most * np.maximum(sizes, _TINY * sizes.mean()))
    return np.flatnonzero(far)


def _halves(values: Floats, heads: int) -> Floats:
    """Rows of heads as (pair, part of the pair) -> (part, pair)."""
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _of_gguf(model: Any, path: Path) -> Iterator[_Part]:
    from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape

    header = read_header(path)
    if header.get("split.count", 1) != 1:
        raise UnsupportedError(f"{path}: a split file")
    places = _gguf_places(model, header)
    config = model.config.get_text_config()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in header.tensors:
        kind = GGMLQuantizationType(tensor.ggml_type)
        if kind is GGMLQuantizationType.F32:
            continue  # as exact as the source's
        if tensor.name not in places or len(tensor.shape) != 2:
            raise UnsupportedError(f"{path}: {tensor.name} has no place in transformers' model")
        shape = tuple(reversed(tensor.shape))
        offset = header.data_start_bytes + tensor.offset_bytes
        byte_shape = quant_shape_to_byte_shape(shape, kind)
        count = int(np.prod(byte_shape))
        data = np.fromfile(path, np.uint8, count, offset=offset).reshape(byte_shape)
        try:
            values = dequantize(data, kind).astype(np.float32)
        except NotImplementedError as error:
            raise UnsupportedError(f"{path}: {tensor.name}: {error}") from error
        far = _FAR if 8 * count / values.size >= 4 else _FAR_IN_FEW_BITS
        interleaved = heads.get(tensor.name.split(".")[-2], 0)
        yield _Part(tensor.name, places[tensor.name], 0, values, far, interleaved)


def _gguf_places(model: Any, header: GgufHeader) -> dict[str, str]:
    """Name in the GGUF -> name in transformers' model."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    if header.architecture not in known:
        raise UnsupportedError(f"{header.path}: architecture {header.architecture}")
    layers = int(model.config.get_text_config().num_hidden_layers)
    names = get_tensor_name_map(known[header.architecture], layers)
    found = {}
    for parameter in model.state_dict():
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is not None:
            found[name] = parameter
    return found


def _of_onnx(parameters: dict[str, Any], folder: Path) -> Iterator[_Part]:
    import onnx

    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    filled: dict[str, int] = {}  # rows of a parameter that its parts have had
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        codes, scales = node.input[1], node.input[2]
        if node.op_type == "GatherBlockQuantized":
            codes = node.input[0]
        if any(node.input[3:]):
            raise UnsupportedError(f"{folder}: {codes} has zero points or more")
        values = _unpack(node, _array(tensors[codes], folder), _array(tensors[scales], folder))
        first = 0
        for parameter in _onnx_places(codes.rpartition(".weight")[0], parameters):
            begin = filled.get(parameter, 0)
            count = min(len(parameters[parameter]) - begin, len(values) - first)
            if count <= 0:
                continue  # a tied head reads the embedding again
            yield _Part(codes, parameter, begin, values[first : first + count])
            filled[parameter], first = begin + count, first + count


def _onnx_places(name: str, parameters: dict[str, Any]) -> list[str]:
    """The parameters whose rows a matrix holds, one below the other.

    A matrix may be a part of a parameter, which a number at the end of its name says.
    """
    prefix, _, last = name.rpartition(".")
    whole = prefix if last.isdigit() else name
    if f"{whole}.weight" in parameters:
        return [f"{whole}.weight"]
    prefix, _, last = whole.rpartition(".")
    found = [f"{prefix}.{one}.weight" for one in _UNITED.get(last, ())]
    if not found or not parameters.keys() >= set(found):
        raise UnsupportedError(f"{name} has no place in transformers' model")
    return found


def _unpack(node: onnx.NodeProto, codes: npt.NDArray[np.uint8], scales: npt.NDArray[Any]) -> Floats:
    """(rows, columns): (code - 2^(bits - 1)) * scale of its block; low bits come first."""
    attributes = {a.name: a.i for a in node.attribute}
    bits = attributes.get("bits", 4)
    rows = len(scales.reshape(-1)) if not scales.shape else scales.shape[0]
    codes = codes.reshape(rows, -1)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(rows, -1)
    elif bits != 8:
        raise UnsupportedError(f"{node.name}: {bits} bits")
    blocks = codes.reshape(rows, -1, attributes["block_size"]).astype(np.float32)
    values = (blocks - 2 ** (bits - 1)) * scales.reshape(rows, -1, 1).astype(np.float32)
    result: Floats = values.reshape(rows, -1)[:, : attributes.get("K")]
    return result


def _array(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[Any]:
    import onnx

    values: npt.NDArray[Any] = onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
    return values
