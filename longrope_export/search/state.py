"""What a run has computed so far, on disk: the base of resuming.

A search is deterministic but for its evaluations. So every evaluation is logged before it is used,
and a run that goes on starts from the beginning with a log that answers for what was computed
before: it takes the same decisions, the budget included, and reaches the same result.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from longrope_export.errors import ConfigError, OutputError
from longrope_export.outputs import write_text
from longrope_export.search.jobs import Score

SETTINGS = "settings.json"
LOG = "log.jsonl"
FORMAT = "longrope-search"


class RunFolder:
    """RUN/: settings.json and log.jsonl, later factors.json, result.json and plots.

    Args:
        folder: made if needed.
        settings: everything that the result depends on, JSON values.
        resume: go on with a run that is there.

    Attributes:
        scores: key of a job -> its score, for all that was logged.

    Raises:
        OutputError: a run is there and resume is not set, or there is none to resume; the folder
            cannot be written.
        ConfigError: the run that is there was made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.scores: dict[str, Score] = {}
        self._settings = json.loads(json.dumps({"format": FORMAT, **settings}))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open(resume)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}") from error

    def add(self, key: str, score: Score) -> None:
        """Log a result; it is on disk when this returns.

        Raises:
            OutputError: the disk is full; the run can be resumed when there is space again.
        """
        line = json.dumps({"key": key, **score.to_json()}) + "\n"
        try:
            written = self._file.write(line.encode())
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.folder / LOG}: {error.strerror}. All results before this one "
                f"are kept: free some space and go on with --resume"
            ) from error
        self.scores[key] = score

    def close(self) -> None:
        """Close the log."""
        self._file.close()

    def _open(self, resume: bool) -> None:
        settings = self.folder / SETTINGS
        if settings.is_file():
            if not resume:
                raise OutputError(
                    f"{self.folder} holds a search already: --resume goes on with it, or choose "
                    f"another folder with -o"
                )
            self._check_settings(json.loads(settings.read_text(encoding="utf-8")))
        elif resume:
            raise OutputError(f"{self.folder}: no {SETTINGS} in it, so there is no run to resume")
        elif any(self.folder.iterdir()):
            raise OutputError(f"{self.folder} is not empty: choose a new folder with -o")
        else:
            write_text(settings, json.dumps(self._settings, indent=2) + "\n")
        self._file = (self.folder / LOG).open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise OutputError(f"{self.folder}: another search is at work in it") from error
        good = self._read_log()
        self._file.truncate(good)

    def _check_settings(self, there: dict[str, Any]) -> None:
        before, now = _flat(there), _flat(self._settings)
        for name in now | before:
            old, new = before.get(name), now.get(name)
            if old != new:
                raise ConfigError(
                    f"{self.folder}: the run was begun with {name} = {json.dumps(old):.100}, "
                    f"now it is {json.dumps(new):.100}: give what it was, or start a new run"
                )

    def _read_log(self) -> int:
        """Take over every whole line; returns their bytes, behind which a kill has torn one."""
        log, good = self.folder / LOG, 0
        lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
        for line in lines:
            if not line.endswith(b"\n"):
                break
            try:
                values = json.loads(line)
                self.scores[values.pop("key")] = Score.from_json(values)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{log}, byte {good}: not a line of a search log: {error!r}"
                ) from error
            good += len(line)
        return good


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Options beside the other settings, so that an error can name one of them."""
    options = settings.get("options", {})
    return {**options, **{name: value for name, value in settings.items() if name != "options"}}
