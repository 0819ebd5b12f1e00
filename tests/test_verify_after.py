"""`safetensors ... --verify`: what is run on the folder just written, and what counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from test_onnx import make_source, three_tiers
from tiny_models import add_bpe_tokenizer, make_model

from longrope_converters.to_gguf.convert import GgufConverter, GgufOptions
from longrope_export.cli import main
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import ModelError
from longrope_export.factor_files import to_json
from longrope_export.models.model import load_model
from longrope_export.stock_rope import stock_config
from longrope_export.verify.stored import stored_precision


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_source(tmp_path_factory.mktemp("after") / "m")
    add_bpe_tokenizer(folder)
    return folder


def safetensors(source: Path, config: LongRopeConfig | None, output: Path, *words: str) -> Result:
    factors = []
    if config is not None:
        file = output.with_suffix(".json")
        file.write_text(json.dumps(to_json(config)))
        factors = ["--factors", str(file)]
    given = ["safetensors", str(source), *factors, "-o", str(output), *words, "--verify"]
    return CliRunner().invoke(main, given)


def as_gguf(source: Path, config: LongRopeConfig, outtype: str, output: Path) -> Path:
    converter = GgufConverter(GgufOptions(outtype=outtype, pre="gpt-2"))
    converter.convert(load_model(source), config, output, lambda _: None)
    return output


def test_remote_code_is_run_by_the_file_in_the_folder(source: Path, tmp_path: Path) -> None:
    config = three_tiers(source)
    result = safetensors(source, config, tmp_path / "out", "--remote-code")
    assert result.exit_code == 0, result.output
    assert "transformers, remote code, fp32, out: passed" in result.output
    assert "transformers, fp32" not in result.output


def test_stock_is_run_too(source: Path, tmp_path: Path) -> None:
    """Of two tiers it keeps stale keys, which is said; what --approximate drops counts."""
    config = three_tiers(source, logit_scaling=None)
    two = stock_config(config)
    result = safetensors(source, two, tmp_path / "two")
    assert result.exit_code == 0, result.output
    assert "transformers, longrope, fp32, two: passed" in result.output
    assert "transformers, fp32, two: FAILED" in result.output
    assert "keeps cached keys of the tier before" in " ".join(result.output.split())
    one = replace(two, tiers=two.tiers[-1:], switch=SwitchPolicy.CAUSAL)
    result = safetensors(source, one, tmp_path / "one")
    assert result.exit_code == 0, result.output
    assert "transformers, fp32, one: passed" in result.output and "keys" not in result.output
    result = safetensors(source, config, tmp_path / "lossy", "--approximate")
    assert result.exit_code == 1, result.output
    assert "transformers, longrope, fp32, lossy: passed" in result.output
    assert "transformers, fp32, lossy: FAILED" in result.output


@pytest.mark.parametrize(
    ("dtype", "outtype", "stored", "limits"),
    [
        ("float32", "q8_0", "bf16", "bf16"),
        ("float32", "f32", "fp16", "fp16"),
        ("float16", "f16", "fp16", "fp32"),  # kept as it was
    ],
)
def test_weights_rounded_to_16_bits_have_the_limits_of_these(
    tmp_path: Path, dtype: str, outtype: str, stored: str, limits: str
) -> None:
    settings = {"eos_token_id": 1, "initializer_range": 0.1}
    source = make_model(tmp_path / "m", "llama", dtype=dtype, **settings)
    add_bpe_tokenizer(source)
    gguf = as_gguf(source, three_tiers(source), outtype, tmp_path / "m.gguf")
    words = ["--dtype", "f16"] if stored == "fp16" else []
    result = safetensors(gguf, None, tmp_path / "out", "--remote-code", *words)
    assert result.exit_code == 0, result.output
    assert f"remote code, {limits}, out: passed" in result.output
    assert stored_precision(tmp_path / "out") == stored


def test_a_damaged_safetensors_header(tmp_path: Path) -> None:
    assert stored_precision(tmp_path) == "unknown"
    (tmp_path / "model.safetensors").write_bytes(b"\5\0\0\0\0\0\0\0[1,2]")
    with pytest.raises(ModelError, match="damaged safetensors header"):
        stored_precision(tmp_path)
