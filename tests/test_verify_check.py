"""Certificates: embedded, checked again, held to what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_onnx import export, three_tiers
from tiny_models import make_model
from verified import make_verified, run

from longrope_converters.certificate import embed_certificate
from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_converters.to_safetensors.convert import SafetensorsConverter, SafetensorsOptions
from longrope_export.factor_files import to_json
from longrope_export.gguf_format import read_header
from longrope_export.models.model import load_model
from longrope_export.runtimes.onnx_sequence import OnnxSequence
from longrope_export.verify.certificate import content_hash, read_certificate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See make_verified."""
    return make_verified(tmp_path_factory.mktemp("command"))


def test_check_finds_the_export_again_and_nothing_else(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other"
    shutil.copytree(made / "onnx", copy)
    embed_certificate(copy, json.loads((made / "certificate.json").read_text()))
    for certificate in (made / "certificate.json", copy):
        result = run(tmp_path, "--check", certificate, "other")
        assert result.exit_code == 0, result.output
    with (copy / "model.onnx.data").open("r+b") as file:
        file.write(b"\0\1")
    result = run(tmp_path, "--check", made / "certificate.json", "other")
    assert result.exit_code == 1 and "none of the certified exports" in result.output
    (tmp_path / "x.json").write_text("{}")
    assert run(tmp_path, "--check", tmp_path / "x.json", "other").exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nonexist",), "nonexist: no such file or folder"),
        (("http://127.0.0.1:1",), "no such file or folder"),
        (("onnx", "--embed"), "--embed is not for --check"),
        (("onnx", "-o", "x.json"), "--output is not for --check"),
        (("onnx", "--length", 5), "--length is not for --check"),
        (("onnx", "--factors", "no.json"), "--factors is not for --check"),
        (("onnx", "--json"), "--json is not for --check"),
    ],
)
def test_check_ignores_nothing(made: Path, words: tuple[object, ...], said: str) -> None:
    result = run(made, "--check", made / "certificate.json", *words)
    assert result.exit_code == 2 and said in result.output, result.output


def test_check_runs_the_export(made: Path) -> None:
    certificate = json.loads((made / "certificate.json").read_text())
    certificate["exports"][0]["probe_log_probabilities"][-1][-1][0] -= 0.1
    (made / "moved.json").write_text(json.dumps(certificate))
    result = run(made, "--check", made / "moved.json", "onnx")
    assert result.exit_code == 1 and "here differs from what" in result.output
    del certificate["probes"]
    (made / "moved.json").write_text(json.dumps(certificate))
    assert "cannot be checked" in run(made, "--check", made / "moved.json", "onnx").output


def test_check_holds_a_quantized_export_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the source, from which 4 bits are far away."""
    settings = {"eos_token_id": 1, "initializer_range": 0.15}  # attention that matters
    source = make_model(tmp_path / "m", "llama", dtype="float32", **settings)
    config = three_tiers(source)
    (tmp_path / "f.json").write_text(json.dumps(to_json(config)))
    exported = export(source, config, tmp_path / "onnx", precision="int4")
    certificate = tmp_path / "c.json"
    options = ("--factors", tmp_path / "f.json", "--length", 100, "-o", certificate)
    assert run(tmp_path, "m", "onnx", *options).exit_code == 0
    assert run(tmp_path, "--check", certificate, exported).exit_code == 0
    outputs = OnnxSequence._outputs

    def wrong_tier(self: OnnxSequence, *rest: Any) -> list[Any]:
        first, *_, last = self.model.config.tiers
        tier, self.tier = self.tier, first if self.tier is last else last
        try:
            return outputs(self, *rest)
        finally:
            self.tier = tier

    def wrong_token(self: OnnxSequence, session: Any, tokens: list[int], *rest: Any) -> list[Any]:
        return outputs(self, session, [*tokens[:-20], 7, *tokens[-19:]], *rest)

    for wrong in (wrong_tier, wrong_token):
        monkeypatch.setattr(OnnxSequence, "_outputs", wrong)
        result = run(tmp_path, "--check", certificate, exported)
        assert result.exit_code == 1 and "expected at most 0.01" in result.output, result.output


def test_a_certificate_in_a_gguf_changes_neither_hash_nor_tensors(
    made: Path, tmp_path: Path
) -> None:
    source, path = load_model(made / "m"), tmp_path / "m.gguf"
    converter = GgufConverter(GgufOptions(outtype="f32", pre="gpt-2"))
    converter.convert(source, three_tiers(made / "m"), path, lambda _: None)
    before, data = content_hash(path), path.read_bytes()[read_header(path).data_start_bytes :]
    certificate = json.loads((made / "certificate.json").read_text())
    for _ in range(2):
        embed_certificate(path, certificate)
        assert content_hash(path) == before
    assert path.read_bytes()[read_header(path).data_start_bytes :].startswith(data)
    assert read_certificate(path)["created"] == certificate["created"]
    with path.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"changed")
    assert content_hash(path) != before


def test_check_runs_no_code_from_a_folder(made: Path) -> None:
    certificate = json.loads((made / "certificate.json").read_text())
    for name, said in (("transformers-remote", "runs code"), ("anything", "no runtime")):
        certificate["exports"][0]["runtime_name"] = name
        (made / "hostile.json").write_text(json.dumps(certificate))
        result = run(made, "--check", made / "hostile.json", "onnx")
        assert result.exit_code == 2 and said in result.output


def test_check_leaves_out_what_would_run_code(made: Path, tmp_path: Path) -> None:
    folder, certificate = tmp_path / "hf", tmp_path / "c.json"
    converter = SafetensorsConverter(SafetensorsOptions(remote_code=True))
    converter.convert(load_model(made / "m"), three_tiers(made / "m"), folder, lambda _: None)
    options = ("--factors", made / "f.json", "--length", 80, "-o", certificate)
    result = run(made, "m", folder, f"transformers-remote={folder}", *options)
    assert result.exit_code == 0, result.output
    result = run(made, "--check", certificate, folder)
    assert result.exit_code == 0, result.output
    assert "transformers-remote is left out" in " ".join(result.output.split())
