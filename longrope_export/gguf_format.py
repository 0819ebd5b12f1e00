"""The GGUF container: read a header without decoding it, and build a new one.

Values stay the raw bytes of the file until somebody asks for one, so rewriting a header keeps
token tables, merges and unknown value types byte for byte. Tensor data is never read here.

Layout, little endian (GGUF version 2 and 3)::

    "GGUF"  u32 version  u64 n_tensors  u64 n_key_values
    key_value * n_key_values:  string key, u32 type, value
    tensor * n_tensors:        string name, u32 n_dims, u64 dims[n_dims], u32 type, u64 offset
    zero bytes up to a multiple of general.alignment (32 unless the key says otherwise)
    tensor data: each tensor at data_start + offset, padded to the alignment

A string is u64 length and UTF-8 bytes. An array is u32 element type, u64 count, elements.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from longrope_export.errors import GgufError

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_U64 = struct.Struct("<Q")

# numpy dtypes of the fixed-size value types, little endian
_SCALARS: Mapping[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry. `raw` is the value as it stands in the file, behind the type word."""

    key: str
    value_type: GGUFValueType
    raw: bytes

    @property
    def value(self) -> Any:
        """The decoded value: int, float, bool, str, or a list of str, or a numpy array."""
        return _decode(self.value_type, self.raw)

    def pack_key(self) -> bytes:
        """What stands in front of `raw` in a file."""
        return _pack_string(self.key) + struct.pack("<I", self.value_type)

    def pack(self) -> bytes:
        return self.pack_key() + self.raw


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry. `shape` is in ggml order: the contiguous dimension first.

    `offset_bytes` counts from the start of the data section; `ggml_type` is kept as a number,
    since files of llama.cpp forks use types that no table here knows.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset_bytes: int

    @property
    def num_bytes(self) -> int | None:
        """Size of the data without padding, or None for a type that the gguf package lacks."""
        return tensor_bytes(self.shape, self.ggml_type)

    def pack(self) -> bytes:
        dims = struct.pack(f"<I{len(self.shape)}Q", len(self.shape), *self.shape)
        return (
            _pack_string(self.name) + dims + struct.pack("<IQ", self.ggml_type, self.offset_bytes)
        )


@dataclass(frozen=True)
class GgufHeader:
    """Everything in front of the tensor data of one file."""

    path: Path
    version: int
    key_values: Mapping[str, KeyValue]
    tensors: tuple[TensorInfo, ...]
    alignment_bytes: int
    data_start_bytes: int
    file_bytes: int

    def get(self, key: str, default: Any = None) -> Any:
        entry = self.key_values.get(key)
        return default if entry is None else entry.value

    @property
    def architecture(self) -> str:
        architecture = self.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise GgufError(f"{self.path}: key general.architecture is missing: not a model file")
        return architecture

    def arch_get(self, name: str, default: Any = None) -> Any:
        """Value of `{architecture}.{name}`."""
        return self.get(f"{self.architecture}.{name}", default)

    @property
    def data_bytes(self) -> int:
        return self.file_bytes - self.data_start_bytes


def tensor_bytes(shape: Iterable[int], ggml_type: int) -> int | None:
    """Bytes of a tensor of `shape` (ggml order), or None for a type unknown to the gguf package.

    Raises:
        GgufError: if the row length is not a multiple of the type's block size.
    """
    try:
        block_size, type_size = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    except (ValueError, KeyError):
        return None
    dims = tuple(shape)
    elements = 1
    for dim in dims:
        elements *= dim
    if dims and dims[0] % block_size:
        raise GgufError(f"row of {dims[0]} values is not a multiple of the block size {block_size}")
    return elements // block_size * type_size


def make_key_value(key: str, value_type: GGUFValueType, value: Any) -> KeyValue:
    """Encode a scalar or a string.

    Raises:
        GgufError: if the value does not fit the type.
    """
    try:
        return KeyValue(key, value_type, _encode_scalar(value_type, value))
    except (struct.error, OverflowError, ValueError, TypeError) as error:
        raise GgufError(f"key {key}: {value!r} does not fit {value_type.name}: {error}") from error


def make_array(key: str, element_type: GGUFValueType, values: Any) -> KeyValue:
    """Encode an array: any sequence or numpy array of numbers or bools, or str or bytes."""
    head = struct.pack("<IQ", element_type, len(values))
    if element_type == GGUFValueType.STRING:
        body = b"".join(
            struct.pack("<Q", len(item)) + item
            for item in (v if isinstance(v, bytes) else v.encode("utf-8") for v in values)
        )
    else:
        body = np.asarray(values, dtype=_SCALARS[element_type]).tobytes()
    return KeyValue(key, GGUFValueType.ARRAY, head + body)


def build_header(
    key_values: Iterable[KeyValue],
    tensors: Iterable[TensorInfo],
    alignment_bytes: int = DEFAULT_ALIGNMENT,
    version: int = VERSION,
) -> bytes:
    """Bytes of a complete header, padded with zeros so that the data section can follow."""
    packed_tensors = [info.pack() for info in tensors]
    packed_keys: list[bytes] = []
    for entry in key_values:
        # the raw value is not copied before the join: a vocabulary takes megabytes
        packed_keys += (entry.pack_key(), entry.raw)
    parts = [
        MAGIC,
        struct.pack("<IQQ", version, len(packed_tensors), len(packed_keys) // 2),
        *packed_keys,
        *packed_tensors,
    ]
    parts.append(bytes(padding(sum(map(len, parts)), alignment_bytes)))
    return b"".join(parts)


def padding(size: int, alignment_bytes: int) -> int:
    """How many bytes are missing from `size` to the next multiple of the alignment."""
    return -size % alignment_bytes


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; the cost does not depend on the tensor data.

    Raises:
        GgufError: not a GGUF, truncated, a count or length beyond the end of the file, tensors
            that overlap or reach past the end, a version or byte order not known here.
    """
    try:
        size = path.stat().st_size
        if size < 24:
            raise GgufError(
                f"{path}: {size} bytes, too short for a GGUF header (24 bytes at least)"
            )
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Parser(path, view).parse()
    except OSError as error:
        raise GgufError(f"{path}: cannot read: {error.strerror}") from error


class _Parser:
    """A cursor over the mapped file. Every read is checked against the end of the file."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self.view, self.size, self.at = path, view, len(view), 0

    def fail(self, problem: str) -> GgufError:
        return GgufError(f"{self.path}: damaged GGUF at byte {self.at}: {problem}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.fail(
                f"{what} needs {count} bytes, {self.size - self.at} are left in the file"
            )
        chunk = self.view[self.at : self.at + count]
        self.at += count
        return chunk

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str) -> str:
        raw = self.take(self.u64(f"length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error.reason}") from error

    def parse(self) -> GgufHeader:
        if self.take(4, "magic") != MAGIC:
            raise GgufError(
                f"{self.path}: not a GGUF file: it does not start with the bytes 'GGUF'"
            )
        version = self.u32("version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
            hint = (
                "the file is big endian; convert it with gguf-convert-endian first"
                if swapped in (2, 3)
                else "this reader knows versions 2 and 3"
            )
            raise GgufError(f"{self.path}: GGUF version {version}: {hint}")
        num_tensors, num_keys = self.u64("tensor count"), self.u64("key count")
        # the smallest possible entries: an empty key with a one-byte value, a nameless tensor
        if num_keys * 13 + num_tensors * 24 > self.size:
            raise self.fail(
                f"counts of {num_keys} keys and {num_tensors} tensors do not fit {self.size} bytes"
            )
        key_values: dict[str, KeyValue] = {}
        for _ in range(num_keys):
            entry = self.key_value()
            if entry.key in key_values:
                raise self.fail(f"key {entry.key!r} stands twice")
            key_values[entry.key] = entry
        tensors = tuple(self.tensor_info() for _ in range(num_tensors))
        alignment = self.alignment(key_values)
        data_start = self.at + padding(self.at, alignment)
        if tensors and data_start > self.size:
            raise self.fail("the file ends before its tensor data")
        header = GgufHeader(
            self.path,
            version,
            key_values,
            tensors,
            alignment,
            min(data_start, self.size),
            self.size,
        )
        self.check_tensors(header)
        return header

    def alignment(self, key_values: Mapping[str, KeyValue]) -> int:
        entry = key_values.get("general.alignment")
        alignment = DEFAULT_ALIGNMENT if entry is None else entry.value
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
            raise self.fail(f"general.alignment is {alignment!r}, expected a multiple of 8 to 2^20")
        return alignment

    def key_value(self) -> KeyValue:
        key = self.text("a key")
        value_type = self.value_type(f"type of key {key!r}")
        start = self.at
        self.skip_value(value_type, f"key {key!r}", depth=0)
        return KeyValue(key, value_type, self.view[start : self.at])

    def value_type(self, what: str) -> GGUFValueType:
        number = self.u32(what)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.fail(f"{what} is {number}, expected 0 to 12") from error

    def skip_value(self, value_type: GGUFValueType, what: str, depth: int) -> None:
        if value_type == GGUFValueType.STRING:
            self.skip(self.u64(f"length of {what}"), what)
        elif value_type == GGUFValueType.ARRAY:
            if depth > 3:
                raise self.fail(f"{what}: arrays nested deeper than 3")
            element_type = self.value_type(f"element type of {what}")
            count = self.u64(f"count of {what}")
            if element_type in _SCALARS:
                self.skip(count * np.dtype(_SCALARS[element_type]).itemsize, what)
            else:
                if count * 8 > self.size - self.at:
                    raise self.fail(f"{what}: {count} elements do not fit the rest of the file")
                if element_type == GGUFValueType.STRING:
                    self.skip_strings(count, what)
                else:
                    for _ in range(count):
                        self.skip_value(element_type, what, depth + 1)
        else:
            self.skip(np.dtype(_SCALARS[value_type]).itemsize, what)

    def skip_strings(self, count: int, what: str) -> None:
        """Same checks as `skip`, in one loop: a vocabulary has some 100 000 strings."""
        view, at, last_length_at = self.view, self.at, self.size - 8
        length_at = _U64.unpack_from
        for _ in range(count):
            if at > last_length_at:
                break
            at += 8 + length_at(view, at)[0]
        else:
            if at <= self.size:
                self.at = at
                return
        raise self.fail(f"{what}: its {count} strings reach past the end of the file")

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(
                f"{what} needs {count} bytes, {self.size - self.at} are left in the file"
            )
        self.at += count

    def tensor_info(self) -> TensorInfo:
        name = self.text("a tensor name")
        num_dims = self.u32(f"dimension count of {name!r}")
        if num_dims > MAX_DIMS:
            raise self.fail(
                f"tensor {name!r} has {num_dims} dimensions, at most {MAX_DIMS} are allowed"
            )
        shape = struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims, f"shape of {name!r}"))
        return TensorInfo(name, shape, self.u32("tensor type"), self.u64("tensor offset"))

    def check_tensors(self, header: GgufHeader) -> None:
        names = {info.name for info in header.tensors}
        if len(names) != len(header.tensors):
            raise GgufError(f"{self.path}: two tensors have the same name")
        end_of_previous = 0
        for info in sorted(header.tensors, key=lambda info: info.offset_bytes):
            where = f"{self.path}: tensor {info.name!r}"
            if info.offset_bytes % header.alignment_bytes:
                raise GgufError(f"{where}: offset {info.offset_bytes} is not aligned")
            if info.offset_bytes < end_of_previous:
                raise GgufError(f"{where}: its data overlaps the tensor before it")
            try:
                size = info.num_bytes or 0
            except GgufError as error:
                raise GgufError(f"{where}: {error}") from error
            end_of_previous = info.offset_bytes + size
            if end_of_previous > header.data_bytes:
                raise GgufError(
                    f"{where}: its data ends at byte {header.data_start_bytes + end_of_previous}, "
                    f"the file has {self.size} bytes: it is truncated; fetch it again"
                )


def _pack_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _encode_scalar(value_type: GGUFValueType, value: Any) -> bytes:
    if value_type == GGUFValueType.STRING:
        return _pack_string(value)
    if value_type == GGUFValueType.FLOAT32:
        return struct.pack("<f", value)
    if value_type == GGUFValueType.FLOAT64:
        return struct.pack("<d", value)
    if value_type == GGUFValueType.BOOL:
        return struct.pack("<?", value)
    dtype = np.dtype(_SCALARS[value_type])
    return int(value).to_bytes(dtype.itemsize, "little", signed=dtype.kind == "i")


def _decode(value_type: GGUFValueType, raw: bytes) -> Any:
    if value_type == GGUFValueType.STRING:
        return raw[8:].decode("utf-8", errors="replace")
    if value_type != GGUFValueType.ARRAY:
        return np.frombuffer(raw, dtype=_SCALARS[value_type])[0].item()
    element_type = GGUFValueType(int.from_bytes(raw[:4], "little"))
    count = int.from_bytes(raw[4:12], "little")
    if element_type in _SCALARS:
        return np.frombuffer(raw, dtype=_SCALARS[element_type], count=count, offset=12)
    if element_type == GGUFValueType.STRING:
        return list(_strings(raw, count))
    raise GgufError("an array of arrays cannot be decoded")


def _strings(raw: bytes, count: int) -> Iterator[str]:
    at = 12
    for _ in range(count):
        length = int.from_bytes(raw[at : at + 8], "little")
        yield raw[at + 8 : at + 8 + length].decode("utf-8", errors="replace")
        at += 8 + length
