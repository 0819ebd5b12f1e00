"""A GGUF as source gives the weights of the folder that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as genai
import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quantize
from gguf_files import gguf_keys, write_gguf_file
from safetensors.numpy import load_file
from sentencepiece import SentencePieceProcessor
from test_onnx import FAMILIES, export, three_tiers, tokens
from test_safetensors_from_gguf import source_model
from tiny_models import SENTENCES, add_bpe_tokenizer, make_model
from tokenizers import Tokenizer

from longrope_converters.base import ExportReport
from longrope_converters.gguf_tokenizer import generation_settings
from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_converters.to_onnx.convert import OnnxConverter, OnnxOptions
from longrope_export.errors import UnsupportedError
from longrope_export.gguf_format import read_header
from longrope_export.gguf_values import make_key_value
from longrope_export.models.model import load_model
from longrope_export.runtimes.onnx import OnnxModel

TEXTS = [
    *SENTENCES,
    "",
    " two  spaces",
    "tabs\tand\n\nlines 1234",
    "caf\u00e9 \u4f60\u597d \U0001f680",
]
SPECIAL = "It's one<|user|>two<|end|> <s>three</s>"


def initializers(folder: Path) -> dict[str, np.ndarray]:
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def make_pair(
    folder: Path, name: str, outtype: str = "f32", pre: str = "smollm"
) -> tuple[Path, Path]:
    """A model folder, and the GGUF of it."""
    family, settings = FAMILIES[name]
    source = make_model(folder / "model", family, dtype="float32", eos_token_id=1, **settings)
    add_bpe_tokenizer(source)
    target = folder / "model.gguf"
    options = GgufOptions(outtype=outtype, pre=pre)
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


def report_of(gguf: Path, output: Path, **options: str | Path) -> ExportReport:
    converter = OnnxConverter(OnnxOptions(**options))  # type: ignore[arg-type]
    return converter.convert(load_model(gguf), None, output, lambda _: None)


def check_tokenizer(folder: Path, expected: list[list[int]]) -> None:
    """The folder's tokenizer gives these ids of TEXTS, in both libraries."""
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [ours.encode(text).ids for text in TEXTS] == expected
    theirs = genai.Tokenizer(genai.Model(str(folder)))
    theirs.update_options(add_special_tokens="true")  # by default it adds none, whatever the model
    assert theirs.encode(SPECIAL).tolist() == ours.encode(SPECIAL).ids
    for text, ids in zip(TEXTS, expected, strict=True):
        assert theirs.encode(text).tolist() == ids, text
        if text:
            assert theirs.decode(np.asarray(ids, np.int32)) == ours.decode(ids)


def test_a_byte_level_tokenizer_from_the_keys(tmp_path: Path) -> None:
    source, gguf = make_pair(tmp_path, "llama", pre="gpt-2")
    report = report_of(gguf, tmp_path / "out")
    assert not any("tokenizer" in note for note in report.notes)
    original = Tokenizer.from_file(str(source / "tokenizer.json"))
    check_tokenizer(tmp_path / "out", [original.encode(text).ids for text in TEXTS])
    got = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert got.encode(SPECIAL).ids == original.encode(SPECIAL).ids
    tokenizer = genai.Tokenizer(genai.Model(str(tmp_path / "out")))
    told = tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": "hi"}]))
    assert told == "<|user|>hi"


def test_a_sentencepiece_tokenizer_from_the_keys(tmp_path: Path) -> None:
    source = source_model(tmp_path / "model", "llama", vocab_size=302, eos_token_id=2)
    gguf = tmp_path / "model.gguf"
    GgufConverter(GgufOptions(outtype="f32")).convert(
        load_model(source), None, gguf, lambda _: None
    )
    report_of(gguf, tmp_path / "out")
    processor = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    check_tokenizer(tmp_path / "out", [[1, *processor.encode(text)] for text in TEXTS])
    model = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (model["bos_token_id"], model["eos_token_id"]) == (1, 2)


def test_an_unknown_splitting_rule_is_reported(tmp_path: Path) -> None:
    source, gguf = make_pair(tmp_path, "llama", pre="viking")
    report = report_of(gguf, tmp_path / "out")
    assert any(
        "splitting rule 'viking' is not known here" in note and "--tokenizer" in note
        for note in report.notes
    )
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    named = report_of(gguf, tmp_path / "named", tokenizer=source)
    assert not any("tokenizer" in note for note in named.notes)
    copied = (tmp_path / "named" / "tokenizer.json").read_bytes()
    assert copied == (source / "tokenizer.json").read_bytes()


def test_the_end_of_a_turn_ends_a_generation(tmp_path: Path) -> None:
    u32 = GGUFValueType.UINT32
    keys = [
        *gguf_keys("llama"),
        make_key_value("tokenizer.ggml.eos_token_id", u32, 1),
        make_key_value("tokenizer.ggml.eot_token_id", u32, 2),
    ]
    file = write_gguf_file(tmp_path / "m.gguf", keys, {"output_norm.weight": np.ones(64)})
    assert generation_settings(read_header(file)) == {"eos_token_id": [1, 2]}
