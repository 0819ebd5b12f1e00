"""The small files of a folder that is made from a GGUF: settings, tokenizer, generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longrope_converters.gguf_tokenizer import (
    generation_settings,
    special_ids,
    write_tokenizer,
)
from longrope_converters.to_safetensors.dequantize import TORCH_DTYPES
from longrope_converters.to_safetensors.gguf_settings import GgufModel
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


def write_small_files(header: GgufHeader, folder: Path, max_length: int) -> tuple[str, ...]:
    """tokenizer.json, tokenizer_config.json and generation_config.json; returns notes."""
    generation = json.dumps(generation_settings(header), indent=2)
    (folder / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
    missing = write_tokenizer(header, folder, max_length)
    if missing is None:
        return ()
    return (f"{missing}; copy the tokenizer files of the original model into the folder",)
