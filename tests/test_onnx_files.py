"""The files of an ONNX export: readable, complete, replaced whole or not at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import transformers
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from test_onnx import export, make_source, three_tiers, tokens
from tiny_models import edit_json, make_model

from longrope_converters.to_onnx.families import mistral
from longrope_converters.to_onnx.weights import PIECE_ELEMENTS, transposed_pieces
from longrope_export.cli import main
from longrope_export.errors import FactorFileError, ModelError, OutputError
from longrope_export.factor_files import read_factors, to_json, write_factors
from longrope_export.models.hf_config import read_hf_config
from longrope_export.models.model import load_model
from longrope_export.onnx_metadata import read_config
from longrope_export.runtimes.onnx import OnnxModel


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def exported(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(llama, three_tiers(llama), tmp_path_factory.mktemp("out") / "onnx")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["onnx", *map(str, arguments)])


@pytest.mark.parametrize("ops", ["genai", "standard"])
def test_the_checker_and_both_readers_take_it(tmp_path: Path, llama: Path, ops: str) -> None:
    folder = export(llama, three_tiers(llama), tmp_path / "out", ops=ops)
    for name in ("model.onnx", "rerotate.onnx"):
        onnx.checker.check_model(str(folder / name))
    weights = load_file(llama / "model.safetensors")
    model = onnx.load(folder / "model.onnx")
    read = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    again = onnx_ir.load(folder / "model.onnx").graph.initializers
    down = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(read[down], weights[down].T)
    np.testing.assert_array_equal(again[down].const_value.numpy(), weights[down].T)
    np.testing.assert_array_equal(
        again["model.norm.weight"].const_value.numpy(), weights["model.norm.weight"]
    )
    if ops == "standard":
        assert {node.domain for node in model.graph.node} == {""}


def test_the_config_can_be_read_back(llama: Path, exported: Path) -> None:
    assert read_config(exported) == three_tiers(llama)
    assert OnnxModel(exported, threads=1).config == three_tiers(llama)
    with pytest.raises(ModelError, match="cannot read as ONNX"):
        read_config(exported / "model.onnx.data")
    with pytest.raises(ModelError, match="no such file"):
        OnnxModel(exported.parent)


def test_an_export_is_a_factors_file(tmp_path: Path, llama: Path, exported: Path) -> None:
    config, model = three_tiers(llama), load_model(llama)
    for path in (exported, exported / "model.onnx", exported / "rerotate.onnx"):
        assert read_factors(path, model) == config
    again = invoke(llama, "--factors", exported, "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert read_config(tmp_path / "again") == config
    inside = invoke(llama, "--factors", exported, "-o", exported, "--force")
    assert inside.exit_code == 2 and "the input" in inside.stderr
    shown = CliRunner().invoke(main, ["inspect", str(exported), "--json"])
    assert json.loads(shown.stdout)["config"] == to_json(config)
    twice = CliRunner().invoke(main, ["inspect", str(exported), "--factors", str(exported)])
    assert twice.exit_code == 2 and "leave out --factors" in twice.stderr
    with pytest.raises(FactorFileError, match="these factors are for another model"):
        read_factors(exported, load_model(make_model(tmp_path / "other", "llama", head_dim=32)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not written by `longrope-export onnx`"),
        ("{", "longrope.config is damaged"),
        ("[" * 100_000, "longrope.config is damaged"),
        ("[1]", r"must be a JSON object, got \[1\]"),
        ('{"version": 9}', "version is 9, this tool reads 1"),
    ],
)
def test_foreign_and_damaged_metadata(tmp_path: Path, text: str | None, message: str) -> None:
    proto = onnx.ModelProto()
    if text is not None:
        proto.metadata_props.add(key="longrope.config", value=text)
    onnx.save(proto, tmp_path / "model.onnx")
    for path in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(FactorFileError, match=message) as error:
            read_factors(path)
        assert "model.onnx" in str(error.value)


def test_factors_from_a_file_that_is_no_onnx(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\xff" * 100)
    with pytest.raises(FactorFileError, match="cannot read as ONNX"):
        read_factors(damaged)
    with pytest.raises(FactorFileError, match="no such file"):
        read_factors(tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FactorFileError, match=r"pip install 'longrope-export\[onnx\]'"):
        read_factors(exported)


def test_wide_matrices_are_transposed_in_tiles() -> None:
    class Matrix:
        values = (np.arange(5001 * 1033, dtype=np.float32) % 2039).reshape(5001, 1033)
        shape = values.shape

        def read(self, start: int, stop: int) -> np.ndarray:
            assert (stop - start) * 1033 <= PIECE_ELEMENTS
            return self.values[start:stop]

    pieces = [piece.copy() for piece in transposed_pieces(Matrix(), np.float16)]
    np.testing.assert_array_equal(np.concatenate(pieces), Matrix.values.T.astype(np.float16))


def test_the_command(tmp_path: Path, llama: Path) -> None:
    factors, output = tmp_path / "f.json", tmp_path / "out"
    write_factors(three_tiers(llama), factors)
    dry = invoke(llama, "--factors", factors, "-o", output, "--dry-run")
    assert dry.exit_code == 0 and not output.exists()
    done = invoke(llama, "--factors", factors, "-o", output, "--json", "--max-length", 128)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["tiers"] == [64, 128, 256]
    assert report["honours"]["onnxruntime-genai"]["switch"]["verdict"] == "no"
    assert report["num_bytes"] == sum(path.stat().st_size for path in output.iterdir())
    again = invoke(llama, "--factors", factors, "-o", output)
    assert again.exit_code == 2 and "use --force" in again.stderr
    assert invoke(llama, "-o", output, "--force", "--precision", "fp16").exit_code == 0
    assert not (output / "rerotate.onnx").exists(), "one tier has no border"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "out"]


def test_a_certified_export_can_be_replaced(tmp_path: Path, llama: Path) -> None:
    output = export(llama, None, tmp_path / "out")
    (output / "longrope-certificate.json").write_text("{}")
    export(llama, None, output, force=True)
    assert not (output / "longrope-certificate.json").exists()


def test_without_the_extra_the_pip_line_is_given(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    result = invoke(llama, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "pip install 'longrope-export[onnx]'" in result.stderr


def test_what_is_not_known_is_refused_by_name(tmp_path: Path, llama: Path) -> None:
    def refusal(source: Path, *options: object) -> str:
        result = invoke(source, "-o", tmp_path / "out", *options)
        assert result.exit_code == 2, result.output
        assert not (tmp_path / "out").exists()
        return result.stderr

    assert "Gemma2ForCausalLM" in refusal(make_model(tmp_path / "gemma2", "gemma2"))
    assert "beyond the factors' target" in refusal(llama, "--max-length", 257)
    broken = make_model(tmp_path / "broken", "llama", eos_token_id=1)
    for changes, message in (
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_act": "silu", "num_local_experts": 4}, "mixture of experts"),
        ({"num_local_experts": None, "intermediate_size": 97}, "must have shape [97, 64]"),
        (
            {"intermediate_size": 96, "num_hidden_layers": 3},
            "model.layers.2.input_layernorm.weight",
        ),
        ({"num_hidden_layers": 1}, "no place for: model.layers.1"),
    ):
        edit_json(broken / "config.json", **changes)
        assert message in refusal(broken)


def test_a_damaged_checkpoint_leaves_nothing(tmp_path: Path, llama: Path) -> None:
    source = make_source(tmp_path / "model")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="damaged or truncated"):
        export(source, None, tmp_path / "out")
    wrong = {
        name: value.astype(np.int32) for name, value in load_file(llama / weights.name).items()
    }
    save_file(wrong, weights)
    with pytest.raises(ModelError, match="dtype I32"):
        export(source, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.* beyond the range of float16"):
        export(source, None, tmp_path / "out", precision="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_outputs_that_must_not_be_replaced(tmp_path: Path, llama: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not empty and holds no"):
        export(llama, None, documents, force=True)
    annotated = export(llama, None, tmp_path / "annotated")
    (annotated / "notes.txt").write_text("measured")
    with pytest.raises(OutputError, match=r"no export writes \(notes.txt\)"):
        export(llama, None, annotated, force=True)
    assert (annotated / "notes.txt").read_text() == "measured"
    with pytest.raises(OutputError, match="is a file"):
        export(llama, None, documents / "thesis.txt", force=True)
    with pytest.raises(OutputError, match="the input"):
        export(llama, None, llama, force=True)
    with pytest.raises(OutputError, match="does not exist"):
        export(llama, None, tmp_path / "no" / "out")
    assert (documents / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    source = make_model(
        tmp_path / "model", "llama", dtype="float32", vocab_size=4000, eos_token_id=1
    )
    with pytest.raises(OutputError, match="free some space"):
        export(source, None, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_a_killed_export_leaves_nothing_under_the_final_name(tmp_path: Path, llama: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; "
        "from longrope_converters.to_onnx.convert import OnnxConverter; "
        "from longrope_export.models.model import load_model; "
        "OnnxConverter().convert(load_model(Path(sys.argv[1])), None, Path(sys.argv[2]), "
        "lambda count: os.kill(os.getpid(), signal.SIGKILL))"
    )
    result = subprocess.run([sys.executable, "-c", code, llama, tmp_path / "out"], check=False)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    export(llama, None, tmp_path / "out")
    assert OnnxModel(tmp_path / "out", threads=1).logits(tokens(5)).shape == (5, 320)


@pytest.mark.parametrize(
    ("said", "window"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 40}, 40)],
)
def test_a_mistral_that_says_nothing_has_the_window_of_its_class(
    said: dict[str, int | None], window: int | None, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "m", "mistral")
    values = json.loads((folder / "config.json").read_text())
    values.pop("sliding_window", None)
    (folder / "config.json").write_text(json.dumps({**values, **said}))
    assert set(mistral.describe(read_hf_config(folder)).windows) == {window}
    assert transformers.AutoConfig.from_pretrained(folder).sliding_window == window
