"""Metadata values and tensor types of a GGUF file: numbers, sizes, packing and unpacking.

The tables are those of the gguf package (a test compares them). They stand here because importing
that package takes longer than rewriting a header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from longrope_export.errors import GgufError

GGML_TYPE_F32 = 0

_pack_length = struct.Struct("<Q").pack

# ggml type number -> (elements of a block, bytes of a block)
GGML_BLOCKS: Mapping[int, tuple[int, int]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    9: (32, 40),  # Q8_1
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    15: (256, 292),  # Q8_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
}


class ValueType(IntEnum):
    """Type word of a metadata value, as in ggml's gguf.h."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct and numpy know these letters, with "<" in front for little endian
SCALARS: Mapping[ValueType, str] = {
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT16: "<H",
    ValueType.INT16: "<h",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<?",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry. `raw` is the value as it stands in the file, behind the type word."""

    key: str
    value_type: ValueType
    raw: bytes

    @property
    def value(self) -> Any:
        """The decoded value: int, float, bool, str, or a list of str, or a numpy array."""
        return _decode(self.value_type, self.raw)

    def pack_key(self) -> bytes:
        """What stands in front of `raw` in a file."""
        return pack_string(self.key) + struct.pack("<I", self.value_type)

    def pack(self) -> bytes:
        return self.pack_key() + self.raw


def make_key_value(key: str, value_type: ValueType, value: Any) -> KeyValue:
    """Encode a scalar or a string.

    Raises:
        GgufError: if the value does not fit the type.
    """
    try:
        return KeyValue(key, value_type, _encode_scalar(value_type, value))
    except (struct.error, OverflowError, ValueError, TypeError, AttributeError) as error:
        raise GgufError(f"key {key}: {value!r} does not fit {value_type.name}: {error}") from error


def make_array(key: str, element_type: ValueType, values: Any) -> KeyValue:
    """Encode an array: any sequence or numpy array of numbers or bools, or str or bytes."""
    head = struct.pack("<IQ", element_type, len(values))
    if element_type == ValueType.STRING:
        pieces: list[bytes] = []
        for text in values:
            raw = text if isinstance(text, bytes) else text.encode("utf-8")
            pieces += (_pack_length(len(raw)), raw)
        body = b"".join(pieces)
    else:
        body = np.asarray(values, dtype=SCALARS[element_type]).tobytes()
    return KeyValue(key, ValueType.ARRAY, head + body)


def tensor_bytes(shape: Iterable[int], ggml_type: int) -> int | None:
    """Bytes of a tensor of `shape` (ggml order), or None for a type not in GGML_BLOCKS.

    Raises:
        GgufError: if the row length is not a multiple of the type's block size.
    """
    if ggml_type not in GGML_BLOCKS:
        return None
    block_size, type_size = GGML_BLOCKS[ggml_type]
    dims = tuple(shape)
    elements = 1
    for dim in dims:
        elements *= dim
    if dims and dims[0] % block_size:
        raise GgufError(f"row of {dims[0]} values is not a multiple of the block size {block_size}")
    return elements // block_size * type_size


def pack_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return _pack_length(len(raw)) + raw


def _encode_scalar(value_type: ValueType, value: Any) -> bytes:
    if value_type == ValueType.STRING:
        return pack_string(value)
    return struct.pack(SCALARS[value_type], value)


def _decode(value_type: ValueType, raw: bytes) -> Any:
    if value_type == ValueType.STRING:
        return raw[8:].decode("utf-8", errors="replace")
    if value_type != ValueType.ARRAY:
        return struct.unpack(SCALARS[value_type], raw)[0]
    element_type = ValueType(int.from_bytes(raw[:4], "little"))
    count = int.from_bytes(raw[4:12], "little")
    if element_type in SCALARS:
        return np.frombuffer(raw, dtype=SCALARS[element_type], count=count, offset=12)
    if element_type == ValueType.STRING:
        return list(_strings(raw, count))
    raise GgufError("an array of arrays cannot be decoded")


def _strings(raw: bytes, count: int) -> Iterator[str]:
    at = 12
    for _ in range(count):
        length = int.from_bytes(raw[at : at + 8], "little")
        yield raw[at + 8 : at + 8 + length].decode("utf-8", errors="replace")
        at += 8 + length
