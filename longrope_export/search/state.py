"""What a run has computed so far, on disk: the base of resuming.

A search is deterministic but for its evaluations. So every evaluation is logged before it is used,
and a run that goes on starts from the beginning with a log that answers for what was computed
before: it takes the same decisions, the budget included, and reaches the same result.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from longrope_export.errors import ConfigError, OutputError
from longrope_export.run_settings import lock_run, open_settings
from longrope_export.search.jobs import Score

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
        open_settings(folder, {"format": FORMAT, **settings}, resume=resume)
        try:
            self._file = (folder / LOG).open("ab", buffering=0)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}") from error
        try:
            lock_run(self._file, folder)
            self._file.truncate(self._read_log())
        except BaseException:
            self._file.close()
            raise

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
