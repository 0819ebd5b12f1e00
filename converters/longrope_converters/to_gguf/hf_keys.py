"""Metadata of a GGUF file that is made from config.json and the model card.

Keys come out in the order in which llama.cpp's own converter writes them. GGUFWriter serves as a
typed collector only; it never opens a file here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from gguf.constants import (
    MODEL_ARCH,
    MODEL_TENSOR,
    MODEL_TENSORS,
    GGMLQuantizationType,
    GGUFType,
    GGUFValueType,
    LlamaFileType,
    RopeScalingType,
)
from gguf.gguf_writer import GGUFWriter

from longrope_converters.to_gguf.plan import PlannedTensor
from longrope_export.errors import ModelError, UnsupportedError
from longrope_export.gguf_values import KeyValue, ValueType, make_array, make_key_value
from longrope_export.models.hf_config import HfConfig, HfRope, read_json_object

_ROPE_FREQS_ARCHITECTURES = frozenset(
    gguf.MODEL_ARCH_NAMES[arch]
    for arch in (MODEL_ARCH.LLAMA, MODEL_ARCH.GRANITE)
    if MODEL_TENSOR.ROPE_FREQS in MODEL_TENSORS[arch]
)


def collected_key_values(writer: GGUFWriter) -> tuple[KeyValue, ...]:
    """What was added to the writer, encoded."""
    entries = []
    for key, entry in writer.kv_data[0].items():
        if entry.type == GGUFValueType.ARRAY:
            element_type = entry.sub_type or GGUFValueType.get_type(entry.value[0])
            entries.append(make_array(key, ValueType(element_type), entry.value))
        else:
            entries.append(make_key_value(key, ValueType(entry.type), entry.value))
    return tuple(entries)


def add_general_keys(
    writer: GGUFWriter, config: HfConfig, name: str | None, num_parameters: int
) -> None:
    """general.*: name, authorship from the model card, sampling defaults, size label."""
    folder = config.folder.absolute()
    try:
        metadata = gguf.Metadata.load(None, folder, name, num_parameters)
    except Exception as error:  # a hand-written card can fail in YAML and in every use of it
        raise ModelError(f"{folder}: the model card cannot be read: {error}") from error
    generation = folder / "generation_config.json"
    if metadata.sampling_penalty_repeat is None and generation.is_file():
        # not known to gguf 0.19, which is otherwise the same
        metadata.sampling_penalty_repeat = read_json_object(generation).get("repetition_penalty")
    metadata.name = metadata.name or folder.name
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(num_parameters, num_parameters, 0, 0)
    writer.add_type(GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)


def add_model_keys(
    writer: GGUFWriter, config: HfConfig, file_type: LlamaFileType, keep_rope_scaling: bool
) -> None:
    """Hyperparameters. Of LongRoPE nothing is written."""
    if config.family.name == "phi3":
        _add_phi3_keys(writer, config, file_type, keep_rope_scaling)
        return
    writer.add_block_count(config.require_int("num_hidden_layers"))
    writer.add_context_length(config.require_int("max_position_embeddings"))
    writer.add_embedding_length(config.require_int("hidden_size"))
    writer.add_feed_forward_length(config.require_int("intermediate_size"))
    writer.add_head_count(config.require_int("num_attention_heads"))
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.values.get("is_causal") is False:
        writer.add_causal_attention(False)
    if keep_rope_scaling:
        _add_rope_scaling(writer, config)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps"))
    if _names_head_dim(config):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_file_type(file_type)
    add_family_keys = _FAMILY_KEYS.get(config.family.name)
    if add_family_keys is not None:
        add_family_keys(writer, config)


def rope_tensors(config: HfConfig) -> tuple[PlannedTensor, ...]:
    """rope_freqs.weight for Llama 3 scaling, else nothing."""
    if config.rope.rope_type != "llama3":
        return ()
    factors = llama3_factors(config)
    return (PlannedTensor("rope_freqs.weight", factors, GGMLQuantizationType.F32),)


def llama3_factors(config: HfConfig) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Divisors of the rotary frequencies, shape (head_dim / 2,).

    In float32 and by torch's rule that `number / tensor` multiplies by the reciprocal, so that the
    result equals that of llama.cpp's converter to the last bit.
    """
    rope, dim = config.rope, config.head_dim
    f32 = np.float32
    exponents = (np.arange(0, dim, 2, dtype=f32) / f32(dim)).astype(np.float64)
    # rounded from float64, since numpy's float32 power depends on the processor
    frequencies = f32(1.0) / np.power(rope.rope_theta, exponents).astype(f32)
    factor = _number(config, rope, "factor", 8.0)
    low = _number(config, rope, "low_freq_factor", 1.0)
    high = _number(config, rope, "high_freq_factor", 4.0)
    trained = _trained_length(config)
    if not high > low:
        raise ModelError(
            f"{config.path}: high_freq_factor must be above low_freq_factor, got {high} and {low}"
        )
    wavelengths = f32(1.0) / frequencies * f32(2 * math.pi)
    turns = f32(1.0) / wavelengths * f32(trained)
    smooth = (turns - f32(low)) / f32(high - low)
    blended = f32(1.0) / ((f32(1.0) - smooth) / f32(factor) + smooth)
    long_waves = np.where(wavelengths > f32(trained / low), f32(factor), blended)
    return np.where(wavelengths < f32(trained / high), f32(1.0), long_waves).astype(f32)


def _names_head_dim(config: HfConfig) -> bool:
    """Whether the file states head_dim: the readers of granite derive it, the others may."""
    if config.family.name == "granite":
        return False
    return config.family.name in ("llama", "mistral") or config.get("head_dim") is not None


def _add_rope_scaling(writer: GGUFWriter, config: HfConfig) -> None:
    rope = config.rope
    match rope.rope_type:
        case "default" | "longrope":
            pass
        case "dynamic":
            pass  # acts beyond max_position_embeddings only, which is the file's context length
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(_number(config, rope, "factor"))
        case "yarn":
            _add_yarn(writer, config, rope)
        case "llama3" if writer.arch in _ROPE_FREQS_ARCHITECTURES:
            pass  # expressed by rope_freqs.weight
        case _:
            raise UnsupportedError(
                f"{config.path}: rope_type {rope.rope_type!r} cannot be expressed in a GGUF of "
                f"architecture {writer.arch}"
            )


def _add_yarn(writer: GGUFWriter, config: HfConfig, rope: HfRope) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(_number(config, rope, "factor"))
    writer.add_rope_scaling_orig_ctx_len(_trained_length(config))
    block = rope.parameters
    optional: tuple[tuple[Any, Callable[[float], None]], ...] = (
        (block.get("extrapolation_factor"), writer.add_rope_scaling_yarn_ext_factor),
        (
            block.get("attention_factor", block.get("attn_factor")),
            writer.add_rope_scaling_yarn_attn_factor,
        ),
        (block.get("beta_fast"), writer.add_rope_scaling_yarn_beta_fast),
        (block.get("beta_slow"), writer.add_rope_scaling_yarn_beta_slow),
    )
    for value, add in optional:
        if value is not None:
            add(value)


def _trained_length(config: HfConfig) -> int:
    original = config.rope.original_max_position_embeddings
    return original or config.require_int("max_position_embeddings")


def _number(config: HfConfig, rope: HfRope, key: str, default: float | None = None) -> float:
    value = rope.parameters.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ModelError(f"{config.path}: RoPE {key} must be a positive number, got {value!r}")
    return value


def _add_llama_keys(writer: GGUFWriter, config: HfConfig) -> None:
    writer.add_vocab_size(config.require_int("vocab_size"))
    writer.add_rope_dimension_count(config.head_dim)


def _add_granite_keys(writer: GGUFWriter, config: HfConfig) -> None:
    _add_llama_keys(writer, config)
    multipliers: tuple[tuple[str, Callable[[float], None]], ...] = (
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
    )
    for key, add in multipliers:
        if value := config.get(key):
            add(value)


def _add_minicpm_keys(writer: GGUFWriter, config: HfConfig) -> None:
    layers, hidden = config.require_int("num_hidden_layers"), config.require_int("hidden_size")
    writer.add_embedding_scale(float(config.get("scale_emb")))
    writer.add_residual_scale(config.get("scale_depth") / layers**0.5)
    writer.add_logit_scale(hidden / config.get("dim_model_base"))


_FAMILY_KEYS: dict[str, Callable[[GGUFWriter, HfConfig], None]] = {
    "llama": _add_llama_keys,
    "mistral": _add_llama_keys,
    "granite": _add_granite_keys,
    "minicpm": _add_minicpm_keys,
}


def _add_phi3_keys(
    writer: GGUFWriter, config: HfConfig, file_type: LlamaFileType, keep_rope_scaling: bool
) -> None:
    rope, hidden = config.rope, config.require_int("hidden_size")
    heads = config.require_int("num_attention_heads")
    # transformers reads "yarn" of early phi3 configs as longrope
    is_longrope = rope.rope_type == "longrope" or "long_factor" in rope.parameters
    if rope.rope_type != "default" and not is_longrope and keep_rope_scaling:
        raise UnsupportedError(
            f"{config.path}: a phi3 model has rope_type default or longrope, got {rope.rope_type!r}"
        )
    writer.add_context_length(config.require_int("max_position_embeddings"))
    if keep_rope_scaling and not is_longrope:
        writer.add_rope_scaling_orig_ctx_len(config.require_int("original_max_position_embeddings"))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config.require_int("intermediate_size"))
    writer.add_block_count(config.require_int("num_hidden_layers"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps"))
    writer.add_rope_dimension_count(int(rope.partial_rotary_factor * hidden) // heads)
    writer.add_rope_freq_base(rope.rope_theta)
    writer.add_file_type(file_type)
    # zero, not absence, is how llama.cpp tells phi4 from phi3
    writer.add_sliding_window(config.get("sliding_window") or 0)
