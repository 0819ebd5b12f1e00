"""Folders with quantized weights: refused by whoever computes with them, and by nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_models import SENTENCES, add_bpe_tokenizer, edit_json, make_model

from longrope_export.cli import main
from longrope_export.errors import UnsupportedError
from longrope_export.finetune.model import TrainingModel
from longrope_export.finetune.recipes import load_recipe
from longrope_export.models.hf_config import refuse_quantized
from longrope_export.models.model import load_model
from longrope_export.runtimes.hf import HfModel
from longrope_export.search.scorer import Scorer
from longrope_export.verify.exports import prepare

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, which says that it is quantized, and exports and factors of when it was not."""
    folder = tmp_path_factory.mktemp("quantized")
    make_model(folder / "model", dtype="float32", max_position_embeddings=64)
    add_bpe_tokenizer(folder / "model")
    (folder / "book.txt").write_text(" ".join(SENTENCES * 60))
    factors = ["factors", "yarn", "model", "--target-length", "128", "-o", "factors.json"]
    exports = (
        ["onnx", "model", "--factors", "factors.json", "-o", "onnx"],
        ["gguf", "model", "--factors", "factors.json", "--pre", "gpt-2", "-o", "model.gguf"],
    )
    for command in (factors, *exports):
        result = invoke(folder, *command)
        assert result.exit_code == 0, result.stderr
    edit_json(folder / "model" / "config.json", quantization_config=GPTQ)
    return folder


def invoke(place: Path, *command: str) -> Result:
    """Run a command; arguments that name what lies in the place become paths."""
    names = {path.name for path in place.iterdir()} | {"factors.json", "onnx", "model.gguf", "new"}
    given = [command[0]]
    for word in command[1:]:
        head, equals, tail = word.rpartition("=")
        given.append(f"{head}{equals}{place / tail}" if tail in names else word)
    return CliRunner().invoke(main, given)


@pytest.mark.parametrize(
    "command",
    [
        "gguf model --factors factors.json --verify -o new",
        "onnx model --factors factors.json -o new",
        "safetensors model --factors factors.json --verify -o new",
        "search model --target-length 128 --text book.txt -o new",
        "finetune model --factors factors.json --recipe yarn --text book.txt -o new",
        "extend model longrope-llama2 -o new",
        "extend model longrope-llama2 --dry-run",
        "verify model onnx --factors factors.json",
        "verify model.gguf model",
        "evaluate transformers-stock=model --text book.txt --tasks perplexity --lengths 64 -o new",
        "evaluate model --factors factors.json --tasks perplexity --text book.txt -o new",
    ],
)
def test_commands_that_compute_with_the_weights_refuse_them_at_once(
    place: Path, command: str
) -> None:
    result = invoke(place, *command.split())
    assert result.exit_code == 2
    told = (
        f"{place / 'model'}: its weights are quantized (quantization_config in config.json: gptq)"
    )
    if command != "verify model.gguf model":
        assert told in result.stderr
        assert "model.dequantize(); model.save_pretrained(NEW)" in result.stderr
    assert "reading" not in result.stderr
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    "command",
    [
        "inspect model",
        "gguf model --dry-run -o NEW",
        "factors yarn model --target-length 128 -o NEW",
        "safetensors model --factors factors.json -o NEW",
        "safetensors model --factors factors.json --link -o NEW",
    ],
)
def test_commands_that_do_not_go_on_working(place: Path, tmp_path: Path, command: str) -> None:
    new = tmp_path / "new"
    result = invoke(place, *command.replace("NEW", str(new)).split())
    assert result.exit_code == 0, result.stderr
    if command.startswith("safetensors"):
        weights = (place / "model" / "model.safetensors").read_bytes()
        copied = (new / "model.safetensors").read_bytes()
        data = len(weights) - 8 - int.from_bytes(weights[:8], "little")
        assert copied[-data:] == weights[-data:]
        with pytest.raises(UnsupportedError, match="gptq"):  # it still says what it is
            refuse_quantized(new)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"quantization_config": {"load_in_4bit": True}},
            r"\(quantization_config in config.json\)",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "config.json: fp8"),
        (
            {"compression_config": {"quant_method": "sparseml"}},
            "compression_config in .*: sparseml",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "config.json: awq"),
        ({"quantization_config": "mxfp4"}, "config.json: mxfp4"),
    ],
)
def test_what_says_that_weights_are_quantized_is_named(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    edit_json(tmp_path / "config.json", **settings)
    with pytest.raises(UnsupportedError, match=told):
        refuse_quantized(tmp_path)


def test_whoever_loads_weights_from_python_refuses_too(place: Path) -> None:
    folder = place / "model"
    config = load_model(folder).native
    for load in (
        lambda: Scorer(folder, (), 64),
        lambda: HfModel(folder),
        lambda: TrainingModel(folder, config, load_recipe("yarn"), 0),
        lambda: prepare(load_model(folder), config, 64),
    ):
        with pytest.raises(UnsupportedError, match="its weights are quantized"):
            load()


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    edit_json(tmp_path / "config.json", quantization_config={})
    refuse_quantized(tmp_path)  # an empty block says nothing
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"quantized \(hf_quant_config.json\)"):
        refuse_quantized(tmp_path)
