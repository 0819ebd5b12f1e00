"""Models in several files: which files belong together, and where new keys and tensors go."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from bake_models import EDIT, check_consecutive, names, sha256, write_model

from longrope_converters.to_gguf.bake import HeaderEdit, bake_gguf
from longrope_converters.to_gguf.shards import bake_split, read_shards, shard_outputs
from longrope_export.errors import GgufError, OutputError
from longrope_export.gguf_format import read_header
from longrope_export.gguf_shards import shard_paths
from longrope_export.gguf_values import ValueType, make_key_value
from longrope_export.runtimes.llama_cpp import weight_precision


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf")


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, ...]:
    folder = tmp_path / "split"
    folder.mkdir()
    write_model(folder / "model.gguf", splits=3)
    return tuple(
        shard.path for shard in read_shards(read_header(folder / "model-00001-of-00003.gguf"))
    )


def test_shards_are_found_from_the_first(shards: tuple[Path, ...]) -> None:
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


def test_most_of_the_weights_decide_the_precision_of_a_split_model(tmp_path: Path) -> None:
    """llama.cpp's gguf-split and writers with a small first shard leave all tensors to the others."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=2, small_first_shard=True)
    for name, dtype in (("a", np.float32), ("b", np.float16), ("c", np.float16), ("d", np.float16)):
        writer.add_tensor(name, np.zeros((8, 32), dtype))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = tmp_path / "m-00001-of-00003.gguf"
    assert not read_header(first).tensors and len(shard_paths(first)) == 3
    assert weight_precision(first) == "fp16"
    shard_paths(first)[2].unlink()
    with pytest.raises(GgufError):
        weight_precision(first)


def test_a_model_in_one_file_is_its_only_shard(model: Path) -> None:
    assert read_shards(read_header(model)) == (read_header(model),)
    assert shard_outputs(Path("out.gguf"), 1) == (Path("out.gguf"),)


def test_a_later_shard_is_refused_and_the_first_is_named(shards: tuple[Path, ...]) -> None:
    with pytest.raises(
        GgufError, match=r"is shard 2 of 3: give the first one, .*model-00001-of-00003"
    ):
        read_shards(read_header(shards[1]))
    with pytest.raises(GgufError, match="not the first shard"):
        bake_gguf(read_header(shards[1]), shards[1].with_name("out.gguf"), EDIT)


def test_a_missing_or_foreign_shard_is_named(shards: tuple[Path, ...]) -> None:
    shards[2].write_bytes(shards[1].read_bytes())
    with pytest.raises(GgufError, match=r"model-00003-of-00003\.gguf: is not shard 3 of 3"):
        read_shards(read_header(shards[0]))
    shards[2].unlink()
    with pytest.raises(GgufError, match=r"model-00003-of-00003\.gguf: shard 3 of 3 is missing"):
        read_shards(read_header(shards[0]))


def test_a_renamed_shard_is_refused(shards: tuple[Path, ...]) -> None:
    renamed = shards[0].rename(shards[0].with_name("renamed.gguf"))
    with pytest.raises(GgufError, match=r"its name must end in -00001-of-00003\.gguf"):
        read_shards(read_header(renamed))


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
    bake_split(read_shards(read_header(shards[0])), outputs, EDIT)
    assert tuple(shard.path for shard in read_shards(read_header(outputs[0]))) == outputs
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
    bake_split(
        read_shards(read_header(shards[0])), outputs, EDIT
    )  # again, over hard links of its own inputs
    assert names(tmp_path) == sorted(["split", *(output.name for output in outputs)])


def test_a_failed_split_leaves_nothing(
    shards: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OutputError, match="No space left"):
        bake_split(
            read_shards(read_header(shards[0])), shard_outputs(tmp_path / "out.gguf", 3), EDIT
        )
    assert names(tmp_path) == ["split"]


def test_split_keys_that_are_no_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    bad = HeaderEdit((make_key_value("split.count", ValueType.STRING, "three"),))
    bake_gguf(read_header(model), tmp_path / "bad.gguf", bad)
    with pytest.raises(GgufError, match=r"split\.count 'three' make no sense"):
        read_shards(read_header(tmp_path / "bad.gguf"))
    with pytest.raises(GgufError, match=r"split\.count 'three' make no sense"):
        bake_gguf(read_header(tmp_path / "bad.gguf"), tmp_path / "out.gguf", EDIT)
