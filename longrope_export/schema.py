"""The JSON schema of a factors file, made from the dataclasses that hold it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from longrope_export.config import FactorTier, LogitScaling, LongRopeConfig
from longrope_export.factor_files import FORMAT, VERSION

_SCALARS: Mapping[Any, dict[str, Any]] = {
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number", "exclusiveMinimum": 0},
    str: {"type": "string"},
}


def factors_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of format "longrope-factors", version 1.

    It states types, required fields and that nothing else may stand there; that tiers rise and
    that lists have rotary_dim / 2 values is checked when a file is read.
    """
    schema = _object(LongRopeConfig)
    constants = {"format": {"const": FORMAT}, "version": {"const": VERSION}}
    schema["properties"] = {**constants, **schema["properties"]}
    schema["required"] = [*constants, *schema["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "LongRoPE factors",
        **schema,
        "$defs": {
            "FactorTier": _object(FactorTier),
            "LogitScaling": _with_type(_object(LogitScaling)),
        },
    }


def _with_type(schema: dict[str, Any]) -> dict[str, Any]:
    schema["properties"] = {"type": {"const": "log"}, **schema["properties"]}
    schema["required"] = ["type", *schema["required"]]
    return schema


def _object(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    no_default = dataclasses.MISSING
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {field.name: _type(hints[field.name]) for field in fields},
        "required": [
            field.name
            for field in fields
            if field.default is no_default and field.default_factory is no_default
        ],
    }


def _type(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return {"type": "array", "items": _type(arguments[0])}
    if origin in (types.UnionType, typing.Union):
        others = [argument for argument in arguments if argument is not type(None)]
        return {"anyOf": [*(_type(other) for other in others), {"type": "null"}]}
    if origin is Mapping:
        return {"type": "object"}
    if dataclasses.is_dataclass(hint):
        return {"$ref": f"#/$defs/{hint.__name__}"}  # type: ignore[union-attr]
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return {"enum": [member.value for member in hint]}
    return dict(_SCALARS[hint])
