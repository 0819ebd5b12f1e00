"""The published JSON shape of a LongRopeConfig: format "longrope-factors", both directions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig
from longrope_export.errors import ConfigError, FactorFileError

FORMAT = "longrope-factors"
VERSION = 1
_CONFIG_FIELDS = (
    "rope_theta",
    "rotary_dim",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "switch",
    "layers",
    "provenance",
)
_TIER_FIELDS = ("max_length", "rescale_factors", "num_start_tokens", "attention_factor")


def to_json(config: LongRopeConfig) -> dict[str, Any]:
    """The config as JSON values, in the published shape (docs/longrope-factors.schema.json)."""
    scaling = config.logit_scaling
    return {
        "format": FORMAT,
        "version": VERSION,
        "rope_theta": config.rope_theta,
        "rotary_dim": config.rotary_dim,
        "original_max_position_embeddings": config.original_max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "switch": config.switch.value,
        "logit_scaling": None
        if scaling is None
        else {
            "type": "log",
            "base_length": scaling.base_length,
            "exempt_layers": list(scaling.exempt_layers),
        },
        "layers": None if config.layers is None else list(config.layers),
        "tiers": [
            {
                "max_length": tier.max_length,
                "num_start_tokens": tier.num_start_tokens,
                "attention_factor": tier.attention_factor,
                "rescale_factors": list(tier.rescale_factors),
            }
            for tier in config.tiers
        ],
        "provenance": dict(config.provenance),
    }


def from_json(values: Mapping[str, Any], source: str) -> LongRopeConfig:
    """Read the published shape; unknown fields are refused, since they would be ignored.

    Raises:
        FactorFileError: naming the field.
    """
    if values.get("version") is True or values.get("version") != VERSION:
        raise FactorFileError(
            f"{source}: version is {values.get('version')!r}, this tool reads {VERSION}"
        )
    _refuse_unknown(
        values, {*_CONFIG_FIELDS, "format", "version", "tiers", "logit_scaling"}, source
    )
    fields = {name: values[name] for name in _CONFIG_FIELDS if name in values}
    try:
        tiers = _read_tiers(values.get("tiers"), source)
        scaling = _read_scaling(values.get("logit_scaling"), source)
        return LongRopeConfig(tiers=tiers, logit_scaling=scaling, **fields)
    except (ConfigError, ValueError, OverflowError) as error:
        raise FactorFileError(f"{source}: {error}") from error
    except TypeError as error:
        missing = [name for name in _CONFIG_FIELDS[:4] if name not in values]
        detail = f"missing {', '.join(missing)}" if missing else str(error)
        raise FactorFileError(f"{source}: {detail}") from error


def dump_factors(config: LongRopeConfig) -> str:
    """The published shape as text: one line per tier, so that a ladder stays readable."""
    values = to_json(config)
    tiers = ",\n    ".join(json.dumps(tier) for tier in values.pop("tiers"))
    head = json.dumps(values, indent=2)
    return f'{head[:-2]},\n  "tiers": [\n    {tiers}\n  ]\n}}\n'


def _read_tiers(values: Any, source: str) -> tuple[FactorTier, ...]:
    if not isinstance(values, list):
        raise FactorFileError(f"{source}: tiers must be a list, got {type(values).__name__}")
    tiers = []
    for index, value in enumerate(values):
        where = f"{source}: tiers[{index}]"
        if not isinstance(value, dict):
            raise FactorFileError(f"{where}: expected an object, got {type(value).__name__}")
        _refuse_unknown(value, set(_TIER_FIELDS), where)
        factors = value.get("rescale_factors")
        if not isinstance(factors, list):
            raise FactorFileError(f"{where}: rescale_factors must be a list of numbers")
        if "max_length" not in value:
            raise FactorFileError(f"{where}: max_length is missing")
        try:
            tiers.append(FactorTier(**{**value, "rescale_factors": tuple(factors)}))
        except ConfigError as error:
            raise FactorFileError(f"{where}: {error}") from error
    return tuple(tiers)


def _read_scaling(value: Any, source: str) -> LogitScaling | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("type") != "log":
        raise FactorFileError(f"{source}: logit_scaling must be null or an object of type 'log'")
    _refuse_unknown(value, {"type", "base_length", "exempt_layers"}, f"{source}: logit_scaling")
    return LogitScaling(value.get("base_length", 0), tuple(value.get("exempt_layers", ())))


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise FactorFileError(
            f"{where}: unknown field {', '.join(unknown)}: it would be ignored; known are "
            f"{', '.join(sorted(known))}"
        )
