"""Edits of a GGUF in its own file: the same result as a new file, or the file as it was."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest
from bake_models import (
    EDIT,
    LONG,
    SCALING,
    SHORT,
    check_consecutive,
    check_edit,
    sha256,
    tensor_data,
    write_model,
)

from longrope_converters.to_gguf import bake, files, in_place
from longrope_converters.to_gguf.bake import PADDING_KEY, HeaderEdit, bake_gguf
from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_converters.to_gguf.in_place import bake_in_place
from longrope_export.config import LongRopeConfig
from longrope_export.errors import OutputError
from longrope_export.gguf_format import read_header
from longrope_export.gguf_values import ValueType, make_array, make_key_value
from longrope_export.ladder import make_config
from longrope_export.models.model import Model, header_of, load_model


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


def test_tmpfs_refuses_an_edit_in_place_and_the_file_is_unchanged(
    small_disk: Path, model: Path
) -> None:
    copy = small_disk / "model.gguf"
    copy.write_bytes(model.read_bytes())
    before = sha256(copy)
    with pytest.raises(OutputError, match=r"cannot insert blocks.*Write a new file with -o"):
        bake_in_place(read_header(copy), _growing_edit())
    assert sha256(copy) == before


def _growing_edit() -> HeaderEdit:
    """EDIT with a key that no header padding has room for."""
    long_text = make_key_value("general.description", ValueType.STRING, "x" * 5000)
    return HeaderEdit((*EDIT.set_keys, long_text), (), EDIT.new_tensors)


def test_in_place_equals_a_new_file(editable: Path) -> None:
    before, data = read_header(editable), tensor_data(editable)
    bake_in_place(read_header(editable), EDIT)
    check_edit(before, data, editable)
    assert (read_header(editable).data_start_bytes - before.data_start_bytes) % 512 == 0


@pytest.mark.usefixtures("editable")
def test_a_model_that_is_held_may_be_edited_twice(tiny_gguf: Path, tmp_path: Path) -> None:
    data, model = tensor_data(tiny_gguf), load_model(tiny_gguf)
    converter = GgufConverter(GgufOptions(in_place=True))
    for num_tiers in (4, 400):  # the second header needs another block
        config = long_ladder(model, num_tiers)
        converter.convert(model, config, tmp_path / "unused", lambda _: None)
        held = tensor_data(tiny_gguf)
        assert {name: held[name] for name in data} == data
        assert len(load_model(tiny_gguf).native.tiers) == num_tiers
    assert header_of(model) == read_header(tiny_gguf) != model.gguf_header


def long_ladder(model: Model, num_tiers: int) -> LongRopeConfig:
    window = model.window
    lengths = ",".join(str(window * (n + 1)) for n in range(num_tiers))
    return make_config(model, "yarn", window * num_tiers, ladder=lengths)


def test_a_second_edit_in_place_uses_the_padding(editable: Path) -> None:
    before, data = read_header(editable), tensor_data(editable)
    bake_in_place(read_header(editable), EDIT)
    first = read_header(editable)
    assert PADDING_KEY in first.key_values
    more = make_array("llama.rope.scaling.longrope.tier_length", ValueType.UINT32, [1, 2, 3])
    bake_in_place(read_header(editable), HeaderEdit(set_keys=(more,)))
    second = read_header(editable)
    assert second.data_start_bytes == first.data_start_bytes
    assert second.file_bytes == first.file_bytes
    assert list(second.key_values)[-2:] == [more.key, PADDING_KEY]
    bake_in_place(read_header(editable), HeaderEdit(remove_keys=(more.key,)))
    check_edit(before, data, editable)
    assert read_header(editable).key_values == first.key_values


def test_a_header_of_any_size_ends_where_the_data_starts(model: Path) -> None:
    header = read_header(model)
    path = model.with_name("built.gguf")
    for length in range(0, 4200, 7):
        text = make_key_value("general.description", ValueType.STRING, "x" * length)
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
    bake_gguf(read_header(model), tmp_path / "out.gguf", edit)
    bake_in_place(read_header(model), edit)
    assert tensor_data(model) == tensor_data(tmp_path / "out.gguf")
    check_consecutive(read_header(model))


def test_the_padding_does_not_travel_to_a_new_file(editable: Path, tmp_path: Path) -> None:
    bake_in_place(read_header(editable), EDIT)
    bake_gguf(read_header(editable), tmp_path / "out.gguf", HeaderEdit())
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
        bake_in_place(read_header(model), edit)
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
        bake_in_place(read_header(editable), EDIT)


def test_a_file_with_two_names_is_not_edited_in_place(model: Path, tmp_path: Path) -> None:
    os.link(model, tmp_path / "other.gguf")
    before = sha256(model)
    with pytest.raises(OutputError, match="it has 2 names"):
        bake_in_place(read_header(model), EDIT)
    assert sha256(model) == before
