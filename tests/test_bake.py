"""Edits of existing GGUF files: what changes, what must not, and what happens on failure."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType, GGUFValueType, RopeScalingType
from gguf.quants import quantize

from longrope_converters.to_gguf import bake, files, in_place
from longrope_converters.to_gguf.bake import PADDING_KEY, HeaderEdit, bake_gguf
from longrope_converters.to_gguf.in_place import bake_in_place
from longrope_converters.to_gguf.shards import bake_split, find_shards, shard_outputs
from longrope_export.errors import GgufError, OutputError
from longrope_export.gguf_format import (
    GgufHeader,
    KeyValue,
    TensorInfo,
    build_header,
    make_array,
    make_key_value,
    read_header,
)
from longrope_export.outputs import replace_when_done

LONG = np.linspace(1, 8, 16, dtype=np.float32)
SHORT = np.ones(16, np.float32)
SCALING = make_key_value("llama.rope.scaling.type", GGUFValueType.STRING, "longrope")
LADDER = make_array("llama.rope.scaling.longrope.tier_factors", GGUFValueType.FLOAT32, LONG)
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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf")


@pytest.fixture
def editable(model: Path) -> Path:
    """A model on a file system that can insert blocks in front of a file."""
    probe = model.with_name("probe")
    probe.write_bytes(bytes(1 << 16))
    with probe.open("r+b") as file:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        result = fallocate(file.fileno(), 0x20, 0, os.fstatvfs(file.fileno()).f_bsize)
    probe.unlink()
    if result:
        pytest.skip(
            f"{model.parent} cannot insert blocks ({os.strerror(ctypes.get_errno())}): "
            f"run with --basetemp on ext4 or XFS"
        )
    return model


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


# a new file


def test_bake_keeps_every_other_byte(model: Path, tmp_path: Path) -> None:
    before = sha256(model)
    steps: list[int] = []
    bake_gguf(model, tmp_path / "out.gguf", EDIT, steps.append)
    check_edit(read_header(model), tensor_data(model), tmp_path / "out.gguf")
    assert sha256(model) == before
    last = read_header(model).tensors[-1]
    assert sum(steps) == last.offset_bytes + (last.num_bytes or 0)


def test_a_set_key_is_replaced_at_its_place_and_a_removed_one_is_gone(
    model: Path, tmp_path: Path
) -> None:
    edit = HeaderEdit(set_keys=(SCALING,), remove_keys=("test.bool", "never.there"))
    bake_gguf(model, tmp_path / "out.gguf", edit)
    before, after = read_header(model), read_header(tmp_path / "out.gguf")
    assert list(after.key_values) == [key for key in before.key_values if key != "test.bool"]
    assert after.get("llama.rope.scaling.type") == "longrope"


def test_an_empty_edit_reproduces_the_file(model: Path, tmp_path: Path) -> None:
    bake_gguf(model, tmp_path / "out.gguf", HeaderEdit())
    size = (tmp_path / "out.gguf").stat().st_size
    assert (tmp_path / "out.gguf").read_bytes() == model.read_bytes()[:size]
    assert not model.read_bytes()[size:].strip(b"\0")  # only padding of the last tensor is gone


def test_a_tensor_is_replaced_in_its_place(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", rope_freqs=True)
    edit = HeaderEdit(
        new_tensors={"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
        replace_tensors={"rope_freqs.weight": "rope_factors_long.weight"},
    )
    bake_gguf(model, tmp_path / "out.gguf", edit)
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
    bake_gguf(model, tmp_path / "once.gguf", EDIT)
    names = {name: name for name in EDIT.new_tensors}
    again = HeaderEdit(EDIT.set_keys, (), EDIT.new_tensors, names)
    bake_gguf(tmp_path / "once.gguf", tmp_path / "twice.gguf", again)
    assert sha256(tmp_path / "once.gguf") == sha256(tmp_path / "twice.gguf")


def test_an_own_alignment_is_kept(tmp_path: Path) -> None:
    alignment = make_key_value("general.alignment", GGUFValueType.UINT32, 256)
    architecture = make_key_value("general.architecture", GGUFValueType.STRING, "llama")
    empty = tmp_path / "empty.gguf"
    empty.write_bytes(build_header((architecture, alignment), (), 256))
    bake_gguf(empty, tmp_path / "out.gguf", EDIT)
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
    bake_gguf(model, tmp_path / "out.gguf", EDIT)
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
            HeaderEdit((make_key_value("general.alignment", GGUFValueType.UINT32, 64),)),
            "general.alignment cannot be changed",
        ),
    ],
)
def test_an_edit_that_does_not_fit_writes_nothing(
    model: Path, tmp_path: Path, edit: HeaderEdit, message: str
) -> None:
    with pytest.raises(GgufError, match=message):
        bake_gguf(model, tmp_path / "out.gguf", edit)
    with pytest.raises(GgufError, match=message):
        bake_in_place(model, edit)
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
        bake_gguf(model, temporary, EDIT, interrupt)
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
            bake_gguf(model, temporary, EDIT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["model.gguf"]


def test_a_really_full_disk_leaves_nothing(small_disk: Path, model: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(1 << 20))
    with (
        pytest.raises(OutputError, match=r"out\.gguf: No space left on device"),
        replace_when_done(small_disk / "out.gguf") as temporary,
    ):
        bake_gguf(model, temporary, EDIT)
    assert names(small_disk) == ["filler"]


def test_tmpfs_refuses_an_edit_in_place_and_the_file_is_unchanged(
    small_disk: Path, model: Path
) -> None:
    copy = small_disk / "model.gguf"
    copy.write_bytes(model.read_bytes())
    before = sha256(copy)
    with pytest.raises(OutputError, match=r"cannot insert blocks.*Write a new file with -o"):
        bake_in_place(copy, _growing_edit())
    assert sha256(copy) == before


# in place


def _growing_edit() -> HeaderEdit:
    """EDIT with a key that no header padding has room for."""
    long_text = make_key_value("general.description", GGUFValueType.STRING, "x" * 5000)
    return HeaderEdit((*EDIT.set_keys, long_text), (), EDIT.new_tensors)


def test_in_place_equals_a_new_file(editable: Path) -> None:
    before, data = read_header(editable), tensor_data(editable)
    bake_in_place(editable, EDIT)
    check_edit(before, data, editable)
    assert (read_header(editable).data_start_bytes - before.data_start_bytes) % 512 == 0


def test_a_second_edit_in_place_uses_the_padding(editable: Path) -> None:
    before, data = read_header(editable), tensor_data(editable)
    bake_in_place(editable, EDIT)
    first = read_header(editable)
    assert PADDING_KEY in first.key_values
    more = make_array("llama.rope.scaling.longrope.tier_length", GGUFValueType.UINT32, [1, 2, 3])
    bake_in_place(editable, HeaderEdit(set_keys=(more,)))
    second = read_header(editable)
    assert second.data_start_bytes == first.data_start_bytes
    assert second.file_bytes == first.file_bytes
    assert list(second.key_values)[-2:] == [more.key, PADDING_KEY]
    bake_in_place(editable, HeaderEdit(remove_keys=(more.key,)))
    check_edit(before, data, editable)
    assert read_header(editable).key_values == first.key_values


def test_a_header_of_any_size_ends_where_the_data_starts(model: Path) -> None:
    header = read_header(model)
    path = model.with_name("built.gguf")
    for length in range(0, 4200, 7):
        text = make_key_value("general.description", GGUFValueType.STRING, "x" * length)
        edited = bake.apply_edit(header, HeaderEdit(set_keys=(text,)))
        built = in_place._build_with_padding(edited, 4096)
        assert len(built) >= header.data_start_bytes
        assert (len(built) - header.data_start_bytes) % 4096 == 0
        path.write_bytes(built + bytes(header.data_bytes))
        assert read_header(path).data_start_bytes == len(built)


def test_a_tensor_is_replaced_in_place(tmp_path: Path, editable: Path) -> None:
    model = write_model(editable.with_name("freqs.gguf"), rope_freqs=True)
    edit = HeaderEdit(
        (SCALING,),
        (),
        {"rope_factors_long.weight": LONG},
        {"rope_freqs.weight": "rope_factors_long.weight"},
    )
    bake_gguf(model, tmp_path / "out.gguf", edit)
    bake_in_place(model, edit)
    assert tensor_data(model) == tensor_data(tmp_path / "out.gguf")
    check_consecutive(read_header(model))


def test_the_padding_does_not_travel_to_a_new_file(editable: Path, tmp_path: Path) -> None:
    bake_in_place(editable, EDIT)
    bake_gguf(editable, tmp_path / "out.gguf", HeaderEdit())
    assert PADDING_KEY not in read_header(tmp_path / "out.gguf").key_values


@pytest.mark.parametrize("failing_call", range(6))
def test_a_failure_in_place_is_undone(
    editable: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    model = write_model(editable.with_name("freqs.gguf"), rope_freqs=True)
    before = model.read_bytes()
    new = {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}
    replace = {"rope_freqs.weight": "rope_factors_long.weight"}
    edit = HeaderEdit(_growing_edit().set_keys, (), new, replace)
    calls = 0

    def fail_once(real: object) -> object:
        def call(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == failing_call + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)  # type: ignore[operator]

        return call

    monkeypatch.setattr(in_place, "write_exactly", fail_once(files.write_exactly))
    monkeypatch.setattr(in_place, "_change_front", fail_once(in_place._change_front))
    monkeypatch.setattr(os, "fsync", fail_once(os.fsync))
    with pytest.raises(OutputError, match=r"the file is as before: No space left"):
        bake_in_place(model, edit)
    assert model.read_bytes() == before


def test_a_failure_that_cannot_be_undone_is_told(
    editable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.write_exactly

    def fail_in_front(output: int, offset_bytes: int, data: bytes) -> None:
        if offset_bytes == 0:
            raise OSError(errno.EIO, "Input/output error")
        real(output, offset_bytes, data)

    monkeypatch.setattr(in_place, "write_exactly", fail_in_front)
    with pytest.raises(OutputError, match=r"the file is damaged, fetch it again \(.*Input/output"):
        bake_in_place(editable, EDIT)


def test_a_file_with_two_names_is_not_edited_in_place(model: Path, tmp_path: Path) -> None:
    os.link(model, tmp_path / "other.gguf")
    before = sha256(model)
    with pytest.raises(OutputError, match="it has 2 names"):
        bake_in_place(model, EDIT)
    assert sha256(model) == before


# split models


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, ...]:
    folder = tmp_path / "split"
    folder.mkdir()
    write_model(folder / "model.gguf", splits=3)
    return find_shards(folder / "model-00001-of-00003.gguf")


def test_shards_are_found_from_the_first(shards: tuple[Path, ...]) -> None:
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


def test_a_model_in_one_file_is_its_only_shard(model: Path) -> None:
    assert find_shards(model) == (model,)
    assert shard_outputs(Path("out.gguf"), 1) == (Path("out.gguf"),)


def test_a_later_shard_is_refused_and_the_first_is_named(shards: tuple[Path, ...]) -> None:
    with pytest.raises(
        GgufError, match=r"is shard 2 of 3: give the first one, .*model-00001-of-00003"
    ):
        find_shards(shards[1])
    with pytest.raises(GgufError, match="not the first shard"):
        bake_gguf(shards[1], shards[1].with_name("out.gguf"), EDIT)


def test_a_missing_or_foreign_shard_is_named(shards: tuple[Path, ...]) -> None:
    shards[2].write_bytes(shards[1].read_bytes())
    with pytest.raises(GgufError, match=r"model-00003-of-00003\.gguf: is not shard 3 of 3"):
        find_shards(shards[0])
    shards[2].unlink()
    with pytest.raises(GgufError, match=r"model-00003-of-00003\.gguf: shard 3 of 3 is missing"):
        find_shards(shards[0])


def test_a_renamed_shard_is_refused(shards: tuple[Path, ...]) -> None:
    renamed = shards[0].rename(shards[0].with_name("renamed.gguf"))
    with pytest.raises(GgufError, match=r"its name must end in -00001-of-00003\.gguf"):
        find_shards(renamed)


@pytest.mark.parametrize("name", ["out.gguf", "out-00001-of-00003.gguf", "out"])
def test_output_names_are_what_llama_cpp_looks_for(name: str) -> None:
    outputs = shard_outputs(Path("folder") / name, 3)
    assert outputs == tuple(Path(f"folder/out-0000{number}-of-00003.gguf") for number in (1, 2, 3))


@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
def test_a_split_model_gets_everything_in_its_first_shard(
    shards: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    before = [sha256(shard) for shard in shards]
    outputs = shard_outputs(tmp_path / "out.gguf", 3)
    bake_split(shards, outputs, EDIT)
    assert find_shards(outputs[0]) == outputs
    first, source = read_header(outputs[0]), read_header(shards[0])
    check_consecutive(first)
    assert first.get("split.tensors.count") == source.get("split.tensors.count") + 2
    count_type = source.key_values["split.tensors.count"].value_type
    assert first.key_values["split.tensors.count"].value_type == count_type
    assert [info.name for info in first.tensors[-2:]] == list(EDIT.new_tensors)
    total = sum(len(read_header(output).tensors) for output in outputs)
    assert total == first.get("split.tensors.count")
    for shard, output in zip(shards[1:], outputs[1:], strict=True):
        assert output.read_bytes() == shard.read_bytes()
        assert output.samefile(shard) == links
    assert [sha256(shard) for shard in shards] == before
    bake_split(shards, outputs, EDIT)  # again, over hard links of its own inputs
    assert names(tmp_path) == sorted(["split", *(output.name for output in outputs)])


def test_a_failed_split_leaves_nothing(
    shards: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OutputError, match="No space left"):
        bake_split(shards, shard_outputs(tmp_path / "out.gguf", 3), EDIT)
    assert names(tmp_path) == ["split"]


def test_split_keys_that_are_no_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    bad = HeaderEdit((make_key_value("split.count", GGUFValueType.STRING, "three"),))
    bake_gguf(model, tmp_path / "bad.gguf", bad)
    with pytest.raises(GgufError, match=r"split\.count 'three' make no sense"):
        find_shards(tmp_path / "bad.gguf")
    with pytest.raises(GgufError, match=r"split\.count 'three' make no sense"):
        bake_gguf(tmp_path / "bad.gguf", tmp_path / "out.gguf", EDIT)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_big_bake_needs_little_memory(tmp_path: Path) -> None:
    """512 MiB of data and a 128k vocabulary in a fresh process: at most 64 MiB resident."""
    big = tmp_path / "big.gguf"
    tokens = make_array(
        "tokenizer.ggml.tokens", GGUFValueType.STRING, [f"token {n}" for n in range(128_000)]
    )
    architecture = make_key_value("general.architecture", GGUFValueType.STRING, "llama")
    tensor = TensorInfo("t", (1 << 27,), int(GGMLQuantizationType.F32), 0)
    big.write_bytes(build_header((architecture, tokens), (tensor,)))
    os.truncate(big, big.stat().st_size + (1 << 29))
    script = """
import re, sys
from pathlib import Path
import numpy as np
from longrope_converters.to_gguf.bake import HeaderEdit, bake_gguf
edit = HeaderEdit(new_tensors={"rope_factors_long.weight": np.ones(64, np.float32)})
bake_gguf(Path(sys.argv[1]), Path(sys.argv[2]), edit)
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
    odd = KeyValue("test.odd", GGUFValueType.STRING, b"\x02\0\0\0\0\0\0\0\xff\xfe")
    bake_gguf(model, tmp_path / "odd.gguf", HeaderEdit((odd,)))
    bake_gguf(tmp_path / "odd.gguf", tmp_path / "out.gguf", EDIT)
    assert read_header(tmp_path / "out.gguf").key_values["test.odd"].raw == odd.raw
