"""What onnxruntime-genai wants beside the model: genai_config.json and the tokenizer's files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from longrope_converters.gguf_tokenizer import write_tokenizer
from longrope_converters.to_onnx.description import Decoder
from longrope_converters.to_onnx.folder_output import TOKENIZER_FILES
from longrope_converters.to_onnx.source import Source
from longrope_export.config import LongRopeConfig, SwitchPolicy
from longrope_export.errors import ModelError
from longrope_export.gguf_format import GgufHeader

# any decoder-only model; never "phi3", "phimoe" or "phi3small", at whose names onnxruntime-genai
# throws the cache away at 4097 or 8193 tokens, whatever the model says
MODEL_TYPE = "decoder"
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def genai_config(
    source: Source,
    decoder: Decoder,
    rope: LongRopeConfig,
    ops: str,
    max_length: int,
) -> dict[str, Any]:
    """The content of genai_config.json.

    Args:
        max_length: search.max_length in tokens: how many the key-value cache is allocated for,
            which is also the length that picks the tier in onnxruntime-genai.

    Raises:
        ModelError: the source names no end token.
    """
    generation = source.generation
    begin, end = _token_ids(source, "bos_token_id"), _token_ids(source, "eos_token_id")
    pad = _token_ids(source, "pad_token_id") or end
    if not end:
        raise ModelError(
            f"{source.settings.path}: eos_token_id is missing (and in generation_config.json): "
            f"onnxruntime-genai would not know when to stop"
        )
    caches = {
        f"{kind}_{part}_names": f"{prefix}.%d.{part}"
        for kind, prefix in (("past", "past_key_values"), ("present", "present"))
        for part in ("key", "value")
    }
    return {
        "model": {
            "type": MODEL_TYPE,
            "bos_token_id": begin[0] if begin else end[0],
            "eos_token_id": end[0] if len(end) == 1 else end,
            "pad_token_id": pad[0],
            "context_length": rope.max_position_embeddings,
            "vocab_size": decoder.vocab_size,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": decoder.hidden_size,
                "head_size": decoder.head_dim,
                "num_attention_heads": decoder.num_heads,
                "num_hidden_layers": decoder.num_layers,
                "num_key_value_heads": decoder.num_key_value_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    **{name: form for name, form in caches.items() if name.startswith("past")},
                },
                "outputs": {
                    "logits": "logits",
                    **{name: form for name, form in caches.items() if name.startswith("present")},
                },
            },
        },
        "search": {
            "max_length": max_length,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": ops == "genai",
            **{name: generation[name] for name in _SAMPLING if generation.get(name) is not None},
        },
    }


def genai_notes(
    decoder: Decoder, rope: LongRopeConfig, ops: str, max_length: int, item_bytes: int
) -> tuple[str, ...]:
    """What a user of onnxruntime-genai has to know."""
    tokens = decoder.num_layers * 2 * decoder.num_key_value_heads * decoder.head_dim * item_bytes
    notes = []
    if len(rope.tiers) > 1:
        tier = rope.select_tier(max_length).max_length
        advice = "export again with --max-length" if ops == "standard" else "set search.max_length"
        notes.append(
            f"onnxruntime-genai runs every token under the tier up to {tier} (max_length "
            f"{max_length}); for shorter text {advice} to what you need"
        )
        if rope.switch is SwitchPolicy.CAUSAL:
            notes.append(
                "the causal rule itself needs longrope_export.runtimes.onnx: onnxruntime-genai "
                "cannot rotate cached keys again"
            )
    if ops == "genai":
        notes.append(
            f"onnxruntime-genai allocates {tokens * max_length / 2**20:,.0f} MiB of cache for "
            f"max_length {max_length}"
        )
    return tuple(notes)


def write_tokenizer_files(source: Source, folder: Path, max_length: int) -> tuple[str, ...]:
    """The tokenizer's files and the chat template; returns a note if tokenizer.json is missing."""
    missing: str | None = "there is no tokenizer.json"
    if isinstance(source.tokenizer, GgufHeader):
        missing = write_tokenizer(source.tokenizer, folder, max_length)
        template = source.tokenizer.get("tokenizer.chat_template")
        if isinstance(template, str):
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        for path in (source.tokenizer / name for name in TOKENIZER_FILES):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    if (folder / "tokenizer.json").is_file():
        return ()
    return (
        f"{missing}; onnxruntime-genai needs tokenizer.json: name a folder that has it with "
        f"--tokenizer",
    )


def _token_ids(source: Source, key: str) -> list[int]:
    """Of generation_config.json, else (also where it says null) of config.json."""
    value = source.generation.get(key)
    if value is None:
        value = source.settings.get(key)
    if value is None:
        return []
    return [int(token) for token in value] if isinstance(value, list) else [int(value)]
