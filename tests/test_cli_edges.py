"""Names, files and settings that are valid but unusual."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from gguf_files import gguf_keys, write_gguf_file
from test_cli import check_refused, run
from tiny_models import add_bpe_tokenizer, make_model

from longrope_export.gguf_values import ValueType, make_key_value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "hf")
    add_bpe_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", ["llama[old].gguf", "llama[", "x [/bold].gguf"])
def test_inspect_prints_names_that_look_like_markup(
    name: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    path = tiny_gguf.rename(tmp_path / name.replace("/", "\u2215"))
    result = run("inspect", path)
    assert result.returncode == 0, result.stderr
    assert path.name in result.stdout


def test_a_path_with_brackets_over_a_folder_is_printed(tiny_gguf: Path, tmp_path: Path) -> None:
    inside = tmp_path / "x["
    inside.mkdir()
    path = tiny_gguf.rename(inside / "b].gguf")
    assert str(path) in run("inspect", path).stdout.replace("\n", "")


def test_a_pipe_is_no_output(folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = run("gguf", folder, "--pre", "gpt-2", "-o", pipe, "--force")
    check_refused(result, "is a device or a pipe")
    assert pipe.is_fifo()


def test_what_the_system_refuses_is_one_line(folder: Path, tmp_path: Path) -> None:
    check_refused(run("inspect", tmp_path / ("n" * 300)), "File name too long")
    result = run("gguf", folder, "--pre", "gpt-2", "-o", tmp_path / ("n" * 245))
    check_refused(result, "File name too long")


def test_a_number_in_the_model_card_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: 1.0\n---\n")
    result = run("gguf", folder, "--pre", "gpt-2", "-o", tmp_path / "x.gguf")
    check_refused(result, "general.license.name", "does not fit STRING")


def test_a_split_model_can_be_baked_again(tmp_path: Path) -> None:
    for number in range(2):
        split = [
            make_key_value("split.no", ValueType.UINT16, number),
            make_key_value("split.count", ValueType.UINT16, 2),
            make_key_value("split.tensors.count", ValueType.INT32, 2),
        ]
        tensor = {f"tensor.{number}": np.zeros((5, 64), np.float32)}
        keys = [*(gguf_keys() if number == 0 else []), *split]
        write_gguf_file(tmp_path / f"m-0000{number + 1}-of-00002.gguf", keys, tensor)
    first = tmp_path / "m-00001-of-00002.gguf"
    factors, output = tmp_path / "f.json", tmp_path / "out.gguf"
    run("factors", "pi", first, "--target-length", 4096, "-o", factors)
    for options in ((), ("--force",)):
        result = run("gguf", first, "--factors", factors, "-o", output, *options)
        assert result.returncode == 0, result.stderr
    result = run("gguf", first, "--factors", factors, "-o", first, "--force")
    check_refused(result, "is the same file as the input")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({}, ""),
        ({"attention_factor": 1.0}, "attention factor 1.13863, the source's is 1;"),
        ({"truncate": False}, "of 8 factors differ"),
    ],
)
def test_yarn_that_llama_cpp_reads_otherwise_is_told(
    setting: dict[str, object], said: str, tmp_path: Path
) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope = {**yarn, "rope_theta": 10000.0, **setting}
    folder = make_model(tmp_path / "hf", rope_parameters=rope, max_position_embeddings=256)
    add_bpe_tokenizer(folder)
    result = run("gguf", folder, "--pre", "gpt-2", "-o", tmp_path / "x.gguf", "--json")
    notes = json.loads(result.stdout)["notes"]
    assert len(notes) == bool(said)
    assert said in "".join(notes)


def test_scaling_that_a_bake_takes_away_is_told(tmp_path: Path) -> None:
    keys = [
        *gguf_keys("gemma3"),
        make_key_value("gemma3.rope.scaling.type", ValueType.STRING, "linear"),
        make_key_value("gemma3.rope.scaling.factor", ValueType.FLOAT32, 8.0),
    ]
    model, factors = tmp_path / "m.gguf", tmp_path / "f.json"
    write_gguf_file(model, keys, {"token_embd.weight": np.zeros((5, 64), np.float32)})
    run("factors", "yarn", model, "--target-length", 8192, "-o", factors)
    result = run("gguf", model, "--factors", factors, "-o", tmp_path / "x.gguf", "--json")
    assert result.returncode == 0, result.stderr
    assert "unscaled, without the scaling that it had" in result.stdout
