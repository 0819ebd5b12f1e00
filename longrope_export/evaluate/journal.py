"""Finished cells, a line of JSON each, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from longrope_export.errors import OutputError
from longrope_export.evaluate.settings import Cell

FORMAT = "longrope-evaluation-cells"
VERSION = 3


def journal_path(output: Path) -> Path:
    """Where the cells of results.json stand: results.cells.jsonl beside it."""
    return output.with_name(f"{output.stem}.cells.jsonl")


class Journal:
    """The file, open for one writer.

    Args:
        path: made if it is not there.
        settings: that all its cells were measured with, JSON values; see Settings.fixed.
        texts: name -> SHA-256 of every document.
        fresh: forget what is there, as soon as the first cell is finished.

    Raises:
        OutputError: it was begun with other settings or texts, is no such file, cannot be
            written, or another process writes it.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        texts: dict[str, str],
        *,
        fresh: bool = False,
    ) -> None:
        self.path = path
        self._done: dict[Cell, tuple[str, dict[str, Any]]] = {}
        self._texts: dict[str, str] = {}
        self._new_head: dict[str, Any] | None = None  # of what is yet to be begun anew
        try:
            self._file: IO[bytes] = path.open("ab+")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{path}: another evaluation is writing it") from error
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        try:
            self._read(settings, texts, fresh)
        except BaseException:
            self.close()
            raise

    def _read(self, settings: dict[str, Any], texts: dict[str, str], fresh: bool) -> None:
        if fresh:
            self._new_head = {**_known(settings), "texts": texts}
            return
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # what a killed run was writing
        head, *cells = map(self._parse, lines) if lines else ({},)
        known = _known(settings)
        if lines:
            self._check_head(head, known)
            self._texts = dict(head.get("texts", {}))
        for record in cells:
            if "texts" in record:
                self._texts.update(record["texts"])
            else:
                try:
                    cell = Cell(**record["cell"])
                    self._done[cell] = (record["identity"], record["result"])
                except (KeyError, TypeError) as error:
                    raise self._strange() from error
        changed = [name for name, sha in texts.items() if self._texts.get(name, sha) != sha]
        if changed:
            raise OutputError(
                f"{self.path}: text {changed[0]} is not what it was there: give another -o, or "
                "--force to begin anew"
            )
        self._file.truncate(sum(map(len, lines)))
        if not lines:
            self._write({**known, "texts": texts})
        elif new := {name: sha for name, sha in texts.items() if name not in self._texts}:
            self._write({"texts": new})
        self._texts.update(texts)

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except ValueError as error:
            raise self._strange() from error
        if not isinstance(values, dict):
            raise self._strange()
        return values

    def _strange(self) -> OutputError:
        return OutputError(
            f"{self.path} is not the journal of an evaluation, or damaged: give another -o, or "
            "--force to begin anew"
        )

    def _check_head(self, head: dict[str, Any], known: dict[str, Any]) -> None:
        if head.get("format") != FORMAT or not isinstance(head.get("settings"), dict):
            raise self._strange()
        if head.get("version") != VERSION:
            raise OutputError(
                f"{self.path}: version is {head.get('version')}, expected {VERSION}: give another -o, or "
                "--force to begin anew"
            )
        for name, value in known["settings"].items():
            if head["settings"].get(name) != value:
                raise OutputError(
                    f"{self.path} was begun with {name} = {head['settings'].get(name)}, now it is "
                    f"{value}: give the same, another -o, or --force to begin anew"
                )

    def cells(self) -> list[Cell]:
        """Every finished cell, in the order in which they were finished."""
        return list(self._done)

    def find(self, cell: Cell, identity: str) -> dict[str, Any] | None:
        """The result of a finished cell; None if it is not finished.

        Args:
            identity: of the model, see Subject.

        Raises:
            OutputError: it was measured on a model of that name that was another.
        """
        if cell not in self._done:
            return None
        measured, result = self._done[cell]
        if measured != identity:
            raise OutputError(
                f"{self.path}: {cell.model} is not what was measured there (its files, its factors, "
                "its runtime or what the server serves have changed, or for --tasks the files in "
                "--include-path or --limit): give another -o, or --force to begin anew"
            )
        return result

    def add(self, cell: Cell, identity: str, result: dict[str, Any]) -> None:
        """Write a finished cell down; it is on the disk afterwards.

        Raises:
            OutputError: the disk is full.
        """
        if self._new_head is not None:
            self._file.truncate(0)
            self._write(self._new_head)
            self._new_head = None
        self._write({"cell": asdict(cell), "identity": identity, "result": result})
        self._done[cell] = (identity, result)

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}: free some space and give the same command "
                "again, which goes on behind the last cell that is there"
            ) from error

    def close(self) -> None:
        """Let others write."""
        with contextlib.suppress(OSError):  # tries again what a full disk has refused
            self._file.close()


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "settings": settings}
