"""The RoPE that a GGUF file declares, as llama.cpp computes it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from longrope_export import methods
from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError, GgufError
from longrope_export.gguf_format import GgufHeader
from longrope_export.gguf_keys import LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR, decode_config
from longrope_export.models.native import MALFORMED
from longrope_export.rope import FloatArray, compute_inv_freq, yarn_attention_factor

GGML_TYPE_F32 = 0


def native_of_gguf(header: GgufHeader) -> LongRopeConfig:
    """The RoPE that a GGUF file declares, as llama.cpp computes it; our own keys come first.

    Raises:
        GgufError: keys that are missing, contradict each other or do not fit.
    """
    theta = _gguf_float(header, "rope.freq_base", 10000.0)
    rotary_dim = _gguf_rotary_dim(header)
    ours = decode_config(header, theta, rotary_dim)
    if ours is not None:
        return ours
    try:
        window, tiers = _stock_tiers(header, compute_inv_freq(theta, rotary_dim))
        return LongRopeConfig(
            rope_theta=theta,
            rotary_dim=rotary_dim,
            original_max_position_embeddings=window,
            max_position_embeddings=tiers[-1].max_length,
            tiers=tuple(tiers),
            switch=SwitchPolicy.SEQUENCE,
            layers=_gguf_global_layers(header),
            provenance={"method": f"model ({header.arch_get('rope.scaling.type', 'none')})"},
        )
    except (ConfigError, *MALFORMED) as error:
        raise GgufError(f"{header.path}: the rope keys make no sense: {error}") from error


def _stock_tiers(header: GgufHeader, inv_freq: FloatArray) -> tuple[int, list[FactorTier]]:
    """(trained window, tiers) as stock llama.cpp reads its own keys and tensors.

    There a file without a type counts as linear, and the linear factor (also under its old name
    scale_linear) divides all frequencies, beside whatever factor tensors there are.
    """
    pairs = len(inv_freq)
    declared = _gguf_int(header, "context_length")
    window = declared
    if header.arch_get("rope.scaling.original_context_length") is not None:
        window = _gguf_int(header, "rope.scaling.original_context_length")
    kind = str(header.arch_get("rope.scaling.type", "linear"))
    attention = _gguf_float(header, "rope.scaling.attn_factor", 1.0)
    factor = _gguf_float(header, "rope.scaling.factor", 0.0)
    factor = factor or _gguf_float(header, "rope.scale_linear", 0.0) or 1.0
    tensors = {info.name for info in header.tensors}

    def read(name: str) -> FloatArray:
        if name not in tensors:
            return np.full(pairs, 1.0 if kind == "none" else factor)
        factors = np.asarray(_read_factor_tensor(header, name, pairs))
        return factors if kind == "none" else factors * factor

    def tier(length: int, factors: FloatArray, scale: float) -> FactorTier:
        return FactorTier(length, tuple(factors.tolist()), 0, scale)

    if kind == "longrope" and LONG_TENSOR in tensors and LLAMA3_TENSOR not in tensors:
        tiers = [tier(window, read(SHORT_TENSOR), attention)]
        if declared > window:
            tiers.append(tier(declared, read(LONG_TENSOR), attention))
        return window, tiers
    if kind == "yarn":
        factors = methods.yarn_factors(inv_freq, factor, window)
        target = max(declared, round(window * factor))
        return window, [tier(target, factors, attention * _yarn_attention(header, factor))]
    factors = read(LLAMA3_TENSOR)
    if kind == "linear" and LLAMA3_TENSOR not in tensors and factor > 1:
        window = min(window, round(declared / factor))
    return window, [tier(declared, factors, attention)]


def _yarn_attention(header: GgufHeader, factor: float) -> float:
    """llama.cpp's: the log multiplier counts, the key yarn_attn_factor does not."""
    log_multiplier = _gguf_float(header, "rope.scaling.yarn_log_multiplier", 0.0)
    above = yarn_attention_factor(factor)
    return above / yarn_attention_factor(factor, log_multiplier) if log_multiplier else above


def _gguf_float(header: GgufHeader, name: str, default: float) -> float:
    value = header.arch_get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GgufError(f"{header.path}: key {header.architecture}.{name}: not a number: {value!r}")
    return float(value)


def gguf_head_dim(header: GgufHeader) -> int:
    length = header.arch_get("attention.key_length")
    if isinstance(length, int):
        return length
    return _gguf_int(header, "embedding_length") // _gguf_int(header, "attention.head_count")


def _gguf_rotary_dim(header: GgufHeader) -> int:
    count = header.arch_get("rope.dimension_count")
    return count if isinstance(count, int) and count > 0 else gguf_head_dim(header)


def _gguf_int(header: GgufHeader, name: str) -> int:
    value = header.arch_get(name)
    if isinstance(value, np.ndarray) and len(value):  # one value per layer
        value = int(value.max())
    if not isinstance(value, int) or value <= 0:
        raise GgufError(
            f"{header.path}: key {header.architecture}.{name} must be a positive integer, "
            f"got {value!r}"
        )
    return value


def _gguf_global_layers(header: GgufHeader) -> tuple[int, ...] | None:
    if header.architecture != "gemma3":
        return None
    return tuple(i for i in range(_gguf_int(header, "block_count")) if (i + 1) % 6 == 0)


def _read_factor_tensor(header: GgufHeader, name: str, pairs: int) -> tuple[float, ...]:
    info = next(tensor for tensor in header.tensors if tensor.name == name)
    if info.ggml_type != GGML_TYPE_F32 or math.prod(info.shape) != pairs:
        raise GgufError(
            f"{header.path}: tensor {name} has shape {info.shape} and type {info.ggml_type}, "
            f"expected ({pairs},) F32"
        )
    return read_f32(header.path, header.data_start_bytes + info.offset_bytes, pairs)


def read_f32(path: Path, offset_bytes: int, count: int) -> tuple[float, ...]:
    with path.open("rb") as file:
        file.seek(offset_bytes)
        values = np.frombuffer(file.read(4 * count), dtype="<f4")
    return tuple(float(value) for value in values)
