"""The RoPE that a model brings along, as a LongRopeConfig: what every new factor builds upon.

A plain model has one tier with factors of 1. A model that was scaled before (Llama 3.1, YaRN,
Phi-3's longrope, a file that we wrote) has the tiers it was trained or exported with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export import methods
from longrope_export.config import FactorTier, LongRopeConfig, SwitchPolicy
from longrope_export.errors import ConfigError, GgufError, ModelError
from longrope_export.gguf_format import GgufHeader
from longrope_export.gguf_keys import LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR, decode_config
from longrope_export.models.hf_config import HfConfig
from longrope_export.rope import (
    FloatArray,
    compute_inv_freq,
    longrope_attention_factor,
    yarn_attention_factor,
)

GGML_TYPE_F32 = 0


def native_of_hf(config: HfConfig) -> LongRopeConfig:
    """The RoPE that config.json declares, as transformers 5 computes it.

    "dynamic" becomes a ladder, since its base moves with the length.

    Raises:
        ModelError: a rope type that is not known here, or values that do not fit.
    """
    rope = config.rope
    rotary_dim = int(config.head_dim * rope.partial_rotary_factor)
    declared = config.require_int("max_position_embeddings")
    reader = _HfScaling(config, rotary_dim, declared)
    builders = {
        "default": reader.plain,
        "linear": reader.linear,
        "dynamic": reader.dynamic,
        "yarn": reader.yarn,
        "longrope": reader.longrope,
        "llama3": reader.llama3,
    }
    if rope.rope_type not in builders:
        raise ModelError(
            f"{config.path}: rope type {rope.rope_type!r} is not known; "
            f"known are {', '.join(sorted(builders))}"
        )
    try:
        window, tiers = builders[rope.rope_type]()
        return LongRopeConfig(
            rope_theta=rope.rope_theta,
            rotary_dim=rotary_dim,
            original_max_position_embeddings=window,
            max_position_embeddings=tiers[-1].max_length,
            tiers=tiers,
            switch=SwitchPolicy.SEQUENCE,
            layers=_global_layers(config),
            provenance={"method": f"model ({rope.rope_type})"},
        )
    except ConfigError as error:
        raise ModelError(f"{config.path}: {error}") from error


_Tiers = tuple[int, tuple[FactorTier, ...]]


class _HfScaling:
    """One method per rope type: the trained window and the tiers."""

    def __init__(self, config: HfConfig, rotary_dim: int, declared: int) -> None:
        self.config, self.declared = config, declared
        self.rope = config.rope
        self.block: Mapping[str, Any] = self.rope.parameters
        self.inv_freq = compute_inv_freq(self.rope.rope_theta, rotary_dim)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.block.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ModelError(
                f"{self.config.path}: rope {key} must be a number above 0, got {value!r}"
            )
        return float(value)

    def tier(self, length: int, factors: FloatArray, attention_factor: float = 1.0) -> FactorTier:
        return FactorTier(length, tuple(factors.tolist()), 0, attention_factor)

    def plain(self) -> _Tiers:
        return self.declared, (self.tier(self.declared, np.ones_like(self.inv_freq)),)

    def linear(self) -> _Tiers:
        factor = self.number("factor")
        window = self.rope.original_max_position_embeddings or round(self.declared / factor)
        return window, (self.tier(self.declared, methods.pi_factors(self.inv_freq, factor)),)

    def dynamic(self) -> _Tiers:
        factor, window = self.number("factor"), self.declared
        step = max(window // 16, 1)
        target = round(window * factor)
        tiers = [self.tier(window, np.ones_like(self.inv_freq))]
        for length in [*range(window + step, target, step), target]:
            ratio = length / window
            factors = methods.dynamic_ntk_factors(self.inv_freq, ratio, factor)
            tiers.append(self.tier(length, factors))
        return window, tuple(tiers)

    def yarn(self) -> _Tiers:
        factor = self.number("factor")
        window = self.rope.original_max_position_embeddings or self.declared
        factors = methods.yarn_factors(
            self.inv_freq,
            factor,
            window,
            self.number("beta_fast", 32.0),
            self.number("beta_slow", 1.0),
            "code" if self.block.get("truncate", True) else "code-exact",
        )
        target = max(self.declared, round(window * factor))
        return window, (self.tier(target, factors, self._yarn_attention(factor)),)

    def _yarn_attention(self, factor: float) -> float:
        if self.block.get("attention_factor") is not None:
            return self.number("attention_factor")
        if self.block.get("mscale") and self.block.get("mscale_all_dim"):
            # DeepSeek's form: the quotient of two YaRN factors with scaled logarithms
            above = yarn_attention_factor(factor, self.number("mscale"))
            return above / yarn_attention_factor(factor, self.number("mscale_all_dim"))
        return yarn_attention_factor(factor)

    def llama3(self) -> _Tiers:
        factors = methods.llama3_factors(
            self.inv_freq,
            self.number("factor"),
            self.rope.original_max_position_embeddings or self.declared,
            self.number("low_freq_factor", 1.0),
            self.number("high_freq_factor", 4.0),
        )
        window = self.rope.original_max_position_embeddings or self.declared
        return window, (self.tier(self.declared, factors),)

    def longrope(self) -> _Tiers:
        window = self.rope.original_max_position_embeddings or self.declared
        long = self._factor_list("long_factor")
        short = self._factor_list("short_factor")
        long_attention, short_attention = self._longrope_attention(window)
        if self.declared <= window:
            return self.declared, (FactorTier(self.declared, short, 0, short_attention),)
        tiers = (
            FactorTier(window, short, 0, short_attention),
            FactorTier(self.declared, long, 0, long_attention),
        )
        return window, tiers if tiers[0] != _with_length(tiers[1], window) else tiers[1:]

    def _factor_list(self, key: str) -> tuple[float, ...]:
        values = self.block.get(key)
        pairs = len(self.inv_freq)
        if not isinstance(values, list) or len(values) != pairs:
            got = f"{len(values)} values" if isinstance(values, list) else repr(values)
            raise ModelError(
                f"{self.config.path}: {key} must list rotary_dim / 2 = {pairs} numbers, got {got}"
            )
        return tuple(values)

    def _longrope_attention(self, window: int) -> tuple[float, float]:
        """(long, short): attention_factor, else the two mscales, else the sqrt formula."""
        given = self.block.get("attention_factor")
        scales = (self.block.get("long_mscale"), self.block.get("short_mscale"))
        if given is not None:
            if any(scale is not None and scale != given for scale in scales):
                raise ModelError(
                    f"{self.config.path}: attention_factor {given} contradicts long_mscale / "
                    f"short_mscale {scales}: transformers reads the first, vLLM the others; "
                    f"make them equal or remove one"
                )
            return self.number("attention_factor"), self.number("attention_factor")
        if None not in scales:
            return self.number("long_mscale"), self.number("short_mscale")
        ratio = self.number("factor", self.declared / window)
        formula = longrope_attention_factor(ratio, window)
        return formula, formula


def _with_length(tier: FactorTier, length: int) -> FactorTier:
    return FactorTier(length, tier.rescale_factors, tier.num_start_tokens, tier.attention_factor)


def _global_layers(config: HfConfig) -> tuple[int, ...] | None:
    """Layers with full attention, for families where only those are rescaled."""
    if not config.family.global_layers_only:
        return None
    layers = config.require_int("num_hidden_layers")
    types = config.get("layer_types")
    if isinstance(types, list):
        return tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    pattern = int(config.get("sliding_window_pattern") or 6)
    return tuple(i for i in range(layers) if (i + 1) % pattern == 0)


def native_of_gguf(header: GgufHeader) -> LongRopeConfig:
    """The RoPE that a GGUF file declares, as llama.cpp computes it; our own keys come first.

    Raises:
        GgufError: keys that are missing, contradict each other or do not fit.
    """
    theta = float(header.arch_get("rope.freq_base", 10000.0))
    rotary_dim = _gguf_rotary_dim(header)
    ours = decode_config(header, theta, rotary_dim)
    if ours is not None:
        return ours
    declared = _gguf_int(header, "context_length")
    inv_freq = compute_inv_freq(theta, rotary_dim)
    window = int(header.arch_get("rope.scaling.original_context_length", declared))
    kind = str(header.arch_get("rope.scaling.type", "none"))
    attention = float(header.arch_get("rope.scaling.attn_factor", 1.0))
    factor = float(header.arch_get("rope.scaling.factor", 1.0)) or 1.0
    tensors = {info.name for info in header.tensors}

    def read(name: str) -> tuple[float, ...]:
        return _read_factor_tensor(header, name, rotary_dim // 2)

    plain = (1.0,) * (rotary_dim // 2)
    if kind == "longrope" and LONG_TENSOR in tensors:
        short = read(SHORT_TENSOR) if SHORT_TENSOR in tensors else plain
        tiers = [FactorTier(window, short, 0, attention)]
        if declared > window:
            tiers.append(FactorTier(declared, read(LONG_TENSOR), 0, attention))
    elif LLAMA3_TENSOR in tensors:
        tiers = [FactorTier(declared, read(LLAMA3_TENSOR), 0, attention)]
    elif kind == "yarn":
        beta_fast = float(header.arch_get("rope.scaling.yarn_beta_fast", 32.0))
        beta_slow = float(header.arch_get("rope.scaling.yarn_beta_slow", 1.0))
        factors = methods.yarn_factors(inv_freq, factor, window, beta_fast, beta_slow)
        attention *= float(header.arch_get("rope.scaling.yarn_attn_factor", 1.0))
        attention *= yarn_attention_factor(factor)
        target = max(declared, round(window * factor))
        tiers = [FactorTier(target, tuple(factors.tolist()), 0, attention)]
    elif kind == "linear":
        window = min(window, round(declared / factor))
        tiers = [FactorTier(declared, (factor,) * (rotary_dim // 2), 0, attention)]
    else:
        window = declared
        tiers = [FactorTier(declared, plain, 0, attention)]
    try:
        return LongRopeConfig(
            rope_theta=theta,
            rotary_dim=rotary_dim,
            original_max_position_embeddings=window,
            max_position_embeddings=tiers[-1].max_length,
            tiers=tuple(tiers),
            switch=SwitchPolicy.SEQUENCE,
            layers=_gguf_global_layers(header),
            provenance={"method": f"model ({kind})"},
        )
    except ConfigError as error:
        raise GgufError(f"{header.path}: {error}") from error


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
