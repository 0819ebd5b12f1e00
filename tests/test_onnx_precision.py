"""fp16, int8 and int4: against the same quantization, emulated in torch from its definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_onnx import export, make_source, three_tiers, tokens

from longrope_export.errors import UnsupportedError
from longrope_export.runtimes.onnx import OnnxModel
from longrope_export.verify.reference import Reference

BLOCK = 32


@pytest.fixture(scope="module", params=["llama", "phi3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model, and one with fused matrices and a head of its own."""
    return make_source(tmp_path_factory.mktemp("quantized") / "model", request.param)


def emulate(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to nearest in blocks of 32 along the row; the largest value becomes -2^(bits-1)."""
    rows, columns = weight.shape
    blocks = torch.nn.functional.pad(weight, (0, -columns % BLOCK)).reshape(rows, -1, BLOCK)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    half = 2 ** (bits - 1)
    scale = largest / -half
    shifted = (
        torch.where(scale == 0, 0, blocks * (1 / scale)) + half
    )  # the kernel's order, in float32
    codes = (shifted.double() + 0.5).floor().clamp(0, 2 * half - 1) - half  # halves upwards
    return (codes.float() * scale).reshape(rows, -1)[:, :columns]


def emulated_reference(source: Path, bits: int, outer_bits: int = 8) -> Reference:
    reference = Reference(source, three_tiers(source))
    with torch.no_grad():
        for name, weight in reference.model.named_parameters():
            if weight.ndim == 2:
                outer = "embed_tokens" in name or "lm_head" in name
                weight.copy_(emulate(weight, outer_bits if outer else bits))
    return reference


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_block_weights_are_what_their_definition_says(
    tmp_path: Path, source: Path, precision: str, bits: int
) -> None:
    expected = emulated_reference(source, bits).logits(tokens(150))
    exact = Reference(source, three_tiers(source)).logits(tokens(150))
    folders = {
        level: export(
            source, three_tiers(source), tmp_path / level, precision=precision, accuracy_level=n
        )
        for level, n in (("float", 0), ("int8", 4))
    }
    logits = {
        level: OnnxModel(folder, threads=1).logits(tokens(150)) for level, folder in folders.items()
    }
    np.testing.assert_allclose(logits["float"], expected, atol=2e-5)
    # activations in blocks of 8 bits cost about as much as weights of 8 bits do
    limit = 2 * np.abs(emulated_reference(source, 8).logits(tokens(150)) - exact).max()
    assert np.abs(logits["int8"] - expected).max() < limit
    assert np.abs(expected - exact).max() > 1e-3, "the weights are quantized at all"


def test_embedding_and_head_in_four_bits(tmp_path: Path, source: Path) -> None:
    expected = emulated_reference(source, 4, outer_bits=4).logits(tokens(100))
    options = {"precision": "int4", "accuracy_level": 0, "embedding_bits": 4}
    folder = export(source, three_tiers(source), tmp_path / "out", **options)
    np.testing.assert_allclose(
        OnnxModel(folder, threads=1).logits(tokens(100)), expected, atol=2e-5
    )
    with pytest.raises(UnsupportedError, match="is for --precision int4, not int8"):
        export(source, None, tmp_path / "no", precision="int8", embedding_bits=4)


def test_half_precision(tmp_path: Path, source: Path) -> None:
    """float16 has 11 bits: a few units in the last place of logits up to 4."""
    expected = Reference(source, three_tiers(source)).logits(tokens(150))
    for ops in ("genai", "standard"):
        folder = export(source, three_tiers(source), tmp_path / ops, precision="fp16", ops=ops)
        model = OnnxModel(folder, threads=1)
        assert {value.type for value in model.caches.values()} == {"tensor(float16)"}
        limit = 8 * 2.0**-11 * np.abs(expected).max()
        np.testing.assert_allclose(model.logits(tokens(150)), expected, atol=limit)


def test_quantized_weights_and_standard_operators_exclude_each_other(
    tmp_path: Path, source: Path
) -> None:
    with pytest.raises(UnsupportedError, match="int4 needs MatMulNBits"):
        export(source, None, tmp_path / "out", precision="int4", ops="standard")
    assert not (tmp_path / "out").exists()
