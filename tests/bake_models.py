"""A model with every kind of key and tensor, an edit of it, and what must hold afterwards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType, RopeScalingType
from gguf.quants import quantize

from longrope_converters.to_gguf.bake import PADDING_KEY, HeaderEdit
from longrope_export.gguf_format import GgufHeader, read_header
from longrope_export.gguf_values import ValueType, make_array, make_key_value

LONG = np.linspace(1, 8, 16, dtype=np.float32)
SHORT = np.ones(16, np.float32)
SCALING = make_key_value("llama.rope.scaling.type", ValueType.STRING, "longrope")
LADDER = make_array("llama.rope.scaling.longrope.tier_factors", ValueType.FLOAT32, LONG)
EDIT = HeaderEdit(
    set_keys=(SCALING, LADDER),
    new_tensors={"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
)


def write_model(
    path: Path, *, splits: int = 0, rope_freqs: bool = False, name: str = "tiny"
) -> Path:
    """A model with quantized tensors and every kind of key, by the stock writer."""
    writer = GGUFWriter(path, "llama", split_max_tensors=splits, small_first_shard=False)
    writer.add_name(name)
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    writer.add_array("tokenizer.ggml.tokens", [b"\xff\xfe", "ä", "", "token"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_array("test.nested", [[1, 2], [3]])
    writer.add_bool("test.bool", True)
    writer.add_float64("test.double", 1e-300)
    random = np.random.default_rng(0)
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.full(16, 2, np.float32))
    for number in range(4):
        values = random.standard_normal((3, 64), dtype=np.float32)
        q4_1 = quantize(values, GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"blk.{number}.weight", q4_1, raw_dtype=GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"blk.{number}.norm", values[0, :33].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensor_data(path: Path) -> dict[str, bytes]:
    """Name to bytes, read by the stock reader."""
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


def check_consecutive(header: GgufHeader) -> None:
    """gguf.cpp: the offset of each tensor is the padded end of the one before, in listed order."""
    end = 0
    for info in header.tensors:
        assert info.offset_bytes == end, info.name
        assert info.num_bytes is not None
        end += info.num_bytes + -info.num_bytes % header.alignment_bytes
    assert header.data_bytes >= end


def check_edit(source: GgufHeader, source_data: dict[str, bytes], path: Path) -> None:
    """`path` is `source` with EDIT applied and everything else as it was, bit for bit."""
    header = read_header(path)
    check_consecutive(header)
    expected = {**source.key_values, SCALING.key: SCALING, LADDER.key: LADDER}
    kept = {key: entry for key, entry in header.key_values.items() if key != PADDING_KEY}
    assert list(kept.items()) == list(expected.items())  # the order too
    factors = {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}
    expected_data = source_data | {name: values.tobytes() for name, values in factors.items()}
    assert tensor_data(path) == expected_data
    names = [info.name for info in header.tensors]
    assert names == list(expected_data)
