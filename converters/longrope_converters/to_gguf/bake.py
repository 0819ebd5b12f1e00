"""Put keys and small float32 tensors into an existing GGUF without decoding its tensors.

Only the header is built anew. Keys that are not named keep their bytes and their order, and the
tensor data moves as one block, so every quantization stays as it is, those of forks included.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longrope_converters.to_gguf.files import (
    copy_range,
    open_source,
    preallocate,
    start_writeback,
    write_exactly,
)
from longrope_export.errors import GgufError
from longrope_export.gguf_format import (
    PADDING_KEY,
    GgufHeader,
    TensorInfo,
    build_header,
    padding,
)
from longrope_export.gguf_values import GGML_TYPE_F32, KeyValue, make_key_value

_TENSOR_COUNT_KEY = "split.tensors.count"

# llama.cpp keeps tensor names in 64 bytes, the closing zero included.
_MAX_NAME_BYTES = 63

_COPY_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class HeaderEdit:
    """What to change.

    Attributes:
        set_keys: an existing key is replaced at its place, a new one is added at the end.
        remove_keys: keys to leave out; a name that the file lacks is ignored.
        new_tensors: name to 1-D float32 values, added at the end of the file.
        replace_tensors: old name to new name. The old tensor, which must be F32 with the same
            number of elements, is renamed and takes its values from `new_tensors`.
    """

    set_keys: Sequence[KeyValue] = ()
    remove_keys: Collection[str] = ()
    new_tensors: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    replace_tensors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Patch:
    """Bytes to write at `offset_bytes` of the data section."""

    offset_bytes: int
    data: bytes


@dataclass(frozen=True)
class EditedHeader:
    """A header after an edit, and what has to happen in the data section.

    The first `kept_bytes` of the source's data section are kept; `patches` are written over them
    (`replaced`) and behind them (`added`), which makes `data_bytes` in all.
    """

    source: GgufHeader
    key_values: tuple[KeyValue, ...]
    tensors: tuple[TensorInfo, ...]
    replaced: tuple[Patch, ...]
    added: tuple[Patch, ...]
    kept_bytes: int
    data_bytes: int

    def build(self) -> bytes:
        return build_header(
            self.key_values, self.tensors, self.source.alignment_bytes, self.source.version
        )


def bake_gguf(
    source: GgufHeader,
    output: Path,
    edit: HeaderEdit,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write an edited copy of one file; of a split model, its first shard.

    Args:
        source: the header of an existing GGUF, from read_header; the file is only read.
        output: a temporary name: the caller syncs, renames or removes it.
        edit: the changes.
        progress: called with the number of bytes written since the last call.

    Raises:
        GgufError: the edit does not fit the source. Nothing was written.
        OSError: the output cannot be written, ENOSPC included.
    """
    edited = apply_edit(source, edit)
    header = edited.build()
    reading = open_source(source.path)
    try:
        writing = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            preallocate(writing, len(header) + edited.data_bytes)
            write_exactly(writing, 0, header)
            for start in range(0, edited.kept_bytes, _COPY_PIECE_BYTES):
                count = min(_COPY_PIECE_BYTES, edited.kept_bytes - start)
                at = len(header) + start
                copy_range(
                    reading, source.path, source.data_start_bytes + start, writing, at, count
                )
                start_writeback(writing, at, count)
                if progress is not None:
                    progress(count)
            for patch in (*edited.replaced, *edited.added):
                write_exactly(writing, len(header) + patch.offset_bytes, patch.data)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def apply_edit(header: GgufHeader, edit: HeaderEdit) -> EditedHeader:
    """Work out the new header. Nothing is read or written.

    Raises:
        GgufError: with the file's name, if the edit does not fit it.
    """
    number, count = split_position(header)
    if count > 1 and number > 0:
        raise GgufError(f"{header.path}: not the first shard of its model: give the first one")
    _check_tensors(header, edit)
    tensors, replaced = _replace_tensors(header, edit)
    kept_bytes = _used_data_bytes(header)
    end = kept_bytes + padding(kept_bytes, header.alignment_bytes)
    added = []
    for name, values in edit.new_tensors.items():
        if name in edit.replace_tensors.values():
            continue
        tensors.append(TensorInfo(name, values.shape, GGML_TYPE_F32, end))
        data = values.astype("<f4").tobytes()
        data += bytes(padding(len(data), header.alignment_bytes))
        added.append(Patch(end, data))
        end += len(data)
    return EditedHeader(
        header,
        _edit_keys(header, edit, len(added)),
        tuple(tensors),
        tuple(replaced),
        tuple(added),
        kept_bytes,
        end,
    )


def split_position(header: GgufHeader) -> tuple[int, int]:
    """Index of this shard, from 0, and the number of shards; (0, 1) for a model in one file.

    Raises:
        GgufError: if the keys are no numbers, or contradict each other.
    """
    number, count = header.get("split.no", 0), header.get("split.count", 1)
    # some writers put split.count = 0 into models that are not split
    if not isinstance(number, int) or not isinstance(count, int) or not 0 <= number < max(count, 1):
        raise GgufError(
            f"{header.path}: split.no {number!r} and split.count {count!r} make no sense"
        )
    return number, max(count, 1)


def _edit_keys(header: GgufHeader, edit: HeaderEdit, num_added: int) -> tuple[KeyValue, ...]:
    changes = {entry.key: entry for entry in edit.set_keys}
    count = header.key_values.get(_TENSOR_COUNT_KEY)
    if count is not None and num_added:
        if not isinstance(count.value, int):
            raise GgufError(f"{header.path}: {_TENSOR_COUNT_KEY} is not a number")
        # llama.cpp compares the tensors of all shards with this number
        changes[_TENSOR_COUNT_KEY] = make_key_value(
            _TENSOR_COUNT_KEY, count.value_type, count.value + num_added
        )
    alignment = changes.get("general.alignment")
    if alignment is not None and alignment.value != header.alignment_bytes:
        raise GgufError(f"{header.path}: general.alignment cannot be changed without moving data")
    removed = {*edit.remove_keys, PADDING_KEY}
    if removed & {"general.architecture", "general.alignment", *changes}:
        raise GgufError(
            f"{header.path}: cannot remove {', '.join(sorted(edit.remove_keys))}: "
            f"the file needs general.architecture and general.alignment, "
            f"and a key cannot be set and removed at once"
        )
    entries = {key: entry for key, entry in header.key_values.items() if key not in removed}
    return tuple((entries | changes).values())


def _check_tensors(header: GgufHeader, edit: HeaderEdit) -> None:
    existing = {info.name for info in header.tensors}
    for name, values in edit.new_tensors.items():
        if values.ndim != 1 or values.size == 0 or values.dtype != np.float32:
            raise GgufError(
                f"{header.path}: new tensor {name}: {values.dtype} of shape {list(values.shape)}, "
                f"expected one dimension of float32"
            )
        if len(name.encode("utf-8")) > _MAX_NAME_BYTES:
            raise GgufError(f"{header.path}: tensor name {name!r} is longer than 63 bytes")
        if name in existing and name not in edit.replace_tensors:
            raise GgufError(f"{header.path}: tensor {name} is already there; replace it instead")
    for old, new in edit.replace_tensors.items():
        if old not in existing:
            raise GgufError(f"{header.path}: there is no tensor {old} to replace")
        if new not in edit.new_tensors:
            raise GgufError(f"{header.path}: no values given for {new}, which replaces {old}")
    if len(set(edit.replace_tensors.values())) != len(edit.replace_tensors):
        raise GgufError(f"{header.path}: one tensor cannot replace two")


def _replace_tensors(header: GgufHeader, edit: HeaderEdit) -> tuple[list[TensorInfo], list[Patch]]:
    tensors, patches = [], []
    for info in header.tensors:
        new_name = edit.replace_tensors.get(info.name)
        if new_name is None:
            tensors.append(info)
            continue
        values = edit.new_tensors[new_name]
        if info.ggml_type != GGML_TYPE_F32 or info.shape != values.shape:
            raise GgufError(
                f"{header.path}: tensor {info.name} of shape {list(info.shape)} and type "
                f"{info.ggml_type} cannot take {values.size} float32 values"
            )
        tensors.append(TensorInfo(new_name, info.shape, info.ggml_type, info.offset_bytes))
        patches.append(Patch(info.offset_bytes, values.astype("<f4").tobytes()))
    return tensors, patches


def _used_data_bytes(header: GgufHeader) -> int:
    """End of the last tensor; the whole section where a type's size is unknown."""
    ends = [
        info.offset_bytes + info.num_bytes for info in header.tensors if info.num_bytes is not None
    ]
    if len(ends) < len(header.tensors):
        return header.data_bytes
    return max(ends, default=0)
