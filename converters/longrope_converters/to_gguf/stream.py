"""Write a planned GGUF: header first, then every tensor at its place, with threads.

Memory does not depend on the model: tensors pass through fixed buffers in pieces, and bytes that
do not change are copied by the kernel.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longrope_converters.to_gguf.encode import (
    ITEM_BYTES,
    SAME_TYPE,
    TARGET_TYPES,
    Encoder,
    encoded_bytes,
)
from longrope_converters.to_gguf.files import (
    COPY_PIECE_BYTES,
    copy_range,
    open_source,
    preallocate,
    read_exactly,
    start_writeback,
    write_exactly,
)
from longrope_converters.to_gguf.plan import GgufPlan, PlannedTensor, SourceTensor
from longrope_export.errors import ModelError
from longrope_export.gguf_format import DEFAULT_ALIGNMENT, TensorInfo, build_header, padding
from longrope_export.gguf_values import tensor_bytes

# Elements read, encoded and written at once; a multiple of every block size. Twice as many cost
# twice the kernel time in writes when this was measured (f16, ext4).
_CHUNK_ELEMENTS = 1 << 18

MAX_THREADS = 8


@dataclass(frozen=True)
class Layout:
    """Where everything of the output will lie. `file_bytes` includes the last tensor's padding."""

    header: bytes
    tensors: tuple[TensorInfo, ...]
    file_bytes: int


def default_threads() -> int:
    return min(MAX_THREADS, os.cpu_count() or 1)


def plan_layout(plan: GgufPlan) -> Layout:
    """Check the plan and place its tensors; reads no file.

    Raises:
        ModelError: a tensor whose numbers contradict each other, or of a type not known here.
    """
    alignment = next(
        (entry.value for entry in plan.key_values if entry.key == "general.alignment"),
        DEFAULT_ALIGNMENT,
    )
    infos, offset = [], 0
    for tensor in plan.tensors:
        _check(tensor)
        shape = tuple(reversed(tensor.shape))
        infos.append(TensorInfo(tensor.name, shape, int(tensor.target_type), offset))
        size = tensor_bytes(shape, tensor.target_type) or 0
        offset += size + padding(size, alignment)
    header = build_header(plan.key_values, infos, alignment)
    return Layout(header, tuple(infos), len(header) + offset)


def write_gguf(
    plan: GgufPlan,
    output: Path,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the file. On failure what was written so far stays under `output`.

    Args:
        plan: metadata and tensors.
        output: a temporary name: the caller syncs, renames or removes it.
        threads: number of worker threads, by default the number of CPUs up to 8.
        progress: called with the number of bytes written since the last call, from the worker
            threads but never from two at once.

    Raises:
        ModelError: a source file that cannot be read or ends early, or an inconsistent plan.
        OSError: the output cannot be written, ENOSPC included.
    """
    layout = plan_layout(plan)
    with contextlib.ExitStack() as stack:
        sources = {}
        for tensor in plan.tensors:
            if isinstance(tensor.source, SourceTensor) and tensor.source.path not in sources:
                sources[tensor.source.path] = descriptor = open_source(tensor.source.path)
                stack.callback(os.close, descriptor)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        stack.callback(os.close, descriptor)
        preallocate(descriptor, layout.file_bytes)
        write_exactly(descriptor, 0, layout.header)
        _Writer(plan, layout, sources, descriptor, progress).run(threads or default_threads())


@dataclass(frozen=True)
class _Piece:
    """A part of one tensor: equal runs of source bytes that become one run of output bytes.

    One run keeps its order. Two runs hold the same rows of the two halves of a head, and their
    rows take turns in the output.
    """

    tensor: PlannedTensor
    source_offsets: tuple[int, ...]
    run_bytes: int
    output_offset: int
    output_bytes: int


class _Writer:
    def __init__(
        self,
        plan: GgufPlan,
        layout: Layout,
        sources: dict[Path, int],
        output: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._sources, self._output, self._progress = sources, output, progress
        self._pieces = _pieces(plan, layout)
        self._max_elements = max((_piece_elements(tensor) for tensor in plan.tensors), default=0)
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
        encoder = Encoder(self._max_elements)
        read = np.empty(self._max_elements * 4, np.uint8)
        ordered = np.empty_like(read)  # pages that are never touched cost nothing
        try:
            while (piece := self._next_piece()) is not None:
                self._write_piece(piece, encoder, read, ordered)
                start_writeback(self._output, piece.output_offset, piece.output_bytes)
                if self._progress is not None:
                    with self._lock:
                        self._progress(piece.output_bytes)
        except BaseException:
            self._stop.set()
            raise

    def _next_piece(self) -> _Piece | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._pieces, None)

    def _write_piece(
        self,
        piece: _Piece,
        encoder: Encoder,
        read: np.ndarray[tuple[int], np.dtype[np.uint8]],
        ordered: np.ndarray[tuple[int], np.dtype[np.uint8]],
    ) -> None:
        tensor, source = piece.tensor, piece.tensor.source
        if not isinstance(source, SourceTensor):
            (start,) = piece.source_offsets
            raw = np.ascontiguousarray(source, "<f4").reshape(-1).view(np.uint8)
            raw = raw[start : start + piece.run_bytes]
            write_exactly(
                self._output, piece.output_offset, encoder.encode(raw, "F32", tensor.target_type)
            )
            return
        descriptor = self._sources[source.path]
        if tensor.num_heads is None and SAME_TYPE[source.dtype] == tensor.target_type:
            (start,) = piece.source_offsets
            copy_range(
                descriptor, source.path, start, self._output, piece.output_offset, piece.run_bytes
            )
            return
        raw = read[: len(piece.source_offsets) * piece.run_bytes]
        for index, start in enumerate(piece.source_offsets):
            run = raw[index * piece.run_bytes : (index + 1) * piece.run_bytes]
            read_exactly(descriptor, source.path, start, run)
        if tensor.num_heads is not None:
            row_bytes = _row_elements(tensor) * ITEM_BYTES[source.dtype]
            halves = raw.reshape(2, -1, row_bytes)
            raw = ordered[: raw.size]
            np.copyto(raw.reshape(-1, 2, row_bytes), halves.swapaxes(0, 1))
        write_exactly(
            self._output,
            piece.output_offset,
            encoder.encode(raw, source.dtype, tensor.target_type),
        )


def _pieces(plan: GgufPlan, layout: Layout) -> Iterator[_Piece]:
    """All parts of all tensors, in file order."""
    for tensor, info in zip(plan.tensors, layout.tensors, strict=True):
        start = len(layout.header) + info.offset_bytes
        if tensor.num_heads is None:
            yield from _pieces_in_order(tensor, start)
        else:
            yield from _pieces_of_heads(tensor, tensor.num_heads, start)


def _pieces_in_order(tensor: PlannedTensor, output_offset: int) -> Iterator[_Piece]:
    dtype, first = _dtype_and_offset(tensor)
    item_bytes = ITEM_BYTES[dtype]
    same = SAME_TYPE[dtype] == tensor.target_type
    step = COPY_PIECE_BYTES // item_bytes if same else _CHUNK_ELEMENTS
    num_elements = math.prod(tensor.shape)
    for start in range(0, num_elements, step):
        count = min(step, num_elements - start)
        yield _Piece(
            tensor,
            (first + start * item_bytes,),
            count * item_bytes,
            output_offset + encoded_bytes(start, tensor.target_type),
            encoded_bytes(count, tensor.target_type),
        )


def _pieces_of_heads(tensor: PlannedTensor, num_heads: int, output_offset: int) -> Iterator[_Piece]:
    dtype, first = _dtype_and_offset(tensor)
    row_elements = _row_elements(tensor)
    row_bytes = row_elements * ITEM_BYTES[dtype]
    half = tensor.shape[0] // num_heads // 2
    step = max(1, _CHUNK_ELEMENTS // (2 * row_elements))
    for head in range(num_heads):
        head_row = head * 2 * half
        for start in range(0, half, step):
            count = min(step, half - start)
            output_row = head_row + 2 * start
            yield _Piece(
                tensor,
                tuple(first + (head_row + start + part * half) * row_bytes for part in (0, 1)),
                count * row_bytes,
                output_offset + encoded_bytes(output_row * row_elements, tensor.target_type),
                encoded_bytes(2 * count * row_elements, tensor.target_type),
            )


def _dtype_and_offset(tensor: PlannedTensor) -> tuple[str, int]:
    if isinstance(tensor.source, SourceTensor):
        return tensor.source.dtype, tensor.source.offset_bytes
    return "F32", 0


def _row_elements(tensor: PlannedTensor) -> int:
    return math.prod(tensor.shape[1:])


def _piece_elements(tensor: PlannedTensor) -> int:
    """Most elements that a piece of this tensor has in memory."""
    smallest = 2 * _row_elements(tensor) if tensor.num_heads else 1
    return max(min(_CHUNK_ELEMENTS, math.prod(tensor.shape)), smallest)


def _check(tensor: PlannedTensor) -> None:
    if tensor.target_type not in TARGET_TYPES:
        raise ModelError(f"tensor {tensor.name}: cannot be written as {tensor.target_type.name}")
    source = tensor.source
    if isinstance(source, SourceTensor):
        if source.dtype not in ITEM_BYTES:
            raise ModelError(
                f"{source.path}: tensor {tensor.name}: dtype {source.dtype}, "
                f"expected one of {', '.join(ITEM_BYTES)}"
            )
        expected = math.prod(source.shape) * ITEM_BYTES[source.dtype]
        if source.num_bytes != expected:
            raise ModelError(
                f"{source.path}: tensor {tensor.name}: {source.num_bytes} bytes, "
                f"shape {list(source.shape)} of {source.dtype} needs {expected}"
            )
    elif tensor.num_heads is not None:
        raise ModelError(f"tensor {tensor.name}: rows of a computed tensor cannot be reordered")
    if tensor.num_heads is not None and (
        not tensor.shape or tensor.num_heads < 1 or tensor.shape[0] % (2 * tensor.num_heads)
    ):
        raise ModelError(
            f"tensor {tensor.name}: {tensor.shape[0] if tensor.shape else 0} rows cannot be split "
            f"into {tensor.num_heads} heads of two halves"
        )
