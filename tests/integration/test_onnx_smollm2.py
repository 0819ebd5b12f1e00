"""The real model in ONNX Runtime, straight from its GGUF, against transformers on the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import pytest
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from test_onnx import export

from longrope_export.config import FactorTier, LongRopeConfig
from longrope_export.demo.material import fetch_smollm2
from longrope_export.methods import yarn_factors
from longrope_export.rope import compute_inv_freq, yarn_attention_factor
from longrope_export.runtimes.onnx import OnnxModel
from longrope_export.verify.reference import Reference

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

pytestmark = pytest.mark.integration


def as_folder(source: Path, folder: Path) -> Path:
    """The GGUF in transformers' names and row order (whose own reader takes half a minute)."""
    reader = GGUFReader(source)
    values = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    state = {
        "model.embed_tokens.weight": values["token_embd.weight"],
        "model.norm.weight": values["output_norm.weight"],
        "lm_head.weight": values["token_embd.weight"],
    }
    for layer in range(30):
        for name, stored in NAMES.items():
            value = values[f"blk.{layer}.{stored}.weight"]
            if stored in (
                "attn_q",
                "attn_k",
            ):  # llama.cpp keeps the two halves of a head interleaved
                value = value.reshape(-1, 32, 2, 576).transpose(0, 2, 1, 3).reshape(value.shape)
            state[f"model.layers.{layer}.{name}.weight"] = value
    settings = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_theta=100000.0,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings)
    tensors = {name: torch.from_numpy(value.copy()) for name, value in state.items()}
    model.load_state_dict(tensors, assign=True)
    model.save_pretrained(folder)
    return folder


def test_logits_across_borders_are_within_half_a_thousandth(tmp_path: Path) -> None:
    """Three tiers under `causal`; logits are 6 in size. Measured: 1.5e-4."""
    source = fetch_smollm2()
    folder = as_folder(source, tmp_path / "model")
    inv_freq = compute_inv_freq(100000.0, 64)
    tiers = tuple(
        FactorTier(
            length,
            tuple(yarn_factors(inv_freq, ratio, 8192).tolist()),
            4,
            yarn_attention_factor(ratio),
        )
        for length, ratio in ((64, 1.0), (150, 2.0), (400, 4.0))
    )
    config = LongRopeConfig(100000.0, 64, 64, 400, tiers)
    reference = Reference(folder, config)
    ids = np.random.default_rng(0).integers(20, 49152, 200).tolist()
    expected = reference.logits(ids)
    model = OnnxModel(export(source, config, tmp_path / "out"))
    whole, chunked = model.logits(ids), model.logits(ids, chunk_size=70)
    sequence = model.start()
    steps = [sequence.append(ids[:140]), *(sequence.append([token]) for token in ids[140:155])]
    assert np.abs(whole - expected).max() <= 5e-4
    assert np.abs(chunked - expected).max() <= 5e-4
    assert np.abs(np.concatenate(steps) - expected[:155]).max() <= 5e-4
    assert (whole.argmax(1) == expected.argmax(1)).mean() > 0.99


def test_the_tokenizer_in_onnxruntime_genai_is_transformers_own(tmp_path: Path) -> None:
    source = fetch_smollm2()
    export(source, None, tmp_path / "out", precision="int4", embedding_bits=4)
    expected = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    got = genai.Tokenizer(genai.Model(str(tmp_path / "out")))
    texts = [
        "The capital of France is Paris, isn't it?",
        " two  spaces\tand\n\nlines 1234.5",
        "caf\u00e9 \u4f60\u597d \U0001f680 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
        "<|im_start|>user\nhi<|im_end|>\n",
        "if (x == 1) {\r\n    return y[0];  }",
        "",
    ]
    for text in texts:
        ids = expected.encode(text)
        assert got.encode(text).tolist() == ids
        if text:
            assert got.decode(np.asarray(ids, np.int32)) == expected.decode(
                ids, skip_special_tokens=True
            )
    messages = [{"role": "user", "content": "hi"}]
    assert got.apply_chat_template(json.dumps(messages)) == expected.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
