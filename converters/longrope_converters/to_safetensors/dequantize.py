"""Weights of a GGUF as safetensors files: dequantized in pieces, with threads, in flat memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from longrope_converters.to_gguf.checkpoint import INDEX_NAME
from longrope_converters.to_gguf.encode import Encoder
from longrope_converters.to_gguf.files import (
    open_source,
    preallocate,
    read_exactly,
    start_writeback,
    write_exactly,
)
from longrope_converters.to_gguf.stream import default_threads
from longrope_converters.to_safetensors.gguf_settings import GgufTensor
from longrope_converters.to_safetensors.weights import Progress
from longrope_export.errors import UnsupportedError
from longrope_export.gguf_values import tensor_bytes
from longrope_export.stock_rope import DEFINITION_KEY

_CHUNK_ELEMENTS = 1 << 18
_F16_MAX = 65504.0

# our name -> (safetensors' name, bytes per element, the ggml type of the same bytes)
_DTYPES = {
    "f32": ("F32", 4, GGMLQuantizationType.F32),
    "f16": ("F16", 2, GGMLQuantizationType.F16),
    "bf16": ("BF16", 2, GGMLQuantizationType.BF16),
}
TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def own_dtype(tensors: Sequence[GgufTensor]) -> str:
    """The type of the largest tensor if it is unquantized, else bf16."""
    largest = max(tensors, key=lambda tensor: math.prod(tensor.shape))
    name = largest.ggml_type.name.lower()
    return name if name in _DTYPES else "bf16"


@dataclass(frozen=True)
class _Piece:
    """Whole rows of one tensor, or whole heads where rows are reordered."""

    tensor: GgufTensor
    first_row: int
    num_rows: int
    output: int  # descriptor
    output_offset: int


@dataclass(frozen=True)
class _Shard:
    name: str
    header: bytes
    tensors: tuple[GgufTensor, ...]
    offsets: tuple[int, ...]  # of the tensors in the file
    num_bytes: int


def write_weights(
    tensors: Sequence[GgufTensor],
    folder: Path,
    dtype: str,
    *,
    definition: str = "",
    max_shard_bytes: int,
    threads: int | None,
    progress: Progress,
) -> None:
    """Write model.safetensors, or shards and their index.

    Args:
        definition: text for the key "longrope" of the first file's metadata; "" for none.
        progress: told of written bytes, from the worker threads but never from two at once.

    Raises:
        UnsupportedError: a weight beyond the range of float16.
        ModelError: the source cannot be read.
        OSError: the output cannot be written.
    """
    shards = list(_plan_shards(tensors, dtype, definition, max_shard_bytes))
    with contextlib.ExitStack() as stack:
        sources: dict[Path, int] = {}
        for tensor in tensors:
            if tensor.path not in sources:
                sources[tensor.path] = open_source(tensor.path)
                stack.callback(os.close, sources[tensor.path])
        outputs = []
        for shard in shards:
            output = os.open(folder / shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, output)
            preallocate(output, shard.num_bytes)
            write_exactly(output, 0, shard.header)
            outputs.append(output)
        pieces = _pieces(shards, outputs, dtype)
        _Writer(pieces, sources, dtype, progress).run(threads or default_threads())
    if len(shards) > 1:
        sizes = sum(shard.num_bytes - len(shard.header) for shard in shards)
        places = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": sizes}, "weight_map": places}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan_shards(
    tensors: Sequence[GgufTensor], dtype: str, definition: str, max_shard_bytes: int
) -> Iterator[_Shard]:
    kind, item_bytes, _ = _DTYPES[dtype]
    groups: list[list[GgufTensor]] = [[]]
    size = 0
    for tensor in tensors:
        num_bytes = math.prod(tensor.shape) * item_bytes
        if groups[-1] and size + num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += num_bytes
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        metadata = {"format": "pt"}
        if definition and number == 1:
            metadata[DEFINITION_KEY] = definition
        entries: dict[str, Any] = {"__metadata__": metadata}
        at, offsets = 0, []
        for tensor in group:
            end = at + math.prod(tensor.shape) * item_bytes
            entries[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [at, end]}
            offsets.append(at)
            at = end
        raw = json.dumps(entries, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        header = len(raw).to_bytes(8, "little") + raw
        places = tuple(len(header) + offset for offset in offsets)
        yield _Shard(name, header, tuple(group), places, len(header) + at)


def _pieces(shards: Sequence[_Shard], outputs: Sequence[int], dtype: str) -> Iterator[_Piece]:
    item_bytes = _DTYPES[dtype][1]
    for shard, output in zip(shards, outputs, strict=True):
        for tensor, offset in zip(shard.tensors, shard.offsets, strict=True):
            rows, columns = _rows_and_columns(tensor)
            unit = rows // tensor.num_heads if tensor.num_heads else 1
            step = max(1, _CHUNK_ELEMENTS // (unit * columns)) * unit
            for first in range(0, rows, step):
                count = min(step, rows - first)
                yield _Piece(tensor, first, count, output, offset + first * columns * item_bytes)


def _rows_and_columns(tensor: GgufTensor) -> tuple[int, int]:
    """A vector is one row, unless its entries are reordered (biases of llama)."""
    if len(tensor.shape) == 1 and tensor.num_heads is None:
        return 1, tensor.shape[0]
    return tensor.shape[0], math.prod(tensor.shape[1:])


class _Writer:
    def __init__(
        self, pieces: Iterator[_Piece], sources: dict[Path, int], dtype: str, progress: Progress
    ) -> None:
        self._pieces, self._sources, self._progress = pieces, sources, progress
        self._dtype = dtype
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            workers = [pool.submit(self._work) for _ in range(threads)]
            try:
                for worker in workers:
                    worker.result()
            finally:
                self._stop.set()

    def _work(self) -> None:
        try:
            while (piece := self._next_piece()) is not None:
                data = self._encode(piece.tensor, self._read(piece))
                write_exactly(piece.output, piece.output_offset, data)
                start_writeback(piece.output, piece.output_offset, data.size)
                with self._lock:
                    self._progress(data.size)
        except BaseException:
            self._stop.set()
            raise

    def _next_piece(self) -> _Piece | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._pieces, None)

    def _read(self, piece: _Piece) -> npt.NDArray[np.float32]:
        """The piece's rows in transformers' order, (rows, columns)."""
        tensor, (_, columns) = piece.tensor, _rows_and_columns(piece.tensor)
        row_bytes = tensor_bytes((columns,), tensor.ggml_type) or 0
        raw = np.empty((piece.num_rows, row_bytes), np.uint8)
        start = tensor.offset_bytes + piece.first_row * row_bytes
        read_exactly(self._sources[tensor.path], tensor.path, start, raw.reshape(-1))
        values = np.asarray(dequantize(raw, tensor.ggml_type), dtype=np.float32)
        if tensor.num_heads is not None:
            # neighbours in the file are row j of the first and of the second half of a head
            half = tensor.shape[0] // tensor.num_heads // 2
            values = values.reshape(-1, half, 2, columns).swapaxes(1, 2)
        if tensor.minus_one:
            values = values - np.float32(1)
        return np.ascontiguousarray(values).reshape(piece.num_rows, columns)

    def _encode(self, tensor: GgufTensor, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        if self._dtype == "f16" and np.abs(values).max() > _F16_MAX:
            raise UnsupportedError(
                f"{tensor.path}: {tensor.name} holds values beyond float16: use --dtype bf16"
            )
        encoder = Encoder(values.size)
        return encoder.encode(values.reshape(-1).view(np.uint8), "F32", _DTYPES[self._dtype][2])
