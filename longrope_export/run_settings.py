"""settings.json of a run's folder: what the run depends on, checked when it goes on."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import IO, Any

from longrope_export.errors import ConfigError, OutputError
from longrope_export.outputs import write_text

SETTINGS = "settings.json"


def open_settings(folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Write the settings of a new run, or compare them with those of the run that goes on.

    Args:
        folder: made if needed.
        settings: everything that the result depends on, JSON values; "format" names the kind of
            run, and values below "options" are named without that word.

    Raises:
        OutputError: a run is there and resume is not set, or there is none to resume; the folder
            cannot be written.
        ConfigError: the run that is there was begun with other settings, or its file is damaged.
    """
    settings = json.loads(json.dumps(settings))
    path = folder / SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            if not resume:
                raise OutputError(
                    f"{folder} holds a run already: --resume goes on with it, or choose another "
                    f"folder with -o"
                )
            _check(folder, _read(path), settings)
        elif resume:
            raise OutputError(f"{folder}: no {SETTINGS} in it, so there is no run to resume")
        elif any(not path.name.endswith(".partial") for path in folder.iterdir()):
            raise OutputError(f"{folder} is not empty: choose a new folder with -o")
        else:
            write_text(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error


def lock_run(
    file: IO[Any] | int, folder: Path, who: str = "another process", seconds: float = 0.0
) -> None:
    """Hold a file of a run until it is closed, or this process and whoever inherits it ends.

    Args:
        file: open, or its descriptor; it stays open.
        who: holds it, for the message.
        seconds: to wait for it.

    Raises:
        OutputError: another process holds it.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise OutputError(f"{folder}: {who} is at work in it") from error
            time.sleep(0.1)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged: {error}; start a new run in another folder") from error
    if not isinstance(values, dict) or not isinstance(values.get("options", {}), dict):
        raise ConfigError(
            f"{path}: damaged: expected the settings of a run; start a new run in another folder"
        )
    return values


def _check(folder: Path, there: dict[str, Any], settings: dict[str, Any]) -> None:
    before, now = _flat(there), _flat(settings)
    for name in now | before:
        old, new = before.get(name), now.get(name)
        if old != new:
            raise ConfigError(
                f"{folder}: the run was begun with {name} = {json.dumps(old):.100}, now it is "
                f"{json.dumps(new):.100}: give what it was, or start a new run"
            )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Options beside the other settings, so that an error can name one of them."""
    options = settings.get("options", {})
    return {**options, **{name: value for name, value in settings.items() if name != "options"}}
