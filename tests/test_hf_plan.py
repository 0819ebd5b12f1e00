"""What a plan from a Hugging Face folder refuses, and what it leaves to others."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import add_bpe_tokenizer, add_sentencepiece, edit_json, make_model

from longrope_converters.to_gguf.hf_plan import is_native, plan_hf_folder
from longrope_converters.to_gguf.plan import GgufPlan
from longrope_export.errors import ModelError, UnsupportedError
from longrope_export.models.hf_config import read_hf_config

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LONGROPE = {
    "rope_type": "longrope",
    "long_factor": [2.0] * 8,
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 64,
}


def plan(folder: Path, outtype: str = "f16", **options: Any) -> GgufPlan:
    return plan_hf_folder(read_hf_config(folder), outtype, **options)


def keys(plan: GgufPlan) -> dict[str, Any]:
    return {entry.key: entry.value for entry in plan.key_values}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("plan") / "model", dtype="float32")
    add_sentencepiece(folder)
    return folder


@pytest.fixture(scope="module")
def sharded_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("plan") / "model", max_shard_size="40KB")
    add_sentencepiece(folder)
    return folder


@pytest.fixture
def model(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "model"))


@pytest.fixture
def sharded(sharded_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_template, tmp_path / "model"))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray[Any, Any]]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_index(folder: Path, **weight_map: Any) -> dict[str, Any]:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(weight_map)
    path.write_text(json.dumps(index))
    return dict(index["weight_map"])


def test_every_tensor_of_the_checkpoint_is_planned(model: Path) -> None:
    planned = {tensor.name: tensor for tensor in plan(model).tensors}
    assert len(planned) == len(load_file(model / "model.safetensors"))
    assert planned["blk.0.attn_q.weight"].num_heads == 4
    assert planned["blk.0.attn_k.weight"].num_heads == 2
    assert planned["blk.0.attn_v.weight"].num_heads is None


def test_truncated_file_is_refused(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or truncated"):
        plan(model)


@pytest.mark.parametrize("length", [1 << 60, 200 << 20, 0])
def test_absurd_header_length_is_refused(model: Path, length: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(ModelError, match="damaged or truncated"):
        plan(model)


def test_missing_shard_is_named(sharded: Path) -> None:
    weight_map = edit_index(sharded)
    (sharded / weight_map[Q_PROJ]).unlink()
    with pytest.raises(ModelError, match=weight_map[Q_PROJ]):
        plan(sharded)


def test_tensor_that_only_the_index_knows_is_named(sharded: Path) -> None:
    edit_index(sharded, ghost="model-00001-of-00006.safetensors")
    with pytest.raises(ModelError, match="no file holds: ghost"):
        plan(sharded)


def test_index_may_not_point_out_of_the_folder(sharded: Path) -> None:
    edit_index(sharded, ghost="../model.safetensors")
    with pytest.raises(ModelError, match="must name a file of this folder"):
        plan(sharded)


def test_tensor_in_two_files_is_named(sharded: Path) -> None:
    weight_map = edit_index(sharded)
    other = next(shard for shard in weight_map.values() if shard != weight_map[Q_PROJ])
    shutil.copy(sharded / weight_map[Q_PROJ], sharded / other)
    with pytest.raises(ModelError, match="stands in"):
        plan(sharded)


def test_missing_tensor_is_named(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(ModelError, match=f"missing: {Q_PROJ}"):
        plan(model)


def test_missing_layer_is_named(model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"model\.layers\.2\..* and 4 more"):
        plan(model)


def test_missing_head_is_allowed_only_when_tied(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"missing: lm_head\.weight"):
        plan(model)
    edit_json(model / "config.json", tie_word_embeddings=True)
    assert "output.weight" not in {tensor.name for tensor in plan(model).tensors}


def test_wrong_shape_names_both(model: Path) -> None:
    edit_json(model / "config.json", num_attention_heads=8)
    with pytest.raises(ModelError, match=r"o_proj\.weight must have shape \[64, 128\].*\[64, 64\]"):
        plan(model)


def test_unknown_dtype_is_named(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype("i4")}))
    with pytest.raises(ModelError, match=f"{Q_PROJ} has dtype I32, expected one of BF16, F16, F32"):
        plan(model)


def test_unknown_tensor_is_named(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update(extra=np.zeros(4, dtype="f4")))
    with pytest.raises(UnsupportedError, match="no such tensors: extra"):
        plan(model)


def test_rotary_buffers_are_left_out(model: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    before = plan(model).tensors
    edit_tensors(model, lambda tensors: tensors.update({buffer: np.ones(8, dtype="f4")}))
    assert [tensor.name for tensor in plan(model).tensors] == [tensor.name for tensor in before]


def test_pickles_are_not_opened(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="convert the checkpoint to safetensors first"):
        plan(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"num_local_experts": 8},
        {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
        {"architectures": ["Qwen3Model"], "model_type": "qwen3"},
        {"text_config": {"hidden_size": 64}},
    ],
)
def test_other_kinds_are_not_native(model: Path, changes: dict[str, Any]) -> None:
    edit_json(model / "config.json", **changes)
    assert not is_native(read_hf_config(model))
    with pytest.raises(UnsupportedError, match="cannot be converted natively"):
        plan(model)


def test_reranker_is_not_native(template: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(template, tmp_path / "Qwen3-Reranker-0.6B"))
    edit_json(folder / "config.json", model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    assert not is_native(read_hf_config(folder))


def test_of_longrope_nothing_is_written(model: Path) -> None:
    plain = plan(model)
    edit_json(model / "config.json", rope_parameters=LONGROPE)
    assert keys(plan(model)).keys() == keys(plain).keys()
    assert plan(model).tensors == plain.tensors


def test_phi3_longrope_leaves_all_scaling_keys_out(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "phi3", rope_parameters={**LONGROPE, "rope_theta": 1e4})
    add_sentencepiece(folder)
    assert not [key for key in keys(plan(folder)) if ".rope.scaling." in key]


def test_scaling_of_the_config_can_be_left_out(model: Path) -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    plain = plan(model)
    edit_json(model / "config.json", rope_parameters=llama3)
    assert plan(model).tensors[0].name == "rope_freqs.weight"
    assert plan(model, keep_rope_scaling=False).tensors == plain.tensors


@pytest.mark.parametrize("rope_type", ["llama3", "proportional"])
def test_rope_type_without_a_place_is_refused(tmp_path: Path, rope_type: str) -> None:
    folder = make_model(tmp_path / "model", "qwen2")
    add_sentencepiece(folder)
    edit_json(folder / "config.json", rope_parameters={"rope_type": rope_type, "factor": 8.0})
    with pytest.raises(UnsupportedError, match=f"rope_type '{rope_type}' cannot be expressed"):
        plan(folder)


def test_linear_scaling_needs_its_factor(model: Path) -> None:
    edit_json(model / "config.json", rope_parameters={"rope_type": "linear", "factor": "two"})
    with pytest.raises(ModelError, match="RoPE factor must be a positive number, got 'two'"):
        plan(model)


def test_head_dim_that_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "granite", head_dim=32)
    add_sentencepiece(folder)
    with pytest.raises(UnsupportedError, match="head_dim 32 is not hidden_size"):
        plan(folder)


def test_unknown_pre_tokenizer_prints_its_hash_and_the_way_out(model: Path) -> None:
    (model / "tokenizer.model").unlink()
    add_bpe_tokenizer(model)
    with pytest.raises(UnsupportedError, match=r"hash is [0-9a-f]{64}\..*--pre NAME.*llama-bpe"):
        plan(model)
    assert keys(plan(model, pre="llama-bpe"))["tokenizer.ggml.pre"] == "llama-bpe"
    with pytest.raises(UnsupportedError, match="--pre nonsense: not a pre-tokenizer"):
        plan(model, pre="nonsense")


def test_tokenizer_larger_than_the_model_is_refused(model: Path) -> None:
    (model / "tokenizer.model").unlink()
    add_bpe_tokenizer(model)
    edit_json(model / "tokenizer_config.json", extra_special_tokens=[f"<{i}>" for i in range(50)])
    with pytest.raises(ModelError, match=r"token id .* vocab_size in config\.json is 320"):
        plan(model, pre="gpt-2")


def test_bpe_without_merges_is_refused(model: Path) -> None:
    """llama.cpp does not load its file."""
    (model / "tokenizer.model").unlink()
    add_bpe_tokenizer(model, vocab_size=258)  # the bytes and two special tokens
    with pytest.raises(ModelError, match="BPE tokenizer without merges"):
        plan(model, pre="gpt-2")
    (model / "merges.txt").write_text("#version: 0.2\na b\n")
    assert keys(plan(model, pre="gpt-2"))["tokenizer.ggml.merges"] == ["a b"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_damaged_tokenizer_is_refused(model: Path, name: str) -> None:
    (model / "tokenizer.model").unlink()
    (model / name).write_text("{}")
    with pytest.raises(ModelError, match=name):
        plan(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"0": {}}},
        {"added_tokens_decoder": [1, 2]},
        {"added_tokens_decoder": {"one": {"content": "x"}}},
    ],
)
def test_malformed_tokenizer_settings_are_refused(model: Path, settings: dict[str, Any]) -> None:
    edit_json(model / "tokenizer_config.json", **settings)
    with pytest.raises(ModelError, match=r"a tokenizer file or config\.json is malformed"):
        plan(model)


def test_absurd_number_of_layers_is_refused(model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=10**12)
    with pytest.raises(ModelError, match=r"num_hidden_layers is 1000000000000, .* 21 tensors"):
        plan(model)


def test_missing_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        plan(model)


def test_unknown_outtype_is_refused(model: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"outtype must be one of f32, .*got 'q4_k_m'"):
        plan(model, "q4_k_m")


def test_name_is_written(model: Path) -> None:
    assert keys(plan(model, name="My Model"))["general.name"] == "My Model"
    assert keys(plan(model))["general.name"] == "Model"
