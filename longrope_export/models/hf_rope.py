"""The RoPE settings of a config.json: in three places, and in the spelling of each family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longrope_export.errors import ModelError

if TYPE_CHECKING:
    from longrope_export.models.hf_config import HfConfig

_LEGACY_TYPES = {"su": "longrope"}
_TOP_LEVEL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
# of GPT-NeoX, at the top level
_OTHER_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}

# model_type -> the share of a head that transformers' config class assumes
_PARTIAL_BY_DEFAULT = {
    "gpt_neox": 0.25, "stablelm": 0.25, "qwen3_next": 0.25, "qwen3_5_text": 0.25,
    "qwen3_5_moe_text": 0.25, "bamba": 0.5, "glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5,
    "nemotron": 0.5, "persimmon": 0.5, "phi": 0.5, "recurrent_gemma": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class HfRope:
    """The RoPE settings of a config.json in one shape, whatever spelling the file uses.

    Attributes:
        rope_type: "default", "linear", "dynamic", "yarn", "longrope", "llama3", ... ("su" is
            read as "longrope").
        rope_theta: base of the geometric series.
        partial_rotary_factor: rotated share of head_dim, 0 to 1.
        rotary_dim: rotated width of a head.
        original_max_position_embeddings: the trained window if the file names one.
        parameters: the whole block as it stands (rope_parameters or rope_scaling).
    """

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float
    rotary_dim: int
    original_max_position_embeddings: int | None
    parameters: Mapping[str, Any]


def rope_block(values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_scaling or rope_parameters as one flat dict; {} for plain RoPE.

    rope_scaling wins where both stand, as in transformers 5. Of a block nested per layer type the
    full-attention part counts: the sliding-window layers are never rescaled.
    """
    return _flat_block(values.get("rope_scaling") or values.get("rope_parameters") or {})


def read_rope(config: HfConfig) -> HfRope:
    """What a config.json says about RoPE, in any of its spellings.

    Raises:
        ModelError: settings that contradict each other or that are no numbers of their kind.
    """
    try:
        block = rope_block(config.values)
        _refuse_conflicts(config.values)
    except ModelError as error:
        raise ModelError(f"{config.path}: {error}") from error
    rope_type = str(block.get("rope_type") or block.get("type") or "default").lower()
    if rope_type == "default" and block.get("factor") is not None:
        raise ModelError(f"{config.path}: the rope block has a factor but no rope_type")
    # transformers 5 lets the top-level copies win when the model is built
    original = config.values.get("original_max_position_embeddings")
    if original is None:
        original = block.get("original_max_position_embeddings")
    if original is None and rope_type in ("longrope", "su"):
        original = config.get("original_max_position_embeddings")  # Phi-3's default
    if original is not None and (not isinstance(original, int) or original <= 0):
        raise ModelError(
            f"{config.path}: original_max_position_embeddings must be a positive integer, "
            f"got {original!r}"
        )
    theta = _given(config.values, "rope_theta")
    if theta is None:
        theta = config.get("rope_theta", 10000.0)
    partial, rotary_dim = _rotated_part(config)
    return HfRope(
        _LEGACY_TYPES.get(rope_type, rope_type),
        _positive(config, "rope_theta", theta),
        partial,
        rotary_dim,
        original,
        block,
    )


def latent_head_dim(config: HfConfig) -> int | None:
    """head_dim of latent attention (DeepSeek, MiniCPM3); None for any other.

    There transformers calls the rotated part of a head head_dim, unless the file names that
    part's share (Mistral 4).
    """
    if config.get("qk_rope_head_dim") is None or config.get("qk_nope_head_dim") is None:
        return None
    return round(config.require_int("qk_rope_head_dim") / (_partial_factor(config) or 1.0))


def _rotated_part(config: HfConfig) -> tuple[float, int]:
    """(share of head_dim, width): of partial_rotary_factor, qk_rope_head_dim or rotary_dim."""
    head_dim, partial = config.head_dim, _partial_factor(config)
    widths = {
        name: config.require_int(name)
        for name in ("qk_rope_head_dim", "rotary_dim")
        if config.get(name) is not None
    }
    if partial is None and not widths:
        partial = _PARTIAL_BY_DEFAULT.get(str(config.values.get("model_type")), 1.0)
    if partial is not None:
        widths = {"partial_rotary_factor": int(head_dim * partial), **widths}
    name, width = next(iter(widths.items()))
    for other, got in widths.items():
        if got != width:
            raise ModelError(
                f"{config.path}: conflicting rope settings: by {name} {width} of {head_dim} "
                f"channels of a head are rotated, and {got} by {other}: make them equal or "
                f"remove one"
            )
    return (width / head_dim if partial is None else partial), width


def _partial_factor(config: HfConfig) -> float | None:
    """The share of head_dim that the file itself names."""
    given = _given(config.values, "partial_rotary_factor")
    return None if given is None else _positive(config, "partial_rotary_factor", given)


def _given(values: Mapping[str, Any], name: str) -> Any:
    """rope_theta or partial_rotary_factor as the file has it; null counts as missing."""
    places = (rope_block(values).get(name), values.get(name), values.get(_OTHER_NAMES[name]))
    return next((value for value in places if value is not None), None)


def _positive(config: HfConfig, name: str, value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 < value < 1e30:
        raise ModelError(f"{config.path}: {name} must be a positive number, got {value!r:.60}")
    return float(value)


def _flat_block(block: Any) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise ModelError(
            f"rope_scaling / rope_parameters must be an object, got {type(block).__name__}"
        )
    nested = block.get("full_attention")
    return dict(nested) if isinstance(nested, dict) else dict(block)


def _refuse_conflicts(values: Mapping[str, Any]) -> None:
    """RoPE settings may stand in three places; each runtime reads another one of them."""
    places: dict[str, dict[str, Any]] = {
        "the top level": {name: values[name] for name in _TOP_LEVEL if name in values}
    }
    for name, other in _OTHER_NAMES.items():
        places[other] = {name: values.get(other)}
    for name in ("rope_scaling", "rope_parameters"):
        block = _flat_block(values.get(name) or {})
        if block:
            kind = str(block.get("rope_type") or block.pop("type", None) or "default").lower()
            places[name] = {**block, "rope_type": _LEGACY_TYPES.get(kind, kind)}
    seen: dict[str, tuple[str, Any]] = {}
    for place, settings in places.items():
        for key, value in settings.items():
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise ModelError(f"{key} is {value} in {place}, expected a finite number")
            other, expected = seen.setdefault(key, (place, value))
            if value != expected:
                raise ModelError(
                    f"conflicting rope settings: {key} is {expected!r:.60} in {other} and "
                    f"{value!r:.60} in {place}; runtimes differ in which one they read: make them "
                    f"equal or remove one"
                )
