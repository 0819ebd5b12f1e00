"""What longrope_export.honours says of onnxruntime-genai's own builder, seen in what it builds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from tiny_models import add_bpe_tokenizer, make_model

from longrope_converters.to_safetensors.convert import SafetensorsConverter
from longrope_export.config import FactorTier, SwitchPolicy
from longrope_export.honours import Verdict, honours
from longrope_export.models.model import load_model

pytestmark = pytest.mark.integration

PAIRS = 8
THETA = 10000.0
SHORT, LONG = np.linspace(1, 1.5, PAIRS), np.linspace(1, 5, PAIRS)
SCALE = 1.1


def cos_tables(graph: onnx.GraphProto) -> list[npt.NDArray[np.float32]]:
    """Initializers and constants with "cos" in their names, those inside an If too."""
    found = [onnx.numpy_helper.to_array(t) for t in graph.initializer if "cos" in t.name]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += cos_tables(attribute.g)
            elif node.op_type == "Constant" and "cos" in node.output[0]:
                found.append(onnx.numpy_helper.to_array(attribute.t))
    return found


@pytest.mark.parametrize(
    ("family", "tables"),
    [
        ("llama", [(256, np.ones(PAIRS), 1.0)]),  # the factors are gone
        ("phi3", [(64, SHORT, SCALE), (256, LONG, SCALE)]),
        ("qwen2", None),  # refused
    ],
)
def test_the_tables_of_the_builder(
    tmp_path: Path, family: str, tables: list[tuple[int, npt.NDArray[np.float64], float]] | None
) -> None:
    source = make_model(tmp_path / "model", family, dtype="float32", eos_token_id=1)
    add_bpe_tokenizer(source)
    model = load_model(source)
    tiers = (FactorTier(64, tuple(SHORT), 0, SCALE), FactorTier(256, tuple(LONG), 0, SCALE))
    config = replace(
        model.native,
        original_max_position_embeddings=64,
        tiers=tiers,
        switch=SwitchPolicy.SEQUENCE,
    )
    SafetensorsConverter().convert(model, config, tmp_path / "stock", lambda _: None)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    command += ["-i", str(tmp_path / "stock"), "-o", str(tmp_path / "out")]
    result = subprocess.run(
        [*command, "-c", str(tmp_path / "cache")], capture_output=True, text=True, check=False
    )
    verdict = honours(config, model)["onnxruntime-genai's builder"]["last_tier"].verdict
    if tables is None:
        assert "longrope RoPE style is not currently supported" in result.stderr
        assert verdict is Verdict.NO
        return
    assert result.returncode == 0, result.stderr
    assert verdict is (Verdict.YES if family == "phi3" else Verdict.NO)
    built = sorted(cos_tables(onnx.load(tmp_path / "out" / "model.onnx").graph), key=len)
    assert len(built) == len(tables)
    for got, (rows, factors, scale) in zip(built, tables, strict=True):
        angles = np.arange(rows)[:, None] * THETA ** (-np.arange(PAIRS) / PAIRS) / factors
        np.testing.assert_allclose(got, np.cos(angles) * scale, atol=1e-4)
