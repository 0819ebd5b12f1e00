"""Edits of existing GGUF files into a new file: what changes, what must not, what failures leave."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from bake_models import (
    EDIT,
    LONG,
    SCALING,
    SHORT,
    check_consecutive,
    check_edit,
    names,
    sha256,
    tensor_data,
    write_model,
)
from gguf.constants import GGMLQuantizationType

from longrope_converters.to_gguf import bake
from longrope_converters.to_gguf.bake import HeaderEdit, bake_gguf
from longrope_converters.to_gguf.in_place import bake_in_place
from longrope_export.errors import GgufError, OutputError
from longrope_export.gguf_format import TensorInfo, build_header, read_header
from longrope_export.gguf_values import KeyValue, ValueType, make_array, make_key_value
from longrope_export.outputs import replace_when_done


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf")


def test_bake_keeps_every_other_byte(model: Path, tmp_path: Path) -> None:
    before = sha256(model)
    steps: list[int] = []
    bake_gguf(read_header(model), tmp_path / "out.gguf", EDIT, steps.append)
    check_edit(read_header(model), tensor_data(model), tmp_path / "out.gguf")
    assert sha256(model) == before
    last = read_header(model).tensors[-1]
    assert sum(steps) == last.offset_bytes + (last.num_bytes or 0)


def test_a_set_key_is_replaced_at_its_place_and_a_removed_one_is_gone(
    model: Path, tmp_path: Path
) -> None:
    edit = HeaderEdit(set_keys=(SCALING,), remove_keys=("test.bool", "never.there"))
    bake_gguf(read_header(model), tmp_path / "out.gguf", edit)
    before, after = read_header(model), read_header(tmp_path / "out.gguf")
    assert list(after.key_values) == [key for key in before.key_values if key != "test.bool"]
    assert after.get("llama.rope.scaling.type") == "longrope"


def test_an_empty_edit_reproduces_the_file(model: Path, tmp_path: Path) -> None:
    bake_gguf(read_header(model), tmp_path / "out.gguf", HeaderEdit())
    size = (tmp_path / "out.gguf").stat().st_size
    assert (tmp_path / "out.gguf").read_bytes() == model.read_bytes()[:size]
    assert not model.read_bytes()[size:].strip(b"\0")  # only padding of the last tensor is gone


def test_a_tensor_is_replaced_in_its_place(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", rope_freqs=True)
    edit = HeaderEdit(
        new_tensors={"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
        replace_tensors={"rope_freqs.weight": "rope_factors_long.weight"},
    )
    bake_gguf(read_header(model), tmp_path / "out.gguf", edit)
    header = read_header(tmp_path / "out.gguf")
    check_consecutive(header)
    assert header.tensors[0].name == "rope_factors_long.weight"
    assert header.tensors[-1].name == "rope_factors_short.weight"
    expected = tensor_data(model)
    del expected["rope_freqs.weight"]
    expected |= {"rope_factors_long.weight": LONG.tobytes()}
    expected |= {"rope_factors_short.weight": SHORT.tobytes()}
    assert tensor_data(tmp_path / "out.gguf") == expected


def test_baking_twice_replaces_the_factors(model: Path, tmp_path: Path) -> None:
    bake_gguf(read_header(model), tmp_path / "once.gguf", EDIT)
    names = {name: name for name in EDIT.new_tensors}
    again = HeaderEdit(EDIT.set_keys, (), EDIT.new_tensors, names)
    bake_gguf(read_header(tmp_path / "once.gguf"), tmp_path / "twice.gguf", again)
    assert sha256(tmp_path / "once.gguf") == sha256(tmp_path / "twice.gguf")


def test_an_own_alignment_is_kept(tmp_path: Path) -> None:
    alignment = make_key_value("general.alignment", ValueType.UINT32, 256)
    architecture = make_key_value("general.architecture", ValueType.STRING, "llama")
    empty = tmp_path / "empty.gguf"
    empty.write_bytes(build_header((architecture, alignment), (), 256))
    bake_gguf(read_header(empty), tmp_path / "out.gguf", EDIT)
    header = read_header(tmp_path / "out.gguf")
    check_consecutive(header)
    assert (header.alignment_bytes, header.data_start_bytes % 256) == (256, 0)
    assert header.tensors[1].offset_bytes == 256


def test_tensors_of_unknown_types_are_carried_along(tmp_path: Path, model: Path) -> None:
    raw = bytearray(model.read_bytes())
    at = raw.index(b"blk.3.weight") + len("blk.3.weight") + 4 + 2 * 8
    assert struct.unpack_from("<I", raw, at) == (GGMLQuantizationType.Q4_1,)
    struct.pack_into("<I", raw, at, 337)  # a type of a fork
    model.write_bytes(raw)
    bake_gguf(read_header(model), tmp_path / "out.gguf", EDIT)
    before, after = read_header(model), read_header(tmp_path / "out.gguf")
    assert after.tensors[: len(before.tensors)] == before.tensors
    data = model.read_bytes()[before.data_start_bytes :]
    assert (tmp_path / "out.gguf").read_bytes()[after.data_start_bytes :].startswith(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (HeaderEdit(new_tensors={"blk.0.norm": LONG}), "tensor blk.0.norm is already there"),
        (HeaderEdit(new_tensors={"a": LONG.reshape(4, 4)}), "expected one dimension of float32"),
        (HeaderEdit(new_tensors={"a" * 64: LONG}), "longer than 63 bytes"),
        (HeaderEdit(replace_tensors={"gone": "a"}), "there is no tensor gone"),
        (HeaderEdit(replace_tensors={"blk.0.norm": "a"}), "no values given for a"),
        (
            HeaderEdit(new_tensors={"a": LONG}, replace_tensors={"blk.0.norm": "a"}),
            r"tensor blk.0.norm of shape \[33\] and type 0 cannot take 16 float32 values",
        ),
        (
            HeaderEdit(new_tensors={"a": LONG}, replace_tensors={"blk.0.weight": "a"}),
            r"tensor blk.0.weight of shape \[64, 3\] and type 3 cannot take 16",
        ),
        (HeaderEdit(remove_keys=("general.architecture",)), "cannot remove general.architecture"),
        (
            HeaderEdit((make_key_value("general.alignment", ValueType.UINT32, 64),)),
            "general.alignment cannot be changed",
        ),
    ],
)
def test_an_edit_that_does_not_fit_writes_nothing(
    model: Path, tmp_path: Path, edit: HeaderEdit, message: str
) -> None:
    with pytest.raises(GgufError, match=message):
        bake_gguf(read_header(model), tmp_path / "out.gguf", edit)
    with pytest.raises(GgufError, match=message):
        bake_in_place(read_header(model), edit)
    assert names(tmp_path) == ["model.gguf"]


def test_an_interrupt_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bake, "_COPY_PIECE_BYTES", 100)
    before = sha256(model)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        replace_when_done(tmp_path / "out.gguf") as temporary,
    ):
        bake_gguf(read_header(model), temporary, EDIT, interrupt)
    assert names(tmp_path) == ["model.gguf"]
    assert sha256(model) == before


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with (
            pytest.raises(OutputError, match=r"out\.gguf: File too large"),
            replace_when_done(tmp_path / "out.gguf") as temporary,
        ):
            bake_gguf(read_header(model), temporary, EDIT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["model.gguf"]


def test_a_really_full_disk_leaves_nothing(small_disk: Path, model: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(1 << 20))
    with (
        pytest.raises(OutputError, match=r"out\.gguf: No space left on device"),
        replace_when_done(small_disk / "out.gguf") as temporary,
    ):
        bake_gguf(read_header(model), temporary, EDIT)
    assert names(small_disk) == ["filler"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_big_bake_needs_little_memory(tmp_path: Path) -> None:
    """512 MiB of data and a 128k vocabulary in a fresh process: at most 64 MiB resident."""
    big = tmp_path / "big.gguf"
    tokens = make_array(
        "tokenizer.ggml.tokens", ValueType.STRING, [f"token {n}" for n in range(128_000)]
    )
    architecture = make_key_value("general.architecture", ValueType.STRING, "llama")
    tensor = TensorInfo("t", (1 << 27,), int(GGMLQuantizationType.F32), 0)
    big.write_bytes(build_header((architecture, tokens), (tensor,)))
    os.truncate(big, big.stat().st_size + (1 << 29))
    script = """
import re, sys
from pathlib import Path
import numpy as np
from longrope_converters.to_gguf.bake import HeaderEdit, bake_gguf
from longrope_export.gguf_format import read_header
edit = HeaderEdit(new_tensors={"rope_factors_long.weight": np.ones(64, np.float32)})
bake_gguf(read_header(Path(sys.argv[1])), Path(sys.argv[2]), edit)
# not ru_maxrss, which starts with the size of the process that started this one
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(big), str(tmp_path / "out.gguf")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert int(done.stdout) < 64


def test_key_value_types_survive(model: Path, tmp_path: Path) -> None:
    odd = KeyValue("test.odd", ValueType.STRING, b"\x02\0\0\0\0\0\0\0\xff\xfe")
    bake_gguf(read_header(model), tmp_path / "odd.gguf", HeaderEdit((odd,)))
    bake_gguf(read_header(tmp_path / "odd.gguf"), tmp_path / "out.gguf", EDIT)
    assert read_header(tmp_path / "out.gguf").key_values["test.odd"].raw == odd.raw
