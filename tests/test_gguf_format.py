"""The GGUF header: read back by the gguf package's own reader, hostile files packed by hand."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGUFValueType
from gguf_files import gguf_keys, write_gguf_file

from longrope_export.errors import GgufError
from longrope_export.gguf_format import build_header, read_header
from longrope_export.gguf_values import GGML_BLOCKS, ValueType, make_array, make_key_value

SCALARS: dict[GGUFValueType, Any] = {
    GGUFValueType.UINT8: 255,
    GGUFValueType.INT8: -128,
    GGUFValueType.UINT16: 65535,
    GGUFValueType.INT16: -1,
    GGUFValueType.UINT32: 1 << 31,
    GGUFValueType.INT32: -5,
    GGUFValueType.FLOAT32: 0.5,
    GGUFValueType.BOOL: True,
    GGUFValueType.UINT64: 1 << 63,
    GGUFValueType.INT64: -(1 << 40),
    GGUFValueType.FLOAT64: 0.1,
    GGUFValueType.STRING: "h\u00e9llo",
}


def test_the_gguf_package_reads_what_we_write_and_we_read_it_back(tmp_path: Path) -> None:
    keys = [make_key_value(f"k.{kind.name}", kind, value) for kind, value in SCALARS.items()]
    keys += [
        make_array("a.f32", GGUFValueType.FLOAT32, np.arange(3.0)),
        make_array("a.bool", GGUFValueType.BOOL, [True, False]),
        make_array("a.str", GGUFValueType.STRING, ["x", "", "\u00e9"]),
        make_array("a.empty", GGUFValueType.UINT32, []),
    ]
    tensors = {"t": np.arange(12, dtype=np.float32).reshape(3, 4)}
    path = write_gguf_file(tmp_path / "x.gguf", [*gguf_keys(), *keys], tensors)
    theirs = gguf.GGUFReader(path)
    ours = read_header(path)
    for kind, value in SCALARS.items():
        assert theirs.fields[f"k.{kind.name}"].contents() == value
        assert ours.get(f"k.{kind.name}") == value
    assert theirs.fields["a.str"].contents() == ours.get("a.str") == ["x", "", "\u00e9"]
    assert theirs.fields["a.f32"].contents() == list(ours.get("a.f32")) == [0, 1, 2]
    assert list(ours.get("a.bool")) == [True, False]
    assert ours.tensors[0].shape == (4, 3)
    np.testing.assert_array_equal(theirs.tensors[0].data, tensors["t"])


def test_the_tables_are_those_of_the_gguf_package() -> None:
    assert {kind.name: kind.value for kind in ValueType} == {
        kind.name: kind.value for kind in GGUFValueType
    }
    assert dict(GGML_BLOCKS) == {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def test_a_header_that_is_read_and_built_again_is_the_same(tiny_gguf: Path) -> None:
    header = read_header(tiny_gguf)
    rebuilt = build_header(header.key_values.values(), header.tensors, header.alignment_bytes)
    assert tiny_gguf.read_bytes().startswith(rebuilt)
    assert len(rebuilt) == header.data_start_bytes


def test_every_truncation_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 1000, 7), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(GgufError, match=r"cut\.gguf"):
            read_header(cut)


def head(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ggjt" + bytes(40), "does not start with the bytes 'GGUF'"),
        (head(version=1) + bytes(40), "version 1: this reader knows versions 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big endian"),
        (head(keys=1 << 60) + bytes(40), "counts of 1152921504606846976 keys"),
        (head(tensors=1 << 60) + bytes(40), "do not fit"),
        (head(keys=1) + struct.pack("<Q", 1 << 62) + bytes(40), "a key needs"),
        (
            head(keys=1) + string(b"k") + struct.pack("<I", 99) + bytes(40),
            "is 99, expected 0 to 12",
        ),
        (
            head(keys=1) + string(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(40),
            "elements do not fit",
        ),
        (
            head(keys=1) + string(b"k") + struct.pack("<IIQ", 9, 12, 1 << 61) + bytes(40),
            "bytes are|needs",
        ),
        (head(keys=1) + string(b"\xff") + struct.pack("<I", 0) + bytes(40), "not UTF-8"),
        (
            head(keys=1)
            + string(b"k")
            + struct.pack("<I", 9)
            + struct.pack("<IQ", 9, 1) * 5
            + bytes(40),
            "nested deeper",
        ),
        (head(tensors=1) + string(b"t") + struct.pack("<I", 9) + bytes(80), "9 dimensions"),
    ],
)
def test_hostile_headers(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(GgufError, match=message):
        read_header(path)


def test_hostile_tensor_tables(tmp_path: Path) -> None:
    def tensor(name: bytes, offset: int, elements: int = 8, kind: int = 0) -> bytes:
        return string(name) + struct.pack("<IQIQ", 1, elements, kind, offset)

    path = tmp_path / "bad.gguf"
    for table, message in (
        (tensor(b"a", 0) + tensor(b"a", 32), "same name"),
        (tensor(b"a", 0) + tensor(b"b", 16), "not aligned"),
        (tensor(b"a", 0, 16) + tensor(b"b", 32), "overlaps"),
        (tensor(b"a", 0) + tensor(b"b", 1 << 40), "truncated"),
        (tensor(b"a", 0) + tensor(b"b", 32, 1 << 50), "truncated"),
        (tensor(b"a", 0) + tensor(b"b", 32, 33, kind=8), "not a multiple of the block size 32"),
    ):
        path.write_bytes(head(tensors=2) + table + bytes(200))
        with pytest.raises(GgufError, match=message):
            read_header(path)


def test_tensor_type_of_a_fork_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "fork.gguf"
    table = string(b"t") + struct.pack("<IQIQ", 1, 8, 997, 0)
    path.write_bytes(head(tensors=1) + table + bytes(100))
    info = read_header(path).tensors[0]
    assert (info.ggml_type, info.num_bytes) == (997, None)


def test_values_that_do_not_fit() -> None:
    for kind, value in ((GGUFValueType.UINT32, -1), (GGUFValueType.UINT8, 256)):
        with pytest.raises(GgufError, match=f"does not fit {kind.name}"):
            make_key_value("k", kind, value)
