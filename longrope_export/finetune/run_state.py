"""What a run of a plan has done so far: RUN/state.json, and the lock that one run holds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope_export.errors import ConfigError, OutputError
from longrope_export.finetune.stages import Step
from longrope_export.outputs import write_text
from longrope_export.run_settings import lock_run
from longrope_export.verify.certificate import content_hash

FORMAT = "longrope-extend"
STATE, PLAN, LOCK = "state.json", "plan.toml", "lock"
BEGUN, DONE, FAILED = "begun", "done", "failed"
_KEYS = ("name", "run", "argv", "inputs", "hash", "status", "seconds", "exit_code")  # of a stage
_LOCK_SECONDS = 3.0  # a stage whose runner was killed takes a moment to end
WHO = "another extend, or a stage that one left behind,"

Inputs = Mapping[str, str]


class RunState:
    """Made by `open`.

    Attributes:
        folder: RUN/.
        lock: descriptor of the locked file; whoever inherits it holds the lock.
    """

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self.lock = folder, lock
        self._entries = self._read()

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[RunState]:
        """Lock the folder and read what it says.

        Raises:
            OutputError: it holds other things, another run is at work in it, it cannot be written.
            ConfigError: its state cannot be read.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            others = [
                path
                for path in folder.iterdir()
                if path.name != LOCK and not path.name.endswith(".partial")
            ]
            if others and not (folder / STATE).is_file():
                raise OutputError(
                    f"{folder} holds other things ({others[0].name}) and no {STATE}: choose a new "
                    f"folder with -o"
                )
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}") from error
        try:
            lock_run(descriptor, folder, WHO, _LOCK_SECONDS)
            yield cls(folder, descriptor)
        finally:
            os.close(descriptor)

    def status(self, step: Step) -> str | None:
        """BEGUN, DONE or FAILED; None before the first try."""
        entry = self._entries.get(step.folder.name)
        return None if entry is None else str(entry["status"])

    def check(self, steps: Sequence[Step], inputs: Mapping[str, Inputs], count: int | None) -> None:
        """Compare what was run with the plan; of the first `count` stages, or of all.

        Raises:
            ConfigError: naming the first stage that was run otherwise, and what has changed.
        """
        for index, (folder, entry) in enumerate([*self._entries.items()][:count]):
            advice = (
                f"give what it was, choose another folder with -o, or do it and all behind it again "
                f"with --from {steps[min(index, len(steps) - 1)].stage.name}"
            )
            if index >= len(steps) or steps[index].folder.name != folder:
                raise ConfigError(
                    f"{self.folder}: stage {index + 1} was {entry['name']}, which the plan does not "
                    f"have there now: {advice}"
                )
            before, now = entry["inputs"], inputs[steps[index].stage.name]
            for key in {**now, **before}:
                if before.get(key) != now.get(key):
                    raise ConfigError(
                        f"{self.folder}: {steps[index].stage.title}, is {entry['status']} already, and "
                        f"{key} has changed: it was {_shown(before, key)}, now it is "
                        f"{_shown(now, key)}; {advice}"
                    )

    def set_aside(self, index: int) -> None:
        """Forget the stages from `index` on (from 0); their folders are renamed."""
        for name in list(self._entries)[index:]:
            old = self.folder / name
            del self._entries[name]
            self._write()  # a folder without an entry is moved by begin(), if this one is killed
            _move_away(old)

    def begin(self, step: Step, inputs: Inputs, argv: Sequence[str], shown: str) -> None:
        """Note a stage as begun, and its command."""
        entry = self._entries.get(step.folder.name)
        if entry is None:
            _move_away(step.folder)
        seconds = 0.0 if entry is None else float(entry["seconds"])
        try:
            step.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {step.folder}: {error.strerror}") from error
        write_text(step.folder / "command.txt", shown + "\n")
        self._entries[step.folder.name] = {
            "name": step.stage.name,
            "run": step.stage.kind,
            "argv": list(argv),
            "inputs": dict(inputs),
            "hash": hash_of(inputs),
            "status": BEGUN,
            "seconds": seconds,
            "exit_code": None,
        }
        self._write()

    def end(self, step: Step, code: int | None, seconds: float, *, done: bool = False) -> None:
        """Note how a stage has ended; code None for one that was interrupted."""
        entry = self._entries[step.folder.name]
        status = BEGUN if code is None else DONE if done else FAILED
        entry |= {"status": status, "exit_code": code}
        entry["seconds"] = round(entry["seconds"] + seconds, 3)
        self._write()

    def keep_plan(self, text: str) -> None:
        """Copy the plan into the folder, where state.json makes it a run's."""
        self._write()
        write_text(self.folder / PLAN, text)

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.folder / STATE
        if not path.is_file():
            return {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']!r}")
            return {
                name: {key: entry[key] for key in _KEYS} for name, entry in values["stages"].items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: not the state of a run: {error!r}") from error

    def _write(self) -> None:
        values = {"format": FORMAT, "stages": self._entries}
        write_text(self.folder / STATE, json.dumps(values, indent=1) + "\n")


def inputs_of(steps: Sequence[Step], model: str) -> dict[str, dict[str, str]]:
    """What each stage's result depends on, by its name: settings, hashes of files, of stages before.

    Args:
        model: fingerprint of the source.
    """
    found: dict[str, dict[str, str]] = {}
    for step in steps:
        inputs = dict(step.settings)
        inputs |= {name: str(content_hash(path)) for name, path in step.files.items()}
        inputs |= {f"stage {name}": hash_of(found[name]) for name in step.after}
        found[step.stage.name] = inputs
    return found


def hash_of(inputs: Inputs) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(json.dumps(dict(inputs), sort_keys=True).encode()).hexdigest()


def _shown(inputs: Inputs, key: str) -> str:
    value = inputs.get(key)
    return "not there" if value is None else value[:100] or "there"


def _move_away(folder: Path) -> None:
    """<name> -> <name>.old-<k>, the first k from 1 that is free."""
    if not folder.exists():
        return
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    try:
        folder.rename(old)
    except OSError as error:
        raise OutputError(f"cannot rename {folder} to {old}: {error.strerror}") from error
