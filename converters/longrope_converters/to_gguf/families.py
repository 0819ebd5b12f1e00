"""The model families that are converted here without torch, and the tensors each one holds.

A new family is one entry in NATIVE, and one function in hf_keys if it has keys of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longrope_export.errors import UnsupportedError
from longrope_export.models.hf_config import HfConfig


@dataclass(frozen=True)
class NativeFamily:
    """How one family is stored in GGUF.

    Attributes:
        gguf_architecture: value of general.architecture.
        interleaved: rows of q and k change to llama.cpp's interleaved order; `interleaved_bias`
            says the same of their biases.
        fused: q, k and v are one matrix, gate and up another (phi3).
        qk_norm: q and k are normalised per head (qwen3).
        qkv_bias: q, k and v always have biases (qwen2).
        tokenizers: which tokenizer files are looked for, in this order: "sentencepiece"
            (tokenizer.model), "llama-hf" (a SentencePiece model that only tokenizer.json holds),
            "bpe" (byte-level BPE in tokenizer.json).
    """

    gguf_architecture: str
    interleaved: bool = False
    interleaved_bias: bool = False
    fused: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    tokenizers: tuple[str, ...] = ("sentencepiece", "bpe")


_LLAMA_TOKENIZERS = ("sentencepiece", "llama-hf", "bpe")

# by our family name, which is transformers' model_type
NATIVE: dict[str, NativeFamily] = {
    "llama": NativeFamily("llama", True, True, tokenizers=_LLAMA_TOKENIZERS),
    "mistral": NativeFamily("llama", True, True, tokenizers=_LLAMA_TOKENIZERS),
    "granite": NativeFamily("granite", True, True, tokenizers=_LLAMA_TOKENIZERS),
    "minicpm": NativeFamily("minicpm", True, tokenizers=("sentencepiece",)),
    "phi3": NativeFamily("phi3", fused=True),
    "qwen2": NativeFamily("qwen2", qkv_bias=True),
    "qwen3": NativeFamily("qwen3", qk_norm=True),
}

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
_DRAFT_KEYS = ("draft_vocab_size", "spatial_target_layers", "deepstack_layer_map")
# buffers that old checkpoints carry along
_IGNORED_SUFFIXES = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a checkpoint of this config may hold, under its GGUF name.

    `num_heads` is set where rows are reordered, as in PlannedTensor.
    """

    gguf_name: str
    shape: tuple[int, ...]
    required: bool = True
    num_heads: int | None = None


def reason_against_native(config: HfConfig) -> str | None:
    """Why this model cannot be planned here, or None if it can."""
    values, name = config.values, config.family.name
    if name not in NATIVE or not config.architecture.endswith("ForCausalLM"):
        return f"architecture {config.architecture or config.get('model_type')!r} is not built in"
    if isinstance(values.get("text_config"), dict) or values.get("vision_config"):
        return "it is a multimodal model"
    if config.quantization:
        return f"its weights are quantized ({config.quantization})"
    if any(values.get(key) for key in _EXPERT_KEYS):
        return "it is a mixture of experts"
    if any(values.get(key) for key in _DRAFT_KEYS):
        return "it is a draft or multimodal variant"
    if "mrope_section" in config.rope.parameters or "sliding_attention" in config.rope.parameters:
        return "its RoPE differs by section or by layer"
    if name.startswith("qwen") and (config.folder / "modules.json").is_file():
        return "it is an embedding model (modules.json)"
    if name == "qwen3" and _looks_like_reranker(config):
        return "it is a reranker"
    tekken, tokenizer = config.folder / "tekken.json", config.folder / "tokenizer.json"
    if tekken.is_file() and not tokenizer.is_file():
        return "its tokenizer is a tekken.json without tokenizer.json"
    return None


def native_family(config: HfConfig) -> NativeFamily:
    """The entry for a config.

    Raises:
        UnsupportedError: with the reason.
    """
    reason = reason_against_native(config)
    if reason is not None:
        raise UnsupportedError(f"{config.folder}: cannot be converted natively: {reason}")
    return NATIVE[config.family.name]


def is_ignored(tensor_name: str) -> bool:
    """Whether a tensor of the checkpoint is no weight."""
    return tensor_name.endswith(_IGNORED_SUFFIXES)


def expected_tensors(config: HfConfig, family: NativeFamily) -> dict[str, ExpectedTensor]:
    """Every tensor that a checkpoint may hold, by its name there."""
    hidden, vocab = config.require_int("hidden_size"), config.require_int("vocab_size")
    tied = bool(config.get("tie_word_embeddings", False))
    expected = {
        "model.embed_tokens.weight": ExpectedTensor("token_embd.weight", (vocab, hidden)),
        "model.norm.weight": ExpectedTensor("output_norm.weight", (hidden,)),
        "lm_head.weight": ExpectedTensor("output.weight", (vocab, hidden), required=not tied),
    }
    layer = list(_layer_tensors(config, family))
    for block in range(config.require_int("num_hidden_layers")):
        for name, tensor in layer:
            expected[f"model.layers.{block}.{name}"] = ExpectedTensor(
                f"blk.{block}.{tensor.gguf_name}", tensor.shape, tensor.required, tensor.num_heads
            )
    return expected


def _layer_tensors(config: HfConfig, family: NativeFamily) -> Iterator[tuple[str, ExpectedTensor]]:
    """Tensors of one layer, without the prefix that names the layer."""
    hidden, inner = config.require_int("hidden_size"), config.require_int("intermediate_size")
    heads, kv_heads = config.require_int("num_attention_heads"), config.num_key_value_heads
    q_rows, kv_rows = heads * config.head_dim, kv_heads * config.head_dim
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    qkv_bias = attention_bias or family.qkv_bias

    yield "input_layernorm.weight", ExpectedTensor("attn_norm.weight", (hidden,))
    yield "post_attention_layernorm.weight", ExpectedTensor("ffn_norm.weight", (hidden,))
    if family.fused:
        yield from _linear("self_attn.qkv_proj", "attn_qkv", (q_rows + 2 * kv_rows, hidden))
        yield from _linear("mlp.gate_up_proj", "ffn_up", (2 * inner, hidden))
    else:
        for letter, rows, groups in (("q", q_rows, heads), ("k", kv_rows, kv_heads)):
            yield from _linear(
                f"self_attn.{letter}_proj",
                f"attn_{letter}",
                (rows, hidden),
                qkv_bias,
                groups if family.interleaved else None,
                groups if family.interleaved_bias else None,
            )
        yield from _linear("self_attn.v_proj", "attn_v", (kv_rows, hidden), qkv_bias)
        yield from _linear("mlp.gate_proj", "ffn_gate", (inner, hidden), mlp_bias)
        yield from _linear("mlp.up_proj", "ffn_up", (inner, hidden), mlp_bias)
    yield from _linear("self_attn.o_proj", "attn_output", (hidden, q_rows), attention_bias)
    yield from _linear("mlp.down_proj", "ffn_down", (hidden, inner), mlp_bias)
    if family.qk_norm:
        yield "self_attn.q_norm.weight", ExpectedTensor("attn_q_norm.weight", (config.head_dim,))
        yield "self_attn.k_norm.weight", ExpectedTensor("attn_k_norm.weight", (config.head_dim,))


def _linear(
    name: str,
    gguf_name: str,
    shape: tuple[int, int],
    has_bias: bool = False,
    num_heads: int | None = None,
    bias_heads: int | None = None,
) -> Iterator[tuple[str, ExpectedTensor]]:
    yield f"{name}.weight", ExpectedTensor(f"{gguf_name}.weight", shape, num_heads=num_heads)
    yield (
        f"{name}.bias",
        ExpectedTensor(f"{gguf_name}.bias", shape[:1], required=has_bias, num_heads=bias_heads),
    )


def _looks_like_reranker(config: HfConfig) -> bool:
    hints = (config.folder.absolute().name, str(config.values.get("_name_or_path", "")))
    if any("qwen3-reranker" in hint.lower() for hint in hints):
        return True
    readme = config.folder / "README.md"
    if not readme.is_file():
        return False
    return "# qwen3-reranker" in readme.read_text(encoding="utf-8", errors="replace").lower()
