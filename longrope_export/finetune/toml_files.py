"""Plans and recipes: TOML files, shipped with the package under a name or the user's own by a path."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from longrope_export.errors import ConfigError

SUFFIX = ".toml"


def shipped_names(kind: str) -> list[str]:
    """Names of the shipped files of a kind.

    Args:
        kind: plans or recipes, a folder of this package.
    """
    names = (file.name for file in (resources.files(__package__) / kind).iterdir())
    return sorted(name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))


def read_toml_file(kind: str, name: str, what: str) -> str:
    """The text of a shipped file, or of the file at a path.

    Args:
        kind: as in shipped_names.
        name: of a shipped file, or a path.
        what: says what it is for, as PLAN or --recipe.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    names = shipped_names(kind)
    if name in names:
        file = resources.files(__package__) / kind / f"{name}{SUFFIX}"
        return file.read_text(encoding="utf-8")
    path = Path(name)
    if not path.is_file():
        hint = did_you_mean(name, names)
        raise ConfigError(f"{what} {name}: no such file, and none of {', '.join(names)}{hint}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {name}: cannot be read: {error}") from error


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The values.

    Args:
        where: for the message, as PLAN small.

    Raises:
        ConfigError: not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML: {error}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
