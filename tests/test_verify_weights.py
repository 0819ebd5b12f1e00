"""Weights of rounded exports, layer outputs of graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console
from test_onnx import export, make_source, three_tiers
from test_onnx_precision import emulated_reference
from tiny_models import add_bpe_tokenizer, add_sentencepiece, make_model
from verified import make_verified, run

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_export.config import SwitchPolicy
from longrope_export.errors import UnsupportedError
from longrope_export.models.model import load_model
from longrope_export.runtimes.hf import HfModel
from longrope_export.runtimes.llama_cpp import weight_precision
from longrope_export.runtimes.onnx import OnnxModel
from longrope_export.runtimes.onnx_layers import with_layer_outputs
from longrope_export.verify.compare import (
    is_quantized,
)
from longrope_export.verify.layers import first_departure
from longrope_export.verify.own_weights import use_weights_of
from longrope_export.verify.reference import Reference
from longrope_export.verify.report import rich_tables


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See make_verified."""
    return make_verified(tmp_path_factory.mktemp("command"))


@pytest.mark.parametrize("ops", ["genai", "standard"])
def test_layers_in_chunks_and_of_some_tokens(made: Path, tmp_path: Path, ops: str) -> None:
    config = three_tiers(made / "m", switch=SwitchPolicy.SEQUENCE)
    ids = list(range(3, 103))
    calls, wanted = [ids[:40], ids[40:]], range(10, 100)
    expected = Reference(made / "m", config).layer_outputs(ids, 90)
    assert expected.shape == (2, 90, 64)
    onnx_model = OnnxModel(export(made / "m", config, tmp_path / "onnx", ops=ops), threads=1)
    got = onnx_model.layer_outputs(calls, wanted, chunk_size=30)  # the first call runs twice
    np.testing.assert_allclose(got, expected, atol=2e-5)
    live = HfModel(made / "m", config=config)
    got = live.layer_outputs(calls, wanted, declared_length=100, chunk_size=30)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_weights_are_unpacked_as_they_are_defined(
    tmp_path: Path, family: str, bits: int
) -> None:
    """Stacked, fused and tied matrices; the definition is written out in test_onnx_precision."""
    source = make_source(tmp_path / "m", family)
    folder = export(source, None, tmp_path / "onnx", precision=f"int{bits}")
    model = Reference(source, three_tiers(source)).model
    assert use_weights_of(model, folder) == []
    expected = emulated_reference(source, bits).model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "phi3"])
def test_gguf_weights_are_unpacked_in_their_places(tmp_path: Path, family: str) -> None:
    source = make_source(tmp_path / "m", family)
    add_bpe_tokenizer(source)
    if family == "phi3":
        add_sentencepiece(source)
    before = Reference(source, three_tiers(source)).model.state_dict()
    for outtype, far in (("q8_0", 0.008), ("q4_0", 0.1)):
        path = tmp_path / f"{outtype}.gguf"
        converter = GgufConverter(GgufOptions(outtype=outtype, pre="gpt-2"))
        converter.convert(load_model(source), None, path, lambda _: None)
        model = Reference(source, three_tiers(source)).model
        assert use_weights_of(model, path) == []
        for name, weight in model.state_dict().items():
            distance = float((weight - before[name]).norm() / before[name].norm())
            assert (distance == 0) == name.endswith("norm.weight"), name
            assert distance < far, name


@pytest.mark.parametrize("outtype", ["q2_k", "q3_k_m", "iq3_s"])
def test_rows_of_two_and_three_bits_are_known_for_what_they_are(
    tmp_path: Path, outtype: str
) -> None:
    settings = {"eos_token_id": 1, "hidden_size": 256, "intermediate_size": 256}
    source = make_model(tmp_path / "m", "llama", dtype="float32", **settings)
    add_bpe_tokenizer(source)
    path = tmp_path / "m.gguf"
    converter = GgufConverter(GgufOptions(outtype=outtype, pre="gpt-2"))
    converter.convert(load_model(source), None, path, lambda _: None)
    assert is_quantized(weight_precision(path))
    model = Reference(source, three_tiers(source)).model
    assert use_weights_of(model, path) == []
    norm = model.model.layers[1].mlp.down_proj.weight.norm()
    with torch.no_grad():  # another source: its rows are not rounded, they are others
        source_model = Reference(source, three_tiers(source)).model
        source_model.model.layers[1].mlp.down_proj.weight[5] = float(norm)
    (problem,) = use_weights_of(source_model, path)
    assert problem.startswith("blk.1.ffn_down.weight: 1 of 256 rows")


def test_weights_that_have_no_place_are_refused(tmp_path: Path) -> None:
    source, other = make_source(tmp_path / "m"), make_source(tmp_path / "other", "phi3")
    folder = export(source, None, tmp_path / "onnx", precision="int8")
    model = Reference(other, three_tiers(other)).model
    with pytest.raises(UnsupportedError, match="place"):
        use_weights_of(model, folder)


def test_the_table_of_a_quantized_export(made: Path, tmp_path: Path) -> None:
    config = three_tiers(made / "m")
    export(made / "m", config, tmp_path / "int4", precision="int4")
    card = tmp_path / "card.md"
    options = ("--factors", made / "f.json", "--length", 100, "--json", "--markdown", card)
    result = run(made, "m", tmp_path / "int4", *options)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["exports"]
    assert found["reference_weights"] == "the export's own, unpacked"
    for case in found["cases"]:
        assert case["max_kl"] < case["from_source"]["max_kl"] / 2
    assert "| all, from the source's weights |" in card.read_text()
    assert "reference ran on weights: the export's own, unpacked." in card.read_text()
    console = Console(width=200, record=True)
    console.print(*rich_tables(json.loads(result.stdout)))
    assert "The reference ran on weights: the export's own, unpacked." in console.export_text()
    assert "was not used" not in result.output
    result = run(made, "m", tmp_path / "int4", *options, "--limit", "unpacked=1e-9:1e-9")
    assert result.exit_code == 1 and "was not used" not in result.output
    words = ("--limit", "q4_k=1e-9:1e-9", "--limit", "4-bit=9:9")
    result = run(made, "m", tmp_path / "int4", *options, *words)
    assert result.exit_code == 0
    assert "--limit q4_k was not used: the exports reported int4" in result.output
    assert "--limit 4-bit" not in result.output


def test_the_first_layer_beyond_the_limit_at_any_token() -> None:
    expected = np.ones((3, 2, 4), np.float32)
    outputs = expected.copy()
    assert first_departure(outputs, expected, 1e-6) is None
    outputs[1:, 0] += 1e-3
    assert first_departure(outputs, expected, 1e-4) == 1
    assert first_departure(outputs, expected, 1e-2) is None
    outputs[0, 1, 0] = np.nan
    assert first_departure(outputs, expected, 1e-2) == 0


def test_a_graph_of_others_tells_no_layers(made: Path, tmp_path: Path) -> None:
    model = onnx.load(made / "onnx" / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = name.replace("model.norm.weight", "weight")
    onnx.save(model, tmp_path / "model.onnx")
    assert with_layer_outputs(tmp_path / "model.onnx", 2) == (b"", [])
    assert len(with_layer_outputs(made / "onnx" / "model.onnx", 2)[1]) == 2
