"""A GGUF as source gives the weights of the folder that it was made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_files import gguf_keys, write_gguf_file
from safetensors.numpy import load_file
from test_onnx import FAMILIES, export, three_tiers, tokens
from tiny_models import add_bpe_tokenizer, make_model

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_export.errors import UnsupportedError
from longrope_export.models.model import load_model
from longrope_export.runtimes.onnx import OnnxModel


def initializers(folder: Path) -> dict[str, np.ndarray]:
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def make_pair(folder: Path, name: str, outtype: str) -> tuple[Path, Path]:
    """A model folder, and the GGUF of it."""
    family, settings = FAMILIES[name]
    source = make_model(folder / "model", family, dtype="float32", eos_token_id=1, **settings)
    add_bpe_tokenizer(source)
    target = folder / "model.gguf"
    options = GgufOptions(outtype=outtype, pre="smollm")
    GgufConverter(options).convert(load_model(source), None, target, lambda _: None)
    return source, target


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "qwen3", "phi3", "granite"])
def test_the_same_weights_and_graph_as_from_the_folder(tmp_path: Path, name: str) -> None:
    source, gguf = make_pair(tmp_path, name, "f32")
    config = three_tiers(source)
    expected, got = export(source, config, tmp_path / "a"), export(gguf, config, tmp_path / "b")
    weights, again = initializers(expected), initializers(got)
    assert weights.keys() == again.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
    if name == "qwen2":  # GGUF has no place for its windows
        return
    logits = [OnnxModel(folder, threads=1).logits(tokens(100)) for folder in (expected, got)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-6)  # epsilon passes through float32


def test_quantized_blocks_are_undone_as_the_gguf_package_does(tmp_path: Path) -> None:
    source, gguf = make_pair(tmp_path, "llama", "q8_0")
    stored = load_file(source / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    q8_0 = GGMLQuantizationType.Q8_0
    expected = dequantize(quantize(stored, q8_0), q8_0)
    folder = export(gguf, None, tmp_path / "out")
    np.testing.assert_array_equal(
        initializers(folder)["model.layers.1.self_attn.o_proj.weight"], expected.T
    )


def test_the_files_own_tiers_are_carried_over(tmp_path: Path) -> None:
    source, gguf = make_pair(tmp_path, "llama", "f32")
    extended = tmp_path / "extended.gguf"
    GgufConverter().convert(load_model(gguf), three_tiers(source), extended, lambda _: None)
    config = OnnxModel(export(extended, None, tmp_path / "out"), threads=1).config
    assert [tier.max_length for tier in config.tiers] == [64, 128, 256]
    assert config.switch == "causal" and config.num_start_tokens == 9


def test_what_cannot_be_read_from_a_gguf_is_refused(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": np.zeros((5, 64), np.float32)}
    file = write_gguf_file(tmp_path / "gemma.gguf", gguf_keys("gemma3"), tensors)
    with pytest.raises(UnsupportedError, match="'gemma3' is not supported"):
        export(file, None, tmp_path / "out")
