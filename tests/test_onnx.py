"""The ONNX export computes the definition: against transformers' models with attention written out
in verify/reference.py, which shares nothing with the exporter."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tiny_models import make_model

from longrope_converters.to_onnx.convert import OnnxConverter, OnnxOptions
from longrope_converters.to_onnx.graph import Graph
from longrope_converters.to_onnx.rotation import computed_cos_sin, tier_index, uses_tables
from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError
from longrope_export.models.model import load_model
from longrope_export.runtimes.onnx import OnnxModel
from longrope_export.verify.reference import Reference

CLOSE = 2e-5  # logits are about 0.4 in size; float32 sums in another order
GEMMA_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"sliding_window": 40}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "gemma3": (
        "gemma3",
        {"num_hidden_layers": 3, "sliding_window": 40, "layer_types": GEMMA_TYPES, "head_dim": 32},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
}


def make_source(folder: Path, name: str = "llama") -> Path:
    family, settings = FAMILIES[name]
    return make_model(folder, family, dtype="float32", eos_token_id=1, **settings)


def three_tiers(source: Path, **changes: Any) -> LongRopeConfig:
    """64 / 128 / 256 tokens with everything that a config can say."""
    native = load_model(source).native
    rng = np.random.default_rng(5)

    def tier(length: int, ratio: float, start: int, scale: float) -> FactorTier:
        factors = 1 + rng.random(native.num_pairs) * (ratio - 1)
        return FactorTier(length, tuple(factors.tolist()), start, scale)

    config = LongRopeConfig(
        rope_theta=native.rope_theta,
        rotary_dim=native.rotary_dim,
        original_max_position_embeddings=64,
        max_position_embeddings=256,
        tiers=(tier(64, 1.5, 3, 1.0), tier(128, 3.0, 5, 1.2), tier(256, 6.0, 9, 1.1)),
        logit_scaling=LogitScaling(20, (0,)),
        layers=native.layers,
    )
    return replace(config, **changes)


def export(source: Path, config: LongRopeConfig | None, output: Path, **options: Any) -> Path:
    converter = OnnxConverter(OnnxOptions(**options))
    converter.convert(load_model(source), config, output, lambda _: None)
    return output


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 300, count)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ops", ["genai", "standard"])
def test_families_whole_in_chunks_and_step_by_step(tmp_path: Path, name: str, ops: str) -> None:
    source = make_source(tmp_path / "model", name)
    config = three_tiers(source)
    expected = Reference(source, config).logits(tokens(200))
    model = OnnxModel(export(source, config, tmp_path / "out", ops=ops), threads=1)
    assert expected.std() > 0.05
    np.testing.assert_allclose(model.logits(tokens(200)), expected, atol=CLOSE)
    np.testing.assert_allclose(model.logits(tokens(200), chunk_size=23), expected, atol=CLOSE)
    sequence = model.start()
    stepwise = [sequence.append(tokens(200)[:60])]
    stepwise += [sequence.append([token]) for token in tokens(200)[60:140]]
    np.testing.assert_allclose(np.concatenate(stepwise), expected[:140], atol=CLOSE)


@pytest.mark.parametrize("ops", ["genai", "standard"])
def test_sequence_rule_recomputes_or_is_pinned(tmp_path: Path, llama: Path, ops: str) -> None:
    config = three_tiers(llama, switch=SwitchPolicy.SEQUENCE)
    reference = Reference(llama, config)
    model = OnnxModel(export(llama, config, tmp_path / "out", ops=ops), threads=1)
    ids = tokens(140)
    for length in (64, 65, 128, 129):
        np.testing.assert_allclose(
            model.logits(ids[:length], chunk_size=50), reference.logits(ids[:length]), atol=CLOSE
        )
    growing = model.start()
    growing.append(ids[:60])
    for count in range(61, 69):  # 65 recomputes what was cached under the first tier
        step = growing.append(ids[count - 1 : count])
        np.testing.assert_allclose(step[-1], reference.logits(ids[:count])[-1], atol=CLOSE)
    pinned = model.start(declared_length=140)
    logits = [pinned.append(ids[:50]), *(pinned.append([token]) for token in ids[50:70])]
    expected = reference.logits(ids)[:70]
    np.testing.assert_allclose(np.concatenate(logits), expected, atol=CLOSE)


def test_causal_rule_generates_across_borders(tmp_path: Path, llama: Path) -> None:
    config = three_tiers(llama)
    model = OnnxModel(export(llama, config, tmp_path / "out"), threads=1)
    expected = Reference(llama, config).generate(tokens(60), 8)
    assert list(model.generate(tokens(60), 8)) == expected
    assert list(model.generate(tokens(60), 8, end_tokens=expected[2:3]))[-1] == expected[2]


def test_long_ladders_compute_their_angles(tmp_path: Path, llama: Path) -> None:
    base = three_tiers(llama)
    rng = np.random.default_rng(3)
    lengths = [*range(32, 200, 12), 1 << 18]
    tiers = tuple(
        FactorTier(n, tuple((1 + rng.random(8) * n / 32).tolist()), i % 7, 1 + i / 50)
        for i, n in enumerate(lengths)
    )
    config = replace(base, tiers=tiers, max_position_embeddings=1 << 18)
    assert not uses_tables(config)
    expected = Reference(llama, config).logits(tokens(180))
    for ops in ("genai", "standard"):
        folder = export(llama, config, tmp_path / ops, ops=ops)
        model = OnnxModel(folder, threads=1)
        np.testing.assert_allclose(model.logits(tokens(180)), expected, atol=CLOSE)
        assert (folder / "model.onnx.data").stat().st_size < 1 << 20


def test_computed_angles_are_exact_at_two_million(tmp_path: Path) -> None:
    """A float32 product would be wrong in the first decimal here."""
    factors = tuple(np.linspace(1, 50, 32).tolist())
    config = LongRopeConfig(
        10000.0, 64, 4096, 1 << 21, (FactorTier(4096, (1.0,) * 32), FactorTier(1 << 21, factors))
    )
    import onnx_ir as ir

    graph = Graph(np.float32, "angles")
    positions = graph.input("positions", ir.DataType.INT64, ["batch", "tokens"])
    length = graph.input("length", ir.DataType.INT64, [1, 1])
    outputs = computed_cos_sin(graph, config, positions, tier_index(graph, length, config))
    for name, value in zip(("cos", "sin"), outputs, strict=True):
        graph.output(value, name, ir.DataType.FLOAT, ["batch", "tokens", 32])
    graph.save(tmp_path / "angles.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "angles.onnx")
    places = [0, 1, 5000, 1_999_999, (1 << 21) - 1]
    feeds = {"positions": np.asarray([places]), "length": np.asarray([[1 << 21]])}
    cos, sin = session.run(["cos", "sin"], feeds)
    for row, place in enumerate(places):
        for pair in range(32):
            angle = place * 10000.0 ** (-pair / 32) / factors[pair]
            assert cos[0, row, pair] == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[0, row, pair] == pytest.approx(math.sin(angle), abs=1e-6)


def test_only_some_layers_are_rescaled(tmp_path: Path, llama: Path) -> None:
    config = three_tiers(llama, layers=(1,))
    model = OnnxModel(export(llama, config, tmp_path / "out"), threads=1)
    expected = Reference(llama, config).logits(tokens(150))
    np.testing.assert_allclose(model.logits(tokens(150)), expected, atol=CLOSE)


def test_without_factors_the_model_is_as_transformers_runs_it(tmp_path: Path) -> None:
    import torch
    import transformers

    source = make_model(
        tmp_path / "model",
        "llama",
        dtype="float32",
        eos_token_id=1,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    stock = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = stock(torch.as_tensor(tokens(100))[None]).logits[0].numpy()
    model = OnnxModel(export(source, None, tmp_path / "out"), threads=1)
    np.testing.assert_allclose(model.logits(tokens(100)), expected, atol=CLOSE)


@pytest.mark.parametrize("ops", ["genai", "standard"])
def test_a_padded_batch_through_the_runner(tmp_path: Path, llama: Path, ops: str) -> None:
    """Rows on both sides of a border; padding on either side is right."""
    config = three_tiers(llama)
    reference = Reference(llama, config)
    model = OnnxModel(export(llama, config, tmp_path / "out", ops=ops), threads=1)
    ids, mask = np.zeros((2, 90), int), np.zeros((2, 90), int)
    ids[0, :70], mask[0, :70] = tokens(70), 1  # padded on the right
    ids[1, -20:], mask[1, -20:] = tokens(20, 1), 1  # padded on the left
    logits = model.logits_of_batch(ids, mask)
    np.testing.assert_allclose(logits[0, :70], reference.logits(tokens(70)), atol=CLOSE)
    np.testing.assert_allclose(logits[1, -20:], reference.logits(tokens(20, 1)), atol=CLOSE)
    assert not logits[0, 70:].any()
    mask[0, 30] = 0
    with pytest.raises(ConfigError, match="without holes"):
        model.logits_of_batch(ids, mask)


def test_a_right_padded_batch_through_the_bare_session(tmp_path: Path, llama: Path) -> None:
    """What other callers may do: prompts of different lengths in one call, then a step."""
    config = three_tiers(llama, switch=SwitchPolicy.SEQUENCE)
    reference = Reference(llama, config)
    session = OnnxModel(export(llama, config, tmp_path / "out"), threads=1).session
    rows = [tokens(40), tokens(25, 1)]
    ids, mask = np.zeros((2, 40), np.int64), np.zeros((2, 40), np.int64)
    for row, prompt in enumerate(rows):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    feeds = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.arange(40)[None] * [[1]] * np.ones((2, 1), np.int64),
    }
    feeds |= {
        value.name: np.zeros((2, 2, 0, 16), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    names = [value.name for value in session.get_outputs()]
    first = dict(zip(names, session.run(None, feeds), strict=True))
    for row, prompt in enumerate(rows):
        expected = reference.logits(prompt)
        np.testing.assert_allclose(first["logits"][row, : len(prompt)], expected, atol=CLOSE)
    lengths = np.asarray([len(prompt) for prompt in rows])
    step = {
        "input_ids": np.asarray([[7], [9]]),
        "attention_mask": (np.arange(41)[None] <= lengths[:, None]).astype(np.int64),
        "position_ids": lengths[:, None],
    }
    step |= {
        name.replace("present", "past_key_values"): value
        for name, value in first.items()
        if name != "logits"
    }
    logits = session.run(["logits"], step)[0]
    for row, (prompt, token) in enumerate(zip(rows, (7, 9), strict=True)):
        expected = reference.logits([*prompt, token])[-1]
        np.testing.assert_allclose(logits[row, 0], expected, atol=CLOSE)


def test_limits_of_a_sequence(tmp_path: Path, llama: Path) -> None:
    model = OnnxModel(export(llama, three_tiers(llama), tmp_path / "out"), threads=1)
    with pytest.raises(ConfigError, match="beyond max_position_embeddings 256"):
        model.logits(tokens(257))
    with pytest.raises(ConfigError, match="at least one token"):
        model.start().append([])
    with pytest.raises(ConfigError, match="chunk_size"):
        model.start(chunk_size=0)
    sequence = model.start()
    assert sequence.append(tokens(100), keep=3).shape == (3, 320)
    assert sequence.length == 100
