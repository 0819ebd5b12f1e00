"""What a LongRopeConfig is called inside a GGUF file: both directions, one home for every name.

Ours are metadata keys only, `{arch}.rope.scaling.longrope.*`, since stock llama.cpp refuses a file
with a tensor that it does not expect and ignores a key that it does not know. Where the
architecture has them, stock's own fields are written too, so that an unpatched llama.cpp runs
the short and the long factors:

    {arch}.rope.scaling.type = "longrope"           rope_factors_short.weight  F32 (pairs,)
    {arch}.rope.scaling.original_context_length     rope_factors_long.weight   F32 (pairs,)
    {arch}.rope.scaling.attn_factor                 {arch}.context_length = target
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig
from longrope_export.errors import ConfigError, GgufError
from longrope_export.gguf_format import GgufHeader
from longrope_export.gguf_values import KeyValue, ValueType, make_array, make_key_value

FORMAT_VERSION = 1
LONG_TENSOR = "rope_factors_long.weight"
SHORT_TENSOR = "rope_factors_short.weight"
LLAMA3_TENSOR = "rope_freqs.weight"

# architectures whose loader in the pinned llama.cpp creates rope_factors_* and whose graph uses
# them; refact and pangu-embed create them and run without, so they are left out on purpose
STOCK_ARCHITECTURES = frozenset(
    {"llama", "phi3", "phimoe", "minicpm", "minicpm3", "granite", "granitemoe", "granite_swa"}
    | {"deci", "mistral3", "apertus"}
)

_STOCK_SCALING_KEYS = (
    "type",
    "factor",
    "alpha",
    "attn_factor",
    "original_context_length",
    "finetuned",
    "yarn_log_multiplier",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
)
_OUR_KEYS = (
    "version",
    "switch",
    "tier_length",
    "tier_start_tokens",
    "tier_attn_factor",
    "tier_factors",
    "attn_log_base",
    "attn_log_exempt_layers",
    "layers",
    "original_length",
    "provenance",
)


@dataclass(frozen=True)
class GgufLongRope:
    """What has to stand in a file: keys to set and to remove, and stock's factor tensors."""

    set_keys: tuple[KeyValue, ...]
    remove_keys: frozenset[str]
    tensors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)


def has_stock_fields(architecture: str) -> bool:
    return architecture in STOCK_ARCHITECTURES


def encode_config(config: LongRopeConfig, architecture: str) -> GgufLongRope:
    """Keys and tensors that carry `config` in a file of this architecture.

    All rope scaling keys that the file may have are removed: the factors are relative to the
    plain base, so an older YaRN or linear scaling beside them would be applied twice.
    """
    prefix = f"{architecture}.rope.scaling."
    keys = _our_keys(config, prefix + "longrope.")
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    if has_stock_fields(architecture):
        long = config.tiers[-1]
        keys += [
            make_key_value(
                f"{architecture}.context_length",
                ValueType.UINT32,
                config.max_position_embeddings,
            ),
            make_key_value(prefix + "type", ValueType.STRING, "longrope"),
            make_key_value(
                prefix + "original_context_length",
                ValueType.UINT32,
                stock_switch_length(config),
            ),
            make_key_value(prefix + "attn_factor", ValueType.FLOAT32, long.attention_factor),
        ]
        tensors = {
            LONG_TENSOR: np.asarray(long.rescale_factors, dtype=np.float32),
            SHORT_TENSOR: np.asarray(config.tiers[0].rescale_factors, dtype=np.float32),
        }
    removable = {prefix + name for name in _STOCK_SCALING_KEYS}
    removable |= {f"{prefix}longrope.{name}" for name in _OUR_KEYS}
    removable |= {f"{architecture}.rope.scale_linear"}
    return GgufLongRope(tuple(keys), frozenset(removable - {entry.key for entry in keys}), tensors)


def stock_switch_length(config: LongRopeConfig) -> int:
    """Context size up to which stock llama.cpp takes the short factors (inclusive)."""
    return config.tiers[0].max_length


def _our_keys(config: LongRopeConfig, prefix: str) -> list[KeyValue]:
    u32, f32 = ValueType.UINT32, ValueType.FLOAT32
    tiers = config.tiers
    factors = np.asarray([tier.rescale_factors for tier in tiers], dtype=np.float32)
    keys = [
        make_key_value(prefix + "version", u32, FORMAT_VERSION),
        make_key_value(prefix + "switch", ValueType.STRING, config.switch.value),
        make_key_value(prefix + "original_length", u32, config.original_max_position_embeddings),
        make_array(prefix + "tier_length", u32, [tier.max_length for tier in tiers]),
        make_array(prefix + "tier_start_tokens", u32, [tier.num_start_tokens for tier in tiers]),
        make_array(prefix + "tier_attn_factor", f32, [tier.attention_factor for tier in tiers]),
        make_array(prefix + "tier_factors", f32, factors.reshape(-1)),
    ]
    if config.logit_scaling is not None:
        scaling = config.logit_scaling
        keys.append(make_key_value(prefix + "attn_log_base", u32, scaling.base_length))
        keys.append(make_array(prefix + "attn_log_exempt_layers", u32, scaling.exempt_layers))
    if config.layers is not None:
        keys.append(make_array(prefix + "layers", u32, config.layers))
    if config.provenance:
        text = json.dumps(dict(config.provenance), sort_keys=True)
        keys.append(make_key_value(prefix + "provenance", ValueType.STRING, text))
    return keys


def has_our_keys(header: GgufHeader) -> bool:
    """True if the file holds a config of ours, or a part of one."""
    return any(key.startswith(_prefix(header)) for key in header.key_values)


def _prefix(header: GgufHeader) -> str:
    return f"{header.architecture}.rope.scaling.longrope."


def decode_config(header: GgufHeader, rope_theta: float, rotary_dim: int) -> LongRopeConfig | None:
    """The config that our keys describe, or None if the file has none of them.

    Raises:
        GgufError: naming the key that is missing or does not fit.
    """
    if not has_our_keys(header):
        return None
    prefix = _prefix(header)
    reader = _KeyReader(header, prefix)
    version = reader.number("version")
    if version != FORMAT_VERSION:
        raise GgufError(
            f"{header.path}: key {prefix}version is {version}, this tool reads "
            f"{FORMAT_VERSION}: update longrope-export"
        )
    lengths = reader.array("tier_length")
    starts = reader.array("tier_start_tokens", len(lengths))
    attention = reader.array("tier_attn_factor", len(lengths))
    pairs = rotary_dim // 2
    factors = reader.array("tier_factors", len(lengths) * pairs).reshape(len(lengths), pairs)
    scaling = None
    if prefix + "attn_log_base" in header.key_values:
        exempt = reader.array("attn_log_exempt_layers")
        scaling = LogitScaling(reader.number("attn_log_base"), tuple(exempt.tolist()))
    layers = None
    if prefix + "layers" in header.key_values:
        layers = tuple(reader.array("layers").tolist())
    try:
        return LongRopeConfig(
            rope_theta=rope_theta,
            rotary_dim=rotary_dim,
            original_max_position_embeddings=reader.number("original_length"),
            max_position_embeddings=lengths.tolist()[-1] if len(lengths) else 0,
            tiers=tuple(
                FactorTier(length.item(), tuple(row.tolist()), start.item(), scale.item())
                for length, row, start, scale in zip(
                    lengths, factors, starts, attention, strict=True
                )
            ),
            switch=header.get(prefix + "switch"),
            logit_scaling=scaling,
            layers=layers,
            provenance=_provenance(header, prefix),
        )
    except (ConfigError, ValueError, TypeError, OverflowError) as error:
        raise GgufError(f"{header.path}: keys {prefix}*: {error}") from error


class _KeyReader:
    def __init__(self, header: GgufHeader, prefix: str) -> None:
        self.header, self.prefix = header, prefix

    def _value(self, name: str) -> Any:
        value = self.header.get(self.prefix + name)
        if value is None:
            raise GgufError(f"{self.header.path}: key {self.prefix}{name} is missing")
        return value

    def number(self, name: str) -> int:
        value = self._value(name)
        if not isinstance(value, int):
            raise GgufError(
                f"{self.header.path}: key {self.prefix}{name}: not an integer: {value!r}"
            )
        return value

    def array(self, name: str, expected: int | None = None) -> npt.NDArray[Any]:
        value = self._value(name)
        if not isinstance(value, np.ndarray):
            raise GgufError(f"{self.header.path}: key {self.prefix}{name}: not an array of numbers")
        if expected is not None and len(value) != expected:
            raise GgufError(
                f"{self.header.path}: key {self.prefix}{name} has {len(value)} values, "
                f"expected {expected}"
            )
        return value


def _provenance(header: GgufHeader, prefix: str) -> dict[str, Any]:
    try:
        value = json.loads(header.get(prefix + "provenance", "{}"))
    except (json.JSONDecodeError, TypeError, RecursionError) as error:
        raise GgufError(f"{header.path}: key {prefix}provenance is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}
