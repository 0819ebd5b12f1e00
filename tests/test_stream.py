"""write_gguf: read back with the stock reader, compared with the stock kernels and permutation."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize

from longrope_converters.to_gguf import files, stream
from longrope_converters.to_gguf.plan import GgufPlan, PlannedTensor, SourceTensor
from longrope_converters.to_gguf.stream import plan_layout, write_gguf
from longrope_export.errors import LongRopeError, ModelError, OutputError
from longrope_export.gguf_format import read_header
from longrope_export.gguf_values import KeyValue, make_key_value
from longrope_export.outputs import replace_when_done

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
BF16, Q8_0 = GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0

KEYS = (
    make_key_value("general.architecture", GGUFValueType.STRING, "llama"),
    make_key_value("llama.context_length", GGUFValueType.UINT32, 4096),
)


class Weights:
    """A file of raw tensors and the same tensors as float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, npt.NDArray[np.float32]] = {}
        self._random = np.random.default_rng(0)
        path.write_bytes(b"eight by")  # tensors of a real file do not start at 0

    def add(self, name: str, shape: tuple[int, ...], dtype: str = "BF16") -> SourceTensor:
        values = self._random.standard_normal(shape, dtype=np.float32)
        if dtype == "BF16":
            raw = (values.view(np.uint32) >> 16).astype("<u2")
            values = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            raw = values.astype("<f2" if dtype == "F16" else "<f4")
            values = raw.astype(np.float32)
        self.values[name] = values
        with self.path.open("ab") as file:
            offset = file.tell()
            file.write(raw.tobytes())
        return SourceTensor(self.path, offset, raw.nbytes, dtype, shape)


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights(tmp_path / "weights.bin")


@pytest.fixture(params=[1 << 18, 96, 64], ids=["one piece", "96 elements", "64 elements"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small pieces too, so that seams fall inside tensors and inside heads."""
    monkeypatch.setattr(stream, "_CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(stream, "COPY_PIECE_BYTES", request.param * 2)
    yield


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def permuted(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """llama.cpp's LlamaModel.permute, as convert_hf_to_gguf.py has it."""
    return (
        values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def check_file(path: Path, plan: GgufPlan, values: dict[str, npt.NDArray[np.float32]]) -> None:
    reader = GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == [tensor.name for tensor in plan.tensors]
    for planned, read in zip(plan.tensors, reader.tensors, strict=True):
        expected = values[planned.name]
        if planned.num_heads is not None:
            expected = permuted(expected, planned.num_heads)
        assert read.tensor_type == planned.target_type
        assert tuple(read.shape) == tuple(reversed(planned.shape))
        assert read.data.tobytes() == quantize(expected, planned.target_type).tobytes(), (
            planned.name
        )
    header = read_header(path)
    assert tuple(header.key_values.values()) == plan.key_values
    end = 0
    for info in header.tensors:  # llama.cpp wants every tensor right behind the one before it
        assert info.offset_bytes == end
        assert info.num_bytes is not None
        end += info.num_bytes + -info.num_bytes % header.alignment_bytes
    assert header.data_bytes == end


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("target", [F32, F16, BF16, Q8_0])
@pytest.mark.usefixtures("chunks")
def test_tensors_have_the_bytes_of_the_stock_converter(
    tmp_path: Path, weights: Weights, dtype: str, target: GGMLQuantizationType
) -> None:
    plan = GgufPlan(
        KEYS,
        (
            PlannedTensor("matrix", weights.add("matrix", (24, 96), dtype), target),
            PlannedTensor("norm", weights.add("norm", (33,), dtype), F32),
            PlannedTensor("q", weights.add("q", (48, 32), dtype), target, num_heads=3),
            PlannedTensor("k", weights.add("k", (4, 64), dtype), target, num_heads=2),
            PlannedTensor("q.bias", weights.add("q.bias", (48,), dtype), F32, num_heads=3),
            PlannedTensor("experts", weights.add("experts", (2, 3, 64), dtype), target),
        ),
    )
    output = tmp_path / "out.gguf"
    write_gguf(plan, output, threads=3)
    check_file(output, plan, weights.values)


def test_computed_tensors_and_an_own_alignment(tmp_path: Path, weights: Weights) -> None:
    factors = np.linspace(1, 8, 33, dtype=np.float32)
    alignment = make_key_value("general.alignment", GGUFValueType.UINT32, 64)
    plan = GgufPlan(
        (*KEYS, alignment),
        (
            PlannedTensor("rope_factors_long.weight", factors, F32),
            PlannedTensor("matrix", weights.add("matrix", (3, 32)), Q8_0),
        ),
    )
    output = tmp_path / "out.gguf"
    write_gguf(plan, output)
    check_file(output, plan, {**weights.values, "rope_factors_long.weight": factors})
    assert read_header(output).data_start_bytes % 64 == 0


def test_a_file_without_tensors_is_its_header(tmp_path: Path) -> None:
    output = tmp_path / "vocabulary.gguf"
    write_gguf(GgufPlan(KEYS, ()), output)
    assert output.read_bytes() == plan_layout(GgufPlan(KEYS, ())).header


@pytest.mark.parametrize(
    "code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get
)
def test_copies_work_where_the_kernel_cannot(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(files, "_BUFFER_BYTES", 100)
    plan = GgufPlan(KEYS, (PlannedTensor("a", weights.add("a", (5, 64)), BF16),))
    write_gguf(plan, tmp_path / "out.gguf")
    check_file(tmp_path / "out.gguf", plan, weights.values)


def test_progress_adds_up_to_the_tensor_bytes(tmp_path: Path, weights: Weights) -> None:
    plan = GgufPlan(
        KEYS,
        (
            PlannedTensor("a", weights.add("a", (64, 64)), BF16),
            PlannedTensor("b", weights.add("b", (64, 64)), Q8_0, num_heads=2),
        ),
    )
    steps: list[int] = []
    write_gguf(plan, tmp_path / "out.gguf", progress=steps.append)
    assert sum(steps) == 64 * 64 * 2 + 64 * 64 // 32 * 34


@pytest.mark.parametrize("target", [BF16, F16], ids=["copied", "converted"])
def test_a_truncated_source_is_a_model_error_and_leaves_nothing(
    tmp_path: Path, weights: Weights, target: GGMLQuantizationType
) -> None:
    plan = GgufPlan(KEYS, (PlannedTensor("a", weights.add("a", (64, 64)), target),))
    os.truncate(weights.path, 5000)
    output = tmp_path / "out.gguf"
    with (
        pytest.raises(ModelError, match=r"weights\.bin: ends at byte 5000, 3200 more bytes"),
        replace_when_done(output) as temporary,
    ):
        write_gguf(plan, temporary)
    assert names(tmp_path) == ["weights.bin"]


def test_a_missing_source_is_a_model_error(tmp_path: Path) -> None:
    source = SourceTensor(tmp_path / "gone.safetensors", 0, 128, "BF16", (64,))
    with pytest.raises(ModelError, match=r"gone\.safetensors: cannot read: No such file"):
        write_gguf(GgufPlan(KEYS, (PlannedTensor("a", source, F32),)), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            PlannedTensor("a", SourceTensor(Path("f"), 0, 10, "BF16", (4,)), F32),
            r"f: tensor a: 10 bytes, shape \[4\] of BF16 needs 8",
        ),
        (
            PlannedTensor("a", SourceTensor(Path("f"), 0, 4, "F8_E4M3", (4,)), F32),
            "dtype F8_E4M3, expected one of BF16, F16, F32",
        ),
        (
            PlannedTensor(
                "a", SourceTensor(Path("f"), 0, 8, "BF16", (4,)), GGMLQuantizationType.Q4_K
            ),
            "cannot be written as Q4_K",
        ),
        (
            PlannedTensor("a", SourceTensor(Path("f"), 0, 12, "BF16", (6,)), F32, num_heads=2),
            "6 rows cannot be split into 2 heads of two halves",
        ),
        (
            PlannedTensor("a", SourceTensor(Path("f"), 0, 24, "BF16", (1, 12)), Q8_0),
            "row of 12 values is not a multiple of the block size 32",
        ),
    ],
)
def test_a_contradictory_plan_is_refused_before_anything_is_written(
    tmp_path: Path, tensor: PlannedTensor, message: str
) -> None:
    with pytest.raises(LongRopeError, match=message):
        write_gguf(GgufPlan(KEYS, (tensor,)), tmp_path / "out.gguf")
    assert names(tmp_path) == []


def test_an_interrupt_stops_the_workers_and_leaves_nothing(
    tmp_path: Path, weights: Weights
) -> None:
    tensors = tuple(
        PlannedTensor(f"t{number}", weights.add(f"t{number}", (64, 64)), F16)
        for number in range(50)
    )
    calls: list[int] = []

    def interrupt(count: int) -> None:
        calls.append(count)
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        replace_when_done(tmp_path / "out.gguf") as temporary,
    ):
        write_gguf(GgufPlan(KEYS, tensors), temporary, threads=2, progress=interrupt)
    assert len(calls) <= 2
    assert names(tmp_path) == ["weights.bin"]


def test_a_full_disk_is_noticed_before_any_work(small_disk: Path, weights: Weights) -> None:
    plan = GgufPlan(KEYS, (PlannedTensor("a", weights.add("a", (1024, 1024)), F16),))
    steps: list[int] = []
    with (
        pytest.raises(OutputError, match=r"out\.gguf: No space left on device"),
        replace_when_done(small_disk / "out.gguf") as temporary,
    ):
        write_gguf(plan, temporary, progress=steps.append)
    assert steps == []
    assert names(small_disk) == []


def test_a_file_size_limit_is_an_output_error(tmp_path: Path, weights: Weights) -> None:
    plan = GgufPlan(KEYS, (PlannedTensor("a", weights.add("a", (1024, 64)), F16),))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with (
            pytest.raises(OutputError, match=r"out\.gguf: File too large"),
            replace_when_done(tmp_path / "out.gguf") as temporary,
        ):
            write_gguf(plan, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["weights.bin"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """A 256 MiB tensor, sparse on disk, in a fresh process: at most 200 MiB resident."""
    script = """
import re, sys
from pathlib import Path
from gguf.constants import GGMLQuantizationType
from longrope_converters.to_gguf.plan import GgufPlan, PlannedTensor, SourceTensor
from longrope_converters.to_gguf.stream import write_gguf
path, shape = Path(sys.argv[1]), (8192, 16384)
with path.open("wb") as file:
    file.truncate(2 * shape[0] * shape[1])
source = SourceTensor(path, 0, 2 * shape[0] * shape[1], "BF16", shape)
tensor = PlannedTensor("q", source, GGMLQuantizationType.Q8_0, num_heads=32)
write_gguf(GgufPlan((), (tensor,)), Path(sys.argv[2]), threads=8)
# not ru_maxrss, which starts with the size of the process that started this one
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
assert "torch" not in sys.modules
"""
    arguments = [str(tmp_path / "source"), str(tmp_path / "out.gguf")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert int(done.stdout) < 200


def test_key_values_keep_their_bytes(tmp_path: Path) -> None:
    raw = KeyValue("test.bytes", GGUFValueType.STRING, b"\x03\0\0\0\0\0\0\0\xff\xfe\xfd")
    write_gguf(GgufPlan((*KEYS, raw), ()), tmp_path / "out.gguf")
    assert read_header(tmp_path / "out.gguf").key_values["test.bytes"] == raw
