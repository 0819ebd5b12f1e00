"""The small files of a folder that is made from a GGUF: settings, tokenizer, generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longrope_converters.to_safetensors.dequantize import TORCH_DTYPES
from longrope_converters.to_safetensors.gguf_settings import GgufModel
from longrope_converters.to_safetensors.gguf_tokenizer import (
    build_tokenizer,
    special_ids,
    tokenizer_settings,
)
from longrope_export.gguf_format import GgufHeader
from longrope_export.models.model import Model


def all_settings(source: GgufModel, model: Model, dtype: str) -> dict[str, Any]:
    """config.json with the model's base frequency and without scaling."""
    native, values = model.native, source.values
    plain = {"rope_type": "default", "rope_theta": native.rope_theta}
    if native.rotary_dim != model.head_dim:
        plain["partial_rotary_factor"] = native.rotary_dim / model.head_dim
    parameters: dict[str, Any] = plain
    if model.family.global_layers_only:
        local = {"rope_type": "default", "rope_theta": values["rope_local_base_freq"]}
        parameters = {"full_attention": plain, "sliding_attention": local}
    ids = special_ids(source.header)
    return {
        **values,
        **{key: value for key, value in plain.items() if key != "rope_type"},
        "rope_parameters": parameters,
        "torch_dtype": TORCH_DTYPES[dtype],
        # null, not absence: some classes have ids of their own by default
        **{f"{kind}_token_id": ids.get(kind) for kind in ("bos", "eos", "pad")},
    }


def write_tokenizer(header: GgufHeader, folder: Path, max_length: int) -> tuple[str, ...]:
    """tokenizer.json, tokenizer_config.json and generation_config.json; returns notes."""
    ids = special_ids(header)
    generation: dict[str, Any] = {
        f"{kind}_token_id": ids[kind] for kind in ("bos", "eos", "pad") if kind in ids
    }
    turn_end = header.get("tokenizer.ggml.eot_token_id")
    if isinstance(turn_end, int) and "eos" in ids and turn_end != ids["eos"]:
        generation["eos_token_id"] = [ids["eos"], turn_end]
    _write_json(folder / "generation_config.json", generation)
    tokenizer = build_tokenizer(header)
    if tokenizer is None:
        kind, pre = header.get("tokenizer.ggml.model"), header.get("tokenizer.ggml.pre")
        return (
            f"no tokenizer: kind {kind!r} with splitting rule {pre!r} is not known here; copy the "
            f"tokenizer files of the original model into the folder",
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_settings(header, max_length))
    return ()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
