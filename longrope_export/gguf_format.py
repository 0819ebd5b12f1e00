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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.errors import GgufError
from longrope_export.gguf_values import SCALARS, KeyValue, ValueType, pack_string, tensor_bytes

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_U64 = struct.Struct("<Q")


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
        """Size of the data without padding, or None for a type not in GGML_BLOCKS."""
        return tensor_bytes(self.shape, self.ggml_type)

    def pack(self) -> bytes:
        dims = struct.pack(f"<I{len(self.shape)}Q", len(self.shape), *self.shape)
        return pack_string(self.name) + dims + struct.pack("<IQ", self.ggml_type, self.offset_bytes)


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
    modified_ns: int  # of the file, when it was read

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


#: fills the room that an edit in place leaves; says nothing
PADDING_KEY = "general.longrope_export.padding"


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


def latest(header: GgufHeader) -> GgufHeader:
    """The header as it is, or read again where the file has another size or time by now.

    Raises:
        GgufError: see read_header.
    """
    try:
        now = header.path.stat()
    except OSError as error:
        raise GgufError(f"{header.path}: cannot read: {error.strerror}") from error
    same = (now.st_size, now.st_mtime_ns) == (header.file_bytes, header.modified_ns)
    return header if same else read_header(header.path)


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; the cost does not depend on the tensor data.

    Raises:
        GgufError: not a GGUF, truncated, a count or length beyond the end of the file, tensors
            that overlap or reach past the end, a version or byte order not known here.
    """
    try:
        stat = path.stat()
        size = stat.st_size
        if size < 24:
            raise GgufError(
                f"{path}: {size} bytes, too short for a GGUF header (24 bytes at least)"
            )
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Parser(path, view, stat.st_mtime_ns).parse()
    except OSError as error:
        raise GgufError(f"{path}: cannot read: {error.strerror}") from error


class _Parser:
    """A cursor over the mapped file. Every read is checked against the end of the file."""

    def __init__(self, path: Path, view: mmap.mmap, modified_ns: int) -> None:
        self.path, self.view, self.size, self.at = path, view, len(view), 0
        self.modified_ns = modified_ns

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
            self.modified_ns,
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

    def value_type(self, what: str) -> ValueType:
        number = self.u32(what)
        try:
            return ValueType(number)
        except ValueError as error:
            raise self.fail(f"{what} is {number}, expected 0 to 12") from error

    def skip_value(self, value_type: ValueType, what: str, depth: int) -> None:
        if value_type == ValueType.STRING:
            self.skip(self.u64(f"length of {what}"), what)
        elif value_type == ValueType.ARRAY:
            if depth > 3:
                raise self.fail(f"{what}: arrays nested deeper than 3")
            element_type = self.value_type(f"element type of {what}")
            count = self.u64(f"count of {what}")
            if element_type in SCALARS:
                self.skip(count * struct.calcsize(SCALARS[element_type]), what)
            else:
                if count * 8 > self.size - self.at:
                    raise self.fail(f"{what}: {count} elements do not fit the rest of the file")
                if element_type == ValueType.STRING:
                    self.skip_strings(count, what)
                else:
                    for _ in range(count):
                        self.skip_value(element_type, what, depth + 1)
        else:
            self.skip(struct.calcsize(SCALARS[value_type]), what)

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
