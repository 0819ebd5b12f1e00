"""Random models of two layers, saved as Hugging Face folders, and tokenizers for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
SENTENCES = [
    "The factors divide the frequencies of the rotary embedding.",
    "A model trained on short text reads long text when its angles are rescaled.",
    "Every file that comes out of a converter must hold the same numbers.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9, words: one two three four five six seven.",
]
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "granitemoe": (transformers.GraniteMoeConfig, transformers.GraniteMoeForCausalLM),
    "phimoe": (transformers.PhimoeConfig, transformers.PhimoeForCausalLM),
}
_MINICPM = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32}


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    vocab_size: int = 320,
    dtype: str = "bfloat16",
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Save random weights and config.json; returns the folder. A tokenizer is not included.

    Args:
        folder: made if needed.
        family: model_type. transformers lacks minicpm: it is a renamed llama.
        vocab_size: rows of the embedding.
        dtype: of the weights.
        max_shard_size: makes several shards and an index when small.
        **overrides: entries of config.json.
    """
    config_class, model_class = _CLASSES["llama" if family == "minicpm" else family]
    settings = {**_SIZES, "vocab_size": vocab_size, "pad_token_id": 0, **overrides}
    if family == "qwen3":
        settings.setdefault("head_dim", 32)
    if family.startswith("gemma"):
        settings.setdefault("head_dim", 16)
    if family in ("gemma2", "gemma3"):
        settings.setdefault("sliding_window", 32)
    if family == "gemma3":
        settings.setdefault("layer_types", ["sliding_attention", "full_attention"])
    if family in ("mixtral", "phimoe", "granitemoe"):
        settings.setdefault("num_local_experts", 2)
    torch.manual_seed(len(family))
    model = model_class(config_class(**settings)).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if family == "minicpm":
        edit_json(
            folder / "config.json",
            model_type="minicpm",
            architectures=["MiniCPMForCausalLM"],
            head_dim=None,
            **_MINICPM,
        )
    return folder


def as_granite(folder: Path) -> Path:
    """minicpm is a llama with three multipliers, and granite is transformers' class for these.

    The folder of such a model, with the same weights.
    """
    settings = json.loads((folder / "config.json").read_text())
    layers = settings["num_hidden_layers"]
    granite = {
        **settings,
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": settings["scale_emb"],
        "residual_multiplier": settings["scale_depth"] / layers**0.5,
        "logits_scaling": settings["hidden_size"] / settings["dim_model_base"],
        "attention_multiplier": (settings["hidden_size"] // settings["num_attention_heads"])
        ** -0.5,
    }
    target = folder.with_name(folder.name + "-granite")
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(granite))
    weights = target / "model.safetensors"
    if not weights.exists():
        weights.symlink_to(folder / "model.safetensors")
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Change a JSON object on disk; None removes a key."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    values.update(changes)
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(kept, indent=1))


def add_bpe_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    """A byte-level BPE trained on a few sentences: llama.cpp does not know its hash."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )


def add_sentencepiece(folder: Path, vocab_size: int = 300, **settings: Any) -> None:
    """A SentencePiece BPE model with byte fallback, as Llama 2 has it, with two added tokens."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    added = {
        "0": _added("<unk>", special=True),
        "1": _added("<s>", special=True),
        "2": _added("</s>", special=True),
        str(vocab_size): _added("<|user|>", special=False),
        str(vocab_size + 1): _added("\u2581two words", special=False),
    }
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True,
        add_eos_token=False,
        added_tokens_decoder=added,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **settings,
    )


def add_llama_hf_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    """The same kind of vocabulary, but in tokenizer.json alone."""
    add_sentencepiece(folder, vocab_size)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()


def _added(text: str, special: bool) -> dict[str, Any]:
    return {
        "content": text,
        "special": special,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
    }
