"""The table of model families: how each one ropes, and what a config.json may leave out.

A new family is one more entry here, plus one in each converter that writes it itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What is common to all models of one architecture.

    Attributes:
        name: our name; equals transformers' model_type.
        hf_architectures: class names in config.json's `architectures`.
        gguf_architectures: values of general.architecture that hold such a model.
        defaults: what transformers' config class assumes for a key that config.json lacks.
        global_layers_only: only the layers with full attention are rescaled (gemma3: the local
            ones have a base of their own).
        text_model_type: model_type of the text model where a wrapper has `name` itself.
    """

    name: str
    hf_architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    global_layers_only: bool = False
    text_model_type: str | None = None


FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        ("LlamaForCausalLM", "LLaMAForCausalLM"),
        ("llama",),
        {"rope_theta": 10000.0, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    ),
    Family(
        "mistral",
        ("MistralForCausalLM",),
        ("llama", "mistral3"),
        {
            "rope_theta": 10000.0,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 8,
        },
    ),
    Family("mixtral", ("MixtralForCausalLM",), ("llama",), {"rope_theta": 1e6}),
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        ("phi3",),
        {
            "rope_theta": 10000.0,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    Family("phimoe", ("PhiMoEForCausalLM", "PhimoeForCausalLM"), ("phimoe",), {"rope_theta": 1e6}),
    Family(
        "minicpm",
        ("MiniCPMForCausalLM",),
        ("minicpm",),
        {
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "scale_emb": 1,
            "scale_depth": 1,
            "dim_model_base": 1,
        },
    ),
    Family(
        "minicpm3",
        ("MiniCPM3ForCausalLM",),
        ("minicpm3",),
        {"rope_theta": 10000.0, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
    ),
    Family(
        "granite",
        ("GraniteForCausalLM",),
        ("granite",),
        {
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    Family("granitemoe", ("GraniteMoeForCausalLM",), ("granitemoe",), {"rope_theta": 10000.0}),
    Family(
        "qwen2",
        ("Qwen2ForCausalLM", "Qwen2Model"),
        ("qwen2",),
        {
            "rope_theta": 10000.0,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 32,
        },
    ),
    Family("qwen2_moe", ("Qwen2MoeForCausalLM",), ("qwen2moe",), {"rope_theta": 10000.0}),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM", "Qwen3Model"),
        ("qwen3",),
        {
            "rope_theta": 10000.0,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "head_dim": 128,
            "num_key_value_heads": 32,
        },
    ),
    Family("qwen3_moe", ("Qwen3MoeForCausalLM",), ("qwen3moe",), {"rope_theta": 10000.0}),
    Family("gemma", ("GemmaForCausalLM",), ("gemma",), {"head_dim": 256, "rope_theta": 10000.0}),
    Family("gemma2", ("Gemma2ForCausalLM",), ("gemma2",), {"head_dim": 256, "rope_theta": 10000.0}),
    Family(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        ("gemma3",),
        {
            "head_dim": 256,
            "rope_theta": 1e6,
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
        },
        global_layers_only=True,
        text_model_type="gemma3_text",
    ),
)

_UNKNOWN = "unknown"

#: model_type, or general.architecture of a GGUF, of models that have no rotary embedding at all
WITHOUT_ROPE = frozenset(
    {"gpt2", "gpt_neo", "gpt_bigcode", "starcoder", "opt", "bloom", "mpt", "xglm", "biogpt", "ctrl"}
    | {"openai-gpt", "refact", "mamba", "mamba2", "rwkv", "rwkv6", "rwkv7", "t5", "bart", "bert"}
)


def family_of_hf(model_type: str | None, architectures: list[str]) -> Family:
    """The family of a config.json; one named "unknown" when no entry fits."""
    for family in FAMILIES:
        if any(name in family.hf_architectures for name in architectures):
            return family
    for family in FAMILIES:
        known = (family.name, family.text_model_type)
        if model_type is not None and model_type in known and not architectures:
            return family
    return Family(_UNKNOWN, tuple(architectures), ())


def family_of_gguf(architecture: str) -> Family:
    """The first family that is stored under this general.architecture, or one named "unknown"."""
    for family in FAMILIES:
        if architecture in family.gguf_architectures:
            return family
    return Family(_UNKNOWN, (), (architecture,))
